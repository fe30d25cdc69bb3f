"""Super experts and massive activations: which entries of the residual stream are huge, and which experts write them.

A massive activation is an entry of the residual stream above 100 and above 1,000 times the layer's median magnitude. A
super expert is one whose largest output exceeds the 99.5th percentile of all experts' and a tenth of the largest, in a
layer up to that with the first massive activation. Its removal is compared with that of random experts of equal load.

Reference: Sun et al. 2024, arXiv 2402.17762 (massive activations); arXiv 2507.23279 (super experts).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.experiments.effects import load_of, logprobs, routed_slots
from workbench.experiments.expert_sets import Cells
from workbench.experiments.final_channel import answered_rows, final_tokens
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls, family_p, rank
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.hooks.interventions import forbid
from workbench.model.packing import FORWARD_TOKENS, pack, passes
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import prompt_means
from workbench.studies.statistics import ALPHA

EXPERIMENT = Experiment(
    name="super-experts",
    title="Super experts and massive activations",
    question="Which experts write massive activations, and does the model need them more than random experts of equal "
    "load?",
    compute="forward passes over the sequences: two, and two for each of 20 random sets of experts",
    cost={"passes": 44},
    options={
        "controls": "Random sets of experts of the same load, at least 20 (default: 20).",
        "magnitude": "Least magnitude of a massive activation (default: 100).",
        "ratio": "Least ratio of a massive activation to the layer's median magnitude (default: 1000).",
    },
    figures="workbench.figures.default",
    order=180,
)
PERCENTILE, OF_LARGEST = 99.5, 0.1  # of the experts' largest outputs, as in the paper
MEASURES = ("log-probability of the final message", "log of the largest activation", "attention to the learned sinks")
_NAMED = 8  # massive activations that the summary lists
METHOD = (
    "Massive activations are entries of the residual stream after a layer above `magnitude` and above `ratio` times "
    "the median over tokens of each token's median magnitude. Super experts are those whose largest output entry, "
    "before the gate weight, exceeds the 99.5th percentile of all experts' and a tenth of the largest, in layers up to "
    "that of the first massive activation. They are masked before the top-k selection, at every token. Measured are "
    "the log-probability in nats of the final message, the logarithm of a sequence's largest activation, and its mean "
    "attention to the learned sinks, each less that without the edit; means over prompts. The null is the same for "
    "random sets of as many experts, of any layer, whose load is nearest: rank p (two-sided), p_family adjusted for "
    "the measures (single-step max-T). If there is no super expert, the expert with the largest output is ablated "
    "instead. "
    "The experts are chosen for the size of their output in these sequences, so that a smaller largest activation "
    "without them is expected."
)


class Magnitudes(NamedTuple):
    """What a pass over the sequences found, tokens of all sequences in their order."""

    largest: Float[np.ndarray, "layer token"]  # entry of the residual stream with the largest magnitude
    dimension: Int[np.ndarray, "layer token"]
    median: Float[np.ndarray, "layer token"]
    sink: Float[np.ndarray, " token"]  # mean over layers and heads
    output: Float[np.ndarray, "layer expert"]  # largest entry of each expert's outputs


@torch.no_grad()
def magnitudes(model: GptOss, rows: Sequence[Transcript], *edits: Edit, outputs: bool = True) -> Magnitudes:
    """Return how large the residual stream and the experts' outputs are at every token of the sequences.

    outputs: measure the experts' outputs too, which are zero otherwise; the fused kernels do not keep them.
    """
    n_layers, output = model.cfg.n_layers, np.zeros((model.cfg.n_layers, model.cfg.num_experts))
    collected: dict[str, list[np.ndarray]] = {name: [] for name in ("largest", "dimension", "median", "sink")}
    here: dict[str, Tensor] = {}

    def residual(x: Tensor, hook: object) -> None:
        size = x[0].float().abs()
        here[f"largest{_layer(hook)}"], here[f"dimension{_layer(hook)}"] = size.max(-1)
        here[f"median{_layer(hook)}"] = size.median(-1).values

    def sink(x: Tensor, hook: object) -> None:
        here[f"sink{_layer(hook)}"] = x[0].float().mean(-1)

    def chosen(x: Tensor, hook: object) -> None:
        here["chosen"] = x[0]

    def written(x: Tensor, hook: object) -> None:
        largest = x[0].float().abs().amax(-1)
        of_expert = torch.zeros(output.shape[1], device=x.device)
        of_expert.scatter_reduce_(0, here["chosen"].to(x.device).flatten().long(), largest.flatten(), "amax")
        output[_layer(hook)] = np.maximum(output[_layer(hook)], of_expert.cpu().numpy())

    hooks = {"hook_resid_post": residual, "attn.hook_sink": sink}
    hooks |= {"mlp.hook_expert_indices": chosen, "mlp.experts.hook_out": written} if outputs else {}
    named_hooks = [(f"blocks.{layer}.{name}", hook) for layer in range(n_layers) for name, hook in hooks.items()]
    with applied(model, *edits), model.hooks(fwd_hooks=named_hooks):
        for batch in passes((len(row.tokens) for row in rows), FORWARD_TOKENS):
            tokens, lengths = pack([rows[i] for i in batch], model.device)
            model.residual(tokens, packed=lengths)
            for name, parts in collected.items():
                parts.append(torch.stack([here[f"{name}{layer}"].cpu() for layer in range(n_layers)]).numpy())
    joined = {name: np.concatenate(parts, axis=1) for name, parts in collected.items()}
    return Magnitudes(joined["largest"], joined["dimension"], joined["median"], joined["sink"].mean(0), output)


def _layer(hook: object) -> int:
    return int(str(getattr(hook, "name", "")).split(".")[1])


def massive(sizes: Magnitudes, magnitude: float = 100.0, ratio: float = 1000.0) -> Int[np.ndarray, "entry 2"]:
    """Return layer and token of the massive activations: the largest entry of each token that is one."""
    limit = np.maximum(magnitude, ratio * np.median(sizes.median, axis=1))[:, None]
    return np.argwhere(sizes.largest > limit)


def super_experts(output: Float[np.ndarray, "layer expert"], last_layer: int) -> Cells:
    """Return the experts of layers up to `last_layer` whose largest output is extreme, the largest first."""
    extreme = (output > np.percentile(output, PERCENTILE)) & (output > OF_LARGEST * output.max())
    extreme[last_layer + 1 :] = False
    order = [np.unravel_index(int(place), output.shape) for place in np.argsort(-output, axis=None)]
    return [(int(layer), int(expert)) for layer, expert in order if extreme[layer, expert]]


def nearest_in_load(load: Float[np.ndarray, "layer expert"], chosen: Cells, n: int, seed: int) -> list[Cells]:
    """Return n different sets of as many other experts, of any layers, whose summed load is nearest the chosen ones'.

    A layer has too few experts for 20 controls of a single one, which is why those of other layers are taken too.

    Raises:
        InputError: there are not n such sets.
    """
    others = [cell for cell in np.ndindex(*load.shape) if cell not in chosen]
    rng, size = np.random.default_rng(seed), len(chosen)
    drawn = np.arange(len(others))[:, None]
    if size > 1:
        most = 200 * n if size <= len(others) else 0
        drawn = np.array([np.sort(rng.choice(len(others), size, replace=False)) for _ in range(most)])
        drawn = np.unique(drawn.reshape(most, size), axis=0)
    if len(drawn) < n:
        raise InputError(f"only {len(drawn)} other sets of {size} experts, {n} are needed: choose fewer controls")
    flat = np.array([load[cell] for cell in others])
    distance = np.abs(flat[drawn].sum(1) - sum(load[cell] for cell in chosen))
    return [
        [(int(a), int(b)) for a, b in (others[i] for i in drawn[j])] for j in np.argsort(distance, kind="stable")[:n]
    ]


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    controls: int = MIN_CONTROLS,
    magnitude: float = 100.0,
    ratio: float = 1000.0,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the sizes of activations by layer, the largest outputs of experts, and what removing the largest does.

    Dataset `activations`, over layer: largest, median, massive (tokens with one). `experts`, over (layer, expert):
    output and load. `removal`, over measure: change, p, p_family and distance; over (set, measure): random.

    Raises:
        InputError: fewer than 20 controls are asked for, a limit is not positive, or too few prompts have a final
            message.
    """
    check_controls(controls)
    if not (magnitude > 0 and ratio > 0):
        raise InputError(f"magnitude={magnitude:g}, ratio={ratio:g}: expected positive numbers")
    rows = answered_rows(model, rows)
    sizes = magnitudes(model, rows)
    entries = massive(sizes, magnitude, ratio)
    last_layer = int(entries[:, 0].min()) if len(entries) else -1
    super_set = super_experts(sizes.output, last_layer)
    slots = routed_slots(model, rows)
    load = np.nan_to_num(load_of(slots))
    chosen = super_set or [(int(i), int(j)) for i, j in [np.unravel_index(int(sizes.output.argmax()), load.shape)]]
    sets = nearest_in_load(load, chosen, controls, seed)
    removal = _removal(model, rows, sizes, [chosen, *sets])
    change, random = removal[0], removal[1:]
    ranks = [rank(change[i], random[:, i]) for i in range(len(MEASURES))]
    counts = np.bincount(entries[:, 0], minlength=model.cfg.n_layers)
    result = xr.Dataset(
        {
            "change": ("measure", change, {"long_name": "change by removal", "units": "nat, or mean attention"}),
            "p": ("measure", [r.p for r in ranks]),
            "p_family": ("measure", family_p(change, random)),
            "distance": ("measure", [r.distance for r in ranks]),
            "random": (("set", "measure"), random, {"long_name": "change by random experts", "units": "1"}),
        },
        coords={"measure": list(MEASURES), "set": range(len(sets))},
        attrs={"load_ratio": _load_ratio(load, chosen, sets)},
    )
    by_layer = xr.Dataset(
        {
            "largest": ("layer", sizes.largest.max(1), {"long_name": "largest magnitude", "units": "1"}),
            "median": ("layer", np.median(sizes.median, axis=1), {"long_name": "median magnitude", "units": "1"}),
            "massive": ("layer", counts, {"long_name": "tokens with a massive activation", "units": "tokens"}),
        },
        coords={"layer": range(model.cfg.n_layers)},
    )
    by_expert = xr.Dataset(
        {
            "output": (("layer", "expert"), sizes.output, {"long_name": "largest output entry", "units": "1"}),
            "load": (("layer", "expert"), load, {"long_name": "expert load", "units": "1"}),
        },
        coords={"layer": range(load.shape[0]), "expert": range(load.shape[1])},
        attrs={"super_experts": ", ".join(f"{layer}.{expert}" for layer, expert in super_set)},
    )
    about = {
        "rests_on": f"{count_of(len(rows), 'sequence')}, {count_of(sizes.largest.shape[1], 'token')}",
        "method": METHOD,
    }
    titles = {
        "activations": "Largest magnitude of the residual stream by layer",
        "experts": "Largest output of each expert",
        "removal": f"Removal of {'super experts' if super_set else 'the expert with the largest output'}",
    }
    texts = {
        "activations": _activations(model, rows, sizes, entries, about["rests_on"]),
        "experts": _experts(sizes, super_set, chosen),
        "removal": _removed(result, chosen, bool(super_set)),
    }
    datasets = {"activations": by_layer, "experts": by_expert, "removal": result}
    return {n: ds.assign_attrs(about, title=titles[n], summary=texts[n]) for n, ds in datasets.items()}


