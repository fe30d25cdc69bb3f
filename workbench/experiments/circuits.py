"""Circuits: nodes and edges that the attribution graphs of many prompts share, and how they differ between channels.

    pairs = circuits.paired_graphs(model, rows)       # the same digit in analysis and in final, one pair a prompt
    circuits.compare(pairs)                           # which edges recur in each channel
    circuits.similarity(pairs)                        # within prompts, beside other prompts of the same channel

`workbench study circuits RUN --model MODEL` does all three.

A node's name is its kind, layer and head or expert, without its position. The sampling unit is the prompt: of several
sequences of a prompt the first that has both tokens counts.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Shaped
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from workbench import harmony
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.experiments.graph_export import label
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, FewPromptsWarning, mean_effect
from workbench.studies.statistics import false_discovery

EXPERIMENT = Experiment(
    name="circuits",
    title="Circuits in analysis and final",
    question="Do the analysis and the final answer use the same circuit for the same token?",
    compute="two attribution graphs for each prompt",
    options={"max_nodes": "Nodes of a graph that are looked at, the largest by value (default: 200)."},
    figures="workbench.figures.default",
    order=185,
)
_LESS_WITHIN, _LESS_PAIRS = "same prompt less other prompts", "same prompt less other pairs"
_PAIRINGS = 9999  # random ones of the permutation test
LISTED = 100  # edges in the result, those with the smallest q and then the largest share
METHOD = (
    "For each prompt the first token of its last final answer is explained by an attribution graph, and so is the last "
    "equal token of the analysis before it, each from the text before it. An edge is named by the kind, layer and head "
    "or expert of its ends. Shares are of prompts whose graph has the edge, with 95 % Wilson intervals; p is of the "
    "exact McNemar test over prompts, q its Benjamini-Hochberg value over all edges. Similarity is the cosine of the "
    "influences of heads and experts, with bootstrap-t intervals over prompts. Other prompts are those of the same "
    "task (the run's column task); p is the share of random pairings of the analyses and final answers of a task's "
    "prompts that are at least as alike as the true pairs."
)
NOT_CONTROLLED = (
    "The two tokens are at different positions and follow different text. A difference may be of what is read (the "
    "analysis computes what the final answer copies), not of how it is read. Other prompts of a task mostly have "
    "another token; in a run without tasks they differ in more than that. Values are of a frozen pass."
)
Pair = Mapping[str, AttributionGraph]
CHANNELS = ("analysis", "final")


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, max_nodes: int = 200, seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the edges that recur in the circuits of each channel, and how alike the circuits are.

    Dataset `edges`, over edge: analysis and final (shares of prompts, with limits), difference, p and q. Dataset
    `similarity`, over comparison: cosine (with limits), p and the number of prompts.

    Raises:
        InputError: fewer than five prompts have the first token of their final answer in their analysis.
    """
    pairs = paired_graphs(model, rows, max_nodes=max_nodes)
    table, alike = compare(pairs), similarity(pairs, seed=seed)
    order = table.assign(share=table[list(CHANNELS)].max(axis=1)).sort_values(["q", "share"], ascending=[True, False])
    shown = order.head(LISTED)
    names = [f"{a} → {b}" for a, b in zip(shown["source"], shown["target"], strict=True)]
    long = {"analysis": "share in analysis", "final": "share in final", "difference": "analysis less final"}
    columns = [f"{c}{limit}" for c in CHANNELS for limit in ("", "_low", "_high")] + ["difference", "p", "q"]
    edges = xr.Dataset(
        {c: ("edge", shown[c].to_numpy(), {"long_name": long.get(c, c), "units": "1"}) for c in columns},
        coords={"edge": names},
        attrs={"edges_in_all": len(table)},
    )
    names_of = {"cosine": "cosine", "low": "cosine_low", "high": "cosine_high", "p": "p", "prompts": "prompts"}
    limits = {name: ("comparison", alike[c].to_numpy(), {"long_name": name}) for c, name in names_of.items()}
    similar = xr.Dataset(limits, coords={"comparison": alike.index.tolist()})
    about = {"rests_on": f"{count_of(len(pairs), 'prompt')}", "prompts": len(pairs)}
    about |= {"method": METHOD, "not_controlled": NOT_CONTROLLED}
    titles = {"edges": "Edges that recur, by channel", "similarity": "Similarity of circuits within and across prompts"}
    texts = {"edges": _edges_summary(table, shown, len(pairs)), "similarity": _similarity_summary(alike)}
    return {
        n: ds.assign_attrs(about, title=titles[n], summary=texts[n])
        for n, ds in {"edges": edges, "similarity": similar}.items()
    }


