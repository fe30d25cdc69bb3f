"""How differently two conditions route: Jensen–Shannon divergence by layer, difference of load by expert.

Both are computed on means over prompts of each prompt's own load shares, so every prompt counts once. Token-weighted
sums would be dominated by the longest texts, and swapping labels inside a pair would then mix long with short ones: the
test loses nearly all its power where analysis is twenty times as long as final.

Difference, interval and verdict of an expert are those of `workbench.studies.contrast` (Student's t over prompts,
corrected for skewness), so that the same question has the same answer in every study, and no number of permutations
limits the smallest p.

The p-value of a layer rests on the squared Euclidean distance between the two mean shares. Under swapping its null is
calibrated whatever the token counts; that of the divergence itself is not when one side has very few tokens (a rarely
used expert goes unseen). The divergence is the effect size, shown with its own null mean and band.
"""

from math import comb
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.studies.comparison import Between, Comparison, Condition, Run, compare, conditions, has_tokens, places
from workbench.studies.difference_tests import paired_test, unpaired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.layer_experts import mask_absent
from workbench.studies.resampling import (
    TAILS,
    Independent,
    IntervalMethod,
    Paired,
    count_at_least,
    mean_interval,
    permutation_p,
    recentred_interval,
)
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import duplicates_warning, merged_prompts
from workbench.studies.statistics import ALPHA, Array, false_discovery, jensen_shannon
from workbench.studies.wording import wording

# one changed expert among gpt-oss-20b's 768 cells can reach q < 0.05
N_PERMUTATIONS = 20_000
N_BOOT = 1_000

DifferenceInterval = Literal["t", "bca", "percentile"]

_SHARE = "fraction of a sequence's routed slots that went to this expert, averaged over sequences, then over prompts"
_NULL = "the two conditions swapped within prompts (paired), or prompts reassigned to the two groups (tasks)"
_SHIFTED = "95 %, bootstrap over prompts, percentiles recentred on the excess (replicates repeat the plug-in bias)"
_T = "Student's t over prompts, corrected for skewness (paired: of the differences within prompts)"
_FAMILY = f"Benjamini–Hochberg over all layers × experts of this comparison; different means below {ALPHA}"

DEFINITIONS = {
    "jsd": Definition("Jensen–Shannon divergence, plug-in", "bit", "between the mean loads a and b of a layer"),
    "null_mean": Definition("divergence without a difference", "bit", "mean of jsd over the permutations", null=_NULL),
    "null_low": Definition("null band, lower edge", "bit", "2.5th percentile of jsd over the permutations", null=_NULL),
    "null_high": Definition("null band, upper edge", "bit", "97.5th percentile of jsd over permutations", null=_NULL),
    "excess": Definition("excess divergence", "bit", "jsd − null_mean: below 0 means less than chance", ci=_SHIFTED),
    "p": Definition("p of the layer", "1", "permutation test of the squared distance of mean loads", null=_NULL),
    "q": Definition("q of the layer", "1", "Benjamini–Hochberg over the layers of this comparison", null=_NULL),
    "different": Definition("routes differently", "1", f"q < {ALPHA} and the interval of the excess lies above zero"),
    "share_a": Definition("load share in a", "1", _SHARE),
    "share_b": Definition("load share in b", "1", _SHARE),
    "difference": Definition("difference of load share", "1", "share_a − share_b: risk difference over k"),
    "difference_p": Definition("p of the expert", "1", _T, null="no difference of mean shares"),
    "difference_q": Definition("q of the expert", "1", _FAMILY, null="no difference of mean shares"),
    "difference_p_family": Definition(
        "family-wise p of the expert",
        "1",
        "max-T over all cells: reaches small values with few permutations",
        null=_NULL,
    ),
    "expert_different": Definition("used differently", "1", f"difference_q < {ALPHA} and the interval excludes zero"),
}

