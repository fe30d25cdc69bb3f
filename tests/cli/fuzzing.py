"""Random command lines, runs and checkpoints: what they are made of, and what must hold of every command.

A command ends with exit code 0, 1 or 2, never with a traceback. It changes no file that it did not write, writes
nothing when it is refused, and leaves no file that is half written.
"""

import contextlib
import copy
import io
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.cli.running import Result, run_command, snapshot
from workbench.errors import JobError
from workbench.registry import Experiment, records
from workbench.research.recipe import Recipe

LIMIT_S = 300.0  # a command that takes so long waits for something that never comes
_MEMORY_BYTES = 6 * 2**30  # that a command may add to the address space of the tests
_HALF_WRITTEN = re.compile(r"\.(staging|part|lock|creating|partial|old)(/|$)")


class TimeIsUpError(KeyboardInterrupt):
    """A long test has had its time; hypothesis lets this error through, as it tries again after others."""


def cases(n: int, *, long: bool, times: int = 30) -> Callable[[Any], Any]:
    """Return a decorator for a test of hypothesis: `n` cases, or a multiple of them; the same ones every time.

    FUZZ_MINUTES in the environment ends a long test after that time; how many cases there were is printed.
    """
    given_cases = n * (times if long else 1)
    configured = settings(
        max_examples=given_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # a smaller failing case takes longer to find than to read
        suppress_health_check=list(HealthCheck),
    )
    minutes = float(os.environ.get("FUZZ_MINUTES", "inf")) if long else float("inf")

    def decorate(test: Any) -> Callable[[], None]:
        check, begun, done = test.hypothesis.inner_test, time.monotonic(), 0

        def counted(*arguments: Any, **options: Any) -> None:
            nonlocal done
            if time.monotonic() - begun > 60 * minutes:
                raise TimeIsUpError
            check(*arguments, **options)
            done += 1

        test.hypothesis.inner_test = counted
        run = configured(test)

        def every() -> None:
            try:
                with contextlib.suppress(TimeIsUpError):
                    run()
            finally:
                print(f"{done:,} of {given_cases:,} cases in {time.monotonic() - begun:.0f} s")

        return every

    return decorate


HOSTILE_TEXT = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "-",
            "--",
            "0",
            "-1",
            "1",
            "2",
            "7",
            "0.5",
            "-0.0",
            "1e400",
            "nan",
            "inf",
            "-inf",
            "9" * 400,
            "0x10",
            "2147483647",
            "2147483648",
            "18446744073709551616",
            "1_0",
            "١٢",
            "é",
            "∞",
            "\udcff",
            "\x1b[2J",
            "a\nb",
            "a\tb",
            "%s%n",
            "{effort}",
            "{",
            "[",
            "[1, 2]",
            "{}",
            "null",
            "true",
            "x=y",
            "x=",
            "=",
            "cpu",
            "nano",
            "<script>",
            "run.zarr",
            "run.zarr/",
            "run.zarr/zarr.json",
            "transcripts.jsonl",
            "prompts.jsonl",
            "pipe",
            "link",
            "loop",
            "folder",
            "empty",
            "binary",
            "missing/deeper",
            "folder/new",
            ".",
            "..",
            "../work",
            "/dev/full",
            "/dev/null/x",
            "s3://",
            "memory://x",
            "file://run.zarr",
            "http://127.0.0.1:9/x",
            "nosuch://x",
            "://",
            "ollama:x",
            "a" * 300,
            "irregular",
            "truncated,",
            "sinks layers=9",
            "resid_post:99",
            "resid_post:-1",
            "routing",
            "logprobs",
            "html",
            "parquet",
            "safetensors",
            "datasets",
            "activations/hook_resid_post",
            "tokens",
            "low",
            "analysis",
            "user",
        ]
    ),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
    st.integers(-(2**70), 2**70).filter(lambda n: abs(n) < 64 or abs(n) > 2**31).map(str),
)

