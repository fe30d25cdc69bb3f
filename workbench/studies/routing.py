"""The routing study: which experts the tokens of each channel and effort go to, and where that differs.

`load` describes cells (channel × effort) one by one, `divergence` compares two conditions, `study` does both for a run.

Load is the share of routed slots, from counts of selections: neither the router's full softmax nor the gates. Balance
measures follow the field: MaxVio (arXiv 2408.15664), coefficient of variation, effective experts = exp(entropy).
"""

import zlib
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Num

from workbench.counting import count_of
from workbench.harmony.messages import EFFORTS
from workbench.registry import Study
from workbench.studies import statistics
from workbench.studies.comparison import (
    Between,
    Run,
    axes,
    cells,
    conditions,
    labels,
    members,
    places,
    prompts,
    sum_by,
)
from workbench.studies.divergence import N_BOOT, N_PERMUTATIONS, divergence
from workbench.studies.intervals import MIN_PROMPTS, within_bounds
from workbench.studies.layer_experts import layer_experts
from workbench.studies.resampling import (
    IntervalMethod,
    bias_corrected,
    bootstrap_weights,
    mean_interval,
    recentred_interval,
)
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import merged_prompts
from workbench.studies.specialization import coactivation, specialization

__all__ = ["divergence", "load", "study"]

_POOLED = "slots of all tokens of the cell pooled, so long sequences weigh more"
_RECENTRED = "95 %, bootstrap over prompts, percentiles recentred on the bias-corrected estimate"
_EFFECTIVE = "exp of the limits of the entropy"

STUDY = Study(
    name="routing",
    title="Experts",
    question="Which experts process the tokens of each channel and effort, and where do they differ?",
    requires=("routing",),
    compute="sums of the run; bootstrap and permutations over prompts",
    options={
        "n_boot": "Bootstrap draws of prompts.",
        "n_permutations": "Permutations of conditions within prompts.",
    },
    figures="workbench.figures.routing",
    main_figures=("entropy_by_layer", "load_analysis_high", "load_final_high", "divergence_analysis_vs_final"),
    page="experts",
    order=10,
)
DEFINITIONS = {
    "share": Definition("load share", "1", f"fraction of routed slots that went to this expert; {_POOLED}"),
    "share_low": Definition("load share, lower limit", "1", "lower limit of share"),
    "share_high": Definition("load share, upper limit", "1", "upper limit of share"),
    "gate_share": Definition("gate share", "1", f"fraction of the summed gate weights on this expert; {_POOLED}"),
    "entropy": Definition("entropy of the load", "nat", "H(share), plug-in: biased downwards when prompts are few"),
    "entropy_corrected": Definition(
        "entropy of the load, bias-corrected", "nat", "2 H(share) − bootstrap mean, within [0, log E]", ci=_RECENTRED
    ),
    "entropy_low": Definition("entropy, lower limit", "nat", "lower limit of entropy_corrected", ci=_RECENTRED),
    "entropy_high": Definition("entropy, upper limit", "nat", "upper limit of entropy_corrected", ci=_RECENTRED),
    "entropy_normalised": Definition("entropy over its maximum", "1", "H(share) / log E, plug-in"),
    "effective_experts": Definition("effective experts", "experts", "exp(H(share)), plug-in; from 1 to E"),
    "effective_experts_low": Definition("effective experts, lower limit", "experts", _EFFECTIVE, ci=_RECENTRED),
    "effective_experts_high": Definition("effective experts, upper limit", "experts", _EFFECTIVE, ci=_RECENTRED),
    "gini": Definition("Gini coefficient of the load", "1", "0 even, 1 − 1/E when one expert takes all"),
    "max_violation": Definition("MaxVio", "1", "largest load over the mean load, less 1"),
    "cv": Definition("coefficient of variation of the load", "1", "standard deviation over mean, over all E experts"),
    "never_selected": Definition("experts never selected", "experts", "experts that no token of the cell went to"),
    "tokens": Definition("tokens", "tokens", "tokens of the cell"),
    "sequences": Definition("sequences", "sequences", "sequences with at least one token in the cell"),
    "prompts": Definition("prompts", "prompts", "different prompts of those sequences: the sampling unit"),
}

METHOD = (
    "Load is pooled over the tokens of a cell; its sampling unit is the prompt. Cells with no token are missing. E is "
    "the number of experts of the layer. Intervals need five prompts and are too narrow below about fifty; that of an "
    "expert which no prompt used is Wilson's of the number of prompts. Whether two cells' intervals overlap is no "
    "test; divergence() tests."
)
NOT_CONTROLLED = "Cells are not matched on task, position, length or words."


