"""Jacobian lenses: what a residual stream does to the model's output to first order, on average over many contexts.

A lens has a matrix J for each layer: the derivative of the residual stream after the last block with respect to the
stream after this layer's block. It is averaged over prompts and, within a prompt, over the source tokens; the effects
on a source token itself and on all later ones are added up. The first tokens of a prompt and its last one are neither
sources nor targets. `logit_lens(…, jacobian=lens)` reads J h through the final norm and the unembedding. With J = 1 it
is the logit lens.

The choice of experts has no derivative: J follows the gates of the experts that were chosen.

Files have the form of the reference implementation and of TransformerLens, which read each other's. Cost of a fit, for
each prompt: d_model / `batch` backward passes of `batch` copies of the prompt, in memory for the activations of these;
the matrices take d_model² floats for each layer and group.

Reference: Gurnee et al. 2026, Verbalizable Representations Form a Global Workspace in Language Models, Transformer
Circuits Thread; anthropics/jacobian-lens for the estimator and the file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.torch_file import read_torch_file
from workbench.model.transformer import GptOss
from workbench.outputs import staged
from workbench.progress import progress

SKIP_FIRST = 16  # the first tokens have residual streams unlike all others; the reference implementation's number
GROUPS = ("channel", "effort")


@dataclass
class JacobianLens:
    """h → J h before the final norm, for the stream after the block of each layer in `J`; in float32.

    n_prompts: of how many prompts the matrices are means. metadata: plain values about the fit.
    """

    J: dict[int, Float[Tensor, "d_model d_model"]]
    n_prompts: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Return the layers that have a matrix."""
        return sorted(self.J)

    def __call__(self, layer: int, x: Float[Tensor, "point d_model"]) -> Float[Tensor, "point d_model"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) @ self.J[layer].to(x.device, wide).mT).to(x.dtype)

    @classmethod
    def merge(cls, lenses: Sequence["JacobianLens"]) -> "JacobianLens":
        """Return the lens of the prompts of all these lenses, which were fitted to different prompts of one model.

        Raises:
            InputError: there is none, one was fitted to no known number of prompts, or their layers differ.
        """
        counts = [lens.n_prompts for lens in lenses]
        if not counts or min(counts) < 1:
            raise InputError(f"lenses of {counts} prompts cannot be merged: each needs at least one")
        if len({(tuple(lens.layers), len(lens.J[lens.layers[0]])) for lens in lenses}) > 1:
            raise InputError("these lenses have different layers or sizes: only lenses of one model can be merged")
        total = sum(counts)
        means = {
            layer: torch.stack([lens.J[layer] * (n / total) for lens, n in zip(lenses, counts, strict=True)]).sum(0)
            for layer in lenses[0].layers
        }
        return cls(means, total, dict(lenses[0].metadata))

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the file, complete or not at all; another lens is replaced, and nothing else.

        dtype: of the matrices; the reference implementation writes float16, too.

        Raises:
            InputError: the path is a link or a device, or holds something that is not a Jacobian lens.
        """
        content: dict[str, Any] = {
            "J": {layer: self.J[layer].to(dtype) for layer in self.layers},
            "n_prompts": self.n_prompts,
            "source_layers": self.layers,
            "d_model": len(self.J[self.layers[0]]),
        }
        with staged(path, command="JacobianLens.save", overwrite=True, owned=_is_lens) as part:
            try:
                torch.save(content | ({"metadata": self.metadata} if self.metadata else {}), part)
            except RuntimeError as error:  # torch does not name the reason
                raise OSError("not all bytes were written") from error

    @classmethod
    def load(cls, path: str | Path, model: GptOss) -> "JacobianLens":
        """Return the lens in a file of `save`, of the reference implementation or of TransformerLens.

        The checkpoint of an unfinished fit of the reference implementation (`jacobian_sum`, `n_done`) is read, too.

        Raises:
            InputError: the file is missing, damaged, not a Jacobian lens, or of a model of other sizes.
        """
        content = read_torch_file(Path(path))
        if not isinstance(content, dict) or not ({"J", "jacobian_sum"} & content.keys()):
            raise InputError(f"{path} is not a Jacobian lens: expected a dict with 'J', or 'jacobian_sum' and 'n_done'")
        finished = "J" in content
        n_prompts = content.get("n_prompts", content.get("n_done", 0))
        if type(n_prompts) is not int or n_prompts < (0 if finished else 1):
            raise InputError(f"{path}: the number of prompts is {n_prompts!r}, expected a positive whole number")
        matrices = content["J"] if finished else content["jacobian_sum"]
        if not isinstance(matrices, dict) or not matrices:
            raise InputError(f"{path}: expected a matrix for each layer, got {type(matrices).__name__}")
        lens = cls({}, n_prompts, _metadata(content))
        for layer, matrix in matrices.items():
            lens.J[_layer(path, layer, model)] = _matrix(path, layer, matrix, model) / (1 if finished else n_prompts)
        last = model.cfg.n_layers - 1
        if (target := lens.metadata.get("target_layer", last)) != last:
            raise InputError(f"{path} is fitted to layer {target!r}, expected the last one, {last}")
        listed = content.get("source_layers", lens.layers)
        if not isinstance(listed, list | tuple) or sorted(map(str, listed)) != sorted(map(str, lens.J)):
            raise InputError(f"{path} lists layers {listed!r} and has matrices of {lens.layers}: the file is damaged")
        return lens


def _is_lens(path: Path) -> bool:
    try:
        content = read_torch_file(path)
    except InputError:
        return False
    return isinstance(content, dict) and "J" in content


def _metadata(content: Mapping[str, Any]) -> dict[str, Any]:
    known = content.get("metadata")
    metadata = dict(known) if isinstance(known, dict) else {}
    return metadata | ({"target_layer": content["target_layer"]} if "target_layer" in content else {})


def _layer(path: str | Path, layer: object, model: GptOss) -> int:
    """Return the number of a layer of this model; some writers have it as text."""
    number = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
    if type(number) is not int or not 0 <= number < model.cfg.n_layers:
        last = model.cfg.n_layers - 1
        raise InputError(f"{path} has layer {layer!r}, this model has layers 0 to {last}: it is another model's lens")
    return number


def _matrix(path: str | Path, layer: object, matrix: object, model: GptOss) -> Float[Tensor, "d_model d_model"]:
    """Return the matrix of a layer in float32, if it is one of this model's size."""
    d = model.cfg.d_model
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != (d, d):
        got = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InputError(f"{path}: layer {layer} is {got}, this model needs {[d, d]}: it is another model's lens")
    if not matrix.is_floating_point() or not matrix.isfinite().all():
        raise InputError(f"{path}: the matrix of layer {layer} is not of finite floating-point numbers")
    return matrix.float()


