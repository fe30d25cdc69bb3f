"""Where edits act: layers, heads, experts and hook points by number or name, checked against the model they meet."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.edits import Act
from workbench.hooks.names import closest_names

Layers = int | Collection[int]
Points = Callable[[Any], list[tuple[str, Act]]]


def numbers(layers: Layers) -> list[int]:
    """Return the layers, each once, in order."""
    return [layers] if isinstance(layers, int) else sorted(set(layers))


def describe_layers(layers: Layers) -> str:
    """Return the layers in words."""
    which = numbers(layers)
    return f"layer {which[0]}" if len(which) == 1 else f"layers {', '.join(map(str, which))}"


def at_layers(layers: Layers, point: str, act: Act, heads: Sequence[int] | None = None) -> Points:
    """Return the point in each of the layers, once the model is known to have them."""

    def points(model: Any) -> list[tuple[str, Act]]:
        _check("layer", numbers(layers), model.cfg.n_layers)
        _check("head", heads if heads is not None else [0], model.cfg.n_heads)
        return [(f"blocks.{layer}.{point}", act) for layer in numbers(layers)]

    return points


def at_routers(
    layers: Layers,
    experts: Sequence[int],
    point: str,
    act: Act,
    *,
    at_most_k: bool = False,
    forbidden: bool = False,
) -> Points:
    """Return the router hook point of each layer, after checking the experts.

    at_most_k: a token must have a slot for each of them. forbidden: a token must have enough experts without them.

    Raises:
        InputError: the model lacks an expert, or too many are given for one token.
    """

    def points(model: Any) -> list[tuple[str, Act]]:
        for layer in numbers(layers):
            if 0 <= layer < model.cfg.n_layers:  # `at_layers` refuses the others
                where = "the model" if model.cfg.layer_experts is None else f"layer {layer}"
                _check("expert", experts, n := model.cfg.experts_of(layer), where)
                if forbidden and n - len(experts) < (k := model.cfg.experts_per_token):
                    raise InputError(f"forbidding {len(experts)} of {n} experts leaves fewer than the {k} of a token")
        if at_most_k and len(experts) > model.cfg.experts_per_token:
            raise InputError(f"{len(experts)} experts: expected at most the {model.cfg.experts_per_token} of a token")
        return at_layers(layers, point, act)(model)

    return points


def _check(what: str, numbers: Sequence[int], n: int, where: str = "the model") -> None:
    wrong = [i for i in numbers if not 0 <= i < n]
    if wrong or not numbers:
        some = f"[{', '.join([*map(str, wrong[:3]), *(['…'] if len(wrong) > 3 else [])])}]" if wrong else "none"
        raise InputError(f"{what}s {some}: {where} has {what}s 0 to {n - 1}")


def at_points(points: str | Collection[str], act: Act) -> Points:
    """Return these hook points by name; each must have the axes batch and pos.

    Raises:
        InputError: a point has the axes query and key.
    """

    def checked(model: Any) -> list[tuple[str, Act]]:
        square = [name for name in points_of(model, points) if name.endswith(("hook_attn_scores", "hook_pattern"))]
        if square:
            raise InputError(f"{square[0]} has a value for each query and key: use knockout or patch")
        return [(name, act) for name in points_of(model, points)]

    return checked


def points_of(model: Any, points: str | Collection[str]) -> list[str]:
    """Return hook points of the model by name.

    Raises:
        InputError: no hook point was given, or the model does not have it.
    """
    names = [points] if isinstance(points, str) else list(points)
    for name in names:
        if name not in model.hook_dict:
            raise InputError(f"the model has no hook point {name!r}; {closest_names(name, model.hook_dict)}")
    if not names:
        raise InputError("no hook point was given: give at least one name")
    return names


def listed(points: str | Collection[str]) -> str:
    """Return the names of points in words, not too many."""
    names = [points] if isinstance(points, str) else list(points)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def among(which: Sequence[int], like: Shaped[Tensor, "*any n"]) -> Bool[Tensor, " n"]:
    """Return a mask of these entries of the last axis. It is shared: callers must not change it."""
    return _mask(tuple(which), like.shape[-1], like.device)


@functools.lru_cache(256)  # an edit asks at every layer and step
def _mask(which: tuple[int, ...], n: int, device: torch.device) -> Bool[Tensor, " n"]:
    with torch.inference_mode(False):  # a mask that is made during inference has to serve a training step later
        return torch.isin(torch.arange(n, device=device), torch.tensor(which, device=device))


def along(index: int | Collection[int] | None, x: Shaped[Tensor, "batch pos *feature"]) -> Bool[Tensor, "*any"]:
    """Return a mask of indices along the axis after pos, which broadcasts to x; all of them without indices.

    Raises:
        InputError: an index does not fit the axis after pos.
    """
    if index is None:
        return torch.ones((), dtype=torch.bool, device=x.device)
    which = [index] if isinstance(index, int) else list(index)
    if x.dim() < 3 or not all(0 <= i < x.shape[2] for i in which):
        raise InputError(f"index {which} does not fit the axis after pos of activations of {tuple(x.shape)}")
    return among(which, x[0, 0].movedim(0, -1)).view(-1, *[1] * (x.dim() - 3))


def over_axes(mask: Bool[Tensor, "batch pos"], x: Shaped[Tensor, "batch pos *feature"]) -> Bool[Tensor, "..."]:
    """Return the mask of tokens, so that it broadcasts to x."""
    return mask.to(x.device).view(*mask.shape, *[1] * (x.dim() - 2))
