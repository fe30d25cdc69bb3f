"""Lenses: the residual stream of each depth read as logits, and what each expert writes, read as logits.

A lens puts the residual stream of every depth through the final norm and the unembedding: depth 0 is the embedding,
then every attention and every expert layer has one, and the last is the model's own output. Before that, a tuned lens
applies an affine map, fitted for each depth so that the lens predicts the model's output; a Jacobian lens
(`jacobians`) applies the mean derivative of the last stream with respect to that of a layer.

Logits are computed for a few tokens and one depth at a time; the result is a number for each token and depth.

Reference: nostalgebraist 2020, interpreting GPT: the logit lens; Belrose et al. 2023, the tuned lens, arXiv 2303.08112;
Gurnee et al. 2026, the Jacobian lens, Transformer Circuits Thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.jacobians import JacobianLens
from workbench.experiments.token_selection import ROWS, SelectedTokens, Token, read_out, residual, select_tokens
from workbench.hooks.edits import Tokens
from workbench.inputs import open_regular
from workbench.kernels.logits import log_probabilities
from workbench.model.safetensors_file import save_tensors
from workbench.model.transformer import GptOss
from workbench.outputs import staged

_UNITS = {"logit": "logit", "logprob": "nat", "rank": "1", "top": "id", "entropy": "nat", "kl": "nat"}
_MEANS = {
    "logit": "logit of the token",
    "logprob": "log-probability of the token",
    "rank": "tokens that are likelier",
    "top": "the likeliest token",
    "entropy": "entropy of the distribution",
    "kl": "KL divergence of the distribution from the model's own",
}


@dataclass
class TunedLens:
    """x → x + A x + b before the final norm, for every depth but the last; in float32.

    Saved as safetensors with the two tensors A and b.
    """

    A: Float[Tensor, "depth d_model d_model"]
    b: Float[Tensor, "depth d_model"]

    @classmethod
    def identity(cls, model: GptOss) -> "TunedLens":
        """Return the logit lens."""
        depths, d = 2 * model.cfg.n_layers, model.cfg.d_model
        return cls(torch.zeros(depths, d, d), torch.zeros(depths, d))

    def __call__(self, depth: int, x: Float[Tensor, "point d_model"]) -> Float[Tensor, "point d_model"]:
        if depth == len(self.b):
            return x
        a, b = (t[depth].to(x.device) for t in (self.A, self.b))
        return (x.to(a.dtype) + x.to(a.dtype) @ a.mT + b).to(x.dtype)

    def save(self, path: str | Path) -> None:
        """Write the file, complete or not at all; another lens is replaced, and nothing else.

        Raises:
            InputError: the path is a link or a device, or holds something that is not a lens.
        """
        with staged(path, command="TunedLens.save", overwrite=True, owned=_is_lens) as part:
            save_tensors({"A": self.A.contiguous(), "b": self.b.contiguous()}, part)

    @classmethod
    def load(cls, path: str | Path, model: GptOss) -> "TunedLens":
        """Return the lens of a file that `save` wrote for a model of these sizes.

        Raises:
            InputError: the file is missing, unreadable, or of another model.
        """
        try:
            open_regular(Path(path)).close()  # no pipe, which would wait for ever
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or no safetensors file: {error}") from error
        wanted = cls.identity(model)
        shapes = {"A": tuple(wanted.A.shape), "b": tuple(wanted.b.shape)}
        if (got := {name: tuple(t.shape) for name, t in tensors.items()}) != shapes:
            raise InputError(f"{path} holds {got}, this model needs {shapes}: it is another model's lens")
        return cls(tensors["A"].float(), tensors["b"].float())


def _is_lens(path: Path) -> bool:
    try:
        open_regular(path).close()
        return set(load_file(path)) == {"A", "b"}
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def logit_lens(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    *,
    at: Tokens = None,
    of: Token | Sequence[int],
    tuned: TunedLens | None = None,
    jacobian: JacobianLens | None = None,
    n_real: Sequence[int] | None = None,
) -> xr.Dataset:
    """Return the logit lens of the tokens `at` after every depth, by (point, depth), or a tuned or Jacobian lens.

    of: whose logit, log-probability and rank are given: a token id, ids [batch pos], "next" for the token that
    follows, or several ids, which add the dimension `choice`. A Jacobian lens has the depths after the layers for which
    it was fitted, and the last.

    Raises:
        InputError: no token is selected, or both a tuned and a Jacobian lens are given.
    """
    chosen = select_tokens(model, tokens, at, n_real)
    return lens_of_streams(model, chosen, streams(model, chosen), of=of, tuned=tuned, jacobian=jacobian)


@torch.no_grad()
def lens_of_streams(
    model: GptOss,
    chosen: SelectedTokens,
    stream: Sequence[Float[Tensor, "point d_model"]],
    *,
    of: Token | Sequence[int],
    tuned: TunedLens | None = None,
    jacobian: JacobianLens | None = None,
) -> xr.Dataset:
    """Return the dataset of `logit_lens` from streams that `streams` returned, for several lenses of the same tokens.

    Raises:
        InputError: both a tuned and a Jacobian lens are given.
    """
    if tuned is not None and jacobian is not None:
        raise InputError("both a tuned and a Jacobian lens are given: give one of them")
    several = not isinstance(of, int | str | Tensor)
    choices = [chosen.ids(one) for one in of] if several else [chosen.ids(of)]  # type: ignore[union-attr, arg-type]
    ids = torch.stack(choices, 1)
    maps = _maps(model, tuned, jacobian)
    parts_of: dict[str, list[Tensor]] = {name: [] for name in _MEANS}
    for rows in torch.arange(len(ids)).split(ROWS):
        column = chosen.column[rows]
        final = log_probabilities(read_out(model, stream[-1][rows], column))
        mapped = (apply(stream[depth][rows]) for depth, apply in maps.items())
        depths = [_stats(read_out(model, x, column), final, ids[rows]) for x in mapped]
        for name, values in parts_of.items():
            values.append(torch.stack([stats[name] for stats in depths], 1))
    data = {}
    for name, parts in parts_of.items():
        array = torch.cat(parts).numpy()
        dims = ("point", "depth", "choice")[: array.ndim]
        data[name] = (dims, array, {"long_name": _MEANS[name], "units": _UNITS[name]})
    layers = [-1, *(layer for layer in range(model.cfg.n_layers) for _ in range(2))]
    after = ["embed", *["attn", "mlp"] * model.cfg.n_layers]
    depth_coords = {"layer": ("depth", [layers[d] for d in maps]), "after": ("depth", [after[d] for d in maps])}
    coords = chosen.coords() | depth_coords | {"of": (("point", "choice"), ids)}
    name = "tuned" if tuned is not None else "logit" if jacobian is None else "jacobian"
    out = xr.Dataset(data, coords, {"lens": name, "dtype": str(model.dtype)})
    return out if several else out.isel(choice=0)


def _maps(
    model: GptOss, tuned: TunedLens | None, jacobian: JacobianLens | None
) -> dict[int, Callable[[Tensor], Tensor]]:
    """Return what a lens applies to the stream [point d_model] of each depth that it reads."""
    last = 2 * model.cfg.n_layers
    if jacobian is not None:
        after = {2 * layer + 2: partial(jacobian, layer) for layer in jacobian.layers}
        return {**{depth: apply for depth, apply in after.items() if depth < last}, last: lambda x: x}
    return {depth: (lambda x: x) if tuned is None else partial(tuned, depth) for depth in range(last + 1)}


def fit_tuned_lens(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    *,
    at: Tokens = None,
    n_real: Sequence[int] | None = None,
    steps: int = 300,
    rows: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> TunedLens:
    """Return a tuned lens fitted to the model's distribution (KL) by `steps` of Adam on `rows` tokens each.

    It holds the streams of all tokens in the model's dtype, and four matrices of d_model² a depth in float32.
    """
    with torch.no_grad():
        chosen = select_tokens(model, tokens, at, n_real)
        stream = streams(model, chosen)
    lens, rng = TunedLens.identity(model), torch.Generator().manual_seed(seed)
    # Apart, so that a depth's gradient is of its own size and not of all depths'.
    maps = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in zip(lens.A, lens.b, strict=True)]
    adam = torch.optim.Adam([p for pair in maps for p in pair], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, steps)
    for _ in range(steps):
        some = torch.randint(len(chosen.column), (rows,), generator=rng)
        with torch.no_grad():
            final = log_probabilities(read_out(model, stream[-1][some], chosen.column[some]))
        for (a, b), x in zip(maps, stream, strict=False):
            here = TunedLens(a[None], b[None])(0, x[some])
            loss = _kl(log_probabilities(read_out(model, here, chosen.column[some])), final).mean()
            a.grad, b.grad = torch.autograd.grad(loss, (a, b))
        adam.step()
        decay.step()
    return TunedLens(*(torch.stack([pair[i].detach() for pair in maps]) for i in range(2)))


@torch.no_grad()
def expert_writes(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    *,
    at: Tokens = None,
    n_real: Sequence[int] | None = None,
    k: int = 10,
) -> xr.Dataset:
    """Return the output of every expert read as logits: the k tokens it raises most, over the tokens routed to it.

    By (layer, expert, rank): `token`, and `logit`, the mean of its gated output through the final norm, with the scale
    that the run had, and the unembedding, less the mean over the vocabulary. `n` is how many tokens went to it; of an
    expert that none did, the tokens are −1 and the logits NaN.
    """
    chosen = select_tokens(model, tokens, at, n_real)
    scale = (residual(model, chosen).float().square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    n_experts, seen, sums, counts = model.cfg.num_experts, dict[str, Tensor](), list[Tensor](), list[Tensor]()

    def see(x: Tensor, hook: Any) -> None:
        name, there = hook.name.split(".", 2)[2], x[0, chosen.column.to(x.device)]
        seen[name] = there
        if name == "mlp.experts.hook_out":
            gated = there.float() * (seen["mlp.hook_expert_weights"].float() / scale.to(x.device))[..., None]
            slots = seen["mlp.hook_expert_indices"].flatten()
            zeros = torch.zeros(n_experts, x.shape[-1], device=x.device)
            sums.append(zeros.index_add_(0, slots, gated.flatten(0, 1)))
            counts.append(torch.bincount(slots, minlength=n_experts))

    inside = ("mlp.hook_expert_indices", "mlp.hook_expert_weights", "mlp.experts.hook_out")
    with model.hooks(fwd_hooks=[(f"blocks.{i}.{n}", see) for i in range(model.cfg.n_layers) for n in inside]):
        residual(model, chosen)
    strongest = [_top(model, total / n[:, None], k) for total, n in zip(sums, counts, strict=True)]
    logit, token = (torch.stack(list(parts)).numpy() for parts in zip(*strongest, strict=True))
    data = {
        "token": (("layer", "expert", "rank"), np.where(np.isnan(logit), -1, token), {"units": "id"}),
        "logit": (("layer", "expert", "rank"), logit, {"units": "logit"}),
        "n": (("layer", "expert"), torch.stack([n.cpu() for n in counts]).numpy(), {"units": "token"}),
    }
    return xr.Dataset(data, {"layer": range(len(sums)), "expert": range(n_experts)}, {"dtype": str(model.dtype)})


def streams(model: GptOss, chosen: SelectedTokens) -> list[Float[Tensor, "point d_model"]]:
    """Return the residual stream of the points at every depth, in the model's dtype."""
    stream: list[Tensor] = []

    def keep(x: Tensor, hook: object) -> None:
        stream.append(x[0, chosen.column.to(x.device)])

    ends = [
        f"blocks.{layer}.{name}"
        for layer in range(model.cfg.n_layers)
        for name in ("hook_resid_mid", "hook_resid_post")
    ]
    hooks: list[tuple[str, Callable[..., None]]] = [(name, keep) for name in ["hook_embed", *ends]]
    with model.hooks(fwd_hooks=hooks):
        residual(model, chosen)
    return stream


