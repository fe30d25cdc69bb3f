"""The sinks study: attention to the learned sinks by layer, head and position, channel and effort.

Sink attention is the probability 1 − Σ attention of a head at a token. With equal logits it falls with the number
of keys that a head sees, so layers with a window and full layers are distinguished, and every comparison of channels or
efforts is made at equal position too. Means of cells are over tokens, differences are within prompts; the sampling
unit is the prompt.

Reference: arXiv 2309.17453 and 2410.10781 on attention sinks (there on the first token; gpt-oss learns a logit a head).
"""

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.messages import EFFORTS
from workbench.registry import Study
from workbench.studies.comparison import Run, axes, cells, sum_by
from workbench.studies.contrast import Plan, contrasts
from workbench.studies.intervals import ratio, within_bounds
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import TokenRun, independent_prompts, merged_prompts, token_blocks

STUDY = Study(
    name="sinks",
    title="Attention sinks",
    question="How much attention goes to the learned sinks, and does it differ by channel, effort or position?",
    requires=("sinks or sink_sums",),
    compute="one pass over the run's tokens; jackknife over prompts",
    figures="workbench.figures.sinks",
    main_figures=("mass_analysis_high", "sizes"),
    page="sinks",
    order=20,
)
RATE_ABOVE = 0.3  # the threshold of arXiv 2410.10781
_BINS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_CI = "95 %, delete-one jackknife over prompts"

DEFINITIONS = {
    "mass": Definition("sink attention", "1", "mean over the cell's tokens of the probability on the sink", ci=_CI),
    "spread": Definition("standard deviation", "1", "of the probability on the sink over the cell's tokens"),
    "rate": Definition("sink rate", "1", f"share of tokens and heads with more than {RATE_ABOVE} on the sink"),
    "tokens": Definition("tokens", "tokens", "tokens of the cell"),
    "prompts": Definition("prompts", "prompts", "different prompts of those tokens: the sampling unit"),
    "window": Definition("window", "keys", "keys that the layer sees at most; 0: all"),
}
METHOD = (
    "Sink attention is a head's probability on its learned sink, averaged over the tokens of a cell; intervals are the "
    "delete-one jackknife over prompts. By position: tokens of all sequences in bins that double."
)
NOT_CONTROLLED = "Cells are not matched on words, task or position; the comparisons have their control of position."


