"""Calling the model as TransformerLens' users do: text or ids in, logits or loss out, parts of the layers alone.

Rows that are padded on the left are computed with their padding on the right, where it changes nothing. Results are
moved back, and so is what hooks see: the position of a token is its column in the rows that were passed.

Reference: TransformerLens 4.3, HookedTransformer.forward, for names and meanings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.names import hook_points
from workbench.kernels.logits import logprob
from workbench.model.inputs import Batch, read_batch

ReturnType = Literal["logits", "loss", "both"] | None


def loss_fn(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "*any"]:
    """Return the cross-entropy in nats of every token given those before it: its mean, or [batch pos-1].

    attention_mask: 1 for tokens, 0 for padding, which is left out (0 with `per_token`).
    """
    loss = -logprob(logits[:, :-1], tokens[:, 1:])
    if attention_mask is None:
        return loss if per_token else loss.mean()
    counts = (attention_mask[:, 1:] * attention_mask[:, :-1]).to(loss)
    return loss * counts if per_token else (loss * counts).sum() / counts.sum()


def layer_range(n_layers: int, start: int | None, stop: int | None) -> range:
    """Return the layers from `start` up to, not including, `stop`; negative numbers count from the end.

    Raises:
        InputError: the model has no such layers.
    """
    for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
        if layer is not None and not -n_layers <= layer <= n_layers:
            raise InputError(f"{name}={layer}: the model has layers 0 to {n_layers - 1}")
    return range(*slice(start, stop).indices(n_layers))


def forward(
    model: Any,
    given: Any,
    return_type: ReturnType = "logits",
    *,
    loss_per_token: bool = False,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    start_at_layer: int | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Any = None,
    stop_at_layer: int | None = None,
    cache: Any = None,
    packed: Sequence[int] | None = None,
    n_real: Sequence[int] | None = None,
) -> Any:
    """Run a forward pass and return the result that `GptOss.forward` describes.

    Raises:
        InputError: the input is neither text nor ids of the vocabulary, or an option has no meaning.
    """
    if return_type not in ("logits", "loss", "both", None):
        raise InputError(f"return_type {return_type!r} is unknown: use 'logits', 'loss', 'both' or None")
    layers = layer_range(model.cfg.n_layers, start_at_layer, stop_at_layer)
    if start_at_layer is not None:
        stream = _residual_stream(model, given)
        ids = torch.zeros(stream.shape[:2], dtype=torch.long) if tokens is None else torch.as_tensor(tokens)
        batch = read_batch(model, ids, attention_mask=attention_mask)
    else:
        stream = None
        batch = read_batch(
            model, given, prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask
        )
    ids = _shifted(batch.tokens, batch, left=True)
    if stream is not None:
        stream = _shifted(stream, batch, left=True)
    padded = any(n < ids.shape[1] for n in batch.n_real)
    lengths = list(n_real) if n_real is not None else batch.n_real if padded else None
    columns = _columns(batch, left=False) if batch.padded_left else None
    with _hooks_on_rows_as_passed(model, batch, cache):
        x = model.residual(
            ids, cache=cache, packed=packed, n_real=lengths, layers=layers, stream=stream, hook_columns=columns
        )
        if stop_at_layer is not None:
            return _shifted(x, batch, left=False)
        x = model.ln_final(x)
        if return_type is None:
            return None
        logits = _shifted(model.unembed(x), batch, left=False)
    if return_type == "logits":
        return logits
    mask = _mask(batch) if padded else None
    loss = loss_fn(logits, batch.tokens.to(logits.device), mask, per_token=loss_per_token)
    return loss if return_type == "loss" else (logits, loss)


def _residual_stream(model: Any, given: Any) -> Tensor:
    if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[2] != model.cfg.d_model:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"start_at_layer takes a residual stream [batch pos {model.cfg.d_model}] as the input, got {got}"
        )
    return given


@contextmanager
def _hooks_on_rows_as_passed(model: Any, batch: Batch, cache: Any) -> Iterator[None]:
    """Give hooks, within the context, their values in the columns of the rows as these were passed.

    Raises:
        InputError: a backward hook or a cache meets padding on the left.
    """
    points = {name: point for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks}
    if not batch.padded_left or not points:
        yield
        return
    if cache is not None or any(point.bwd_hooks for point in points.values()):
        what = "a cache with hooks" if cache is not None else "backward hooks"
        raise InputError(f"{what} on rows that are padded on the left: pad on the right (padding_side='right')")
    axes, handles = hook_points(model.cfg.n_layers), []
    for name, point in points.items():
        moved = partial(_moved, batch=batch, axes=axes.get(name, "batch pos").split())
        handles.append(point.register_forward_hook(partial(moved, left=False), prepend=True))
        handles.append(point.register_forward_hook(partial(moved, left=True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(_module: Any, _inputs: Any, value: Tensor, *, batch: Batch, axes: list[str], left: bool) -> Tensor:
    """Return a hooked value with each axis of positions rolled."""
    for dim, axis in enumerate(axes):
        if axis in ("pos", "query_pos", "key_pos"):
            value = _shifted(value.movedim(dim, 1), batch, left=left).movedim(1, dim)
    return value


def _columns(batch: Batch, *, left: bool) -> Int[Tensor, "batch pos"]:
    """Return from which column each column of the rolled rows comes."""
    by = torch.tensor(batch.n_left, device=batch.tokens.device)[:, None]
    column = torch.arange(batch.tokens.shape[1], device=by.device)
    return (column + by if left else column - by) % batch.tokens.shape[1]


def _shifted(x: Tensor, batch: Batch, *, left: bool) -> Tensor:
    """Roll every row [batch pos ...] by its padding on the left: to the front, or back."""
    if not batch.padded_left:
        return x
    index = _columns(batch, left=left).to(x.device)
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def _mask(batch: Batch) -> Int[Tensor, "batch pos"]:
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    left = torch.tensor(batch.n_left, device=column.device)[:, None]
    right = left + torch.tensor(batch.n_real, device=column.device)[:, None]
    return ((column >= left) & (column < right)).long()
