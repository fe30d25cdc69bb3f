"""Every registered command at every kind of trouble: it ends with one line and the right exit code.

The commands are those that typer has registered, so one that is added later is tested too: without a line in `BASES`
that states how it succeeds, `test_every_command_is_tested` fails. `--long` runs every command to its end, not some.
"""

import contextlib
import inspect
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.cli.checks import Checked
from tests.cli.random_commands import BASES, SLOW, add_traps, without_long_work
from tests.cli.running import Result
from tests.cli.test_fuzz_commands import option_names
from tests.cli.test_outputs import OUTPUTS
from workbench import cli
from workbench.errors import InputError
from workbench.registry import Experiment, Record, records

COMMANDS = list(BASES)
OPTIONS = option_names()
OUTPUT_OPTIONS = {f"--{name}" for _, name in OUTPUTS} | {"--json"}
QUICK = [command for command in COMMANDS if command not in SLOW]
# inputs that the commands are given, and what is put in their place
INPUTS = ("prompts.jsonl", "transcripts.jsonl", "run.zarr", "recipe.json", "graph.json")
WRONG = ("missing", "folder", "empty", "binary", "pipe", "loop", "/dev/zero")
# `verify` lists what is wrong on standard output and ends with 1
REPORTS = {"verify"}
# options of inputs that a command does not read beside those of its line in `BASES`
UNREAD = {("apply", "--prompts"), ("apply", "--adapter"), ("convert", "--requests")}
FOLDERS = {("live", "--recipes")}  # options for which any folder is right
STAND_IN = "workbench: the test ends here"  # of a server, see `without_long_work`


@pytest.fixture(scope="module")
def checked(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checked]:
    """Runs commands in one folder for all tests, as it checks that each command leaves the folder as it was."""
    folder = tmp_path_factory.mktemp("every") / "work"
    shutil.copytree(inputs, folder)
    add_traps(folder)
    with pytest.MonkeyPatch.context() as patch:
        without_long_work(patch)
        patch.chdir(folder)
        yield Checked(folder)


