"""The command line. Every command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or refused input.
"""

import os
import sys

import typer

from workbench.bench.command import app as bench
from workbench.cli import models, pipeline, results, sharing
from workbench.errors import InputError, JobError

app = typer.Typer(
    help="Generate, capture, study and visualize what gpt-oss computes. Run any command with `--help`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for commands in (models, pipeline, results, sharing):
    app.registered_commands += commands.app.registered_commands
app.add_typer(bench, name="bench")

# what an extra brings that a command cannot do without
_EXTRAS = {"panel": "dashboard", "kaleido": "figures", "distributed": "cluster", "s3fs": "s3", "playwright": "dev"}


def main() -> None:
    """Entry point: one line for what the user can mend, a traceback for what we must."""
    try:
        app()
    except InputError as error:
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        print(f"workbench: {error.name} is not installed: pip install 'gpt-oss-workbench[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except (JobError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `workbench … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("workbench: interrupted; finished work is kept, rerun the command to resume", file=sys.stderr)
        sys.exit(130)