def fit_jacobian_lens(
    model: GptOss,
    tokens: Int[Tensor, "batch pos"],
    *,
    n_real: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    skip_first: int = SKIP_FIRST,
    batch: int = 16,
) -> JacobianLens:
    """Return the lens over all tokens of these sequences, as the reference implementation fits it.

    layers: all but the last by default. batch: rows of J that a backward pass computes; memory grows with it.

    Raises:
        InputError: a layer has no lens, or every sequence is too short.
    """
    lengths = [tokens.shape[1]] * len(tokens) if n_real is None else list(n_real)
    sequences = [ids[:n] for ids, n in zip(tokens.cpu(), lengths, strict=True)]
    everything = [{"all": np.ones(len(ids), dtype=bool)} for ids in sequences]
    return _fit(model, sequences, everything, layers, skip_first, batch)["all"]


def fit_jacobian_lenses(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    by: Sequence[str] = GROUPS,
    layers: Sequence[int] | None = None,
    skip_first: int = SKIP_FIRST,
    batch: int = 16,
) -> dict[str, JacobianLens]:
    """Return a lens for each channel and effort, or for what `by` names of the two: "analysis, high" → lens.

    The source tokens are those of the channel; the targets are all later tokens, whatever their channel. The lens "all"
    has all tokens as sources. One pass over a sequence serves all its groups; groups without a source token have none.

    Raises:
        InputError: `by` names something else, a layer has no lens, or every sequence is too short.
    """
    sequences = [torch.from_numpy(row.tokens.astype(np.int64)) for row in rows]
    masks = [{"all": np.ones(len(row.tokens), dtype=bool)} | group_masks(model, row, by) for row in rows]
    return _fit(model, sequences, masks, layers, skip_first, batch)


def group_masks(model: GptOss, row: Transcript, by: Sequence[str]) -> dict[str, Bool[np.ndarray, " pos"]]:
    """Return the tokens of a sequence in each group of `by` that it has, by the group's name.

    Raises:
        InputError: `by` is empty or names something else than channel and effort.
    """
    if not by or not set(by) <= set(GROUPS):
        raise InputError(f"by={','.join(by)!r}: expected 'channel', 'effort', or both with a comma between them")
    ids = row.tokens.astype(np.int64)
    masks = {"": np.ones(len(ids), dtype=bool)}
    if "channel" in by:
        masks = {name: token_set(channel=name, tokenizer=model.tokenizer)(ids) for name in CHANNELS}
    effort = [row.effort or "unknown effort"] if "effort" in by else []
    return {", ".join([name] * bool(name) + effort): mask for name, mask in masks.items() if mask.any()}