@pytest.fixture
def damaged(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of inputs that a test may damage."""
    without_long_work(monkeypatch)
    return workplace


_took: dict[str, float] = {}


def undisturbed_s(checked: Checked, command: str) -> float:
    """Run a command to its end, in a locale without most characters; return its processor time, in seconds."""
    if command not in _took:
        begun = time.process_time()
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        ends(checked.run(*words(command), out=stream), words(command), 0, 1)
        _took[command] = time.process_time() - begun
    return _took[command]


def words(command: str) -> list[str]:
    return [*command.split(), *BASES[command].split()]


def commands(long: bool) -> list[str]:
    """Those that are run to their end: all, or some that are quick."""
    return COMMANDS if long else QUICK[::3]


def ends(done: Result, arguments: list[str], *codes: int) -> None:
    lines = [line for line in done.err.splitlines() if line.startswith("workbench: ")]
    code = 0 if lines == [STAND_IN] else done.code
    assert code in codes, (arguments, done.code, done.err[-500:])
    reports = arguments[0] in REPORTS and code == 1
    assert len(lines) == (done.code != 0 and not reports), (arguments, done.err[-500:])
    assert "Traceback" not in done.err, (arguments, done.err[-500:])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_that_is_something_else(checked: Checked, command: str) -> None:
    """Each input is missing, a folder, empty, no text, a pipe that nobody writes to, a link to itself, or a device."""
    right = words(command)
    if command.startswith("bench"):  # replaced: see `without_long_work`
        return
    for place in (i for i, word in enumerate(right) if word in INPUTS):
        for wrong in WRONG:
            arguments = [*right[:place], wrong, *right[place + 1 :]]
            ends(checked.run(*arguments), arguments, *((1, 2) if command in REPORTS else (2,)))
    paths = [name for name, kind in OPTIONS[command].items() if kind is Path and name not in OUTPUT_OPTIONS]
    for option in (name for name in paths if (command, name) not in UNREAD):
        for wrong in (text for text in WRONG if text != "folder" or (command, option) not in FOLDERS):
            arguments = [*right, option, wrong]
            ends(checked.run(*arguments), arguments, 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_with_a_wrong_value(checked: Checked, command: str) -> None:
    for option, kind in OPTIONS[command].items():
        if kind in (int, float):
            arguments = [*words(command), option, "x"]
            ends(checked.run(*arguments), arguments, 2)
    for arguments in ([*words(command), "--nosuch"], [*words(command), "one", "too", "many"]):
        if command != "study" or arguments[-1] == "--nosuch":  # any number of runs
            ends(checked.run(*arguments), arguments, 2)


def damage_root(run: Path) -> None:
    (run / "zarr.json").write_text("{")


def damage_chunk(run: Path) -> None:
    for path in (run / "routing" / "gates" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])


def remove_table(run: Path) -> None:
    shutil.rmtree(run / "sequences")


@pytest.mark.parametrize("damage", [damage_root, damage_chunk, remove_table])
@pytest.mark.parametrize("command", [command for command in COMMANDS if "run.zarr" in BASES[command]])
def test_a_damaged_run(damaged: Path, command: str, damage: Callable[[Path], None], long: bool) -> None:
    if command in SLOW and damage is damage_chunk and not long:
        pytest.skip("takes long: with --long")
    damage(damaged / "run.zarr")
    # what reads no damaged file may succeed
    unread = damage is damage_chunk or command.startswith(("bench", "dashboard"))
    codes = (1,) if command in REPORTS else (0, 2) if unread else (2,)
    ends(Checked(damaged).run(*words(command)), words(command), *codes)


@pytest.mark.parametrize("record", records(), ids=lambda record: record.name)
def test_every_study_and_experiment(checked: Checked, record: Record) -> None:
    """A run that is something else, a value of a wrong type, and an option that it does not have."""
    model = ["--model", "nano"] if isinstance(record, Experiment) else []
    runs = ["run.zarr"] * getattr(record, "runs", 1)
    for wrong in ("missing", "transcripts.jsonl", "pipe", "folder"):
        arguments = ["study", record.name, wrong, *runs[1:], *model]
        ends(checked.run(*arguments), arguments, 2)
    wrong_options = ["nosuch=1", "seed=1", "x", *(f"{name}=[[1]]" for name in list(record.options)[:1])]
    for option in wrong_options:
        arguments = ["study", record.name, *runs, *model, "--option", option]
        ends(checked.run(*arguments), arguments, 2)
    function = getattr(record.load(), "experiment" if isinstance(record, Experiment) else "study")
    defaults = {name: inspect.signature(function).parameters[name].default for name in record.options}
    for name in (name for name, default in defaults.items() if default is not None):
        with pytest.raises(InputError, match=rf"option {name}="):
            record.checked_options(function, {name: {"x": 1}})


@contextlib.contextmanager
def interrupted(after_s: float) -> Iterator[None]:
    """SIGINT as Ctrl-C sends it, after so much processor time, if the command still runs then: not to pytest."""

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not cli._run.__code__:
            frame = frame.f_back
        if frame is not None:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGPROF, interrupt), signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_PROF, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_an_interruption_and_a_locale_without_the_characters(checked: Checked, long: bool) -> None:
    """Everything is printed in ASCII, what has no character there as its escape."""
    for command in commands(long):
        arguments, took = words(command), undisturbed_s(checked, command)
        for part in (0.2, 0.5, 0.8) if long else (0.5,):
            done = checked.run(*arguments, within=interrupted(max(0.001, part * took)), codes=(0, 1, 130))
            ends(done, arguments, 0, 1, 130)


def test_an_interrupted_command_states_that_it_resumes_only_if_it_does() -> None:
    assert set(cli._RESUMING) <= {*COMMANDS}
    for command in COMMANDS:
        resumes = "rerun the command to resume" in cli._interrupted([*command.split(), "--seed", "1"])
        assert resumes == (command in cli._RESUMING), command


@contextlib.contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Refuse files of more bytes than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(checked: Checked, long: bool) -> None:
    for command in commands(long):
        for free in (0, 700) if long else (100,):
            done = checked.run(*words(command), within=full_disk(free))
            ends(done, words(command), 0, 1, 2)
            assert done.code or "out" not in BASES[command] or command.startswith("bench"), (command, free)


def test_a_folder_in_which_nothing_can_be_made(checked: Checked, long: bool) -> None:
    """/proc is one for root too."""
    for command in COMMANDS if long else QUICK:
        arguments = [f"/proc/{word}" if word.startswith("out") else word for word in words(command)]
        if arguments != words(command):
            ends(checked.run(*arguments), arguments, 1, 2)


def closed() -> io.TextIOWrapper:
    """A standard output whose reader has exited, as with `| head`."""
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(os.fdopen(write, "wb"), encoding="utf-8")


def test_a_closed_standard_output(checked: Checked, long: bool) -> None:
    for command in commands(long):
        stream = closed()
        done = checked.run(*words(command), out=stream)
        with contextlib.suppress(OSError):
            stream.close()
        ends(done, words(command), 0, 1)


def test_what_memory_cannot_hold(checked: Checked) -> None:
    """A number beyond all counts is refused; one that only this machine lacks the memory for fails in one line."""
    for value, code in (("27264404024892", 2), ("1000000000", 1)):
        arguments = ["study", "routing", "run.zarr", "--option", f"n_boot={value}"]
        ends(checked.run(*arguments), arguments, code)


def test_torch_that_lacks_memory_fails_in_one_line(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises a RuntimeError; the negative control is another one."""
    command = words("convert")
    monkeypatch.setattr("workbench.harmony.hosts.files.convert", lambda *_, **__: torch.empty(2**50))
    done = checked.run(*command)
    ends(done, command, 1)
    assert "not enough memory" in done.err

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr("workbench.harmony.hosts.files.convert", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        checked.run(*command)


@pytest.mark.parametrize(
    "broken",
    [ZeroDivisionError, KeyboardInterrupt, BrokenPipeError],
)
def test_a_command_without_these_promises_is_noticed(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, broken: type[BaseException]
) -> None:
    """Negative controls: an error of its own, and a `main` that catches neither an interruption nor a closed pipe."""

    def fails(*_: object, **__: object) -> Any:
        raise broken

    monkeypatch.setattr("workbench.harmony.hosts.files.convert", fails)
    if broken is not ZeroDivisionError:
        monkeypatch.setattr("workbench.cli.main", fails)
    with pytest.raises(broken):
        checked.run(*words("convert"))
