"""Names under which releases of transformers and other programs stored the tensors of the Hugging Face layout.

transformers 5.5.2 and newer save a model that was dequantised while loading under the names of packed tensors: bfloat16
with three axes in `…_proj_blocks`. Releases 5.3 to 5.5 doubled the endings: `…_proj_blocks_blocks`, `…_blocks_scales`.
Value heads of reinforcement learning, rotary frequencies and scales of quantised caches are no weights of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from workbench.errors import InputError
from workbench.model.safetensors_file import Entry, SafetensorsFile

_UNUSED = re.compile(r"(.*\.)?v_head\..+|.+\.inv_freq|.+\.[kqv]_scale|.+\.kv_scale|.+\.prob_output_scale")
_DOUBLED = re.compile(r"(.+_proj)_blocks_(blocks|scales)")
_BLOCKS = re.compile(r"(.+\.experts\.(?:gate_up|down)_proj)_blocks")
_DENSE_AXES = 3


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file under the name that the file gives it."""

    file: SafetensorsFile
    name: str

    @property
    def entry(self) -> Entry:
        """Return the tensor's entry in the header."""
        return self.file.entries[self.name]

    def tensor(self) -> Tensor:
        """Return the tensor [...] in its stored shape, memory-mapped."""
        return self.file.tensor(self.name)


def hugging_face_names(root: Path, files: Mapping[str, SafetensorsFile]) -> tuple[dict[str, Stored], list[str]]:
    """Return standard name → stored tensor, and the names of tensors that no model uses.

    Raises:
        InputError: two stored tensors have the same standard name.
    """
    found: dict[str, Stored] = {}
    unused: list[str] = []
    for name, file in files.items():
        if _UNUSED.fullmatch(name):
            unused.append(name)
            continue
        standard = _standard(name, file.entries[name])
        if standard in found:
            raise InputError(f"{root}: tensors {found[standard].name!r} and {name!r} are both {standard!r}: remove one")
        found[standard] = Stored(file, name)
    return found, unused


def _standard(name: str, entry: Entry) -> str:
    if doubled := _DOUBLED.fullmatch(name):
        name = f"{doubled[1]}_{doubled[2]}"
    blocks = _BLOCKS.fullmatch(name)
    dense = entry.dtype not in ("U8", "I8") and len(entry.shape) == _DENSE_AXES
    return blocks[1] if blocks and dense else name
