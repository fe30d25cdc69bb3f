"""Gradient estimates: the effect of every patch from two passes, and integrated gradients along a path.

A metric takes logits [batch pos d_vocab] to a number for each sequence. Only what is differentiable is seen: the choice
of experts has no gradient. Where a patch would send tokens to other experts, an estimate by gradient misses that; so
every result states how often the choices of the two runs differ. `verify` measures the largest estimates by patching.

Reference: Nanda 2023, attribution patching; Syed et al., arXiv 2310.10348; integrated gradients, arXiv 1703.01365.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments import activations
from workbench.experiments.activations import Metric
from workbench.hooks.names import BLOCK
from workbench.hooks.targets import points_of
from workbench.model.transformer import GptOss

Source = Int[Tensor, "_ _"] | Mapping[str, Tensor]
_PLACES = ("layer", "sequence", "position", "head", "kv", "slot", "expert", "feature")


def attribution_patching(
    model: GptOss,
    corrupt: Int[Tensor, "batch pos"],
    clean: Source,
    metric: Metric,
    points: str | Collection[str] = "hook_resid_pre",
    *,
    n_real: Sequence[int] | None = None,
) -> xr.Dataset:
    """Estimate the change of the metric when one activation of `corrupt` is replaced: (clean − corrupt) · gradient.

    clean: tokens of the same shape, or activations by full name. points: of the blocks without their layer, as
    `attn.hook_z`, for all layers, or full names. A variable each, by layer, sequence, position and head, slot or
    expert, whatever the point has; NaN at padding. `flip`, by layer, sequence and position, is the share of slots
    whose expert the clean run did not choose. A slot stands for the place, whichever expert is in it.

    Raises:
        InputError: the shapes of the clean and corrupt activations differ.
    """
    kinds = {kind: activations.hook_names(model, kind) for kind in ([points] if isinstance(points, str) else points)}
    wanted = [name for names in kinds.values() for name in names]
    there = activations.source(model, corrupt, clean, wanted, n_real)
    chosen = activations.activations(model, corrupt, activations.choices(model), n_real)
    before, here, slopes = activations.slopes(model, corrupt, metric, wanted, n_real)
    if unlike := [name for name in wanted if there[name].shape != here[name].shape]:
        raise InputError(f"{unlike[0]}: clean {tuple(there[unlike[0]].shape)}, corrupt {tuple(here[unlike[0]].shape)}")
    mask = xr.DataArray(activations.real(corrupt, n_real), dims=("sequence", "position"))
    data: dict[str, Any] = {"metric": ("sequence", before.double().cpu().numpy())}
    for kind, names in kinds.items():
        effects = np.stack([activations.dot(model, name, there[name], here[name], slopes[name]) for name in names])
        array = xr.DataArray(effects, dims=("layer", *activations.dims(model, names[0])))
        data[kind] = (array if kind in BLOCK else array[0]).where(mask)
    if all(name in there for name in chosen):
        flips = np.stack([activations.flipped(experts, there[name]) for name, experts in chosen.items()])
        data["flip"] = xr.DataArray(flips, dims=("layer", "sequence", "position")).where(mask)
    return xr.Dataset(data, {"layer": range(model.cfg.n_layers)}, {"units": "metric"})


@torch.no_grad()
def verify(
    model: GptOss,
    corrupt: Int[Tensor, "batch pos"],
    clean: Source,
    metric: Metric,
    estimates: xr.Dataset,
    *,
    top_k: int = 10,
    n_real: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Return the top_k largest estimates beside the effects of patching, and the fraction of choices that flip.

    Each is patched alone; hits in different sequences share a pass.
    """
    hits = _largest(estimates, top_k)
    there = activations.source(model, corrupt, clean, sorted({hit["name"] for hit in hits}), n_real)
    before = activations.activations(model, corrupt, activations.choices(model), n_real)
    plain, real = activations.metric_value(model, corrupt, metric, n_real), activations.real(corrupt, n_real)
    waiting = list(hits)
    while waiting:
        now = {hit["sequence"]: hit for hit in reversed(waiting)}  # of each sequence the first
        waiting = [hit for hit in waiting if hit is not now[hit["sequence"]]]
        after: dict[str, Tensor] = {}
        edits = [(hit["name"], _cell(there[hit["name"]], hit["cell"])) for hit in now.values()]
        with model.hooks(fwd_hooks=[*edits, *[(name, activations.record_hook(after)) for name in before]]):
            patched = activations.metric_value(model, corrupt, metric, n_real)
        flips = np.stack([activations.flipped(experts, after[name]) for name, experts in before.items()])
        for sequence, hit in now.items():
            hit["measured"] = float(patched[sequence] - plain[sequence])
            hit["flips"] = float(flips[:, sequence, real[sequence]].mean())
    places = [axis for axis in _PLACES if any(axis in hit for hit in hits)]
    table = pd.DataFrame(hits, columns=["point", *places, "estimated", "measured", "flips"])
    return table.astype(dict.fromkeys(places, "Int64"))


