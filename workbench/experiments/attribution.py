"""Direct logit attribution: what the embedding, every head and every routed expert add to a logit, in logits.

The residual stream is a sum, and the final norm and a matrix follow it. So a logit, a difference of logits, or
any other linear function of them is a sum over what was written into the stream. One norm, three ways to share it out:

| norm | a part's share | reads |
|---|---|---|
| `frozen` | a · part / scale of the whole | with the run's scale; parts that only make the stream longer count |
| `path` | its share as the stream goes straight from the embedding to its end | as if all parts came in together |
| `layers` | the same, over each block's own step | a block adds up to its step of the logit lens |

With `path` and `layers` the norm acts on each part as on the whole, and the embedding has what it would say alone.
All three sum to the logit. What no part explains is never lost: `rest`, of each block, holds edits and SAEs at its
output and the rounding of the stream, `rounding` what the final norm and the logits were rounded by.

Reference: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; `rms_path` for the norm.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments import token_selection as at_points
from workbench.experiments.norm_attribution import normed
from workbench.experiments.residual_attribution import Meter, Norm
from workbench.experiments.token_selection import ROWS, SelectedTokens, Token
from workbench.hooks.edits import Tokens
from workbench.model.transformer import GptOss

Of = Token | Float[Tensor, " d_vocab"]
_VOCAB = 8192  # rows of the unembedding at a time
PARTS = ("embed", "heads", "attn_bias", "experts", "expert_bias", "rest", "rounding")
_MEANS = {
    "logit": "the logit of the model",
    "scale": "the final norm's scale",
    "embed": "the token's embedding",
    "heads": "a head's output",
    "attn_bias": "the bias of the attention's output",
    "experts": "a routed expert's matrices, gated",
    "expert_bias": "the bias of a routed expert's output, gated",
    "rest": "what a block wrote beyond its parts: edits, SAEs, rounding of the stream",
    "rounding": "what the final norm and the logits were rounded by",
    "expert": "the expert of a slot",
    "gate": "the slot's gate",
}


@torch.no_grad()
def logit_parts(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    *,
    at: Tokens = None,
    of: Of,
    minus: Of | Literal["mean"] | None = None,
    norm: Norm = "frozen",
    n_real: Sequence[int] | None = None,
) -> xr.Dataset:
    """Return the logit of `of`, less that of `minus`, at the tokens `at`, as a sum over parts.

    of, minus: a token id, ids [batch pos], "next" for the token that follows, or weights over the vocabulary
    [d_vocab]; minus may be "mean", of all logits. It holds a number a part and one layer's activations of the points.
    """
    check_norm(norm)
    chosen = at_points.select_tokens(model, tokens, at, n_real)
    terms = [(sign, _term(model, chosen, term)) for sign, term in ((1.0, of), (-1.0, minus)) if term is not None]
    a = sum(sign * _direction(model, term) for sign, term in terms) * model.ln_final.weight.cpu().double()
    a = a.expand(len(chosen.column), -1)
    ends = _ends(model, chosen) if norm == "path" else None
    meter = Meter(model, chosen, a, norm, ends)
    with model.hooks(fwd_hooks=meter.hooks):
        final = at_points.residual(model, chosen)
    value, scale = normed(a, final.cpu().double(), model.cfg.eps)
    logit = _logits(model, chosen, final, terms)
    shrink = scale if norm == "frozen" else torch.ones_like(scale)
    parts = {name: _over(t, shrink) if name in PARTS else t for name, t in meter.parts().items()}
    return _dataset(model, chosen, parts | {"logit": logit, "scale": scale, "rounding": logit - value}, terms, norm)


def check_norm(norm: str) -> None:
    """Check the name of the way in which norms are treated.

    Raises:
        InputError: the name is unknown.
    """
    if norm not in get_args(Norm):
        raise InputError(f"norm {norm!r}: use {', '.join(get_args(Norm))}")


def total(parts: xr.Dataset) -> xr.DataArray:
    """Return the sum of all parts of each point: the logit."""
    return sum((parts[name].sum(set(parts[name].dims) - {"point"}) for name in PARTS), xr.zeros_like(parts.logit))


def by_expert(parts: xr.Dataset) -> xr.DataArray:
    """Return the contribution of each expert (not slot): its matrices and its bias; 0 where it was not chosen."""
    slots = (parts.experts + parts.expert_bias).transpose("point", "layer", "slot").to_numpy()
    out = np.zeros((*slots.shape[:2], parts.attrs["num_experts"]))
    np.put_along_axis(out, parts.expert.transpose("point", "layer", "slot").to_numpy(), slots, -1)
    coords = {name: parts.coords[name] for name in ("sequence", "position", "token", "layer")}
    return xr.DataArray(out, coords, ("point", "layer", "expert"), "expert", parts.experts.attrs)


def ranked(parts: xr.Dataset, n: int = 20, point: int = 0) -> pd.DataFrame:
    """Return the n largest parts of one point by size, in logits."""
    here = parts.isel(point=point)
    frames = [
        here[name].drop_vars(("sequence", "position", "token")).to_dataframe("logits").reset_index()
        for name in PARTS
        if here[name].dims
    ]
    alone = pd.DataFrame({"part": name, "logits": float(here[name])} for name in PARTS if not here[name].dims)
    tables = [frame.assign(part=name) for name, frame in zip((p for p in PARTS if here[p].dims), frames, strict=True)]
    every = pd.concat([alone, *tables], ignore_index=True)
    every["expert"] = np.nan
    slots = every["slot"].notna()
    where = (every.loc[slots, axis].astype(int).to_numpy() for axis in ("layer", "slot"))
    every.loc[slots, "expert"] = here.expert.transpose("layer", "slot").to_numpy()[tuple(where)]
    order = every["logits"].abs().sort_values(ascending=False, kind="stable").index[:n]
    numbers = ["layer", "head", "slot", "expert"]
    return every.loc[order, ["part", "block", *numbers, "logits"]].astype(dict.fromkeys(numbers, "Int64"))


def _over(x: Float[Tensor, "point *part"], scale: Float[Tensor, " point"]) -> Float[Tensor, "point *part"]:
    return x / scale.view(-1, *[1] * (x.dim() - 1))


def _term(model: GptOss, chosen: SelectedTokens, of: Of | Literal["mean"]) -> Tensor:
    """Return an id for each point, or weights over the vocabulary."""
    d_vocab = model.cfg.d_vocab
    if isinstance(of, Tensor) and of.is_floating_point():
        if of.shape != (d_vocab,):
            raise InputError(f"weights over the vocabulary have the shape {tuple(of.shape)}, expected ({d_vocab},)")
        return of.cpu().double()
    if isinstance(of, str) and of == "mean":
        return torch.full((d_vocab,), 1 / d_vocab, dtype=torch.float64)
    ids = chosen.ids(of)
    if not bool(((ids >= 0) & (ids < d_vocab)).all()):
        raise InputError(f"token ids {int(ids.min())} to {int(ids.max())}: the vocabulary has 0 to {d_vocab - 1}")
    return ids


def _direction(model: GptOss, term: Tensor) -> Float[Tensor, "#point d_model"]:
    """Return what the normed stream is multiplied with, in float64; a few rows of the vocabulary at a time."""
    matrix = model.unembed.W_U.mT  # with the update of an adapter
    if not term.is_floating_point():
        return matrix[term.to(matrix.device)].cpu().double()
    out = torch.zeros(1, matrix.shape[1], dtype=torch.float64)
    for weights, rows in zip(term.split(_VOCAB), matrix.split(_VOCAB), strict=True):
        out += weights @ rows.cpu().double()
    return out


def _logits(
    model: GptOss, chosen: SelectedTokens, final: Tensor, terms: list[tuple[float, Tensor]]
) -> Float[Tensor, " point"]:
    """Return the model's own logits, put together as the terms specify."""
    out = torch.zeros(len(chosen.column), dtype=torch.float64)
    for part in torch.arange(len(out)).split(ROWS):
        logits = at_points.read_out(model, final[part.to(final.device)], chosen.column[part]).cpu().double()
        for sign, term in terms:
            alone = term.is_floating_point()
            out[part] += sign * (logits @ term if alone else logits.gather(-1, term[part, None])[:, 0])
    return out


