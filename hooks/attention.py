"""Edits of attention: sink probabilities, which keys a query sees, outputs of heads; see `hooks.interventions`.

Reference: Geva et al. (arXiv 2304.14767) for knockout.
"""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.edits import At, Edit, Tokens, as_set
from workbench.hooks.targets import Layers, along, among, at_layers, describe_layers, over_axes


def remove_sinks(layers: Layers, heads: Collection[int] | None = None, tokens: Tokens = None) -> Edit:
    """Return an edit that removes the sink from the softmax: each row of the pattern sums to one."""
    return _sinks(f"remove sinks of {describe_layers(layers)}", layers, heads, tokens, lambda p, s: torch.zeros_like(p))


def scale_sinks(layers: Layers, factor: float, heads: Collection[int] | None = None, tokens: Tokens = None) -> Edit:
    """Return an edit that multiplies the sink probability by `factor`, at most to one, and rescales the pattern."""
    description = f"sinks of {describe_layers(layers)} × {factor:g}"
    return _sinks(description, layers, heads, tokens, lambda p, s: (p * factor).clamp(max=1))


def set_sinks(
    layers: Layers,
    heads: Collection[int] | None = None,
    tokens: Tokens = None,
    *,
    probability: float | None = None,
    logit: float | None = None,
) -> Edit:
    """Return an edit that sets the sink probability, or its logit in place of the learned one.

    Raises:
        InputError: neither or both of probability and logit are given, or the probability is outside [0, 1].
    """
    if (probability is None) == (logit is None) or not 0 <= (probability or 0) <= 1:
        raise InputError("expected either a probability from 0 to 1 or a logit, not both or neither")
    if probability is not None:
        description = f"sinks of {describe_layers(layers)} at probability {probability:g}"
        return _sinks(description, layers, heads, tokens, lambda p, s: torch.full_like(p, probability))
    assert logit is not None
    description = f"sinks of {describe_layers(layers)} at logit {logit:g}"
    # p = sigmoid(s − lse): another logit moves the log-odds by what it differs.
    return _sinks(description, layers, heads, tokens, lambda p, s: torch.sigmoid(p.logit() + (logit - s)))


def knockout(layers: Layers, queries: Tokens, keys: Tokens, heads: Collection[int] | None = None) -> Edit:
    """Return an edit that hides the keys from the queries; their probability goes to the other keys and the sink.

    It opens the scores: 4 bytes × heads × queries × keys, one layer at a time.
    """
    from_, to = as_set(queries), as_set(keys)
    heads = None if heads is None else sorted(set(heads))

    def act(scores: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        rows, cols = at.selected(from_), at.context.key_mask(to)
        pairs = (rows[:, :, None] & cols[:, None]).to(scores.device)[:, None]
        if heads is not None:
            pairs = pairs & among(heads, scores[0, :, 0, 0])[:, None, None]
        gone = pairs & (scores > -torch.inf)
        tokens = int(gone.any(1).any(-1).sum())
        return scores.masked_fill(gone, -torch.inf), tokens, gone.sum()

    return Edit(f"knockout in {describe_layers(layers)}", at_layers(layers, "attn.hook_attn_scores", act, heads=heads))


def scale_heads(layers: Layers, factor: float, heads: Collection[int] | None = None, tokens: Tokens = None) -> Edit:
    """Return an edit that multiplies the outputs of heads by `factor`; 0 ablates the heads.

    It acts on `attn.hook_z`, before the output projection, whose bias remains.
    """
    members = as_set(tokens)
    heads = None if heads is None else sorted(set(heads))

    def act(z: Float[Tensor, "batch pos head d_head"], at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        mask = over_axes(selected, z) & along(heads, z)
        out = torch.where(mask, z * factor, z)
        return out, int(selected.sum()), mask.expand(*z.shape[:3], 1).sum()

    which = "all heads" if heads is None else f"head{'s' if len(heads) != 1 else ''} {', '.join(map(str, heads))}"
    description = f"{which} of {describe_layers(layers)} × {factor:g}"
    return Edit(description, at_layers(layers, "attn.hook_z", act, heads=heads))


def _sinks(
    description: str,
    layers: Layers,
    heads: Collection[int] | None,
    tokens: Tokens,
    new: Callable[[Tensor, Tensor], Tensor],
) -> Edit:
    """new(probability [batch pos head], learned logit [head]) is the probability that counts."""
    members = as_set(tokens)
    heads = None if heads is None else sorted(set(heads))

    def act(p: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        mask = selected.to(p.device)[..., None] & along(heads, p)
        out = torch.where(mask, new(p, at.model.blocks[at.layer].attn.sinks.to(p)), p)
        return out, int(selected.sum()), mask.sum()

    return Edit(description, at_layers(layers, "attn.hook_sink", act, heads=heads))