def integrated_gradients(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    baseline: Tensor | float,
    *,
    at: str = "hook_embed",
    steps: int = 32,
    routing: Literal["held", "free"] = "held",
    n_real: Sequence[int] | None = None,
) -> xr.Dataset:
    """Return the difference of the metric between a baseline and the run, divided over the activation at a hook point.

    baseline: other tokens [batch pos], whose activation it is, or an activation that broadcasts to the run's. Zeros in
    the stream are a poor one: every norm after them turns within √eps of zero, where no step looks. The way is
    straight, its integral by Gauss and Legendre with `steps` gradients. routing: "held" keeps the run's choice of
    experts all the way, so that `attribution` sums to `metric` − `baseline` as steps grow; `jump` is how far the
    baseline with its own choice is from that. With "free" the metric jumps wherever a choice flips, which no gradient
    sees: that stays in `gap`, the sum less the difference.

    Raises:
        InputError: `routing` or `steps` is not possible, or an activation is not finite.
    """
    if routing not in ("held", "free") or steps < 1:
        raise InputError(f"routing {routing!r}, {steps} steps: use held or free, and at least one step")
    (at,) = points_of(model, at)
    seen = activations.activations(model, tokens, [at, *activations.choices(model)], n_real)
    if isinstance(baseline, Tensor) and not baseline.is_floating_point():
        baseline = activations.activations(model, baseline, [at], n_real)[at]
    end = seen[at]
    begin = torch.as_tensor(baseline).to(end.device, end.dtype).expand_as(end)
    if not (end.is_floating_point() and bool((end.isfinite() & begin.isfinite()).all())):
        raise InputError(f"{at}: not all of its values are finite numbers, so no straight path connects them")
    held = [(name, activations.replace_hook(seen[name])) for name in activations.choices(model)]
    hooks = held if routing == "held" else []

    slope = torch.zeros_like(end, dtype=torch.promote_types(end.dtype, torch.float32))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        with model.hooks(fwd_hooks=[(at, activations.replace_hook(begin.lerp(end, float(node)))), *hooks]):
            slope += float(weight) * activations.slopes(model, tokens, metric, [at], n_real)[2][at]

    def metric_value(x: Tensor, hooks: list[Any]) -> np.ndarray:
        with model.hooks(fwd_hooks=[(at, activations.replace_hook(x)), *hooks]):
            return activations.metric_value(model, tokens, metric, n_real).double().cpu().numpy()

    run, start, free = metric_value(end, hooks), metric_value(begin, hooks), metric_value(begin, [])
    shares = activations.dot(model, at, end, begin, slope)
    gap = shares.reshape(len(shares), -1).sum(1) - (run - start)
    data = {"metric": run, "baseline": start, "jump": free - start, "gap": gap}
    variables = {name: ("sequence", values) for name, values in data.items()}
    attrs = {"units": "metric", "at": at, "steps": steps, "routing": routing}
    return xr.Dataset({"attribution": (activations.dims(model, at), shares), **variables}, attrs=attrs)


def _largest(estimates: xr.Dataset, top_k: int) -> list[dict[str, Any]]:
    """Return the largest cells of all points: where each is, as named and as the indices of its tensor."""
    hits: list[dict[str, Any]] = []
    for kind, estimate in estimates.drop_vars(["flip", "metric"], errors="ignore").data_vars.items():
        size = np.nan_to_num(np.abs(estimate.to_numpy()), nan=-1.0).ravel()
        for flat in np.argsort(-size, kind="stable")[:top_k]:
            if size[flat] < 0:
                break
            cell = tuple(int(i) for i in np.unravel_index(flat, estimate.shape))
            place = dict(zip(map(str, estimate.dims), cell, strict=True))
            name = f"blocks.{place['layer']}.{kind}" if "layer" in place else str(kind)
            inside = tuple(i for axis, i in place.items() if axis != "layer")
            hits.append(
                {"point": kind, "name": name, "cell": inside, **place, "estimated": float(estimate.to_numpy()[cell])}
            )
    return sorted(hits, key=lambda hit: -abs(hit["estimated"]))[:top_k]


def _cell(source: Tensor, cell: tuple[int, ...]) -> activations.Hook:
    """Return a hook that takes one cell from the source."""

    def put(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        out[cell] = source[cell].to(x)
        return out

    return put