# every command as it succeeds; numbers keep it short. A benchmark measures nothing, see `without_long_work`
BASES: dict[str, str] = {
    "info": "nano",
    "convert-weights": "nano out.gguf",
    "random": "out --layers 1 --vocab 100",
    "generate": "nano prompts.jsonl out.jsonl --max-new-tokens 1 --effort low",
    "transcripts": "http://127.0.0.1:9/v1 prompts.jsonl out.jsonl --model m --retries 0 --timeout 2",
    "convert": "transcripts.jsonl out.jsonl",
    "capture": "nano transcripts.jsonl out.zarr --unit-tokens 1024",
    "verify": "run.zarr",
    "export": "run.zarr out --format parquet",
    "study": "effort run.zarr",
    "summary": "run.zarr",
    "report": "run.zarr --out out.html",
    "figures": "run.zarr --format html --out out",
    "dashboard": "run.zarr --port 45006",
    "finetune": "nano transcripts.jsonl --out out --steps 1 --batch 1 --rank 1",
    "graph": "nano --prompt 2+2= --out out.json --max-new-tokens 2 --at 0",
    "attention": "run.zarr 0 --model nano --out out.npz",
    "conversation": "run.zarr 0 --out out.html",
    "publish": "run.zarr --out out --conversations 0",
    "live": "nano --port 45007",
    "apply": "recipe.json --python",
    "label": "run.zarr",
    "bench cpu": "--json out.json",
    "bench full": "--json out.json",
    "bench capture": "--json out.json",
    "bench store": "--json out.json",
    "bench reading": "run.zarr --json out.json",
    "bench studies": "run.zarr --json out.json",
    "bench dashboard": "run.zarr --json out.json",
    "bench kernels": "--json out.json",
    "bench gpu": "--json out.json",
    "bench graph": "nano --json out.json",
}
SLOW = {"report", "figures", "finetune", "graph", "study", "publish", "label"}


NUMBERS = st.sampled_from(["0", "1", "2", "3", "-1", "0.5", "1e-9", "1e308", "inf", "nan", "2147483648", "9" * 30])


# of what a command repeats: a large number that it accepts keeps it busy for days, as it should
REPEATS = st.sampled_from(["0", "1", "2", "-1", "0.5", "inf", "nan", "2147483648", "9" * 30])


@st.composite
def command_lines(draw: st.DrawFn, options: dict[str, dict[str, Any]], commands: list[str]) -> list[str]:
    """Return a command with one to three of its words missing, changed or added; options: command → name → type."""
    command = draw(st.sampled_from(commands))
    words = BASES[command].split()
    if command == "study":
        record = draw(st.sampled_from(records()))
        words = [record.name, "run.zarr", *(["--model", "nano"] if isinstance(record, Experiment) else [])]
        if record.options and draw(st.booleans()):
            words += ["--option", f"{draw(st.sampled_from(sorted(record.options)))}={draw(HOSTILE_TEXT)}"]
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(["option", "option", "replace", "replace", "drop", "add", "flag"]))
        if change == "option":
            name = draw(st.sampled_from(sorted(options[command])))
            kind = options[command][name]
            words.append(name)
            if kind is not bool:
                numbers = REPEATS if name in ("--samples", "--retries") else NUMBERS
                words.append(draw(numbers if kind in (int, float) else HOSTILE_TEXT))
        elif change == "flag":
            words.append(draw(st.sampled_from(sorted(options[command]))))
        elif change == "add":
            words.append(draw(HOSTILE_TEXT))
        elif words:
            place = draw(st.integers(0, len(words) - 1))
            words[place : place + 1] = [draw(HOSTILE_TEXT)] if change == "replace" else []
    return [*command.split(), *words]


