"""Expert-aware causal tracing: which experts, at which tokens, restore the answer when the question is corrupted.

Noise is added to the embeddings of the last user message. One expert's output at one class of tokens is then put back
to what it was without noise, and the log-probability of the final message is measured. All experts are screened by
gradient on half of the prompts; the best are restored on the other half, beside norm-matched restorations of others.

Reference: Meng et al. 2022, arXiv 2202.05262 (causal tracing); arXiv 2606.03780 (with experts as the unit).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench import harmony
from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments import activations
from workbench.experiments.final_channel import answered_rows, final_tokens
from workbench.experiments.random_controls import check_controls, family_p, rank
from workbench.experiments.sampling import halves
from workbench.harmony.transcripts import Transcript
from workbench.kernels.logits import logprob
from workbench.model.packing import FORWARD_TOKENS
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, prompt_means
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="expert-tracing",
    title="Expert-aware causal tracing",
    question="Which experts, at which tokens, restore the answer when the question is corrupted?",
    compute="of half of the sequences two passes and a backward pass; of the others 22 passes for each of five experts",
    cost={"passes": 57, "gradient_passes": 0.5},
    options={
        "noise": "Standard deviation of the noise, in those of the embeddings (default: 3).",
        "cells": "Experts at a class of tokens that are restored on held-out prompts (default: 5).",
        "controls": "Norm-matched restorations for each, at least 20 (default: 20).",
    },
    order=127,
)
CLASSES = ("corrupted tokens", "rest of the prompt", "generated tokens")
METHOD = (
    "Gaussian noise on the embeddings of the last user message's content. Restored is the gate-weighted output of one "
    "expert of one layer at one class of tokens: clean less corrupted, added to the output of the layer's experts. "
    "Screening on half of the prompts: that difference times the gradient of the log-probability of the final message. "
    "The cells with the largest estimates are measured on the other half. change: log-probability in nats of the final "
    "message, restored less corrupted, mean over prompts, bootstrap-t interval; q: Benjamini–Hochberg over the cells. "
    "recovery: change over the loss by the noise. layer: the same of all experts of the layer. Controls: at each token "
    "a difference of the same norm in the direction of that of a random expert and token of the layer in another "
    "sequence; rank p (two-sided), p_family adjusted for the cells (single-step max-T)."
)
NOT_CONTROLLED = (
    "Noise takes the model off the texts it was trained on; an expert that restores one corruption may "
    "not matter in another. Tokens that change their experts under noise are restored to outputs of experts that they "
    "did not choose. The gradient sees no change of routing, so the screening can miss experts."
)


class Cell(NamedTuple):
    """An expert of a layer at a class of tokens."""

    kind: int
    layer: int
    expert: int

    @property
    def name(self) -> str:
        """Return its name in results."""
        return f"layer {self.layer} expert {self.expert}, {CLASSES[self.kind]}"


@dataclass
class _Traced:
    """A sequence, its noise, the class of each token [pos], and what the slots wrote, clean and corrupted."""

    row: Transcript
    tokens: Int[Tensor, "1 pos"]
    noise: Float[Tensor, "pos d_model"]
    kind: Int[Tensor, " pos"]
    experts: tuple[list[Tensor], list[Tensor]]  # [layer][pos slot]
    wrote: tuple[list[Tensor], list[Tensor]]  # [layer][pos slot d_model]

    def difference(self, layer: int, expert: int | None) -> Float[Tensor, "pos d_model"]:
        """Return what an expert (None: all of them) wrote at every token, clean less corrupted."""
        sides = []
        for chosen, wrote in zip(self.experts, self.wrote, strict=True):
            mask = torch.ones_like(chosen[layer]) if expert is None else chosen[layer] == expert
            sides.append((wrote[layer] * mask[..., None]).sum(1))
        return sides[0] - sides[1]


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    noise: float = 3.0,
    cells: int = 5,
    controls: int = 20,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return which experts restore the answer at which tokens, with intervals and ranks among matched controls.

    Dataset `experts`, over cell: change, low, high, p, q, recovery, layer (all experts), estimate (on the other half),
    p_rank, p_family, distance; over (control, cell): random.

    Raises:
        InputError: an option is not possible, or fewer than ten prompts have a final message.
    """
    check_controls(controls)
    if not noise > 0 or cells < 1:
        raise InputError(f"noise={noise:g}, cells={cells}: expected a positive number and at least 1")
    first, second = halves(answered_rows(model, rows))
    if (n := min(len({row.prompt_id for row in half}) for half in (first, second))) < MIN_PROMPTS:
        raise InputError(f"{n} prompts in one half, and an interval needs {MIN_PROMPTS}: use more sequences")
    estimates = _screened(model, first, noise, seed)
    order = np.argsort(-estimates, axis=None, kind="stable")[:cells]
    chosen = [Cell(*map(int, np.unravel_index(flat, estimates.shape))) for flat in order]
    result = _confirmed(model, second, chosen, noise, controls, seed)
    prompts = len({row.prompt_id for row in second})
    result["estimate"] = ("cell", [estimates[cell] for cell in chosen])
    result.attrs |= {
        "title": "Experts that restore the answer",
        "units": "nat",
        "rests_on": f"{count_of(len(second), 'sequence')} of {count_of(prompts, 'prompt')}; screened on "
        f"{len(first)} others",
        "prompts": prompts,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    return {"experts": result.assign_attrs(summary=_summary(result))}


def token_classes(model: GptOss, row: Transcript) -> Int[np.ndarray, " pos"]:
    """Return the class of every token, an index of CLASSES; −1 before the last user message.

    Raises:
        InputError: the prompt has no user message with content.
    """
    labels = harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt)
    users = [m for m in labels.messages if m.role == "user" and m.content >= 0 and m.stop > m.content]
    if not users:
        raise InputError(f"sequence {row.id!r} has no user message to corrupt")
    kind = np.full(len(row.tokens), -1)
    kind[users[-1].content : users[-1].stop] = 0
    kind[users[-1].stop : row.n_prompt] = 1
    kind[row.n_prompt :] = 2
    return kind


