"""The command line. Every command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or refused input.
"""

import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

from workbench.cli.starting import interrupted_in_one_line

with interrupted_in_one_line():
    import typer

    from workbench.bench.command import app as bench
    from workbench.cli import features, finetuning, graphs, labels, live, models, pipeline, results, sharing
    from workbench.cli.control_characters import visible, visible_controls
    from workbench.errors import InputError, JobError
    from workbench.memory import end_within, lack_of_memory, refuse_small_limit
    from workbench.version import version

app = typer.Typer(
    help="Generate, capture, study and visualize what gpt-oss computes. Run any command with `--help`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for commands in (models, pipeline, results, live, graphs, features, labels, finetuning, sharing):
    app.registered_commands += commands.app.registered_commands
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version())
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before a command."""
    refuse_small_limit()


# the base class of wrong usage, of click or of the copy of it that newer versions of typer bring
_USAGE_ERRORS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_INTERRUPT_CODE = 130
_INTERRUPTED = "interrupted; outputs that are not complete were not written"
_INTERRUPTED_ROWS = "interrupted; finished work is kept, rerun the command to resume"
_RESUMING = ("generate", "transcripts", "capture", "finetune", "label")  # commands that resume
# what an extra brings that a command cannot do without
_EXTRAS = {"panel": "dashboard", "kaleido": "figures", "distributed": "cluster", "s3fs": "s3", "playwright": "dev"}


def main() -> None:
    """Run a command: one line for errors of the user, a traceback for errors of the workbench."""
    _let_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without a character shows its escape
            stream.reconfigure(errors="backslashreplace")
    show = warnings.showwarning
    warnings.showwarning = functools.partial(_show_warning, show)
    with visible_controls():
        _run_and_exit()


def _show_warning(show: Any, message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print a warning of the workbench itself as one line; show those of other packages by `show`."""
    if category.__module__.startswith("workbench."):
        print(f"workbench: {visible(' '.join(str(message).split()))}", file=sys.stderr)
    else:
        show(message, category, *where, **options)


def _run_and_exit() -> NoReturn:
    try:
        sys.exit(_run())
    except _USAGE_ERRORS as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        _fail(error.format_message(), error.exit_code)
    except typer.Abort:
        _fail(_interrupted(sys.argv[1:]), _INTERRUPT_CODE)
    except InputError as error:
        _fail(str(error), 2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        _fail(f"{error.name} is not installed: pip install 'gpt-oss-workbench[{extra}]'", 2)
    except BrokenPipeError:  # `workbench … | head`
        _discard_output()
        sys.exit(0)
    except JobError as error:
        _discard_output()
        _fail(str(error), 1)
    except OSError as error:
        _discard_output()
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except KeyboardInterrupt:
        _fail(_interrupted(sys.argv[1:]), _INTERRUPT_CODE)


def _interrupted(arguments: Sequence[str]) -> str:
    """Return what an interrupted command kept."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return _INTERRUPTED_ROWS if command in _RESUMING else _INTERRUPTED


def _let_threads_sleep() -> None:
    """Let threads of torch that wait for each other sleep after a short time, unless the user sets how they wait.

    With torch's longer waiting, `generate nano` made less than 40 tokens/s beside four busy processes on two cores, and
    150 with this; alone, 1,000 and 880, and 750 where threads sleep at once (OMP_WAIT_POLICY=passive). The variable is
    read when a command imports torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _run() -> int:
    """Run the command and return its exit code, after all of its output is written."""
    try:
        code = app(standalone_mode=False)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer itself ends at a closed pipe, with 1
            raise ended.__context__ from None
        raise
    except BaseException as error:  # Rust libraries raise one that is no Exception
        if (lack := lack_of_memory(error)) is None:
            raise
        end_within(seconds=30)
        reason = f" ({lack})" if str(lack) else ""
        raise JobError(f"not enough memory: use smaller numbers, or another machine{reason}") from error
    if code == _INTERRUPT_CODE:  # typer returns it for Ctrl-C and shows nothing
        raise KeyboardInterrupt
    if sys.stdout is not None:
        sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> NoReturn:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it lists tasks that failed beside the one that is stated
    print(f"workbench: {visible(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _discard_output() -> None:
    """Keep Python from writing what is left to a standard output that takes nothing more."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
