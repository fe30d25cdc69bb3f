"""The probe trajectory study: from where in the chain of thought on can a label be read from activations?

The label belongs to a sequence: its answer is right, its task, or one of your own, as whether it refuses in the end. A
linear probe reads the last token of the first 0 %, 20 %, … 100 % of the analysis; 0 % is the token before it. Its AUC
on held-out prompts is compared with those of the token, the number of tokens so far, the bigram, and all tokens so far.

    found = study(run, label="correct")["trajectory"]

Reference: Reasoning Theater, arXiv 2603.05488; Hewitt & Liang 2019 (control tasks).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from workbench.counting import count_of, signed_interval
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.probe_folds import (
    AUC_DEFINITIONS,
    CI,
    FOLDS,
    Folds,
    Values,
    auc_variables,
    beyond_variables,
    gain_variables,
    pseudo_values,
)
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import independent_prompts

STUDY = Study(
    name="probe-trajectory",
    title="Probes along the analysis",
    question="From which point of the analysis on do activations predict a label better than its tokens do?",
    requires=("activations",),
    compute="probes of every recorded layer and point of the analysis, fitted five times; jackknife",
    options={
        "label": "Label of sequences: correct (default), task, domain or effort.",
        "hook": "Recorded hook point (default: hook_resid_post).",
        "channel": "Channel that is followed: analysis (default) or final.",
        "points": "Points at equal shares of the channel, the start excluded (default: 5).",
        "max_sequences": "Use at most this many sequences (default: 1000).",
    },
    figures="workbench.figures.probe_trajectory",
    page="probe-trajectory",
    order=49,
)
SOURCES = ("token", "position", "bigram", "tokens so far")
_FEW = 20  # sequences of a label, below which an AUC shows little
_MOST_TYPES = 512  # token types of the baseline of all tokens so far
DEFINITIONS = {
    **AUC_DEFINITIONS,
    "control": Definition("AUC of the control task", "1", "a random label for each prompt"),
    "baseline": Definition("AUC of a baseline", "1", "prediction from tokens and positions, without activations"),
    "gain": Definition("AUC gained since the start", "1", "AUC less that before the analysis, same layer", ci=CI),
    "q": Definition("q", "1", "Benjamini–Hochberg over layers and points"),
    "onset": Definition("onset", "1", "share of the analysis from which on every point is beyond the best baseline"),
}
METHOD = (
    "Ridge regression on the standardised activation of one token of each sequence, fitted on prompts and scored on "
    "others in five folds. Points: the token before the channel (share 0) and the last token of each share. Baselines "
    "at the same token: the share of the label among training tokens with the same id, number of tokens so far, or "
    f"bigram; and ridge regression on the counts of the {_MOST_TYPES} commonest token ids of the channel so far. "
    "Control task: a random label for each prompt. onset: the first share from which on all later points have q ≤ 0.05 "
    "and are above the best baseline."
)
NOT_CONTROLLED = (
    "That a label can be read does not show that the model uses it; ablate or steer to see. Shares of a short "
    "and a long analysis are different numbers of tokens. Counts of tokens so far ignore their order."
)


def study(
    run: Run,
    *,
    label: str | pd.Series | Mapping[int, Any] | Sequence[Any] = "correct",
    hook: str = "hook_resid_post",
    channel: str = "analysis",
    points: int = 5,
    max_sequences: int = 1000,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return how well a label of sequences can be read at points of the chain of thought, by layer.

    label: the name of a label, or a value for each sequence ("" for none). Sequences whose channel has fewer tokens
    than points are left out; `rests_on` counts the others.

    Raises:
        InputError: the activation, the label or the channel is unknown, or too few prompts or labels have it.
    """
    if channel not in ("analysis", "final") or points < 1 or max_sequences < 10:
        raise InputError(
            f"channel={channel!r}, points={points}, max_sequences={max_sequences}: expected analysis or final, at "
            "least 1 point and 10 sequences"
        )
    if isinstance(label, str) and label in token_labels.TOKEN_LABELS:
        raise InputError(f"label={label!r} is one of tokens: use correct, task, domain, effort, or values of your own")
    about = token_labels.recorded(run, hook)
    layers = [token_labels.layer_index(about, layer, int(run.model["n_layers"])) for layer in about.layers]
    read = [_read(run, about, index, label, channel, points, max_sequences, seed) for index in layers]
    table = read[0].table
    names = sorted(set(table["label"]))
    shares = np.linspace(0, 1, points + 1)
    aucs, fixed, control = [], [], np.empty((len(layers), len(shares)))
    for i in range(len(shares)):
        design = Folds(read[0].at(i), "last", seed)
        probes = [design.activation(one.x[:, i], names, 0.05) for one in read]
        aucs.append([probe[0] for probe in probes])
        control[:, i] = [probe[1][0] for probe in probes]
        words = design.activation(read[0].counts[:, i], names, 0.05)[0] if i else _chance(aucs[0][0])
        fixed.append([*(design.category(source, names) for source in SOURCES[:3]), words])
    variables = _variables(aucs, fixed, shares) | {"control": (("layer", "share"), control)}
    shown = label if isinstance(label, str) else "labels given by the caller"
    parameters = {"label": shown, "hook": hook, "channel": channel, "points": points, "max_sequences": max_sequences}
    n_prompts, rarest = int(table["prompt"].nunique()), table["label"].value_counts()
    attrs = provenance(STUDY.name, f"Probes of {shown} along {channel}", run.digest, seed, parameters) | {
        "rests_on": f"{count_of(len(table), 'sequence')} of {count_of(n_prompts, 'prompt')}, {len(names)} labels",
        "prompts": n_prompts,
        "rarest_label": f"{rarest.index[-1]}: {count_of(rarest.iloc[-1], 'sequence')}",
        "left_out": ", ".join(f"{name} ({n})" for name, n in read[0].rare.items()),
        "few": int(rarest.iloc[-1] < _FEW),
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"layer": list(about.layers), "share": shares.tolist(), "source": list(SOURCES)}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = _summary(result, channel)
    return {"trajectory": result}