def study(run: Run, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the mass by channel and effort; by position; analysis against final, halves of analysis, and efforts.

    A comparison for which the run has no tokens or no pairs is left out; the summary of `mass` states which and why.
    """
    datasets = {"mass": mass(run, seed=seed)}
    if not isinstance(run, TokenRun):
        return datasets
    try:
        datasets["position"] = by_position(run, seed=seed)
    except InputError as error:  # sums alone were recorded
        datasets["mass"].attrs["summary"] += f"\nSkipped: what needs single tokens, as {error}"
        return datasets
    efforts = [e for e in EFFORTS if e in set(run.sequences["effort"])]
    planned = {
        "analysis_vs_final": Plan("channel", "analysis", "final"),
        "halves_of_analysis": Plan("half", "first", "second", "analysis"),
    }
    if len(efforts) > 1:
        planned |= {
            f"{efforts[0]}_vs_{efforts[-1]}_in_{c}": Plan("effort", efforts[0], efforts[-1], c)
            for c in ("prompt", "analysis", "final")
        }
    compared, refused = contrasts(run, "sink", planned, study="sinks", seed=seed)
    datasets |= compared
    left_out = [f"Skipped: a comparison of sinks, as {reason}." for reason in dict.fromkeys(refused.values())]
    datasets["mass"].attrs["summary"] = "\n".join([datasets["mass"].attrs["summary"], *left_out])
    return datasets


def mass(run: Run, by: tuple[str, ...] = ("channel", "effort"), *, seed: int = 0) -> xr.Dataset:
    """Return mean sink attention [cells, layer, head] with intervals, from the sums of sequences."""
    sums, squares, tokens = (run.summary(name) for name in ("sink_sum", "sink_sumsq", "tokens"))
    split, prompt = axes(tokens, by, None), merged_prompts(run, tokens)[0]
    parts: dict[str, list[np.ndarray]] = {
        n: [] for n in ("mass", "mass_low", "mass_high", "spread", "tokens", "prompts")
    }
    for cell in cells(tokens, by, None):
        within = {"channel": list(cell.channels), "sequence": tokens["sequence"][cell.sequences]}
        of = prompt[cell.sequences]
        counts = tokens.sel(within).sum("channel").values.astype(np.float64)
        first, second = (
            s.sel(within).sum("channel").transpose("sequence", "layer", "head").values.astype(np.float64)
            for s in (sums, squares)
        )
        grouped = (sum_by(first, of), sum_by(counts, of)) if len(of) else (first, counts)
        value, low, high = ratio(*grouped)
        limits = within_bounds(value, low, high, len(np.unique(of)))
        for name, values in zip(("mass", "mass_low", "mass_high"), (value, *limits), strict=True):
            parts[name].append(np.asarray(values))
        n = max(counts.sum(), 1)
        variance = second.sum(0) / n - (first.sum(0) / n) ** 2
        parts["spread"].append(np.where(counts.sum() > 0, np.sqrt(np.maximum(variance, 0)), np.nan))
        parts["tokens"].append(np.asarray(int(counts.sum())))
        parts["prompts"].append(np.asarray(len(np.unique(of))))
    shape = tuple(len(values) for values in split.values())
    places = {"layer": np.asarray(sums["layer"].values), "head": np.arange(sums.sizes["head"])}
    variables = {
        name: (
            (*split, "layer", "head")[: len(shape) + values[0].ndim],
            np.stack(values).reshape(shape + values[0].shape),
        )
        for name, values in parts.items()
    }
    windows = np.array([w or 0 for w in getattr(run, "model", {}).get("windows", [None] * len(places["layer"]))])
    variables["window"] = (("layer",), windows)
    title = f"Sink attention by {', '.join((*by, 'layer', 'head'))}"
    attrs = provenance("sinks", title, run.digest, seed, {"by": list(by)})
    result = dataset(variables, split | places, DEFINITIONS, attrs)
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": _words(result)}
    return result


def by_position(run: TokenRun, *, seed: int = 0) -> xr.Dataset:
    """Return sink attention and rate [channel, layer, position bin], mean over heads, by the number of visible keys."""
    layers, heads = run.model["n_layers"], run.model["n_heads"]
    edges = np.array(_BINS)
    number = independent_prompts(run)
    n_prompts, n_cells = int(number.max()) + 1, len(CHANNELS) * len(edges)
    sums = np.zeros((n_prompts, n_cells, layers))
    above, tokens = np.zeros((n_cells, layers)), np.zeros((n_prompts, n_cells))
    for block in token_blocks(run, "sinks by position", "sink"):
        bins = np.searchsorted(edges, block["position"], side="right") - 1
        cell = block["channel"].astype(np.int64) * len(edges) + bins
        place = number[block["sequence"]] * n_cells + cell
        tokens += np.bincount(place, minlength=tokens.size).reshape(tokens.shape)
        for layer in range(layers):
            values = block["sink"][layer].astype(np.float64)
            sums[..., layer] += np.bincount(place, values.mean(-1), tokens.size).reshape(tokens.shape)
            above[:, layer] += np.bincount(cell, (values > RATE_ABOVE).mean(-1), n_cells)
    estimates = [(*ratio(sums[:, c], tokens[:, c]), int((tokens[:, c] > 0).sum())) for c in range(n_cells)]
    parts = [(value, *within_bounds(value, low, high, n)) for value, low, high, n in estimates]
    counted = tokens.sum(0)
    dims = ("channel", "bin", "layer")
    shape = (len(CHANNELS), len(edges), layers)
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        n: (dims, np.stack([p[i] for p in parts]).reshape(shape))
        for i, n in enumerate(("mass", "mass_low", "mass_high"))
    }
    rate = np.divide(above, counted[:, None], out=np.full(above.shape, np.nan), where=counted[:, None] > 0)
    variables["rate"] = (dims, rate.reshape(shape))
    variables["tokens"] = (dims[:2], counted.astype(np.int64).reshape(shape[:2]))
    variables["prompts"] = (dims[:2], (tokens > 0).sum(0).reshape(shape[:2]))
    coords = {"channel": list(CHANNELS), "bin": edges, "layer": np.arange(layers)}
    used = np.flatnonzero(counted.reshape(shape[:2]).sum(0))
    attrs = provenance(
        "sinks", "Sink attention by position", run.digest, seed, {"bins": list(_BINS), "rate": RATE_ABOVE}
    )
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED}
    attrs["summary"] = f"Mean over {heads} heads in {len(used)} bins of position, each named by its first."
    return dataset(variables, coords, DEFINITIONS, attrs).isel(bin=slice(0, int(used.max(initial=0)) + 1))


def _words(result: xr.Dataset) -> str:
    lines, windows = [], result["window"].values
    pooled = (
        result["mass"].weighted(result["tokens"].fillna(0)).mean(("channel", "effort"))
        if "effort" in result.dims
        else result["mass"]
    )
    for label, where in (("full layers", windows == 0), ("layers with a window", windows > 0)):
        if where.any() and "effort" in result.dims:
            lines.append(
                f"Mean sink attention in {label}: {100 * float(pooled.isel(layer=np.flatnonzero(where)).mean()):.1f} %."
            )
    if "effort" in result.dims:
        ranked = np.argsort(-np.nan_to_num(pooled.transpose("layer", "head").values), axis=None)[:5]
        places = [np.unravel_index(i, pooled.shape) for i in ranked]
        heads = ", ".join(
            f"{int(layer)}.{int(head)} ({100 * float(pooled[layer, head]):.0f} %)" for layer, head in places
        )
        lines.append(f"Heads with the largest mean sink attention (layer.head): {heads}.")
    for channel in map(str, result["channel"].values):
        cell = result.sel(channel=channel)
        total = int(cell["tokens"].sum())
        if total:
            weighted = (
                cell["mass"].weighted(cell["tokens"]).mean([d for d in cell["mass"].dims if d not in ("layer", "head")])
            )
            lines.append(
                f"{channel}: mean sink attention {100 * float(weighted.mean()):.1f} % over all heads; {total:,} tokens."
            )
    return "\n".join(lines)