METHOD = (
    "Load is the fraction of routed slots (k a token) per expert, averaged over a prompt's sequences, then prompts. "
    "Divergence is the plug-in Jensen–Shannon divergence in bits; the excess is what remains over the mean of the "
    "permutation null. A layer or an expert is called different only if q < 0.05 and its interval excludes zero. "
    "Expert numbers mean nothing across layers, and association is not causation."
)
NOT_CONTROLLED: dict[Between, str] = {
    "channel": "Analysis comes before final: position, visible keys and words differ with it. Sums per channel "
    "can neither match tokens nor equalise token budgets; a task can be held fixed (task=…).",
    "effort": "What the model writes differs in words and length with effort, hence in position. The prompt channel "
    "is the matched comparison: both efforts read the same text at the same positions, save the effort's own word.",
    "task": "Tasks differ in words, length and position, and their prompts are not paired.",
}


def divergence(
    run: Run,
    between: Between = "channel",
    a: str = "analysis",
    b: str = "final",
    *,
    channel: str | None = None,
    effort: str | None = None,
    task: str | None = None,
    n_boot: int = N_BOOT,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
    interval: DifferenceInterval = "t",
) -> xr.Dataset:
    """Compare the routing of `a` and `b`: channels within a sequence, efforts within a prompt, or tasks unpaired.

    `channel`, `effort` and `task` hold the other two conditions fixed; between efforts or tasks, `channel` is needed.

    Raises:
        InputError: the number of permutations or the kind of interval is not possible.
    """
    if n_permutations < 1:
        raise InputError(f"n_permutations={n_permutations}; a test needs at least 1 permutation")
    if interval not in get_args(DifferenceInterval):
        raise InputError(f"interval={interval!r} is unknown; choose t, bca or percentile")
    sides = conditions(between, a, b, channel=channel, effort=effort, task=task)
    counts = run.summary("expert_count")
    tokens = run.summary("tokens")
    prompt, merged = merged_prompts(run, tokens)
    comparison = compare(counts, tokens, between, sides, prompt)
    results = _by_layer(comparison, n_boot, n_permutations, np.random.default_rng(seed), interval)
    variables = {name: (("layer", "expert")[: values.ndim], values) for name, values in results.items()}
    n_prompts = [side.n_prompts for side in (comparison.a, comparison.b)]
    rests_on = f"{count_of(n_prompts[0], 'prompt')}" + ("" if comparison.paired else f" against {n_prompts[1]}")
    parameters: dict[str, Any] = {
        "between": between,
        "a": a,
        "b": b,
        "channel": channel,
        "effort": effort,
        "task": task,
    }
    parameters |= {"n_boot": n_boot, "n_permutations": n_permutations, "interval": interval}
    title = f"Routing of {sides[0]} against {sides[1]}, {rests_on}"
    attrs = provenance("routing", title, run.digest, seed, parameters) | {
        "between": between,
        "a": a,
        "b": b,
        "within": " ".join(fixed for fixed in (channel, effort, task) if fixed),
        "rests_on": rests_on,
        "paired": int(comparison.paired),
        "prompts": min(n_prompts),
        "tokens_a": comparison.a.n_tokens,
        "tokens_b": comparison.b.n_tokens,
        "duplicate_prompts": merged,
        **_excluded(tokens, sides, comparison, prompt),
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED[between],
    }
    result = mask_absent(dataset(variables, places(counts), DEFINITIONS, attrs), run)
    for name in ("difference", "difference_low", "difference_high"):
        how = (
            "jackknife over prompts, Student's t corrected for skewness"
            if interval == "t"
            else f"bootstrap over prompts, {interval}"
        )
        result[name].attrs["ci"] = f"95 %, {how}"
    result.attrs["summary"] = _words(result)
    return result