def traced(model: GptOss, row: Transcript, noise: float, seed: int) -> _Traced:
    """Return a sequence with its noise, and what every expert wrote with and without it."""
    tokens = torch.from_numpy(row.tokens.astype(np.int64))[None].to(model.device)
    kind = torch.from_numpy(token_classes(model, row)).to(model.device)
    spread = model.embed.weight.float().std().item()
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens.shape[1], model.cfg.d_model, generator=rng).to(model.device) * noise * spread
    drawn = drawn * (kind == 0)[:, None]
    names = [
        f"blocks.{layer}.mlp.{point}"
        for layer in range(model.cfg.n_layers)
        for point in ("hook_expert_indices", "hook_expert_weights", "experts.hook_out")
    ]
    sides = []
    for added in (torch.zeros_like(drawn), drawn):
        with model.hooks(fwd_hooks=[("hook_embed", _add(added))]):
            recorded = activations.activations(model, tokens, names)
        layers = [[recorded[name][0] for name in names[3 * i : 3 * i + 3]] for i in range(model.cfg.n_layers)]
        sides.append(([e for e, _, _ in layers], [w.float()[..., None] * out.float() for _, w, out in layers]))
    experts, wrote = zip(*sides, strict=True)
    return _Traced(row, tokens, drawn, kind, (experts[0], experts[1]), (wrote[0], wrote[1]))


def _add(value: Tensor) -> activations.Hook:
    return lambda x, hook: x + value.to(x)


def _screened(
    model: GptOss, rows: Sequence[Transcript], noise: float, seed: int
) -> Float[np.ndarray, "kind layer expert"]:
    """Return the estimated mean change of restoring each expert at each class of tokens."""
    shape = (len(CLASSES), model.cfg.n_layers, model.cfg.num_experts)
    total, final = np.zeros(shape), final_tokens(model)
    points = [f"blocks.{layer}.hook_mlp_out" for layer in range(shape[1])]
    with progress("screen", len(rows), "sequences") as advance:
        for number, row in enumerate(rows):
            one = traced(model, row, noise, seed + number)
            at = torch.from_numpy(np.flatnonzero(final(row.tokens.astype(np.int64)))).to(model.device)

            def metric(logits: Tensor, at: Tensor = at, one: _Traced = one) -> Tensor:
                return logprob(logits[:, at - 1], one.tokens[:, at]).sum(-1)

            with model.hooks(fwd_hooks=[("hook_embed", _add(one.noise))]):
                slopes = activations.slopes(model, one.tokens, metric, points)[2]
            for layer, point in enumerate(points):
                gain = slopes[point][0].float()
                for sign, chosen, wrote in zip((1, -1), one.experts, one.wrote, strict=True):
                    value = sign * torch.einsum("psd,pd->ps", wrote[layer], gain)
                    for kind in range(shape[0]):
                        mine = one.kind == kind
                        index, weight = chosen[layer][mine].flatten().long(), value[mine].flatten().double()
                        total[kind, layer] += torch.bincount(index, weight, shape[2]).cpu().numpy()
            advance(1)
    return total / len(rows)