def _load_ratio(load: Float[np.ndarray, "layer expert"], chosen: Cells, sets: Sequence[Cells]) -> float:
    return float(np.mean([sum(load[c] for c in cells) for cells in sets]) / sum(load[cell] for cell in chosen))


def _removal(
    model: GptOss, rows: Sequence[Transcript], before: Magnitudes, sets: Sequence[Cells]
) -> Float[np.ndarray, "set measure"]:
    """Return what masking each set of experts changes: means over prompts of the log-probability, and the sizes."""
    final, units = final_tokens(model), [row.prompt_id for row in rows]
    begins = np.cumsum([0, *(len(row.tokens) for row in rows[:-1])])

    def by_sequence(sizes: Magnitudes) -> Float[np.ndarray, "2 sequence"]:
        largest = np.maximum.reduceat(sizes.largest.max(0), begins)
        return np.stack([np.log(largest), [part.mean() for part in np.split(sizes.sink, begins[1:])]])

    base, out = logprobs(model, rows, final), np.empty((len(sets), len(MEASURES)))
    for i, cells in enumerate(sets):
        edits = [forbid(layer, [e for at, e in cells if at == layer]) for layer in sorted({at for at, _ in cells})]
        sizes = by_sequence(magnitudes(model, rows, *edits, outputs=False)) - by_sequence(before)
        changes = np.stack([logprobs(model, rows, final, *edits) - base, *sizes])
        out[i] = prompt_means(changes, units).mean(-1)
    return out


