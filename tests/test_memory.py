"""A lack of memory is stated in one line, whatever a library makes of it, and never taken for damage of a run."""

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import InputError, JobError
from workbench.memory import lack_of_memory, raise_if_limited, refuse_small_limit
from workbench.runs.manifest import reading
from workbench.runs.verify import verify


class PanicException(BaseException):
    """What libraries in Rust raise."""


LACKS = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    SystemError("<built-in function f> returned NULL without setting an exception"),
    PanicException('error: "Allocation error : not enough memory"'),
]
OTHERS = [
    OSError(errno.ENOENT, "No such file or directory"),
    RuntimeError("shapes do not agree"),
    SystemError("bad argument"),
    JobError("the estimate is 3 GB: not enough memory"),
]


@pytest.mark.parametrize("lack", LACKS, ids=lambda error: type(error).__name__)
def test_every_form_is_recognized_also_as_the_cause_of_another_error(lack: BaseException) -> None:
    assert lack_of_memory(lack) is lack
    damage = InputError("run.zarr is damaged")
    damage.__cause__ = lack
    assert lack_of_memory(damage) is lack


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    """Negative controls."""
    assert lack_of_memory(error) is None


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    value = [900_000 * 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (value[0], resource.RLIM_INFINITY))
    return value


def test_a_limit_without_room_for_the_libraries_is_refused(limit: list[int]) -> None:
    refuse_small_limit()
    with pytest.raises(InputError, match=r"limited to 878 MiB \(ulimit -v\).* at least 2,048 MiB"):
        refuse_small_limit(2**31)
    limit[0] = resource.RLIM_INFINITY
    refuse_small_limit(2**31)


def test_a_lack_of_memory_is_no_damage_of_a_run(
    limit: list[int], demo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("workbench.runs.verify._CheckedRun", fails)
    with pytest.raises(MemoryError, match="can't start new thread"):
        verify(demo_run)
    with pytest.raises(MemoryError), reading("run.zarr", "a total"):
        fails()
    limit[0] = resource.RLIM_INFINITY  # negative controls: then it is what damaged metadata ask for
    raise_if_limited(MemoryError())
    assert "can't start new thread" in verify(demo_run)[0].what


@pytest.mark.parametrize("ends", [True, False])
def test_a_process_does_not_wait_for_a_thread_without_end(ends: bool) -> None:
    """The negative control waits, and is killed."""
    code = "import threading, workbench.memory as m; " + ("m.end_within(1); " if ends else "")
    code += "threading.Thread(target=threading.Event().wait).start(); print(flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert process.wait(600 if ends else 3) == -signal.SIGALRM
    except subprocess.TimeoutExpired:
        assert not ends
    finally:
        process.kill()
        process.communicate()
