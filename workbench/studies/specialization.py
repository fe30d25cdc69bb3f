"""Coactivation of experts, dependence between layers, and the specialization of each expert.

Co-activation and transitions are sums over the run, so they come without intervals. Specialization is the mutual
information of a token's expert and a label, whose plug-in value is positive by chance: beside it stands what shuffled
labels give.

Reference: OLMoE, arXiv 2409.02060, sections 5.2 to 5.4; its co-activation is P(j | i), ours with its lift.
"""

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float, Num

from workbench.counting import count_of
from workbench.studies.comparison import Run, in_order, labels, places, sum_by
from workbench.studies.intervals import MIN_PROMPTS
from workbench.studies.layer_experts import layer_experts, mask_absent
from workbench.studies.resampling import count_at_least, permutation_p
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import merged_prompts
from workbench.studies.statistics import entropy, false_discovery, share

N_PERMUTATIONS = 200
_AT_ONCE = 32  # shuffles in one product

DEFINITIONS = {
    "given": Definition(
        "co-activation", "1", "P(expert_2 in the top k | expert in the top k), over tokens of the channel"
    ),
    "lift": Definition(
        "lift of co-activation", "1", "P(both) / (P(expert) P(expert_2)); below 1 on average, as k are chosen"
    ),
    "next_given": Definition(
        "next layer's expert",
        "1",
        "P(a slot's expert_2 in the next layer | a slot's expert in this one), pairs of slots",
    ),
    "information": Definition(
        "information between layers",
        "bit",
        "mutual information of a slot's expert in one layer and in the next, plug-in",
    ),
    "information_corrected": Definition(
        "information between layers, corrected",
        "bit",
        "less (E − 1) (E₂ − 1) / (2 N ln 2), the bias of N independent pairs; E, E₂: experts of the two layers",
    ),
    "label_information": Definition(
        "information about a label", "bit", "mutual information of a slot's expert and the label, plug-in"
    ),
    "label_information_null": Definition("information by chance", "bit", "its mean when labels are shuffled"),
    "nmi": Definition(
        "normalised information", "1", "label_information less its null, over the label's entropy; not below 0"
    ),
    "p": Definition(
        "p",
        "1",
        "share of shuffles whose labels' mean loads lie as far apart (squared distance)",
        null="labels shuffled within prompts; tasks between",
    ),
    "q": Definition("q", "1", "Benjamini–Hochberg over the layers of this label"),
    "label_lift": Definition(
        "lift for a label", "1", "mean load share of the expert with the label over its mean with all labels"
    ),
}
METHOD = (
    "Load shares by prompt and label, averaged over prompts; information in bits between a routed slot's expert and "
    "the label, less what shuffled labels give: channels and efforts shuffled within a prompt, tasks between prompts."
)
NOT_CONTROLLED = "Labels differ in words and position: an expert special in a channel may be special in its words."


def coactivation(run: Run, *, seed: int = 0) -> xr.Dataset:
    """Return which experts are selected at the same token and at the next layer, by channel."""
    pairs, follows = run.summary("coactivation"), run.summary("transition")
    counts = pairs.values.astype(np.float64)
    k_times_n = np.diagonal(counts, axis1=-2, axis2=-1)  # selections of each expert
    tokens = run.summary("tokens").sum("sequence").values.astype(np.float64)
    n = tokens[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        given = counts / k_times_n[..., None]
        lift = counts * n[..., None] / (k_times_n[..., None] * k_times_n[..., None, :])
    joint = follows.values.astype(np.float64)
    next_given = share(joint)
    e = joint.shape[-1]
    own = layer_experts(run, counts.shape[1], e)
    information, corrected = mutual_information(joint, own[:-1], own[1:])
    channel = [str(c) for c in pairs["channel"].values]
    layers = np.arange(counts.shape[1])
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "given": (("channel", "layer", "expert", "expert_2"), given),
        "lift": (("channel", "layer", "expert", "expert_2"), lift),
        "next_given": (("channel", "layer_pair", "expert", "expert_2"), next_given),
        "information": (("channel", "layer_pair"), information),
        "information_corrected": (("channel", "layer_pair"), corrected),
    }
    coords = {
        "channel": channel,
        "layer": layers,
        "layer_pair": layers[:-1],
        "expert": np.arange(e),
        "expert_2": np.arange(e),
    }
    attrs = provenance("routing", "Experts together, and layer after layer", run.digest, seed, {})
    lines = []
    for c, label in enumerate(channel):
        if tokens[c]:
            off = np.where(np.eye(e, dtype=bool), np.nan, lift[c])
            off[(k_times_n[c] < 20)[:, :, None] | (k_times_n[c] < 20)[:, None, :]] = np.nan
            if np.isfinite(off).any():
                layer, i, j = np.unravel_index(np.nanargmax(off), off.shape)
                between = (
                    f"{np.nanmean(corrected[c]):.3f} bits from a layer's expert to the next's on average"
                    if layers.size > 1
                    else ""
                )
                lines.append(
                    f"{label}: most above chance together, layer {layer} experts {i} and {j} (lift "
                    f"{off[layer, i, j]:.2f}); {between}."
                )
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": "\n".join(lines)}
    return mask_absent(dataset(variables, coords, DEFINITIONS, attrs), run)