@torch.no_grad()
def restored(model: GptOss, one: _Traced, added: Sequence[tuple[int, Tensor]]) -> Float[np.ndarray, " edit"]:
    """Return the log-probability of the final message with noise, and each of these added to a layer's output.

    added: a layer and what is added there [pos d_model]; each is a sequence of its own in a batch.
    """
    final = final_tokens(model)(one.row.tokens.astype(np.int64))
    at = torch.from_numpy(np.flatnonzero(final)).to(model.device)
    size = max(1, FORWARD_TOKENS // one.tokens.shape[1])
    out = []
    for start in range(0, len(added), size):
        batch = added[start : start + size]

        def put(x: Tensor, hook: Any, batch: Sequence[tuple[int, Tensor]] = batch) -> Tensor:
            x, layer = x.clone(), int(hook.name.split(".")[1])
            for i, (own, value) in enumerate(batch):
                if own == layer:
                    x[i] += value.to(x)
            return x

        points = [f"blocks.{layer}.hook_mlp_out" for layer in sorted({layer for layer, _ in batch})]
        with model.hooks(fwd_hooks=[("hook_embed", _add(one.noise)), *((point, put) for point in points)]):
            residual = model.residual(one.tokens.expand(len(batch), -1))
        logits = model.logits(residual, (at - 1).expand(len(batch), -1))
        out.append(logprob(logits, one.tokens[:, at].expand(len(batch), -1)).double().sum(-1).cpu().numpy())
    return np.concatenate(out)


def _confirmed(
    model: GptOss, rows: Sequence[Transcript], chosen: Sequence[Cell], noise: float, controls: int, seed: int
) -> xr.Dataset:
    """Return the measured changes of the cells and of their controls on these sequences."""
    rng = torch.Generator().manual_seed(seed)
    every = [traced(model, row, noise, seed + 10_000 + number) for number, row in enumerate(rows)]
    pools = {layer: _directions(every, layer) for layer in sorted({cell.layer for cell in chosen})}
    changes, loss = np.empty((2 + controls, len(chosen), len(rows))), np.empty(len(rows))
    with progress("restore", len(rows), "sequences") as advance:
        for number, one in enumerate(every):
            added = [(0, torch.zeros_like(one.noise))]
            for cell in chosen:
                mine = (one.kind == cell.kind)[:, None]
                own = one.difference(cell.layer, cell.expert) * mine
                added += [(cell.layer, own), (cell.layer, one.difference(cell.layer, None) * mine)]
                pool = pools[cell.layer][number]
                for _ in range(controls):
                    drawn = pool[torch.randint(len(pool), (len(own),), generator=rng)]
                    added.append((cell.layer, drawn.to(own) * own.norm(dim=-1, keepdim=True)))
            values = restored(model, one, added)
            changes[:, :, number] = (values[1:] - values[0]).reshape(len(chosen), 2 + controls).T
            loss[number] = _clean(model, one) - values[0]
            advance(1)
    units = [row.prompt_id for row in rows]
    effect = mean_effect(changes[0], units, seed=seed)
    means = prompt_means(changes, units).mean(-1)
    ranks = [rank(float(means[0, i]), means[2:, i]) for i in range(len(chosen))]
    lost = float(prompt_means(loss[None], units).mean())
    names = ("change", "low", "high", "p")
    variables: dict[str, Any] = {name: ("cell", getattr(effect, name)) for name in names}
    variables |= {
        "q": ("cell", false_discovery(effect.p)),
        "recovery": ("cell", means[0] / lost),
        "layer": ("cell", means[1]),
        "p_rank": ("cell", np.array([r.p for r in ranks])),
        "p_family": ("cell", family_p(means[0], means[2:])),
        "distance": ("cell", np.array([r.distance for r in ranks])),
        "random": (("control", "cell"), means[2:]),
        "loss": ((), np.array(lost)),
    }
    return xr.Dataset(variables, coords={"cell": [cell.name for cell in chosen], "control": range(controls)})


def _clean(model: GptOss, one: _Traced) -> float:
    """Return the log-probability of the final message without noise."""
    quiet = _Traced(one.row, one.tokens, torch.zeros_like(one.noise), one.kind, one.experts, one.wrote)
    return float(restored(model, quiet, [(0, torch.zeros_like(one.noise))])[0])


def _directions(every: Sequence[_Traced], layer: int, most: int = 256) -> list[Float[Tensor, "direction d_model"]]:
    """Return for each sequence unit vectors of what slots of the others wrote in a layer, clean less corrupted."""
    own = []
    for one in every:
        slots = [wrote[layer][one.kind >= 0].flatten(0, 1) for wrote in one.wrote]
        difference = slots[0] - slots[1]
        norm = difference.norm(dim=-1, keepdim=True)
        directions = (difference / norm)[norm[:, 0] > 1e-6].cpu()
        own.append(directions[:: max(1, len(directions) // most)])
    pools = [torch.cat([*own[:i], *own[i + 1 :]]) for i in range(len(own))]
    if any(not len(pool) for pool in pools):
        raise InputError(f"layer {layer} writes the same with and without noise: use a larger noise")
    return pools


def _summary(result: xr.Dataset) -> str:
    loss = float(result["loss"])
    lines = [
        f"{result.attrs['rests_on']}. The noise costs {loss:.2f} nats of the final message; restored, beside "
        f"{result.sizes['control']} matched controls:"
    ]
    for name in map(str, result["cell"].values):
        one = result.sel(cell=name)
        change, low, high, p = (float(one[v]) for v in ("change", "low", "high", "p_family"))
        beyond = p <= ALPHA and float(one["distance"]) > 0 and low > 0
        shown = "more than controls" if beyond else "not shown beyond controls"
        lines.append(
            f"  {name}: {signed_interval(change, low, high, 2)} nats, {float(one['recovery']):.0%} of the loss, "
            f"{shown} (mean {signed(float(one['random'].mean()), 2)}, p {p:.3f}); all experts of the layer "
            f"{signed(float(one['layer']), 2)}."
        )
    return "\n".join(lines)
