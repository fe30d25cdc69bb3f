"""Steering: the direction from the analysis to the final channel is added to the residual stream of final tokens."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from workbench.errors import InputError
from workbench.experiments.final_channel import answered_rows, final_effects
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import steer
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="steering",
    title="Steering along the channel direction",
    question="Does moving final tokens along the direction between the channels change the answer more than a "
    "random direction?",
    compute="forward passes over the sequences: nine",
    aliases=("steer",),
    order=170,
)


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Along the direction from analysis to final: channel means over half of the prompts, effect on the other half."""
    rows = answered_rows(model, rows)
    prompts = sorted({row.prompt_id for row in rows})
    fit = set(prompts[::2])
    train, test = [r for r in rows if r.prompt_id in fit], [r for r in rows if r.prompt_id not in fit]
    layer = model.cfg.n_layers // 2
    point = f"blocks.{layer}.hook_resid_post"
    means = [_mean(model, train, point, token_set(tokenizer=model.tokenizer, channel=c)) for c in ("analysis", "final")]
    direction = means[1] - means[0]
    random = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed))
    random = (random * direction.norm().cpu() / random.norm()).to(direction)
    where = token_set(tokenizer=model.tokenizer, channel="final")
    what: dict[str, Edit | Sequence[Edit]] = {}
    for scale in (-1.0, -0.5, 0.5, 1.0):
        what[f"{scale:+g} × (final − analysis)"] = steer(point, direction, scale, where)
        what[f"{scale:+g} × a random direction as long"] = steer(point, random, scale, where)
    return {
        "direction": final_effects(
            model, test, what, seed, f"Steering the final message along the channel direction at {point}"
        )
    }


@torch.no_grad()
def _mean(model: GptOss, rows: Sequence[Transcript], point: str, where: TokenSet) -> torch.Tensor:
    total, n = torch.zeros(model.cfg.d_model, dtype=torch.float64), 0
    for row in rows:
        mask = torch.from_numpy(where(row.tokens.astype(np.int64)))
        if mask.any():
            ids = torch.from_numpy(row.tokens.astype(np.int64))[None].to(model.device)
            _, cache = model.run_with_cache(ids, names_filter=point)
            total += cache[point][0].cpu()[mask].double().sum(0)
            n += int(mask.sum())
    if not n:
        raise InputError(f"no sequence has tokens in {where!r}")
    return (total / n).float().to(model.device)