def _ends(
    model: GptOss, chosen: SelectedTokens
) -> tuple[Float[Tensor, "point d_model"], Float[Tensor, "point d_model"]]:
    """Return the points' embedding and their stream after the last block."""
    begin: list[Tensor] = []

    def keep(x: Tensor, hook: object) -> None:
        begin.append(x[0, chosen.column.to(x.device)].cpu().double())

    with model.hooks(fwd_hooks=[("hook_embed", keep)]):
        end = at_points.residual(model, chosen).cpu().double()
    return begin[0], end


def _dataset(
    model: GptOss, chosen: SelectedTokens, values: dict[str, Tensor], terms: list[tuple[float, Tensor]], norm: Norm
) -> xr.Dataset:
    slots = dict.fromkeys(("experts", "expert_bias", "expert", "gate"), ("layer", "slot"))
    dims = slots | {"heads": ("layer", "head"), "attn_bias": ("layer",), "rest": ("layer", "block")}
    units = {"expert": "id", "gate": "1", "scale": "1"}
    data = {
        name: (
            ("point", *dims.get(name, ())),
            values[name].numpy(),
            {"long_name": says, "units": units.get(name, "logit")},
        )
        for name, says in _MEANS.items()
    }
    coords = chosen.coords() | {"layer": range(model.cfg.n_layers), "block": ["attn", "mlp"]}
    for name, (_, term) in zip(("of", "minus"), terms, strict=False):
        if not term.is_floating_point():
            coords[name] = ("point", term.numpy())
    attrs = {"units": "logit", "norm": norm, "num_experts": model.cfg.num_experts, "dtype": str(model.dtype)}
    return xr.Dataset(data, coords, attrs)