def _stats(logits: Tensor, final: Tensor, ids: Int[Tensor, "point choice"]) -> dict[str, Tensor]:
    logp, ids = log_probabilities(logits), ids.to(logits.device)
    own = logits.gather(-1, ids)
    rank = [(logits > own[:, i, None]).sum(-1) for i in range(ids.shape[1])]
    out = {
        "logit": own,
        "logprob": logp.gather(-1, ids),
        "rank": torch.stack(rank, 1),
        "top": logits.argmax(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "kl": _kl(logp, final),
    }
    return {name: t.cpu() for name, t in out.items()}


def _kl(logp: Float[Tensor, "point d_vocab"], final: Float[Tensor, "point d_vocab"]) -> Float[Tensor, " point"]:
    return (final.exp() * (final - logp)).sum(-1)


def _top(model: GptOss, mean: Float[Tensor, "expert d_model"], k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits, less their mean, and their tokens; a few experts at a time."""
    weight, largest = model.unembed.W_U.mT, []
    for part in mean.split(ROWS):
        logits = (part.to(weight.device) * model.ln_final.weight.float()).to(weight.dtype) @ weight.mT
        largest.append((logits.float() - logits.float().mean(-1, keepdim=True)).topk(min(k, len(weight)), -1))
    return torch.cat([f.values for f in largest]).cpu(), torch.cat([f.indices for f in largest]).cpu()
