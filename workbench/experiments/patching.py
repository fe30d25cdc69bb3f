"""Activation patching of reasoning effort: the prompt's states at another effort replace its own, by layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from workbench.errors import InputError
from workbench.experiments.effects import paired
from workbench.experiments.final_channel import METHOD, generated_tokens
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="patching",
    title="Patching reasoning effort",
    question="At which layer do the prompt's states carry the reasoning effort?",
    compute="forward passes over the sequences: one for each layer, for each pair of efforts",
    aliases=("patch",),
    order=180,
)


@torch.no_grad()
def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """The prompt's states at another effort put in, layer by layer: where the effort is carried.

    Pairs are the same prompt at two efforts with prompts of equal length; all its positions behind the first that
    differs are patched at once, and the written tokens' log-probability is read.
    """
    by_prompt: dict[str, dict[str, Transcript]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, {}).setdefault(row.effort, row)
    pairs = [
        (own, other)
        for found in by_prompt.values()
        for own in found.values()
        for other in found.values()
        if own.effort != other.effort
        and own.n_prompt == other.n_prompt
        and not np.array_equal(own.tokens[: own.n_prompt], other.tokens[: own.n_prompt])
    ]
    if len({own.prompt_id for own, _ in pairs}) < 2:
        raise InputError("fewer than two prompts were answered at two efforts with prompts of equal length")
    layers = range(model.cfg.n_layers)
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    written, kinds = generated_tokens(model), sorted({f"{other.effort} into {own.effort}" for own, other in pairs})
    changes: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    units: dict[str, list[str]] = {kind: [] for kind in kinds}
    for own, other in pairs:
        n = own.n_prompt
        first = int(np.flatnonzero(own.tokens[:n] != other.tokens[:n])[0])
        theirs = torch.from_numpy(other.tokens[:n].astype(np.int64))[None].to(model.device)
        _, cache = model.run_with_cache(theirs, names_filter=lambda name: name in points)
        ids = torch.from_numpy(own.tokens.astype(np.int64))[None].to(model.device)
        at = torch.from_numpy(np.flatnonzero(written(own.tokens.astype(np.int64)))).to(model.device)
        if not len(at):
            continue
        base = _said(model, ids, at, [])
        each = []
        for point in points:
            each.append(_said(model, ids, at, [(point, partial(_put, cache[point], first))]) - base)
        kind = f"{other.effort} into {own.effort}"
        changes[kind].append(np.array(each))
        units[kind].append(own.prompt_id)
    kinds = [kind for kind in kinds if len(set(units[kind])) > 1]
    parts = [paired(np.stack(changes[kind], -1), units[kind], seed=seed) for kind in kinds]
    variables = {
        n: (("which", "layer"), np.stack([p[i] for p in parts])) for i, n in enumerate(("change", "low", "high"))
    }
    result = xr.Dataset(variables, coords={"which": kinds, "layer": list(layers)})
    lines = []
    for kind in kinds:
        one = result.sel(which=kind)
        layer = int(np.argmin(one["change"].values))
        cell = one.isel(layer=layer)
        low, high = float(cell["low"]), float(cell["high"])
        shown = "" if low * high > 0 else "no effect shown, "
        lines.append(
            f"{kind}: most in layer {layer}, {shown}{float(cell['change']):+.2f} nats on what was written "
            f"[{low:+.2f}, {high:+.2f}]."
        )
    method = (
        "The prompt's residual stream behind a layer replaced by that of the same prompt at another effort; " + METHOD
    )
    title = "Where in the prompt's states the effort is carried"
    return {"effort": result.assign_attrs(title=title, summary="\n".join(lines), method=method, units="nat")}


def _put(source: torch.Tensor, first: int, x: torch.Tensor, hook: Any) -> torch.Tensor:
    """x with its positions from `first` to the source's end as the source has them."""
    return torch.cat([x[:, :first], source[:, first:], x[:, source.shape[1] :]], 1)


def _said(model: GptOss, ids: torch.Tensor, at: torch.Tensor, hooks: list[tuple[str, Any]]) -> float:
    """Summed log-probability of the tokens at these places."""
    with model.hooks(fwd_hooks=hooks):
        residual = model.residual(ids)
    logp = model.logits(residual, at[None] - 1)[0].float().log_softmax(-1)
    return float(logp.gather(-1, ids[0, at, None].to(logp.device)).sum())
