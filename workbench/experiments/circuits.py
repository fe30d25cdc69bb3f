"""Circuits: what the attribution graphs of many prompts have in common, and whether two channels share it.

    pairs = circuits.paired_graphs(model, rows)       # the same digit in analysis and in final, one pair a prompt
    circuits.compare(pairs)                           # which edges recur in each channel
    circuits.similarity(pairs)                        # within prompts, beside other prompts of the same channel

A node's name is its kind, layer and head or expert, without its position. The sampling unit is the prompt: of several
sequences of a prompt the first that has both tokens counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from workbench import harmony
from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.experiments.graph_export import label
from workbench.model.transformer import GptOss
from workbench.studies.intervals import mean_effect
from workbench.studies.statistics import false_discovery

Pair = Mapping[str, AttributionGraph]
CHANNELS = ("analysis", "final")


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
        pairs[row.prompt_id] = {
            channel: graph(model, ids[:pos], target=ids[pos], **options) for channel, pos in places.items()
        }
    if not pairs:
        raise InputError("no sequence has the first token of its final answer in its analysis: use other sequences")
    return list(pairs.values())


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
    found = pd.DataFrame(every, columns=["source", "target"])
    for channel, values in there.items():
        low, high = proportion_confint(values.sum(1), len(pairs), method="wilson")
        found = found.assign(**{channel: values.mean(1), f"{channel}_low": low, f"{channel}_high": high})
    more, fewer = ((there[a] & ~there[b]).sum(1) for a, b in (CHANNELS, CHANNELS[::-1]))
    found["difference"] = found["analysis"] - found["final"]
    found["p"] = [binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in zip(more, fewer, strict=True)]
    found["q"] = false_discovery(found["p"].to_numpy())
    return found.sort_values(["q", "difference"], ascending=[True, False], ignore_index=True)


def _edges(found: AttributionGraph) -> set[tuple[str, str]]:
    names = _names(found)
    ends = (found.edges[end].tolist() for end in ("source", "target"))
    return {(names[int(s)], names[int(t)]) for s, t in zip(*ends, strict=True)}


def _names(found: AttributionGraph) -> list[str]:
    return ["embedding" if row["kind"] == "embedding" else label(row) for _, row in found.nodes.iterrows()]


def similarity(pairs: Sequence[Pair], *, seed: int = 0) -> pd.DataFrame:
    """Return how alike circuits are: cosines of the influence of heads and experts, as means over prompts.

    Rows: the two channels of a prompt (`same prompt`), and each channel with that of other prompts (`analysis, other
    prompts`, `final, other prompts`), which is what a channel has in common with itself; then the difference of the
    first and the mean of the others. Intervals are bootstrap-t over prompts, which the comparisons with other prompts
    share: theirs are approximate.

    Raises:
        InputError: there are fewer than five pairs.
    """
    vectors = {channel: _influences([pair[channel] for pair in pairs], pairs) for channel in CHANNELS}
    n = len(pairs)
    values = {"same prompt": (vectors["analysis"] * vectors["final"]).sum(1)}
    for channel, rows in vectors.items():
        others = rows @ rows.T
        values[f"{channel}, other prompts"] = (others.sum(1) - np.diag(others)) / max(n - 1, 1)
    within = (values["analysis, other prompts"] + values["final, other prompts"]) / 2
    values["same prompt less other prompts"] = values["same prompt"] - within
    effect = mean_effect(np.stack(list(values.values())), [str(i) for i in range(n)], seed=seed)
    return pd.DataFrame({"cosine": effect.change, "low": effect.low, "high": effect.high}, index=list(values))


def _influences(graphs: Sequence[AttributionGraph], pairs: Sequence[Pair]) -> Float[np.ndarray, "prompt name"]:
    """Return the influence of heads and experts by name, each prompt's of length 1."""
    names = sorted({name for pair in pairs for found in pair.values() for name in _inner(found).index})
    rows = np.stack([_inner(found).reindex(names, fill_value=0.0).to_numpy() for found in graphs])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _inner(found: AttributionGraph) -> "pd.Series[float]":
    nodes = found.nodes.assign(name=_names(found))
    inner = nodes[nodes["kind"].isin(("head", "expert"))]
    return inner.groupby("name")["influence"].sum()
