"""What a page says, as pure functions of a run and a study's datasets: figures, tables and text, no widget."""

from collections import Counter
from collections.abc import Callable, Mapping
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import compare as draw_compare
from workbench.figures import effort as draw_effort
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


def filled_cells(load: xr.Dataset) -> dict[str, list[str]]:
    """Channels and efforts with any token: what the model says first, the hardest effort first."""
    tokens = load["tokens"]
    first = ("analysis", "final", "commentary")
    channels = [str(c) for c in tokens["channel"].values[tokens.sum("effort").values > 0]]
    efforts = [str(e) for e in tokens["effort"].values[tokens.sum("channel").values > 0]]
    return {"channel": sorted(channels, key=lambda c: first.index(c) if c in first else 3), "effort": efforts[::-1]}


def load(study: Mapping[str, xr.Dataset], channel: str, effort: str) -> go.Figure:
    """Which experts the tokens of a channel and effort go to."""
    return draw.load_heatmap(study["load"], channel, effort)


def fixed_figures(study: Mapping[str, xr.Dataset]) -> list[go.Figure]:
    """What does not depend on the selection, in reading order: evenness, then each comparison."""
    compared = [draw_one(study[name]) for name in study if "jsd" in study[name] for draw_one in _COMPARISON]
    return [draw.entropy_by_layer(study["load"]), *compared]


_COMPARISON = (draw.divergence_by_layer, draw.load_difference_heatmap)


def method(study: Mapping[str, xr.Dataset]) -> str:
    """How the page's numbers were computed and what they do not control."""
    said = dict.fromkeys((r.attrs["method"], r.attrs["not_controlled"]) for r in study.values())
    first = next(iter(study.values())).attrs
    origin = f"Run {first['run_digest']}, workbench {first['workbench_version']}, seed {first['seed']}."
    paragraphs = [f"{escape(how)} <i>Not controlled:</i> {escape(limits)}" for how, limits in said]
    return "".join(f"<p>{text}</p>" for text in [*paragraphs, escape(origin)])


def findings(study: Mapping[str, xr.Dataset]) -> str:
    """The study's own summaries in plain words."""
    lines = ((r.attrs["title"], r.attrs["summary"].splitlines()) for r in study.values())
    return "".join(f"<h4>{escape(title)}</h4><p>{'<br>'.join(map(escape, text))}</p>" for title, text in lines)


def progress(run: Run) -> str:
    """How far a run has come, as a bar."""
    done, total = run.progress
    if run.status == "complete":
        return f"<b>Complete</b>: {total} units."
    tokens = sum(span.stop - span.start for span in run.spans)
    return (
        f"<b>Being written</b>: {done} of {total} units, {tokens:,} tokens. <progress max={total} value={done} "
        'style="width:60%"></progress>'
    )


def efforts(run: Run) -> list[str]:
    """Efforts that occur, in their order."""
    there = set(run.sequences["effort"])
    return [effort for effort in ("low", "medium", "high") if effort in there]


def token_counts(run: Run) -> pd.DataFrame:
    """Tokens by channel, a column an effort."""
    total = run.total("tokens")
    table = total.to_series().unstack("channel").groupby(total["effort"].values).sum().T
    table = table[[*efforts(run), *(c for c in table.columns if c not in efforts(run))]]
    table["all"] = table.sum(axis=1)
    return table[table["all"] > 0].rename_axis("channel").reset_index()


def accuracy(study: Mapping[str, xr.Dataset]) -> go.Figure:
    """Accuracy against analysis tokens, by effort."""
    return draw_effort.accuracy_by_tokens(study["cost"])


def provenance(run: Run) -> str:
    """Where the run comes from, as a table of text."""
    rows = {**run.provenance, "digest": run.digest, "checkpoint": run.checkpoint}
    rows.pop("rejects", None)
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def figure_names(figures: Mapping[str, go.Figure]) -> dict[str, str]:
    """Names for people, in the order that tells most first."""
    last = [name for name in figures if name.startswith(("mass_frame", "mass_prompt")) or name.endswith("naive")]
    order = [name for name in figures if name not in last and ("sizes" in name or "accuracy" in name)]
    order += [name for name in figures if name not in (*order, *last)]
    return {name.replace("_", " "): name for name in (*order, *last)}


def pairs(study: Mapping[str, xr.Dataset], channel: str, layer: int) -> go.Figure:
    """How often experts of a layer are chosen together, over chance."""
    return draw.lift_heatmap(study["together"], channel, layer)


