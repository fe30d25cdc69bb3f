"""Edits of the router and the experts: forbid, force, reweight, ablate, route; see `workbench.hooks.interventions`.

Reference: SteerMoE (arXiv 2509.09660) for promoting experts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.edits import Act, At, Edit, Tokens, TokenSet, applied, as_set
from workbench.hooks.targets import Layers, among, at_layers, at_routers, describe_layers, numbers

_PROMOTED = 0.01  # a promoted expert's logit above the token's largest, as SteerMoE has it


def forbid(layers: Layers, experts: Collection[int], tokens: Tokens = None) -> Edit:
    """Return an edit that masks experts before the top-k choice: the next-best experts are chosen with their gates.

    Raises:
        InputError: fewer experts than a token needs would be left, or an expert does not exist.
    """
    experts, members = sorted(set(experts)), as_set(tokens)

    def act(logits: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        mask = selected.to(logits.device)[..., None] & among(experts, logits)
        changed = mask.gather(-1, logits.topk(at.model.cfg.experts_per_token, -1).indices).sum()
        return logits.masked_fill(mask, -torch.inf), int(selected.sum()), changed

    return Edit(
        f"forbid experts {experts} in {describe_layers(layers)}",
        at_routers(layers, experts, "mlp.router.hook_out", act, forbidden=True),
    )


def force(
    layers: Layers, experts: Collection[int], tokens: Tokens = None, how: Literal["promote", "swap"] = "promote"
) -> Edit:
    """Return an edit that makes the router choose these experts.

    promote: their logits are raised just above the token's largest, and the gates follow. swap: they take the places
    of the weakest chosen ones, whose gates they inherit.

    Raises:
        InputError: `how` is unknown, or more experts are given than a token has.
    """
    experts, members = sorted(set(experts)), as_set(tokens)

    def promote(logits: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        mask = selected.to(logits.device)[..., None] & among(experts, logits)
        choice = torch.zeros_like(mask).scatter_(-1, logits.topk(at.model.cfg.experts_per_token, -1).indices, True)
        out = torch.where(mask, logits.amax(-1, keepdim=True) + _PROMOTED, logits)
        return out, int(selected.sum()), (mask & ~choice).sum()

    def swap(chosen: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        # Slots in the order of their gates: wanted ones already chosen stay, the last others go, strongest first.
        already_chosen = torch.isin(chosen, torch.tensor(experts, device=chosen.device))
        out, changed = chosen, torch.zeros_like(already_chosen)
        for expert in experts:
            absent = ~(out == expert).any(-1) & selected.to(chosen.device)
            free = ~(already_chosen | changed)
            last = (free * torch.arange(1, out.shape[-1] + 1, device=out.device)).argmax(-1, keepdim=True)
            here = torch.zeros_like(already_chosen).scatter_(-1, last, True) & absent[..., None]
            out, changed = torch.where(here, expert, out), changed | here
        return out, int(selected.sum()), changed.sum()

    def gates_of_the_places(gates: Tensor, at: At) -> tuple[Tensor, int, int]:
        selected = at.selected(members)
        before = at.seen["logits"].gather(-1, at.seen["unedited"]).softmax(-1)
        return torch.where(selected.to(gates.device)[..., None], before.to(gates.dtype), gates), int(selected.sum()), 0

    description = f"force experts {experts} in {describe_layers(layers)} ({how})"
    if how == "promote":
        return Edit(description, at_routers(layers, experts, "mlp.router.hook_out", promote, at_most_k=True))
    if how != "swap":
        raise InputError(f"how={how!r}: use promote or swap")
    places = at_routers(layers, experts, "mlp.hook_expert_indices", swap, at_most_k=True)
    gates = at_routers(layers, experts, "mlp.hook_expert_weights", gates_of_the_places)
    return Edit(description, lambda model: [*places(model), *gates(model)], watches=("logits", "unedited"))


def reweight(
    layers: Layers, experts: Collection[int], factor: float, tokens: Tokens = None, *, renormalise: bool = False
) -> Edit:
    """Return an edit that multiplies gates of experts by `factor`; `renormalise` keeps the sum of a token's gates."""
    experts, members = sorted(set(experts)), as_set(tokens)

    def act(gates: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected, hit = _slots(at, members, experts)
        out = torch.where(hit, gates * factor, gates)
        if renormalise:
            total = out.sum(-1, keepdim=True)
            out = torch.where(total > 0, out * (gates.sum(-1, keepdim=True) / total), out)
        return out, selected, hit.sum()

    description = (
        f"gates of experts {experts} in {describe_layers(layers)} × {factor:g}{', renormalised' if renormalise else ''}"
    )
    return Edit(description, at_routers(layers, experts, "mlp.hook_expert_weights", act), watches=("experts",))


def ablate(
    layers: Layers,
    experts: Collection[int],
    tokens: Tokens = None,
    how: Literal["zero", "renormalise", "mean", "resample"] = "zero",
    *,
    means: Mapping[int, Float[Tensor, "expert d_model"]] | None = None,
    seed: int = 0,
) -> Edit:
    """Return an edit that removes the output of these experts without a new choice; the module lists the ways.

    means: layer → mean output of every expert, for how="mean"; `expert_means` has them.

    Raises:
        InputError: `how` is unknown, or means of a layer or an expert are missing.
    """
    if how in ("zero", "renormalise"):
        edit = reweight(layers, experts, 0.0, tokens, renormalise=how == "renormalise")
        return Edit(f"ablate ({how}): {edit.description}", edit.points, edit.watches)
    if how not in ("mean", "resample"):
        raise InputError(f"how={how!r}: use zero, renormalise, mean or resample")
    experts, members = sorted(set(experts)), as_set(tokens)
    if how == "mean" and (missing := sorted(set(numbers(layers)) - set(means or {}))):
        raise InputError(f"how='mean' needs means of layers {missing}: means=expert_means(model, tokens, layers)")

    def mean(out: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        assert means is not None
        selected, hit = _slots(at, members, experts)
        known = means[at.layer].to(out.device, out.dtype)
        if (hit & known.isnan().any(-1)[at.seen["experts"]]).any():
            raise InputError(
                f"layer {at.layer}: one of the experts {experts} was selected by no token, so it has no mean: "
                "compute expert_means on more tokens"
            )
        return torch.where(hit[..., None], known[at.seen["experts"]], out), selected, hit.sum()

    def another(out: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected, hit = _slots(at, members, experts)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + at.layer)
        new, changed = out.clone(), torch.zeros((), dtype=torch.long, device=out.device)
        for expert in experts:
            real = (at.context.sequence >= 0).to(out.device)[..., None]
            own = ((at.seen["experts"] == expert) & real).nonzero(as_tuple=True)
            n = len(own[0])
            if n < 2:
                continue
            shift = torch.randint(1, n, (n,), generator=rng).to(out.device)
            donor = (torch.arange(n, device=out.device) + shift) % n  # never itself
            target = hit[own]
            new[tuple(i[target] for i in own)] = out[tuple(i[donor[target]] for i in own)]
            changed = changed + target.sum()
        return new, selected, changed

    description = f"ablate ({how}): output of experts {experts} in {describe_layers(layers)}"
    acts: dict[str, Act] = {"mean": mean, "resample": another}
    return Edit(description, at_routers(layers, experts, "mlp.experts.hook_out", acts[how]), watches=("experts",))


@torch.no_grad()
def expert_means(
    model: Any, tokens: Tensor, layers: Layers, *, over: Tokens = None, **pass_options: Any
) -> dict[int, Float[Tensor, "expert d_model"]]:
    """Return each expert's mean output [expert d_model] over the tokens [batch pos] routed to it; NaN without any."""
    members, shape = as_set(over), (model.cfg.num_experts, model.cfg.d_model)
    sums = {layer: torch.zeros(shape, dtype=torch.float64) for layer in numbers(layers)}
    counts = {layer: torch.zeros(shape[0], dtype=torch.float64) for layer in sums}

    def add(out: Tensor, at: At) -> tuple[Tensor, int, int]:
        selected = at.selected(members)
        which = at.seen["experts"].cpu()[selected].flatten()
        sums[at.layer].index_add_(0, which, out.cpu()[selected].flatten(0, 1).double())
        counts[at.layer] += torch.bincount(which, minlength=shape[0])
        return out, int(selected.sum()), 0

    look = Edit("means of experts", at_layers(layers, "mlp.experts.hook_out", add), watches=("experts",))
    with applied(model, look):
        model.residual(tokens, **pass_options)
    return {layer: (sums[layer] / counts[layer][:, None]).float() for layer in sums}


def route(layers: Layers, function: Callable[[Tensor, Tensor], Tensor], tokens: Tokens = None) -> Edit:
    """Return an edit that replaces the router: function(x [batch pos d_model], logits [batch pos expert]) gives logits.

    x is what the router reads. Return something of the shape of `logits`, or that broadcasts to it.
    """
    members = as_set(tokens)

    def act(logits: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        norm = at.model.blocks[at.layer].ln2
        x = (at.seen["input"] * norm.weight.to(at.seen["input"].dtype)).to(at.model.dtype)
        selected = at.selected(members)
        new = torch.as_tensor(function(x, logits)).to(logits.device, logits.dtype).expand_as(logits)
        out = torch.where(selected.to(logits.device)[..., None], new, logits)
        return out, int(selected.sum()), (out != logits).any(-1).sum()

    return Edit(
        f"another router in {describe_layers(layers)}",
        at_layers(layers, "mlp.router.hook_out", act),
        watches=("input",),
    )


def _slots(at: At, members: TokenSet, experts: Sequence[int]) -> tuple[int, Bool[Tensor, "batch pos slot"]]:
    """Return how many tokens are selected, and the slots in which one of them went to one of the experts."""
    selected, chosen = at.selected(members), at.seen["experts"]
    wanted = torch.tensor(experts, device=chosen.device)
    return int(selected.sum()), torch.isin(chosen, wanted) & selected.to(chosen.device)[..., None]