def _activations(
    model: GptOss, rows: Sequence[Transcript], sizes: Magnitudes, entries: np.ndarray, rests_on: str
) -> str:
    ratio = sizes.largest.max(1) / np.median(sizes.median, axis=1)
    layer = int(ratio.argmax())
    lines = [
        f"{rests_on}. The largest activation is {sizes.largest.max():.3g}; relative to the layer's median it is "
        f"largest in layer {layer}: {sizes.largest[layer].max():.3g}, {ratio[layer]:.3g} times the median."
    ]
    if not len(entries):
        return "\n".join([*lines, "No activation is massive by the stated limits."])
    ids = np.concatenate([row.tokens for row in rows])
    position = np.concatenate([np.arange(len(row.tokens)) for row in rows])
    kinds = {(int(at), int(sizes.dimension[at, token]), int(ids[token])) for at, token in entries}
    lines.append(
        f"{len(entries)} massive activations; {(position[entries[:, 1]] == 0).mean():.0%} at the first token. Kinds:"
    )
    for at, dimension, token in sorted(kinds)[:_NAMED]:
        lines.append(f"  layer {at}, dimension {dimension}, token {model.tokenizer.decode([token])!r}")
    return "\n".join(lines)


def _experts(sizes: Magnitudes, super_set: Cells, chosen: Cells) -> str:
    if super_set:
        listed = ", ".join(f"layer {at} expert {e} ({sizes.output[at, e]:.3g})" for at, e in super_set)
        return (
            f"Super experts, with their largest output: {listed}; the median expert's is {np.median(sizes.output):.3g}."
        )
    at, expert = chosen[0]
    return (
        f"No super expert by the stated limits. The largest output, {sizes.output[at, expert]:.3g}, is that of layer "
        f"{at} expert {expert}; the median expert's is {np.median(sizes.output):.3g}."
    )


def _removed(result: xr.Dataset, chosen: Cells, is_super: bool) -> str:
    listed = ", ".join(f"{layer}.{expert}" for layer, expert in chosen)
    who = "Super experts" if is_super else "No super expert; the expert with the largest output instead,"
    ratio = f"{result.attrs['load_ratio']:.2f}"
    lines = [f"{who} {listed} removed, beside {result.sizes['set']} random sets of {ratio} times the load:"]
    for measure in map(str, result["measure"].values):
        one = result.sel(measure=measure)
        differs = "more extreme than" if float(one["p_family"]) <= ALPHA else "not shown to differ from"
        lines.append(
            f"  {measure}: {signed(float(one['change']), 3)}, random {signed(float(one['random'].mean()), 3)} "
            f"({signed(float(one['random'].min()), 3)} to {signed(float(one['random'].max()), 3)}); {differs} "
            f"random sets: rank p {float(one['p']):.3f}, {float(one['p_family']):.3f} for all measures."
        )
    return "\n".join(lines)