def add_traps(folder: Path) -> None:
    """Put what is no input and no output of a command beside its inputs."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "transcripts.jsonl")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "recipe.json").write_text(Recipe(user="2+2=", max_new_tokens=2).to_json())
    (folder / "folder").mkdir()
    (folder / "folder" / "mine").write_text("precious")
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)


def without_long_work(patch: pytest.MonkeyPatch) -> None:
    """Replace what serves, measures, or starts processes: a command gets as far as that, and ends."""

    def ends(*_: object, **__: object) -> Any:
        raise JobError("the test ends here")

    def random_weights(path: Path, *_: object, **__: object) -> None:
        path.mkdir()
        (path / "config.json").write_text("{}")

    from workbench.bench import capture, cpu, dashboard, first, full, gpu, graph, kernels, reading, store, studies
    from workbench.capture import cluster
    from workbench.dashboards import app
    from workbench.model import export

    patch.setattr(app.pn, "serve", ends)
    patch.setattr(app, "_warm", lambda registry: None)
    patch.setattr(cluster, "run", ends)
    patch.setattr(export, "save_random", random_weights)
    for module in (capture, cpu, full, graph, store):
        patch.setattr(module, "run", lambda *_, **__: {})
    patch.setattr(gpu, "run", lambda **_: {"tiles": {}})
    patch.setattr(kernels, "run", lambda *_, **__: ([], []))
    patch.setattr(dashboard, "run", lambda *_: {})
    patch.setattr(studies, "measure", lambda *_: {})
    patch.setattr(reading, "ask", lambda *_: {})
    patch.setattr(reading, "make", lambda *_: None)
    patch.setattr(first, "start", lambda *_, **__: 0)
    patch.setattr("workbench.inputs.WRITER_TIMEOUT_S", 0.05)
    patch.setattr("workbench.harmony.hosts.client._LONGEST_WAIT_S", 0.01)  # between retries


class TooLongError(BaseException):
    """The command waits; no command may catch this, as some catch every `Exception` of a damaged file."""


class Checked:
    """Runs commands in a folder and checks the files that each leaves; the folder is then restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = snapshot(folder)

    def run(
        self,
        *arguments: str,
        may_change: str = "",
        within: contextlib.AbstractContextManager[object] | None = None,
        codes: tuple[int, ...] = (0, 1, 2),
        out: io.TextIOBase | None = None,
    ) -> Result:
        """Return how a command ended. may_change: an output that exists, which it may complete.

        within: a context in which the command runs. codes: those that it may end with. out: its standard output.
        """
        with limits(), within or contextlib.nullcontext():
            done = run_command(*arguments, out=out)
        after = snapshot(self.folder)
        owned = {name for name in self._before if may_change and name.split("/")[0] == may_change}
        changed = [n for n, what in self._before.items() if after.get(n) != what and (done.code == 2 or n not in owned)]
        new = sorted(after.keys() - self._before.keys())
        for name in new:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        assert not done.problem(codes=codes), (arguments, done.problem(codes=codes))
        assert not changed, (arguments, changed)
        assert not new or done.code != 2, (arguments, done.err, new)
        assert not [name for name in new if _HALF_WRITTEN.search(name)], (arguments, new)
        return done


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let a command that waits for ever, or asks for absurd memory, fail here and not the machine."""

    def stop(*_: object) -> None:
        raise TooLongError(f"the command did not end within {LIMIT_S:.0f} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HOSTILE_VALUE = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            7,
            2**31,
            2**40,
            2**63,
            10**30,
            0.5,
            -0.0,
            1e308,
            float("inf"),
            float("nan"),
            "",
            " ",
            "x",
            "../x",
            "/etc/passwd",
            "\x1b[2J<script>",
            "\ud800",
            "a" * 5000,
            [],
            [0],
            [[]],
            {},
            {"x": 1},
            [2**62, 2**62],
            "string",
            "float64",
            "bfloat16",
            "|O",
            "complete",
            "writing",
        ]
    ),
    st.text(max_size=5),
    st.integers(),
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Return a function that changes one value, key or entry of a JSON value, deep inside."""
    steps = draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=7))
    kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat"]))
    value = draw(HOSTILE_VALUE)

    def change(content: Any) -> Any:
        content = copy.deepcopy(content)
        at, parent, key = content, None, None
        for step in steps:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            parent, key = at, keys[step % len(keys)]
            at = at[key]
        if parent is None:
            return value
        if kind == "delete":
            del parent[key]
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(at))
        else:
            parent[key] = value
        return content

    return change


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(path.parent):
        end.bind(path.name)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": make_pipe,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "folder": lambda path: path.mkdir(),
    "absurd size": make_sparse,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"\xff\x00{" * 50),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "missing": lambda path: None,
}


@contextlib.contextmanager
def replaced(path: Path, kind: str) -> Iterator[None]:
    """Replace a file by something else while the block runs; readers that wait for a pipe are released."""
    content = path.read_bytes()
    path.unlink()
    SPECIAL[kind](path)
    try:
        yield
    finally:
        if kind == "pipe":
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)
