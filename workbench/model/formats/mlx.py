"""Read folders that MLX wrote: gate and up in separate tensors, packed words of 32 bits, and affine-quantised matrices.

MXFP4 words hold the published nibbles in the published order, so the experts are views with gate and up put in turn.
An affine matrix is `weight` (words, lowest bits first) · `scales` + `biases`, in groups along the inputs; it is
dequantised when it is read. The number of bits follows from the shapes.

Reference: https://github.com/ml-explore/mlx-lm, mlx_lm/models/gpt_oss.py (commit 1245c2ec); mlx.core.quantize.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise
from workbench.model.config import GROUP, Config
from workbench.model.lazy_tensors import LazyTensor
from workbench.model.names import name_in, shapes
from workbench.model.safetensors_file import FLOATS
from workbench.model.stored_names import Stored

_WORD = 32  # bits
_BITS = (2, 4, 8)  # whole values in a word
_PROBE = "model.layers.0.mlp.experts.gate_proj.weight"


def is_mlx(available: Mapping[str, Stored]) -> bool:
    """Return whether a folder with these tensors was written by MLX."""
    return _PROBE in available


def mlx_tensors(root: Path, cfg: Config, available: Mapping[str, Stored]) -> tuple[str, dict[str, LazyTensor]]:
    """Return "mxfp4" or "dense", and every tensor of the config.

    Raises:
        InputError: a tensor is missing, unexpected, or of a shape or dtype that is not read.
    """
    matrices = {name.removesuffix(".weight") for name in available if ".experts." in name and name.endswith(".weight")}
    packed = all(_is_packed(available, matrix) for matrix in matrices)
    experts = "mxfp4" if packed else "dense"
    used: set[str] = set()
    tensors: dict[str, LazyTensor] = {}
    for name, shape in shapes(cfg, experts).items():
        if ".mlp.experts." in name:
            tensors[name] = _expert(root, available, name, shape, used)
        else:
            tensors[name] = _matrix(root, available, name_in("huggingface", name), shape, used)
    if left := sorted(set(available) - used):
        raise InputError(f"{root}: tensor {left[0]!r} is not part of a gpt-oss of MLX ({len(left)} unexpected tensors)")
    return experts, tensors


def _is_packed(available: Mapping[str, Stored], matrix: str) -> bool:
    scales = available.get(f"{matrix}.scales")
    return scales is not None and scales.entry.dtype == "U8"


def _expert(
    root: Path, available: Mapping[str, Stored], name: str, shape: tuple[int, ...], used: set[str]
) -> LazyTensor:
    stem, _, kind = name.rpartition(".")
    prefix, _, part = stem.rpartition(".")
    folder = f"model.layers.{prefix.split('.')[1]}.mlp.experts."
    matrices = [f"{folder}{own}_proj" for own in (("gate", "up") if part == "gate_up" else ("down",))]
    rows = (shape[2] if kind == "weight" else shape[1]) // len(matrices)
    parts = []
    for matrix in matrices:
        if kind == "bias":
            own = _matrix(root, available, f"{matrix}.bias", (shape[0], rows), used)
        elif kind == "weight":
            own = _matrix(root, available, f"{matrix}.weight", (shape[0], rows, shape[1]), used)
        else:
            own = _packed(root, available, matrix, kind, (shape[0], rows, *shape[2:]), used)
        parts.append(own)
    return LazyTensor(
        " and ".join(own.stored for own in parts),
        shape,
        parts[0].precision,
        functools.partial(_in_turn, parts, transposed=kind == "weight"),
    )


def _in_turn(parts: Sequence[LazyTensor], *, transposed: bool) -> Tensor:
    """Return the rows of the parts in turn: of gate and up [expert, row, …] → [expert, 2 · row, …]."""
    tensors = [part.read() for part in parts]
    tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors, 2).flatten(1, 2)
    return tensor.mT.contiguous() if transposed else tensor


def _packed(
    root: Path, available: Mapping[str, Stored], matrix: str, kind: str, shape: tuple[int, ...], used: set[str]
) -> LazyTensor:
    """Return blocks or scales of MXFP4 as they are stored."""
    stored = _stored(root, available, f"{matrix}.{'weight' if kind == 'blocks' else 'scales'}", used)
    wanted = (*shape[:2], shape[2] * 4) if kind == "blocks" else shape  # 4 words hold the 16 bytes of a group
    _check(root, stored, wanted, ("U32",) if kind == "blocks" else ("U8",))
    return LazyTensor(stored.name, shape, "MXFP4", lambda: stored.tensor().view(torch.uint8).reshape(shape))


def _matrix(
    root: Path, available: Mapping[str, Stored], name: str, shape: tuple[int, ...], used: set[str]
) -> LazyTensor:
    """Return a tensor of floats, or a quantised matrix that is dequantised when it is read."""
    stored = _stored(root, available, name, used)
    if stored.entry.dtype != "U32":
        _check(root, stored, shape, FLOATS)
        return LazyTensor(name, shape, stored.entry.dtype, stored.tensor)
    matrix = name.removesuffix(".weight")
    scales = _stored(root, available, f"{matrix}.scales", used)
    words, groups = stored.entry.shape[-1], scales.entry.shape[-1]
    bits = words * _WORD // shape[-1]
    if bits not in _BITS or bits * shape[-1] != words * _WORD or groups == 0 or shape[-1] % groups:
        raise InputError(
            f"{root}: tensor {name!r} has {words} words and {groups} scales for {shape[-1]} inputs; 2, 4 and 8 bits "
            "are read"
        )
    _check(root, stored, (*shape[:-1], words), ("U32",))
    if scales.entry.dtype == "U8":
        _check(root, scales, (*shape[:-1], shape[-1] // GROUP), ("U8",))
        read = functools.partial(_microscaled, stored, scales, shape)
        return LazyTensor(name, shape, "MLX mxfp4", read)
    biases = _stored(root, available, f"{matrix}.biases", used)
    for factors in (scales, biases):
        _check(root, factors, (*shape[:-1], groups), FLOATS)
    return LazyTensor(name, shape, f"MLX {bits}-bit", functools.partial(_affine, stored, scales, biases, bits, shape))


def _stored(root: Path, available: Mapping[str, Stored], name: str, used: set[str]) -> Stored:
    if name not in available:
        raise InputError(f"{root}: tensor {name!r} is missing")
    used.add(name)
    return available[name]


def _check(root: Path, stored: Stored, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    entry = stored.entry
    if entry.shape != shape or entry.dtype not in dtypes:
        raise InputError(
            f"{root}: tensor {stored.name!r} is {entry.dtype} {list(entry.shape)}, the config requires {list(shape)} "
            f"of {' or '.join(dtypes)}"
        )


def _microscaled(stored: Stored, scales: Stored, shape: tuple[int, ...]) -> Tensor:
    blocks = stored.tensor().view(torch.uint8).reshape(*shape[:-1], shape[-1] // GROUP, GROUP // 2)
    return dequantise(blocks, scales.tensor())


def _affine(stored: Stored, scales: Stored, biases: Stored, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return code · scale + bias in float32."""
    octets = stored.tensor().view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (octets[..., None] >> shifts & (2**bits - 1)).flatten(-2).reshape(shape)
    groups = codes.unflatten(-1, (scales.entry.shape[-1], -1)).float()
    return (groups * scales.tensor().float()[..., None] + biases.tensor().float()[..., None]).flatten(-2)