def _by_layer(
    comparison: Comparison, n_boot: int, n_permutations: int, rng: np.random.Generator, interval: DifferenceInterval
) -> dict[str, np.ndarray]:
    """Return every layer with the same resamples and permutations, then the corrections for looking at many of them."""
    n_a, n_b = comparison.a.n_prompts, comparison.b.n_prompts
    design = (
        Paired(n_a, n_permutations, n_boot, rng)
        if comparison.paired
        else Independent(n_a, n_b, n_permutations, n_boot, rng)
    )
    largest_z = np.zeros(n_permutations)
    layers = [
        _layer(design, comparison.a.mean_share(layer), comparison.b.mean_share(layer), largest_z, interval)
        for layer in range(comparison.a.counts.shape[1])
    ]
    results = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    few = min(n_a, n_b) < MIN_PROMPTS
    if few or _smallest_p(n_a, n_b, comparison.paired) > ALPHA:
        results["p"] = np.full_like(results["p"], np.nan)
    for name in ("excess_low", "excess_high", "difference_low", "difference_high") if few else ():
        results[name] = np.full_like(results[name], np.nan)
    results["q"] = false_discovery(results["p"])
    results["different"] = (results["q"] < ALPHA) & (results["excess_low"] > 0)
    results |= _experts(comparison, results, interval)
    z = results.pop("z")
    as_large = n_permutations - np.searchsorted(np.sort(largest_z), z.ravel() * (1 - 1e-12)).reshape(z.shape)
    results["difference_p_family"] = np.where(np.isnan(z), np.nan, permutation_p(as_large, n_permutations))
    return results


def _smallest_p(n_a: int, n_b: int, paired: bool) -> float:
    """Return the smallest p that any permutation test of so few prompts can have."""
    if paired:
        return 2.0 ** (1 - n_a)
    return (2 if n_a == n_b else 1) / comb(n_a + n_b, n_a)


def _experts(
    comparison: Comparison, results: dict[str, np.ndarray], interval: DifferenceInterval
) -> dict[str, np.ndarray]:
    """Interval, p, q and verdict of every expert, as in `contrast`."""
    layers = range(comparison.a.counts.shape[1])
    a, b = (np.stack([side.mean_share(layer) for layer in layers], 1) for side in (comparison.a, comparison.b))
    tested = paired_test(a - b) if comparison.paired else unpaired_test(a, b)
    low, high = (
        (tested["low"], tested["high"]) if interval == "t" else (results["difference_low"], results["difference_high"])
    )
    return {
        "difference_low": low,
        "difference_high": high,
        "difference_p": tested["p"],
        "difference_q": tested["q"],
        "expert_different": (tested["q"] < ALPHA) & (low * high > 0),
    }


def _excluded(
    tokens: xr.DataArray, sides: tuple[Condition, Condition], comparison: Comparison, prompt: np.ndarray
) -> dict[str, int]:
    """Return how many prompts, sequences and tokens of the two sides are left out, as they cannot be paired."""
    on_side = [has_tokens(tokens, side) for side in sides]
    either = on_side[0] | on_side[1]
    total = sum(
        int(tokens.sel(channel=side.channel).values[chosen].sum()) for side, chosen in zip(sides, on_side, strict=True)
    )
    used = np.union1d(comparison.a.prompt, comparison.b.prompt)
    members_used = np.union1d(comparison.a.sequences, comparison.b.sequences)
    return {
        "prompts_excluded": len(np.unique(prompt[either])) - len(used),
        "sequences_excluded": int(either.sum()) - len(members_used),
        "tokens_excluded": total - comparison.a.n_tokens - comparison.b.n_tokens,
    }


def _layer(
    design: Paired | Independent,
    a: Float[np.ndarray, "prompt_a expert"],
    b: Float[np.ndarray, "prompt_b expert"],
    largest_z: Float[np.ndarray, "permutation"],
    interval: DifferenceInterval,
) -> dict[str, Array]:
    """Effect sizes, nulls and intervals of one layer; raises `largest_z` to this layer's largest score."""
    share_a, share_b = a.mean(axis=0), b.mean(axis=0)
    difference = share_a - share_b
    size, jsd = np.abs(difference), jensen_shannon(share_a, share_b)
    sd = design.permutation_sd(a, b)
    null_jsd = np.empty(len(largest_z))
    farther, stop = np.zeros((), dtype=np.int64), 0
    for null_a, null_b in design.permuted(a, b):
        start, stop = stop, stop + len(null_a)
        null_size = np.abs(null_a - null_b)
        null_jsd[start:stop] = jensen_shannon(null_a, null_b)
        farther += count_at_least((null_size**2).sum(axis=-1), (size**2).sum())
        z = np.divide(null_size, sd, out=np.zeros_like(null_size), where=sd > 0)
        np.maximum(largest_z[start:stop], z.max(axis=-1), out=largest_z[start:stop])
    resampled_a, resampled_b = design.resampled(a, b)
    null_low, null_high = np.quantile(null_jsd, TAILS)
    excess = jsd - null_jsd.mean()
    excess_low, excess_high = recentred_interval(jensen_shannon(resampled_a, resampled_b), excess)
    method: IntervalMethod = "percentile" if interval == "t" else interval
    low, high = mean_interval(method, difference, resampled_a - resampled_b, design.influence(a, b))
    missing = np.isnan(size)
    return {
        "jsd": jsd,
        "null_mean": null_jsd.mean(),
        "null_low": null_low,
        "null_high": null_high,
        "excess": excess,
        "excess_low": excess_low,
        "excess_high": excess_high,
        "p": np.where(missing.any(), np.nan, permutation_p(farther, len(largest_z))),
        "share_a": share_a,
        "share_b": share_b,
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "z": np.divide(size, sd, out=np.where(missing, np.nan, 0.0), where=sd > 0),
    }


