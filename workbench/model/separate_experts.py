"""Experts that a checkpoint stores one by one, read as the stacked matrices of the Hugging Face layout.

Unsloth and quantisation tools make a linear map of each expert: `experts.gate_up_projs.N` and `experts.down_projs.N`,
or `experts.N.gate_proj`, `up_proj` and `down_proj`; their router is `mlp.router.linear`. A map's weight is [output,
input]; the layout has [expert, input, output], with the rows of gate and up in turn.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.model.safetensors_file import Entry
from workbench.model.stored_names import Stored

_PARTS = {
    "gate_up_projs": ("gate_up", 0),
    "gate_up_proj": ("gate_up", 0),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
    "down_projs": ("down", 0),
    "down_proj": ("down", 0),
}
_NAMES = "|".join(_PARTS)
_EXPERT = re.compile(
    rf"(?P<module>.+\.mlp\.experts)\.(?:(?P<n>\d+)\.(?P<name>{_NAMES})|(?P<stem>{_NAMES})\.(?P<last>\d+))"
    r"\.(?P<kind>weight|bias)"
)


@dataclass(frozen=True)
class Stacked(Stored):
    """A matrix or bias of all experts of a layer. experts: of each expert its tensor, or those of gate and up."""

    experts: tuple[tuple[Stored, ...], ...] = ()

    @property
    def entry(self) -> Entry:
        """Return dtype and shape of the stack."""
        first = self.experts[0][0].entry
        rows, *inputs = first.shape
        return Entry(first.dtype, (len(self.experts), *inputs, rows * len(self.experts[0])), 0, 0)

    def tensor(self) -> Tensor:
        """Return the stack: weights [expert, input, output] or biases [expert, output]."""
        return torch.stack([_in_turn([part.tensor() for part in parts]) for parts in self.experts])


def _in_turn(parts: list[Tensor]) -> Tensor:
    """Return the rows of the parts in turn, and inputs first: of gate and up [row, input] → [input, 2 · row]."""
    rows = torch.stack(parts, 1).flatten(0, 1)
    return rows.mT if rows.dim() == 2 else rows


def stack_experts(root: Path, stored_tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors with experts that are stored one by one as stacks under the layout's names.

    Raises:
        InputError: an expert lacks a tensor, or two have different shapes or dtypes.
    """
    tensors: dict[str, Stored] = {}
    stacks: dict[str, dict[tuple[int, int], Stored]] = {}
    for name, stored in stored_tensors.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            tensors[re.sub(r"\.mlp\.router\.linear\.(weight|bias)$", r".mlp.router.\1", name)] = stored
            continue
        part, place = _PARTS[match["name"] or match["stem"]]
        stack = f"{match['module']}.{part}_proj{'_bias' if match['kind'] == 'bias' else ''}"
        key = int(match["n"] or match["last"]), place
        if key in stacks.setdefault(stack, {}) or stack in stored_tensors:
            raise InputError(
                f"{root}: tensor {stored.name!r} is a part of {stack!r}, which is stored too: remove one of them"
            )
        stacks[stack][key] = stored
    return tensors | {name: _stacked(root, name, parts) for name, parts in stacks.items()}


def _stacked(root: Path, name: str, parts: Mapping[tuple[int, int], Stored]) -> Stacked:
    n_experts, n_parts = (max(key[i] for key in parts) + 1 for i in (0, 1))
    if len(parts) != n_experts * n_parts:
        raise InputError(
            f"{root}: {len(parts)} of {n_experts * n_parts} tensors of {name!r} are stored, the others are "
            "missing: download the checkpoint again"
        )
    first = parts[0, 0]
    for stored in parts.values():
        if (stored.entry.dtype, stored.entry.shape) != (first.entry.dtype, first.entry.shape):
            raise InputError(
                f"{root}: tensor {stored.name!r} is {stored.entry.dtype} {list(stored.entry.shape)}, and "
                f"{first.name!r} is {first.entry.dtype} {list(first.entry.shape)}: experts of a layer have one shape"
            )
    experts = tuple(tuple(parts[n, part] for part in range(n_parts)) for n in range(n_experts))
    return Stacked(first.file, name, experts)