class _Points:
    """The activations x [sequence point d] of one layer, counts of tokens so far [sequence point type], and labels."""

    def __init__(self, parts: list[tuple[np.ndarray, list[np.ndarray], dict[str, Any]]], rare: dict[str, int]) -> None:
        self.rare = rare  # labels that are left out, as fewer prompts than folds have them
        self.x = np.stack([x for x, _, _ in parts]).astype(np.float32)
        self.table = pd.DataFrame([row for _, _, row in parts])
        types = {int(t): i for i, t in enumerate(_commonest([written[-1] for _, written, _ in parts]))}
        self.counts = np.zeros((*self.x.shape[:2], len(types)), np.float32)
        for i, (_, written, _) in enumerate(parts):
            for j, ids in enumerate(written):
                for token in ids:
                    if (at := types.get(int(token))) is not None:
                        self.counts[i, j, at] += 1
        self.counts = np.log1p(self.counts)

    def at(self, point: int) -> pd.DataFrame:
        """Return label, prompt, id, the id before and the number of tokens so far at one point."""
        columns = {name: self.table[name].str[point] for name in ("id", "before", "position")}
        return self.table[["label", "prompt"]].assign(**columns)


def _commonest(written: Sequence[Int[np.ndarray, " token"]]) -> Int[np.ndarray, " type"]:
    types, counts = np.unique(np.concatenate(written), return_counts=True)
    return np.asarray(types[np.argsort(-counts, kind="stable")[:_MOST_TYPES]])