def _words(result: xr.Dataset) -> str:
    """Return the summary of the comparison; nothing whose interval includes zero is called different."""
    attrs, different, layers = result.attrs, result["different"].values, result["layer"].values
    missing = np.isnan(result["jsd"].values)
    how = "both conditions of each" if attrs["paired"] else "not paired"
    lines = [f"Based on {attrs['rests_on']} ({how}), {attrs['tokens_a']:,} and {attrs['tokens_b']:,} tokens."]
    if not attrs["paired"]:
        lines.append(f"Unpaired. {attrs['not_controlled']}")
    if attrs["tokens_excluded"]:
        lines.append(
            f"Excluded, as not paired: {count_of(attrs['prompts_excluded'], 'prompt')}, "
            f"{count_of(attrs['sequences_excluded'], 'sequence')}, "
            f"{attrs['tokens_excluded']:,} tokens."
        )
    if warning := duplicates_warning(attrs["duplicate_prompts"]):
        lines.append(warning)
    if warning := few_prompts(attrs["prompts"]):
        lines.append(f"Warning: {warning}.")
    if different.any():
        most = int(np.argmax(np.where(different, result["excess"].values, -np.inf)))
        top = result.isel(layer=most)
        lines.append(
            f"Routing differs in {different.sum()} of {(~missing).sum()} layers, most in layer "
            f"{layers[most]}: {top.excess:.3f} bits over chance [{top.excess_low:.3f}, {top.excess_high:.3f}]."
        )
        if not (different | missing).all():
            lines.append(f"No difference shown in {_layer_names(layers[~different & ~missing])}.")
    elif np.isfinite(result["p"].values).any() or missing.all():
        lines.append("No difference shown in any layer.")
    elif attrs["prompts"] < MIN_PROMPTS:
        lines.append(f"Layers cannot be tested: at least {MIN_PROMPTS} prompts are needed.")
    else:
        lines.append("Layers cannot be tested: no permutation of so few prompts has a p below 0.05.")
    if missing.any():
        lines.append(f"Missing, as nothing was counted: {_layer_names(layers[missing])}.")
    cells = result["expert_different"].values
    if attrs["prompts"] < MIN_PROMPTS:
        return "\n".join([*lines, f"Experts cannot be tested: at least {MIN_PROMPTS} prompts are needed."])
    lines.append(f"Used differently: {cells.sum()} of {int(result['share_a'].count())} experts (layer × expert).")
    size, words = np.where(cells, np.abs(result["difference"].values), -np.inf), wording("experts")
    for place in np.argsort(-size, axis=None)[: min(3, cells.sum())]:
        layer, expert = np.unravel_index(place, size.shape)
        cell = result.isel(layer=int(layer), expert=int(expert))
        sides = words.sides(float(cell.share_a), float(cell.share_b), attrs["a"], attrs["b"])
        interval = words.interval(*(float(cell[f"difference{end}"]) for end in ("", "_low", "_high")))
        lines.append(f"  layer {layers[layer]} expert {expert}: {sides}; difference {interval}")
    return "\n".join(lines)


def _layer_names(layers: np.ndarray) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
