"""Calling the model as TransformerLens' users do: text or ids in, logits or loss out, parts of the layers alone.

Rows that are padded on the left run with their padding on the right, where it changes nothing, and results are moved
back. Hooks would see the rows before they are moved back, at other positions than their tokens, so the two are refused
together.

Reference: TransformerLens 4.3, HookedTransformer.forward, for names and meanings.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
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
    found = -logprob(logits[:, :-1], tokens[:, 1:])
    if attention_mask is None:
        return found if per_token else found.mean()
    counts = (attention_mask[:, 1:] * attention_mask[:, :-1]).to(found)
    return found * counts if per_token else (found * counts).sum() / counts.sum()


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
    """Return what `GptOss.forward` describes.

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
    if batch.padded_left and any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()):
        raise InputError(
            "hooks on rows that are padded on the left would see tokens at other positions: pad on the right "
            "(padding_side='right') and read each row's last token by its length"
        )
    ids = _shifted(batch.tokens, batch, left=True)
    if stream is not None:
        stream = _shifted(stream, batch, left=True)
    padded = any(n < ids.shape[1] for n in batch.n_real)
    lengths = list(n_real) if n_real is not None else batch.n_real if padded else None
    x = model.residual(ids, cache=cache, packed=packed, n_real=lengths, layers=layers, stream=stream)
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


def _shifted(x: Tensor, batch: Batch, *, left: bool) -> Tensor:
    """Roll every row by its padding on the left: to the front, or back."""
    if not batch.padded_left:
        return x
    by = torch.tensor(batch.n_left, device=x.device)[:, None]
    column = torch.arange(x.shape[1], device=x.device)
    index = (column + by if left else column - by) % x.shape[1]
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def _mask(batch: Batch) -> Int[Tensor, "batch pos"]:
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    left = torch.tensor(batch.n_left, device=column.device)[:, None]
    right = left + torch.tensor(batch.n_real, device=column.device)[:, None]
    return ((column >= left) & (column < right)).long()