def _read(run: Run, about: Any, index: int, label: Any, channel: str, points: int, most: int, seed: int) -> _Points:
    """Return the sequences with a label and enough tokens in the channel, drawn at random where there are too many.

    Raises:
        InputError: fewer than two labels or five prompts remain.
    """
    number, rng = CHANNELS.index(channel), np.random.default_rng(seed)
    prompts_of = independent_prompts(run)  # duplicates are one prompt, so that no fold holds a copy of another's
    drawn: list[tuple[float, Any]] = []  # the same sequences in every layer
    for columns, values in token_labels.blocks(run, about, index):
        label_values = token_labels.values_of(label, columns, run)
        sequence, inside = columns["sequence"].to_numpy(), columns["channel"].to_numpy() == number
        ids = columns["id"].to_numpy(np.int64)
        for own in np.split(np.arange(len(columns)), np.flatnonzero(np.diff(sequence)) + 1):
            at = own[inside[own]]
            if len(at) < points or at[0] == own[0] or label_values[own[0]] == "":
                continue
            ends = [at[0] - 1, *(at[int(np.ceil(len(at) * k / points)) - 1] for k in range(1, points + 1))]
            if not np.isfinite(values[ends]).all():
                continue
            written = [ids[at[at <= end]] for end in ends]
            row = {
                "label": label_values[own[0]],
                "prompt": int(prompts_of[sequence[own[0]]]),
                "id": [int(ids[end]) for end in ends],
                "before": [int(ids[end - 1]) if end > own[0] else -1 for end in ends],
                "position": [len(w) for w in written],
            }
            drawn.append((rng.random(), (values[ends], written, row)))
        drawn = sorted(drawn, key=lambda item: item[0])[:most]
    counts = Counter(label for label, _ in {(row["label"], row["prompt"]) for _, (_, _, row) in drawn})
    rare = {name: n for name, n in counts.items() if n < FOLDS}
    parts = [part for _, part in drawn if part[2]["label"] not in rare]
    labels, prompts = {row["label"] for *_, row in parts}, {row["prompt"] for *_, row in parts}
    if len(labels) < 2 or len(prompts) < max(FOLDS, MIN_PROMPTS):
        raise InputError(
            f"{count_of(len(parts), 'sequence')} with at least {points} tokens in {channel} have "
            f"{len(labels)} labels and "
            f"{count_of(len(prompts), 'prompt')}: a probe needs two labels and "
            f"{max(FOLDS, MIN_PROMPTS)} prompts"
        )
    return _Points(parts, rare)


def _chance(like: Values) -> Values:
    """Return the AUC of no tokens: chance, with and without each group of prompts."""
    return 0.5, np.full(len(like[1]), 0.5)


def _variables(
    aucs: Sequence[Sequence[Values]], fixed: Sequence[Sequence[Values]], shares: Float[np.ndarray, " share"]
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return AUC, differences from the best baseline and from the start, and the onset. found: [share][layer]."""
    cells = ("layer", "share")
    own = np.stack([[pseudo_values(v) for v in layers] for layers in aucs]).T  # group layer share
    best = np.stack([pseudo_values(max(one, key=lambda v: float(np.nan_to_num(v[0])))) for one in fixed], 1)
    variables = auc_variables(cells, own)
    variables |= beyond_variables(cells, own - best[:, None]) | gain_variables(cells, own - own[..., :1])
    shown = (variables["q"][1] <= 0.05) & (variables["beyond_words_low"][1] > 0)
    from_here = np.flip(np.logical_and.accumulate(np.flip(shown, 1), 1), 1)
    onset = np.where(from_here.any(1), shares[from_here.argmax(1)], np.nan)
    auc = np.array([[v[0] for v in one] for one in fixed])
    return {**variables, "onset": (("layer",), onset), "baseline": (("share", "source"), auc)}


def _summary(result: xr.Dataset, channel: str) -> str:
    lines = [f"{result.attrs['rests_on']}, at {result.sizes['share']} points of {channel}."]
    if text := few_prompts(int(result.attrs["prompts"])):
        lines.append(f"Warning: {text}.")
    if result.attrs["left_out"]:
        lines.append(f"Skipped, as fewer than {FOLDS} prompts have them: {result.attrs['left_out']}.")
    if result.attrs["few"]:
        lines.append(f"Warning: few sequences have the rarest label ({result.attrs['rarest_label']}).")
    best = result["baseline"].max("source")
    lines.append("  best baseline: " + ", ".join(f"{float(v):.3f}" for v in best) + " from the start to the end.")
    for layer in map(int, result["layer"].values):
        one = result.sel(layer=layer)
        values = ", ".join(f"{float(v):.3f}" for v in one["auc"])
        beyond, low, high = (float(one[f"beyond_words{end}"][-1]) for end in ("", "_low", "_high"))
        onset = float(one["onset"])
        verdict = (
            f"beyond the best baseline from {onset:.0%} on"
            if np.isfinite(onset)
            else "not shown beyond the best baseline up to the end"
        )
        lines.append(
            f"  layer {layer}: AUC {values}; {verdict}; at the end {signed_interval(beyond, low, high, 3)} beyond the "
            "best baseline."
        )
    return "\n".join(lines)
