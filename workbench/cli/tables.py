"""Tables that summarize a run in a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.flags import counted_in
from workbench.runs import Run
from workbench.studies import quick_look
from workbench.studies.statistics import effective_number

_BARS = " ▁▂▃▄▅▆▇█"


def summary(run: Run) -> Group:
    """Return the run, its tokens, its accuracy, and how evenly and by whom its tokens are routed."""
    done, total = run.progress
    model = run.model
    about = Table("run", escape(run.path))
    about.add_row(
        "model",
        f"{escape(str(run.checkpoint['name']))}: {count_of(model['n_layers'], 'layer')} of "
        f"{model['num_experts']} experts",
    )
    about.add_row("state", "complete" if done == total else f"{done} of {count_of(total, 'unit')}")
    about.add_row("recorded", ", ".join(run.recorded))
    about.add_row("sequences", f"{len(run.sequences):,}, {int(run.sequences['length'].sum()):,} tokens")
    if flags := counted_in(run.sequences):
        about.add_row("flags", flags)
    if run.exclusion:
        about.add_row("excluded", run.exclusion)
    if run.sequences.empty:
        return Group(about, Text("No unit is written yet."))
    parts: list[Any] = [about, _tokens(run)]
    if (run.sequences["correct"] >= 0).any():
        parts.append(_accuracy(run))
    if "routing" in run.recorded:
        parts.append(_experts(run))
    if {"sinks", "sink_sums"} & set(run.recorded):
        parts.append(_sinks(run))
    return Group(*parts)


def _tokens(run: Run) -> Table:
    rows = quick_look.tokens(run)
    table = Table("channel", *map(str, rows.columns), title="tokens by channel and effort")
    for channel, row in rows.iterrows():
        table.add_row(str(channel), *(f"{int(n):,}" for n in row))
    return table


def _accuracy(run: Run) -> Table:
    marked = run.sequences[run.sequences["correct"] >= 0]
    efforts = [e for e in quick_look.options(run)["effort"] if e in set(marked["effort"])]
    rows = marked.pivot_table(index="task", columns="effort", values="correct", aggfunc="mean")[efforts]
    table = Table("task", *efforts, title="accuracy by task and effort")
    for task, row in rows.iterrows():
        table.add_row(escape(str(task)), *(f"{v:.2f}" for v in row))
    return table


def _experts(run: Run) -> Table:
    """Return a row for each layer: effective experts of the analysis and final channels, and expert loads as bars."""
    table = Table("layer", title="experts: effective number, and load of each (full bar: 4 × uniform)")
    cells = {}
    for channel in ("analysis", "final"):
        if channel in quick_look.options(run)["channel"]:
            cells[channel] = quick_look.routing(run, channel)["load"].values
            table.add_column(f"{channel}", justify="right")
            table.add_column("", no_wrap=True, overflow="crop")
    for layer in range(run.model["n_layers"]):
        row = []
        for load in cells.values():
            row += [f"{effective_number(load[layer]):.1f}", bars(load[layer] * load.shape[1] / 4)]
        table.add_row(str(layer), *row)
    return table


def _sinks(run: Run) -> Table:
    channels = [c for c in quick_look.options(run)["channel"] if c != quick_look.ALL]
    table = Table("layer", *channels, title="mean sink attention")
    mass = [quick_look.sinks(run, channel)["mass"].values.mean(-1) for channel in channels]
    for layer in range(run.model["n_layers"]):
        table.add_row(str(layer), *(f"{m[layer]:.3f}" for m in mass))
    return table


def bars(heights: Sequence[float] | np.ndarray) -> str:
    """Return heights from 0 to 1 as a line of block characters; larger values are cut.

    Raises:
        InputError: the heights do not start at 0 or exceed 1.
    """
    if np.any(np.asarray(heights) < 0):
        raise InputError("the height of a bar is out of range: expected 0 to 1")
    steps = np.minimum(np.ceil(np.asarray(heights) * (len(_BARS) - 1)), len(_BARS) - 1).astype(int)
    return "".join(_BARS[step] for step in steps)