def mutual_information(
    joint: Num[np.ndarray, "*cells a b"],
    n_a: Num[np.ndarray, "..."] | None = None,
    n_b: Num[np.ndarray, "..."] | None = None,
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Return the mutual information of counts: plug-in in bits, and less its first-order bias (Miller–Madow).

    n_a, n_b: how many values the two can take, where cells [*cells] have fewer than the table.
    """
    n_a, n_b = (joint.shape[axis] if n is None else n for axis, n in ((-2, n_a), (-1, n_b)))
    total = joint.sum((-2, -1))
    flat = share(joint.reshape(*joint.shape[:-2], -1))
    information = (entropy(share(joint.sum(-1))) + entropy(share(joint.sum(-2))) - entropy(flat)) / np.log(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = (n_a - 1) * (n_b - 1) / (2 * total * np.log(2))
    return np.maximum(information, 0), information - bias


def specialization(run: Run, axis: str, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0) -> xr.Dataset | None:
    """Return the information on a label (channel, effort, task) in expert choices; None where there is only one."""
    counts = run.summary("expert_count").transpose("sequence", "channel", "layer", "expert")
    names, by = _load_shares(run, counts, axis)
    if len(names) < 2:
        return None
    recorded = ~np.isnan(by).all((0, 1, 3))  # layers
    there = ~np.isnan(by[:, :, recorded]).any((2, 3)) & recorded.any()
    having = there.any(1)  # a prompt without a token of any label has nothing to shuffle
    by, there = np.nan_to_num(by[having]), there[having]
    rng = np.random.default_rng(seed)
    observed = _mean(by, there)
    information, size = _information(observed), _spread(observed)
    null, larger = np.empty((n_permutations, by.shape[2])), np.zeros(by.shape[2], dtype=np.int64)
    for start, shuffled in _shuffled(by, there, axis, n_permutations, rng):
        null[start : start + len(shuffled)] = np.stack([_information(table) for table in shuffled])
        larger += count_at_least(np.stack([_spread(table) for table in shuffled]), size)
    # channels and efforts are exchanged within prompts: one with a single label has nothing to exchange
    exchanged = int((there.any(1) if axis == "task" else there.sum(1) > 1).sum())
    tested = exchanged >= MIN_PROMPTS
    p = np.where(recorded, permutation_p(larger, n_permutations) if tested else np.nan, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = observed / observed.mean(0)
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "label_information": (("layer",), information),
        "label_information_null": (("layer",), null.mean(0)),
        "nmi": (("layer",), np.maximum(information - null.mean(0), 0) / np.log2(len(names))),
        "p": (("layer",), p),
        "q": (("layer",), false_discovery(p)),
        "label_lift": ((axis, "layer", "expert"), lift),
    }
    parameters = {"axis": axis, "n_permutations": n_permutations}
    attrs = provenance("routing", f"Information on the {axis} in expert choices", run.digest, seed, parameters)
    result = mask_absent(dataset(variables, {axis: names} | places(counts), DEFINITIONS, attrs), run)
    summary = _summary(result, axis, exchanged)
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": summary}
    return result


def _load_shares(
    run: Run, counts: xr.DataArray, axis: str
) -> tuple[list[str], Float[np.ndarray, "prompt label layer expert"]]:
    """Return the labels that the run has, and load shares by prompt and label, NaN where a prompt lacks a label.

    counts: selections of experts, by sequence, channel, layer and expert. Each prompt counts once, however long.
    """
    prompt = merged_prompts(run, counts)[0]
    if axis == "channel":
        names = [
            c for c in map(str, counts["channel"].values) if c not in ("frame", "other") and counts.sel(channel=c).any()
        ]
        return names, share(sum_by(counts.sel(channel=names).values.astype(np.int64), prompt))
    of = labels(counts, axis)
    names = in_order(list(of))
    written = counts.sel(channel=["analysis", "commentary", "final"]).sum("channel").values.astype(np.int64)
    by_label = [sum_by(np.where((of == n)[:, None, None], written, 0), prompt) for n in names]
    return names, share(np.stack(by_label, axis=1))


def _summary(result: xr.Dataset, axis: str, exchanged: int) -> str:
    """Return in how many layers there is information on the label; exchanged: prompts whose labels were shuffled."""
    if exchanged < MIN_PROMPTS:
        having = "" if axis == "task" else f" with tokens of two {axis}s"
        needed = f"at least {MIN_PROMPTS} are needed"
        return f"Information on the {axis} cannot be tested: {count_of(exchanged, 'prompt')}{having}, and {needed}."
    known = result["q"].values < 0.05
    text = f"Expert choices carry information on the {axis} in {int(known.sum())} of {known.size} layers beyond chance"
    if not known.any():
        return f"{text}."
    layer = int(np.argmax(result["nmi"].values))
    return f"{text}, most in layer {layer}: {float(result['nmi'][layer]):.1%} of the label's entropy."


def _shuffled(
    by: Float[np.ndarray, "prompt label layer expert"], there: np.ndarray, axis: str, n: int, rng: np.random.Generator
) -> Iterator[tuple[int, Float[np.ndarray, "permutation label layer expert"]]]:
    """Yield mean shares with labels exchanged within prompts or, for tasks, exchanged among prompts.

    A shuffle is a row of zeros and ones for each label, over prompts × labels: many are one product of matrices.
    """
    prompts_, kinds = there.shape
    flat = by.reshape(prompts_ * kinds, math.prod(by.shape[2:]))
    row = np.arange(prompts_)
    of = np.maximum(there.sum(0), 1)[:, None, None]
    for start in range(0, n, _AT_ONCE):
        count = min(_AT_ONCE, n - start)
        take = np.zeros((count, kinds, prompts_ * kinds))
        for i in range(count):
            if axis == "task":
                own = there.argmax(1)
                take[i, own[rng.permutation(prompts_)], row * kinds + own] = 1
                continue
            # the labels a prompt has, in a random order, at the places of those it has
            random = np.argsort(np.where(there, rng.random(there.shape), 2.0), 1)
            in_order_ = np.argsort(~there, 1, kind="stable")
            has = np.take_along_axis(there, in_order_, 1)
            p, k = np.nonzero(has)
            take[i, in_order_[p, k], p * kinds + random[p, k]] = 1
        yield start, (take.reshape(count * kinds, -1) @ flat).reshape(count, kinds, *by.shape[2:]) / of


def _mean(
    by: Float[np.ndarray, "prompt label layer expert"], there: np.ndarray
) -> Float[np.ndarray, "label layer expert"]:
    """Return mean share over the prompts that have the label."""
    return by.sum(0) / np.maximum(there.sum(0), 1)[:, None, None]


def _spread(table: Float[np.ndarray, "label layer expert"]) -> Float[np.ndarray, " layer"]:
    """Squared distance of the labels' mean shares from their mean: what p rests on (see `divergence`)."""
    return ((table - table.mean(0)) ** 2).sum((0, 2))


def _information(table: Float[np.ndarray, "label layer expert"]) -> Float[np.ndarray, " layer"]:
    """Plug-in mutual information of label and expert in bits, by layer."""
    return mutual_information(table.transpose(1, 0, 2).astype(np.float64))[0]