def load(
    run: Run,
    by: Sequence[str] = ("channel", "effort"),
    channels: Sequence[str] | None = None,
    *,
    n_boot: int = N_BOOT,
    seed: int = 0,
    interval: IntervalMethod = "bca",
) -> xr.Dataset:
    """Return the expert load of every cell (the labels that `by` names) and layer, and how uniform it is.

    `channels` selects some (all by default); what `by` does not name is pooled. `interval` is that of the shares.
    """
    counts, gates, tokens = (run.summary(name) for name in ("expert_count", "gate_sum", "tokens"))
    split, prompt = axes(tokens, by, channels), merged_prompts(run, tokens)[0]
    own = layer_experts(run, counts.sizes["layer"], counts.sizes["expert"])
    descriptions = []
    for cell in cells(tokens, by, channels):
        pooled = [
            block.sel(channel=list(cell.channels)).isel(sequence=cell.sequences).sum("channel")
            for block in (counts, gates)
        ]
        # seeded by what the cell is, not by when it comes: a cell keeps its interval whatever else is asked for
        rng = np.random.default_rng([seed, zlib.crc32("/".join(cell.labels.values()).encode())])
        described = _describe(
            sum_by(pooled[0].transpose("sequence", "layer", "expert").values, prompt[cell.sequences]),
            pooled[1].transpose("sequence", "layer", "expert").values.sum(axis=0),
            own,
            n_boot,
            rng,
            interval,
        )
        described["tokens"] = tokens.sel(channel=list(cell.channels)).values[cell.sequences].sum()
        described["sequences"] = np.asarray(len(cell.sequences))
        described["prompts"] = np.asarray(len(np.unique(prompt[cell.sequences])))
        descriptions.append(described)
    shape = tuple(len(values) for values in split.values())
    variables = {}
    for name in DEFINITIONS:
        values = np.stack([described[name] for described in descriptions])
        variables[name] = (
            (*split, "layer", "expert")[: len(split) + values.ndim - 1],
            values.reshape(shape + values.shape[1:]),
        )
    coords = split | places(counts)
    parameters = {"by": list(by), "channels": split.get("channel", channels), "n_boot": n_boot, "interval": interval}
    title = f"Expert load by {', '.join((*by, 'layer'))}"
    result = dataset(variables, coords, DEFINITIONS, provenance("routing", title, run.digest, seed, parameters))
    for name in ("share", "share_low", "share_high"):
        result[name].attrs["ci"] = f"95 %, bootstrap over prompts, {interval}"
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": _words(result)}
    return result


def _describe(
    counts: Num[np.ndarray, "prompt layer expert"],
    gates: Num[np.ndarray, "layer expert"],
    own: Int[np.ndarray, " layer"],
    n_boot: int,
    rng: np.random.Generator,
    interval: IntervalMethod,
) -> dict[str, np.ndarray]:
    """Return every measure of one cell, by layer; all missing when it has no token. own: the experts of each layer."""
    weights = bootstrap_weights(len(counts), n_boot, rng) if len(counts) >= MIN_PROMPTS else None
    layers = [_describe_layer(counts[:, i, :n], gates[i, :n], weights, interval) for i, n in enumerate(own)]
    widest = counts.shape[-1]
    return {name: np.stack([_padded(layer[name], widest) for layer in layers]) for name in layers[0]}


def _padded(values: statistics.Array, n: int) -> statistics.Array:
    """Return values by expert with NaN up to n, where a layer has fewer; a value of the layer as it is."""
    return values if np.ndim(values) == 0 else np.pad(values, (0, n - len(values)), constant_values=np.nan)


def _describe_layer(
    counts: Num[np.ndarray, "prompt expert"],
    gates: Num[np.ndarray, " expert"],
    weights: Float[np.ndarray, "replicate prompt"] | None,
    interval: IntervalMethod,
) -> dict[str, statistics.Array]:
    """Return every measure of one layer of a cell, with intervals if there are weights of a bootstrap."""
    share = statistics.share(counts.sum(axis=0))
    entropy = statistics.entropy(share)
    most = np.log(share.shape[-1])
    description: dict[str, statistics.Array] = {
        "share": share,
        "gate_share": statistics.share(gates),
        "entropy": entropy,
        "entropy_normalised": entropy / most,
        "effective_experts": np.exp(entropy),
        "gini": statistics.gini(share),
        "max_violation": statistics.max_violation(share),
        "cv": statistics.coefficient_of_variation(share),
        "never_selected": np.where(np.isnan(entropy), np.nan, (share == 0).sum(axis=-1)),
    }
    if weights is not None:
        description |= _intervals(counts.astype(np.float64), weights, interval)
    else:
        description |= dict.fromkeys(("share_low", "share_high"), np.full_like(share, np.nan))
        description |= dict.fromkeys(("entropy_corrected", "entropy_low", "entropy_high"), np.asarray(np.nan))
    for name in ("entropy_corrected", "entropy_low", "entropy_high"):
        description[name] = np.clip(description[name], 0, most)
    for edge in ("low", "high"):
        description[f"effective_experts_{edge}"] = np.exp(description[f"entropy_{edge}"])
    return description


