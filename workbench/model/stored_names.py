"""Names under which releases of transformers and other programs stored the tensors of the Hugging Face layout.

transformers 5.5.2 and newer save a model that was dequantised while loading under the names of packed tensors: bfloat16
with three axes in `…_proj_blocks`. Releases 5.3 to 5.5 doubled the endings: `…_proj_blocks_blocks`, `…_blocks_scales`.
Value heads of reinforcement learning, classifiers, rotary frequencies and scales of quantised caches are not weights of
the model. torch.compile and distributed training put names of their wrappers before or into the names of tensors; a
model that is part of another one, or a backbone that was saved alone, has another beginning than `model.`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from workbench.errors import InputError
from workbench.model.safetensors_file import Entry, SafetensorsFile

_UNUSED = re.compile(
    r"(.*\.)?(v_head|value_head|score)\..+|.+\.(original_)?inv_freq|.+\.(cos|sin)_cached|.+\.[kqv]_scale|.+\.kv_scale"
    r"|.+\.prob_output_scale"
)
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_ADAPTER = re.compile(r".+\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(\..+)?")
_MODEL, _EMBEDDING, _HEAD = "model.", "embed_tokens.weight", "lm_head."
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
    """Return standard name → stored tensor, and notes about names that were ignored or have another beginning.

    Raises:
        InputError: two stored tensors have the same standard name, or one belongs to an adapter.
    """
    standard_names: dict[str, Stored] = {}
    unused: list[str] = []
    beginning = _beginning(files)
    for name, file in files.items():
        if _ADAPTER.fullmatch(name):
            raise InputError(
                f"{root}: tensor {name!r} belongs to an adapter that was not merged: save the merged model "
                "(merge_and_unload), or save the adapter alone and load it with adapter="
            )
        if _UNUSED.fullmatch(name):
            unused.append(name)
            continue
        standard = _standard(_with_standard_beginning(name, beginning), file.entries[name])
        if standard in standard_names:
            raise InputError(
                f"{root}: tensors {standard_names[standard].name!r} and {name!r} are both {standard!r}: remove one"
            )
        standard_names[standard] = Stored(file, name)
    notes = []
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"tensors that the model does not use are ignored: {', '.join(unused[:3])}{more}")
    if beginning != _MODEL:
        notes.append(f"the names of the backbone's tensors begin with {beginning!r}: this is read as {_MODEL!r}")
    return standard_names, notes


def _beginning(names: Collection[str]) -> str:
    """Return what stands before the names of the backbone's tensors: `model.`, or what the embedding's name has."""
    prefixes = {
        name.removesuffix(_EMBEDDING) for name in map(unwrapped, names) if re.search(rf"(^|\.){_EMBEDDING}$", name)
    }
    return prefixes.pop() if len(prefixes) == 1 else _MODEL


def unwrapped(name: str) -> str:
    """Return a name without those of the wrappers of torch.compile and of distributed training."""
    return _WRAPPER.sub("", name)


def _with_standard_beginning(name: str, beginning: str) -> str:
    """Return a name of the backbone with `model.` before it, and that of the unembedding with nothing."""
    name, outer = unwrapped(name), re.sub(rf"(^|\.){_MODEL}$", r"\1", beginning)
    for before, after in ((beginning, _MODEL), (outer, "")):
        if name.startswith(before):
            rest = name.removeprefix(before)
            return rest if rest.startswith(_HEAD) else after + rest
    return name


def _standard(name: str, entry: Entry) -> str:
    if doubled := _DOUBLED.fullmatch(name):
        name = f"{doubled[1]}_{doubled[2]}"
    blocks = _BLOCKS.fullmatch(name)
    dense = entry.dtype not in ("U8", "I8") and len(entry.shape) == _DENSE_AXES
    return blocks[1] if blocks and dense else name