def _edges_summary(table: pd.DataFrame, shown: pd.DataFrame, n: int) -> str:
    both = table[(table["analysis_low"] > 0.5) & (table["final_low"] > 0.5)]
    differs = table[table["q"] <= 0.05]
    lines = [
        f"{count_of(n, 'prompt')}, {count_of(len(table), 'edge')} in any graph, {len(shown)} listed. {len(both)} recur "
        f"in more than half of the prompts in both channels; {len(differs)} differ between the channels (q ≤ 0.05)."
    ]
    for row in differs.head(5).to_dict("records"):
        lines.append(f"  {row['source']} → {row['target']}: {row['analysis']:.0%} analysis, {row['final']:.0%} final")
    return "\n".join(lines)


def _similarity_summary(alike: pd.DataFrame) -> str:
    by_comparison = alike.to_dict("index")
    own = by_comparison["same prompt"]
    if np.isnan(by_comparison[_LESS_PAIRS]["cosine"]):
        return (
            f"same prompt: {own['cosine']:.2f} ({own['low']:.2f} to {own['high']:.2f}). Only "
            f"{count_of(by_comparison[_LESS_PAIRS]['prompts'], 'prompt has', 'prompts have')} another prompt of their "
            "task to compare with: use more sequences."
        )
    rows = [f"  {name}: {r['cosine']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for name, r in by_comparison.items()]
    within, pairs = (_answer(by_comparison[name]) for name in (_LESS_WITHIN, _LESS_PAIRS))
    lines = [
        f"The two circuits of a prompt are {within} those of one channel in other prompts of the same task, and "
        f"{pairs} an analysis and a final answer of different prompts of a task "
        f"(p = {float(by_comparison[_LESS_PAIRS]['p']):.2g}; "
        f"{count_of(by_comparison[_LESS_PAIRS]['prompts'], 'prompt')}):"
    ]
    return "\n".join([*lines, *rows])


def _answer(row: Mapping[Any, Any]) -> str:
    return "less alike than" if row["high"] < 0 else "more alike than" if row["low"] > 0 else "not shown to differ from"


def same_token(model: GptOss, tokens: Sequence[int]) -> dict[str, int] | None:
    """Return the position of the last final answer's first token, and of the last equal token in analysis before it.

    None if there is no final answer, or its first token does not occur in an analysis before it.
    """
    ids = [int(token) for token in tokens]
    messages = harmony.label(ids, tokenizer=model.tokenizer).messages
    spans = {channel: [m.text_span for m in messages if m.channel == channel] for channel in CHANNELS}
    starts = [span.start for span in spans["final"] if span.start < min(span.stop, len(ids))]
    if not starts:
        return None
    answer = starts[-1]  # earlier ones are of earlier turns
    earlier = [pos for span in spans["analysis"] for pos in range(answer)[span]]
    equal = [pos for pos in earlier if ids[pos] == ids[answer]]
    return {"analysis": equal[-1], "final": answer} if equal else None


def paired_graphs(model: GptOss, rows: Iterable[Any], **options: Any) -> list[dict[str, AttributionGraph]]:
    """Return for each prompt the graphs of one token in the analysis and in the final answer.

    rows: transcripts, see `from_run.transcripts`. options: as of `graph`.

    Raises:
        InputError: no sequence has the first token of its final answer in its analysis.
    """
    pairs: dict[str, dict[str, AttributionGraph]] = {}
    for row in rows:
        places = None if row.prompt_id in pairs else same_token(model, row.tokens)
        if places is None:
            continue
        ids = [int(token) for token in row.tokens]
        task = str(row.meta.get("task", ""))
        pairs[row.prompt_id] = {
            channel: _of_task(graph(model, ids[:pos], target=ids[pos], **options), task)
            for channel, pos in places.items()
        }
    if not pairs:
        raise InputError("no sequence has the first token of its final answer in its analysis: use other sequences")
    return list(pairs.values())


def _of_task(attributed: AttributionGraph, task: str) -> AttributionGraph:
    return replace(attributed, metadata=attributed.metadata | {"task": task})


def compare(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return for every edge the share of prompts whose graph has it, in each channel, with 95 % Wilson intervals.

    p is of the exact McNemar test over prompts, q its Benjamini-Hochberg value over all edges.

    Raises:
        InputError: there is no pair.
    """
    if not pairs:
        raise InputError("a comparison of circuits needs at least one pair of graphs")
    sets = {channel: [_edges(pair[channel]) for pair in pairs] for channel in CHANNELS}
    every = sorted(set().union(*sets["analysis"], *sets["final"]))
    there = {c: np.array([[edge in own for own in sets[c]] for edge in every], dtype=bool) for c in CHANNELS}
    edges = pd.DataFrame(every, columns=["source", "target"])
    for channel, values in there.items():
        low, high = proportion_confint(values.sum(1), len(pairs), method="wilson")
        edges = edges.assign(**{channel: values.mean(1), f"{channel}_low": low, f"{channel}_high": high})
    more, fewer = ((there[a] & ~there[b]).sum(1) for a, b in (CHANNELS, CHANNELS[::-1]))
    edges["difference"] = edges["analysis"] - edges["final"]
    edges["p"] = [binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in zip(more, fewer, strict=True)]
    edges["q"] = false_discovery(edges["p"].to_numpy())
    return edges.sort_values(["q", "difference"], ascending=[True, False], ignore_index=True)


def _edges(graph: AttributionGraph) -> set[tuple[str, str]]:
    names = _names(graph)
    ends = (graph.edges[end].tolist() for end in ("source", "target"))
    return {(names[int(s)], names[int(t)]) for s, t in zip(*ends, strict=True)}


def _names(graph: AttributionGraph) -> list[str]:
    return ["embedding" if row["kind"] == "embedding" else label(row) for _, row in graph.nodes.iterrows()]


def similarity(pairs: Sequence[Pair], *, seed: int = 0) -> pd.DataFrame:
    """Return how alike circuits are: cosines of the influence of heads and experts, as means over prompts.

    Rows: the two channels of a prompt (`same prompt`), and each channel with that of other prompts of the same task
    (`analysis, other prompts`, `final, other prompts`), which is what a channel has in common with itself; then the
    difference of the first and the mean of the others. `other pairs` are an analysis and a final answer of different
    prompts of a task, the null of circuits that have only the task in common; p is of a one-sided permutation test
    within tasks. Tasks are those of the graphs' metadata (`paired_graphs`); graphs without one are of the same task.

    The column prompts counts the prompts of each row; of the comparisons it is those with another prompt of their task.
    Fewer than five leave it without a cosine. Intervals are bootstrap-t over prompts, which the comparisons with other
    prompts share: theirs are approximate.

    Raises:
        InputError: there are fewer than five pairs.
    """
    vectors = {channel: _influences([pair[channel] for pair in pairs], pairs) for channel in CHANNELS}
    tasks = np.array([str(pair["final"].metadata.get("task", "")) for pair in pairs])
    same_task = (tasks[:, None] == tasks[None]) & ~np.eye(len(tasks), dtype=bool)
    n_same_task = same_task.sum(1)

    def over_same_task(cosines: Float[np.ndarray, "prompt prompt"]) -> Float[np.ndarray, " prompt"]:
        return np.where(same_task, cosines, 0).sum(1) / np.maximum(n_same_task, 1)

    values = {"same prompt": (vectors["analysis"] * vectors["final"]).sum(1)}
    for channel, rows in vectors.items():
        values[f"{channel}, other prompts"] = over_same_task(rows @ rows.T)
    within = (values["analysis, other prompts"] + values["final, other prompts"]) / 2
    values[_LESS_WITHIN] = values["same prompt"] - within
    cross = vectors["analysis"] @ vectors["final"].T
    values["other pairs"] = (over_same_task(cross) + over_same_task(cross.T)) / 2
    values[_LESS_PAIRS] = values["same prompt"] - values["other pairs"]
    compared = n_same_task > 0
    p = _pairing_p(cross[np.ix_(compared, compared)], tasks[compared], seed)
    table = [
        _mean_row(own, np.ones(len(own), dtype=bool) if name == "same prompt" else compared, name, seed)
        for name, own in values.items()
    ]
    return pd.DataFrame(table, index=list(values)).assign(p=[p if name == _LESS_PAIRS else np.nan for name in values])


def _mean_row(
    values: Float[np.ndarray, " prompt"], used: Bool[np.ndarray, " prompt"], name: str, seed: int
) -> dict[str, float]:
    """Return the mean over the prompts used, with its limits within what a cosine or a difference of two can be."""
    n = int(used.sum())
    if n < MIN_PROMPTS <= len(values):
        return {"cosine": np.nan, "low": np.nan, "high": np.nan, "prompts": n}
    with warnings.catch_warnings():
        if name != _LESS_PAIRS:  # one warning is enough: that of the comparison, which has the fewest prompts
            warnings.simplefilter("ignore", FewPromptsWarning)
        effect = mean_effect(values[used][None], [str(i) for i in range(n)], seed=seed)
    most = 2.0 if name in (_LESS_WITHIN, _LESS_PAIRS) else 1.0
    low, high = (float(np.clip(limit[0], -most, most)) for limit in (effect.low, effect.high))
    return {"cosine": float(effect.change[0]), "low": low, "high": high, "prompts": n}


def _pairing_p(cross: Float[np.ndarray, "prompt prompt"], tasks: Shaped[np.ndarray, " prompt"], seed: int) -> float:
    """Return the share of random pairings of rows and columns within tasks with at least the mean of the true ones."""
    if len(cross) < MIN_PROMPTS:
        return np.nan
    codes = np.unique(tasks, return_inverse=True)[1].ravel()
    rows = np.argsort(codes, kind="stable")
    keys = np.random.default_rng(seed).random((_PAIRINGS, len(codes)))
    columns = np.argsort(codes + keys, axis=1)  # the tasks in the order of `rows`, each in a random order
    means = cross[rows, columns].mean(1)
    return float((1 + (means >= np.diag(cross).mean() - 1e-12).sum()) / (1 + _PAIRINGS))


def _influences(graphs: Sequence[AttributionGraph], pairs: Sequence[Pair]) -> Float[np.ndarray, "prompt name"]:
    """Return the influence of heads and experts by name, each prompt's of length 1."""
    names = sorted({name for pair in pairs for one in pair.values() for name in _inner(one).index})
    rows = np.stack([_inner(one).reindex(names, fill_value=0.0).to_numpy() for one in graphs])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _inner(graph: AttributionGraph) -> "pd.Series[float]":
    nodes = graph.nodes.assign(name=_names(graph))
    inner = nodes[nodes["kind"].isin(("head", "expert"))]
    return inner.groupby("name")["influence"].sum()