def _intervals(
    counts: Float[np.ndarray, "prompt expert"],
    weights: Float[np.ndarray, "replicate prompt"],
    interval: IntervalMethod,
) -> dict[str, statistics.Array]:
    """Bootstrap intervals of one layer's shares and entropy."""
    total = counts.sum(axis=0)
    share, replicates = statistics.share(total), statistics.share(weights @ counts)
    influence = counts - counts.sum(axis=1, keepdims=True) * share  # up to a factor, which BCa does not see
    share_low, share_high = within_bounds(
        share, *mean_interval(interval, share, replicates, influence), int((counts.sum(1) > 0).sum())
    )
    entropies = statistics.entropy(replicates)
    corrected = bias_corrected(statistics.entropy(share), entropies)
    entropy_low, entropy_high = recentred_interval(entropies, corrected)
    return {
        "share_low": share_low,
        "share_high": share_high,
        "entropy_corrected": corrected,
        "entropy_low": entropy_low,
        "entropy_high": entropy_high,
    }


def study(
    run: Run, *, n_boot: int = N_BOOT, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> dict[str, xr.Dataset]:
    """Load by channel and effort, analysis against final, and the most distant efforts in each channel.

    A comparison for which the run has no pairs is left out; the load's summary states which and why.
    """
    tokens = run.summary("tokens")
    datasets = {"load": load(run, n_boot=n_boot, seed=seed)}
    left_out = []
    for between, channel, pairs in _planned(tokens):
        within = f" in {channel}" if channel else ""
        a, b = next((pair for pair in pairs if _shared(tokens, between, pair, channel) > 1), ("", ""))
        if a:
            name = f"{a}_vs_{b}" + (f"_in_{channel}" if channel else "")
            datasets[name] = divergence(
                run, between, a, b, channel=channel, n_boot=n_boot, n_permutations=n_permutations, seed=seed
            )
        else:
            left_out.append(f"Skipped: {between}s{within}, as fewer than two prompts have tokens of both.")
    for axis in ("channel", "effort", "task"):
        if (about := specialization(run, axis, seed=seed)) is not None:
            datasets[f"special_in_{axis}"] = about
    if {"coactivation", "transition"} <= set(getattr(run, "summaries", ())):
        datasets["together"] = coactivation(run, seed=seed)
    datasets["load"].attrs["summary"] = "\n".join([datasets["load"].attrs["summary"], *left_out])
    return datasets


def _planned(tokens: xr.DataArray) -> list[tuple[Between, str | None, list[tuple[str, str]]]]:
    """Return what to compare: (between, channel held fixed, pairs to try until one has data)."""
    efforts = [effort for effort in EFFORTS if effort in labels(tokens, "effort")]
    widest_first = sorted(combinations(efforts, 2), key=lambda pair: efforts.index(pair[0]) - efforts.index(pair[1]))
    channels = [
        channel for channel in ("prompt", "analysis", "commentary", "final") if tokens.sel(channel=channel).any()
    ]
    return [("channel", None, [("analysis", "final")]), *(("effort", channel, widest_first) for channel in channels)]


def _shared(tokens: xr.DataArray, between: Between, pair: tuple[str, str], channel: str | None) -> int:
    """Return the number of prompts with tokens on both sides."""
    first, _ = members(tokens, between, conditions(between, *pair, channel=channel))
    return len(np.unique(prompts(tokens)[first]))


def _words(result: xr.Dataset) -> str:
    """Return one line a cell: how even its load is; no cell is called different from another here."""
    axis_names = [str(dim) for dim in result["tokens"].dims]
    lines, empty = [], []
    for place in np.ndindex(result["tokens"].shape):
        cell = result.isel(dict(zip(axis_names, place, strict=True)))
        name = ", ".join(str(cell[axis].values) for axis in axis_names) or "all tokens"
        if not cell["tokens"]:
            empty.append(name)
            continue
        effective = cell["effective_experts"].values
        lines.append(
            f"{name}: {np.nanmean(effective):.1f} effective experts of {_range_of_experts(cell)} on average over "
            f"layers (from {np.nanmin(effective):.1f} to {np.nanmax(effective):.1f}); "
            f"{np.nansum(cell['never_selected']):.0f} of {int(cell['share'].count())} never selected; "
            f"{int(cell['tokens']):,} tokens of {count_of(int(cell['prompts']), 'prompt')}."
        )
    return "\n".join([*lines, *([f"No tokens: {'; '.join(empty)}."] if empty else [])])


def _range_of_experts(cell: xr.Dataset) -> str:
    """Return the number of experts of a layer, or the least and the most of any layer."""
    n = cell["share"].count("expert")
    return str(int(n.max())) if n.min() == n.max() else f"{int(n.min())} to {int(n.max())}"
