"""What a page says, as pure functions of a run and a study's datasets: figures, tables and text, no widget."""

from html import escape

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import routing as draw
from workbench.runs import Run


def about(run: Run) -> str:
    """What the run is, in one paragraph of HTML; every text that came from outside is escaped."""
    sequences = run.sequences
    done, total = run.progress
    state = "complete" if done == total else f"being written: {done} of {total} units"
    recorded = [name for name, on in vars(run.spec).items() if on is True] + [a.hook for a in run.spec.activations]
    efforts = ", ".join(f"{n} {effort}" for effort, n in sequences["effort"].value_counts(sort=False).items())
    parts = {
        "Model": f"{run.checkpoint['name']}: {run.model['n_layers']} layers, {run.model['num_experts']} experts, "
        f"{run.model['experts_per_token']} a token",
        "Transcripts": f"{len(sequences):,} ({efforts}), {int(sequences['length'].sum()):,} tokens",
        "Recorded": ", ".join(recorded).replace("_", " "),
        "State": state,
    }
    return " &ensp; ".join(f"<b>{name}</b> {escape(text)}" for name, text in parts.items())


def accuracy_by_effort(run: Run) -> pd.DataFrame:
    """Share of marked transcripts that are right: a row a task, a column an effort, and how many tokens were spent."""
    marked = run.sequences.query("correct >= 0").assign(new_tokens=lambda t: t["length"] - t["n_prompt"])
    order = [effort for effort in ("low", "medium", "high") if effort in set(marked["effort"])]
    by_task = marked.pivot_table(index="task", columns="effort", values="correct", aggfunc="mean")[order]
    spent = marked.groupby("effort")["new_tokens"].mean()[order].rename("mean new tokens")
    overall = marked.groupby("effort")["correct"].mean()[order].rename("all tasks")
    return pd.concat([by_task, overall.to_frame().T, spent.to_frame().T]).round(2).rename_axis("task").reset_index()


def routing_figures(study: dict[str, xr.Dataset], channel: str, effort: str) -> dict[str, go.Figure]:
    """The routing page's figures by a short name, in reading order."""
    figures = {
        "load": draw.load_heatmap(study["load"], channel, effort),
        "entropy": draw.entropy_by_layer(study["load"]),
    }
    for name in comparisons(study):
        figures[f"divergence {name}"] = draw.divergence_by_layer(study[name])
        figures[f"difference {name}"] = draw.load_difference_heatmap(study[name])
    return figures


def comparisons(study: dict[str, xr.Dataset]) -> list[str]:
    """The comparisons a study holds: analysis against final first."""
    return [name for name in study if name != "load"]


def method(study: dict[str, xr.Dataset]) -> str:
    """How the page's numbers were computed and what they do not control, as Markdown."""
    paragraphs = []
    for name, result in study.items():
        attrs = result.attrs
        paragraphs.append(f"**{name.replace('_', ' ')}.** {attrs['method']} *Not controlled:* {attrs['not_controlled']}")
    first = next(iter(study.values())).attrs
    origin = f"Run {first['run_digest']}, workbench {first['workbench_version']}, seed {first['seed']}."
    return "\n\n".join([*paragraphs, origin])


def findings(study: dict[str, xr.Dataset]) -> str:
    """The study's own summaries, as Markdown that cannot carry markup from outside."""
    return "\n\n".join(f"**{escape(r.attrs['title'])}**\n\n{escape(r.attrs['summary'])}" for r in study.values())
