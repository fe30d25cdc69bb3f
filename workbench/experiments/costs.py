"""What the experiments cost on one H100, before anything is run: tokens that they compute, and the time.

An experiment's record states what it computes with its default options (`registry.Work`). The time is estimated from
speeds that `workbench bench gpu` measured once, with random weights in the published shapes (docs/bench_gpu.json).
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from workbench import registry
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.model.config import PUBLISHED

# A pass with gradient, in passes without: the kernel of the experts took 3.1 to 3.3 times as long, attention 5 to 8.
GRADIENT = 3.5
RECORDING = 1.16  # of a pass of 8,192 tokens that hooks record, relative to one that is not; a capture takes 1.01


@dataclass(frozen=True)
class Speed:
    """Measured tokens a second on one H100. forward: passes of 8,192 tokens. decode: 64 sequences at once."""

    forward: float
    decode: float


SPEEDS = {"20b": Speed(forward=51_994, decode=5_461), "120b": Speed(forward=26_849, decode=1_519)}


@dataclass(frozen=True)
class Cost:
    """Tokens that an experiment computes forward, with gradients, and new ones; and its time on one H100."""

    forward: float
    gradient: float
    new_tokens: float
    seconds: float


def cost(work: registry.Work, size: str, *, sequences: int, sequence_tokens: int) -> Cost:
    """Return the estimated cost of an experiment on a number of sequences. size: 20b or 120b."""
    cfg, speed, tokens = PUBLISHED[size], SPEEDS[size], sequences * sequence_tokens
    forward = tokens * (work.passes + work.layer_passes * cfg.n_layers)
    gradient = tokens * (work.gradient_passes + work.width_passes * cfg.d_model)
    new = work.new_tokens + work.sequence_new_tokens * sequences
    seconds = (RECORDING * forward + GRADIENT * gradient) / speed.forward + new / speed.decode
    return Cost(forward, gradient, new, seconds)


def show(size: str | None, *, sequences: int, sequence_tokens: int) -> None:
    """Print the cost of every experiment as a table.

    Raises:
        InputError: the model is not one whose speed was measured.
    """
    if size not in SPEEDS:
        raise InputError(f"--experiments: the speed is known of {' and '.join(SPEEDS)} only; name one of them")
    table = Table(
        title=f"Experiments on {count_of(sequences, 'sequence')} of {sequence_tokens:,} tokens, "
        f"gpt-oss-{size}, one H100"
    )
    table.add_column("experiment", no_wrap=True)
    for column in ("forward", "with gradients", "new tokens", "time"):
        table.add_column(column, justify="right")
    for record in registry.experiments():
        estimate = record.work and cost(record.work, size, sequences=sequences, sequence_tokens=sequence_tokens)
        values = (estimate.forward, estimate.gradient, estimate.new_tokens) if estimate else ()
        cells = [f"{value:,.0f}" if value else "" for value in values] or [""] * 3
        table.add_row(record.name, *cells, clock(estimate.seconds) if estimate else "not estimated")
    speed = SPEEDS[size]
    Console().print(table)
    print(
        f"Default options. Estimated, not measured: {speed.forward:,} tokens a second forward and {speed.decode:,} new "
        f"ones (64 sequences at once), as measured with random weights; recorded passes take {RECORDING - 1:.0%} more, "
        f"passes with gradients {GRADIENT} times as long. Studies need no model and no GPU."
    )


def clock(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