def _fit(
    model: GptOss,
    sequences: Sequence[Int[Tensor, " _"]],
    groups: Sequence[Mapping[str, Bool[np.ndarray, " _"]]],
    layers: Sequence[int] | None,
    skip_first: int,
    batch: int,
) -> dict[str, JacobianLens]:
    """Return a lens for each name of a group of source tokens, from means within prompts, then over prompts."""
    last = model.cfg.n_layers - 1
    chosen = list(range(last)) if layers is None else sorted(set(layers))
    if not chosen or not all(0 <= layer < last for layer in chosen):
        raise InputError(
            f"layers={chosen}: expected layers from 0 to {last - 1}; the Jacobian of the last layer is the identity"
        )
    if batch < 1 or skip_first < 0:
        raise InputError(f"batch={batch}, skip_first={skip_first}: expected at least 1, and at least 0")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with progress("fit", len(sequences), "prompts") as advance:
        for ids, masks in zip(sequences, groups, strict=True):
            valid = np.zeros(len(ids), dtype=bool)
            valid[skip_first:-1] = True
            sources = {name: mask & valid for name, mask in masks.items() if (mask & valid).any()}
            if sources:
                own = torch.from_numpy(np.stack(list(sources.values())))
                matrices = jacobians(model, ids, torch.from_numpy(valid), own, chosen, batch)
                for name, J in zip(sources, matrices, strict=True):
                    sums[name], counts[name] = sums.get(name, 0) + J, counts.get(name, 0) + 1
            advance(1)
    if not sums:
        raise InputError(
            f"no sequence has a source token after the first {skip_first} and before its last: give longer ones, or a "
            "smaller skip_first"
        )
    about = {"skip_first_positions": skip_first, "target_layer": last, "estimator": "jacobian_lens"}
    return {
        name: JacobianLens(dict(zip(chosen, total / counts[name], strict=True)), counts[name], about | {"group": name})
        for name, total in sums.items()
    }


def jacobians(
    model: GptOss,
    ids: Int[Tensor, " pos"],
    targets: Bool[Tensor, " pos"],
    sources: Bool[Tensor, "group pos"],
    layers: Sequence[int],
    batch: int = 16,
) -> Float[Tensor, "group layer d_model d_model"]:
    """Return, of one sequence, the mean over each group's source tokens of the derivative of the summed targets.

    Rows of a matrix are the dimensions of the stream after the last block. The sequence runs `batch` times side by
    side, and each copy has the gradient of another dimension.
    """
    d, batch = model.cfg.d_model, min(batch, model.cfg.d_model)
    with _without_weight_gradients(model):
        streams, end = _differentiable_pass(model, ids, layers, batch)
    weights = (sources / sources.sum(-1, keepdim=True)).to(torch.promote_types(end.dtype, torch.float32))
    out = torch.zeros(len(sources), len(layers), d, d)
    for row in range(0, d, batch):
        n = min(batch, d - row)
        cotangent = torch.zeros_like(end)
        for i in range(n):
            cotangent[i, :, row + i] = targets.to(end.device, end.dtype)
        gradients = torch.autograd.grad(end, streams, cotangent, retain_graph=row + n < d)
        for i, gradient in enumerate(gradients):
            own = weights.to(gradient.device)
            out[:, i, row : row + n] = torch.einsum("npd,gp->gnd", gradient[:n].to(own.dtype), own).cpu().float()
    return out


def _differentiable_pass(
    model: GptOss, ids: Int[Tensor, " pos"], layers: Sequence[int], batch: int
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]:
    """Return the streams after the blocks of `layers` and after the last block, which depends on them."""
    copies, first, streams = ids.expand(batch, -1), layers[0], dict[int, Tensor]()

    def keep(x: Tensor, hook: Any) -> None:
        streams[int(hook.name.split(".")[1])] = x

    with torch.no_grad():
        start = model.residual(ids[None], layers=range(first + 1))
    hooks = [(f"blocks.{layer}.hook_resid_post", keep) for layer in layers[1:]]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        streams[first] = start.detach().expand(batch, -1, -1).clone().requires_grad_()
        end = model.residual(copies, stream=streams[first], layers=range(first + 1, model.cfg.n_layers))
    return [streams[layer] for layer in layers], end


@contextmanager
def _without_weight_gradients(model: GptOss) -> Iterator[None]:
    """Let no weight keep what its gradient would need, while the model runs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