def comparison(study: Mapping[str, xr.Dataset]) -> list[go.Figure]:
    """Figures of two runs."""
    figures, _ = draw_compare.gallery(study)
    return list(figures.values())


def conversations(run: Run, task: str, effort: str, text: str, most: int = 500) -> dict[str, int]:
    """Conversations by what is asked of them: label → number; at most so many."""
    table = run.sequences
    chosen = pd.Series(True, index=table.index)
    for column, value in (("task", task), ("effort", effort)):
        chosen &= True if value == "all" else table[column] == value
    if text:
        chosen &= table["id"].str.contains(text, regex=False) | table["answer"].str.contains(text, regex=False)
    rows = table[chosen].head(most)
    marks = {1: " ✓", 0: " ✗"}
    named = zip(rows["id"].tolist(), rows["correct"].tolist(), rows.index.tolist(), strict=True)
    return {f"{id}{marks.get(right, '')}": number for id, right, number in named}


def about_sequence(run: Run, number: int) -> str:
    """What is known of a conversation."""
    row = run.sequences.loc[[number]].to_dict("records")[0]
    right = {1: "right", 0: "wrong"}.get(int(row["correct"]), "not marked")
    parts = {
        "Id": row["id"], "Task": row["task"] or "–", "Effort": row["effort"] or "–", "Tokens": f"{int(row['length']):,}",
        "Expected": row["answer"] or "–", "Answer is": right,
    }  # fmt: skip
    return " &ensp; ".join(f"<b>{name}</b> {escape(str(text))}" for name, text in parts.items())


def transitions(study: Mapping[str, xr.Dataset], channel: str, layer: int) -> go.Figure | None:
    """Where a layer's experts lead in the next one; None for the last layer."""
    ds = study["together"]
    return draw.transition_heatmap(ds, channel, layer) if layer in ds["layer_pair"].values else None


def partners(study: Mapping[str, xr.Dataset], channel: str, layer: int, expert: int, most: int = 6) -> pd.DataFrame:
    """Whom an expert works with, over chance."""
    cell = study["together"].sel(channel=channel, layer=layer, expert=expert)
    table = pd.DataFrame(
        {"with expert": cell["expert_2"].values, "lift": cell["lift"].values, "P(with | this)": cell["given"].values}
    )
    table = table[table["with expert"] != expert].dropna().sort_values("lift", ascending=False)
    return table.head(most).round(3)


def where_it_acts(study: Mapping[str, xr.Dataset], layer: int, expert: int) -> pd.DataFrame:
    """An expert's share of the slots of each channel and effort, times an even share."""
    share = study["load"]["share"].sel(layer=layer, expert=expert)
    table = (share * study["load"].sizes["expert"]).to_series().unstack("effort").dropna(how="all").round(2)
    return table.rename_axis("channel").reset_index()


def top_tokens(
    run: Run, layer: int, expert: int, text: Callable[[int], str], *, most_tokens: int = 300_000, rows: int = 20
) -> pd.DataFrame:
    """Tokens that go to an expert more often than tokens do, with an example in its context; from the first ones of a run."""
    seen = 0
    every: Counter[int] = Counter()
    chosen: Counter[int] = Counter()
    example: dict[int, str] = {}
    for block in run.blocks("id", "experts"):
        ids, sequence = block["id"], block["sequence"]
        hit = (block["experts"][layer] == expert).any(-1)
        every.update(ids.tolist())
        chosen.update(ids[hit].tolist())
        for at in np.flatnonzero(hit)[:: max(1, int(hit.sum()) // 2000)]:
            if int(ids[at]) not in example:
                near = [i for i in range(max(0, at - 8), min(len(ids), at + 5)) if sequence[i] == sequence[at]]
                example[int(ids[at])] = "".join(
                    f"[{text(int(ids[i]))}]" if i == at else text(int(ids[i])) for i in near
                )
        seen += len(ids)
        if seen >= most_tokens:
            break
    share = sum(chosen.values()) / max(seen, 1)
    found = [
        (text(i), n, n / every[i], n / every[i] / share, example.get(i, ""))
        for i, n in chosen.items()
        if n >= 5 and share > 0
    ]
    table = pd.DataFrame(found, columns=["token", "times", "share of its uses", "lift", "for example"])
    return table.sort_values(["lift", "times"], ascending=False).head(rows).round(3)
