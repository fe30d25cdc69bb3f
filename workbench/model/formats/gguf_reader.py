"""Open gpt-oss in GGUF files, of llama.cpp, LM Studio, Unsloth and Ollama, as canonical tensors.

The experts stay packed where they are MXFP4. All other quantised tensors are dequantised when they are read; the
checkpoint names the stored type of each. llama.cpp stores gate and up apart, rows 0, 2, … and 1, 3, … of the published
matrix. Ollama's files of August 2025 have architecture `gptoss`, fused q, k, v and gate and up, and MXFP4 in the
published order under the type number 4; later ones have llama.cpp's types under Ollama's names.
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony.vocabulary import Tokenizer, tokenizer_of_tokens
from workbench.kernels import cpu
from workbench.kernels.ggml import BLOCK_BYTES, GgmlMxfp4, widen_q8_0
from workbench.kernels.parallel import parallel_map
from workbench.model.config import GROUP, Config
from workbench.model.formats.gguf_config import read_gguf_config, unknown_fields
from workbench.model.formats.gguf_file import (
    BF16,
    F16,
    F32,
    MXFP4,
    OLLAMA_MXFP4,
    Q8_0,
    GgufFile,
    GgufTensor,
    decoder,
    precision,
)
from workbench.model.formats.gguf_split import check_split
from workbench.model.lazy_tensors import LazyTensor, Tensors
from workbench.model.names import shapes
from workbench.model.opened_checkpoint import Checkpoint

ARCHITECTURES = ("gpt-oss", "gptoss", "gpt-oss-puzzle")
_NAMES = {
    "ln1.weight": ("attn_norm.weight",),
    "ln2.weight": ("post_attention_norm.weight", "ffn_norm.weight"),
    **{f"attn.{p}.{kind}": (f"attn_{p}.{kind}",) for p in "qkv" for kind in ("weight", "bias")},
    "attn.o.weight": ("attn_output.weight", "attn_out.weight"),
    "attn.o.bias": ("attn_output.bias", "attn_out.bias"),
    "attn.sinks": ("attn_sinks.weight", "attn_sinks"),
    "mlp.router.weight": ("ffn_gate_inp.weight",),
    "mlp.router.bias": ("ffn_gate_inp.bias",),
    "mlp.experts.down.bias": ("ffn_down_exps.bias",),
}
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_DECODED = 2**18  # values at a time: their copies in float32 stay in cache
_ENDS = {
    "embed.weight": "token_embd.weight",
    "ln_final.weight": "output_norm.weight",
    "unembed.weight": "output.weight",
}


def open_gguf(paths: Sequence[Path]) -> Checkpoint:
    """Open and validate the files of a model; weights are read when they are used.

    Raises:
        InputError: a file is damaged or no gpt-oss, or a tensor is missing, unexpected or has another shape.
    """
    files = [GgufFile.open(path) for path in paths]
    check_split(files)
    metadata = files[0].metadata
    kind, arch = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        remedy = "load the model with adapter=, a folder of PEFT" if kind == "adapter" else "name the model's own file"
        raise InputError(f"{paths[0]} is not a model: its general.type is {kind!r}: {remedy}")
    if arch not in ARCHITECTURES:
        raise InputError(f"{paths[0]}: the architecture is {arch!r}, expected 'gpt-oss'")
    stored: dict[str, _Stored] = {}
    for file in files:
        for name in file.tensors:
            if name in stored:
                raise InputError(
                    f"tensor {name!r} is both in {stored[name].file.path.name} and in {file.path}: remove one"
                )
            stored[name] = _Stored(file, name)
    cfg = read_gguf_config(paths[0], metadata, str(arch), {name: one.tensor.shape for name, one in stored.items()})
    reader = _Reader(paths[0], cfg, stored)
    tensors = Tensors(reader.read_all())
    if unknown := unknown_fields(paths[0], metadata, str(arch)):
        reader.notes.append(f"fields that are not read: {', '.join(f'{arch}.{name}' for name in unknown)}")
    experts = "mxfp4" if reader.packed else "dense"
    return Checkpoint(
        paths[0],
        cfg,
        "gguf",
        experts,
        tensors,
        _digest(files),
        lambda: _tokenizer(paths[0], metadata, cfg.d_vocab),
        tuple(reader.notes),
    )


@dataclass(frozen=True)
class _Stored:
    """A tensor in a GGUF file."""

    file: GgufFile
    name: str

    @property
    def tensor(self) -> GgufTensor:
        return self.file.tensors[self.name]

    @property
    def is_mxfp4(self) -> bool:
        return self.tensor.kind in (MXFP4, OLLAMA_MXFP4)

    def rows(self) -> npt.NDArray[np.uint8]:
        """Return the bytes with the shape of the tensor, but for the last axis, which is bytes."""
        return self.file.bytes_of(self.name).reshape(*self.tensor.shape[:-1], -1)

    @property
    def is_float(self) -> bool:
        return self.tensor.kind in _FLOATS

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values: floats memory-mapped and of their own dtype, others dequantised to `dtype`."""
        kind = self.tensor.kind
        if self.is_float:
            return torch.from_numpy(self.file.bytes_of(self.name)).view(_FLOATS[kind]).view(self.tensor.shape)
        if kind == OLLAMA_MXFP4:
            raise InputError(
                f"{self.file.path}: tensor {self.name!r} is MXFP4 in Ollama's order, but other experts are "
                "dense: convert the model again"
            )
        rows, out = self.rows(), torch.empty(self.tensor.shape, dtype=dtype)
        decode = _q8_0 if kind == Q8_0 else decoder(kind)
        flat, values = rows.reshape(-1, rows.shape[-1]), out.view(-1, out.shape[-1])
        step = max(1, _DECODED // out.shape[-1])

        compiled = kind == Q8_0 and dtype == torch.bfloat16 and not cpu.unavailable()

        def fill(start: int) -> None:
            some = flat[start : start + step]
            if compiled:
                widen_q8_0(some, values[start : start + step])
            else:
                values[start : start + step] = torch.from_numpy(decode(np.ascontiguousarray(some)))

        parallel_map(fill, range(0, len(flat), step))
        self.file.release(self.name)
        return out

    def groups(self) -> npt.NDArray[np.uint8]:
        """Return the blocks of a packed tensor [expert, out, group, 17]."""
        shape = self.tensor.shape
        return self.file.bytes_of(self.name).reshape(*shape[:-1], shape[-1] // GROUP, BLOCK_BYTES)


class _Reader:
    """Builds the canonical tensors, and notes which stored ones were used."""

    def __init__(self, path: Path, cfg: Config, stored: Mapping[str, _Stored]) -> None:
        self.path, self.cfg, self.stored = path, cfg, stored
        self.used: set[str] = set()
        self.notes: list[str] = []
        self.packed_experts: dict[str, _PackedExperts] = {}
        experts = [stored for name, stored in stored.items() if re.search(r"_exps\.weight$", name)]
        self.packed = bool(experts) and all(stored.is_mxfp4 for stored in experts)

    def read_all(self) -> dict[str, LazyTensor]:
        """Return every tensor of the config; refuse missing, unexpected and misshapen ones."""
        tensors: dict[str, LazyTensor] = {}
        for name, shape in shapes(self.cfg, "mxfp4" if self.packed else "dense").items():
            tensors[name] = self._tensor(name)
            if tensors[name].shape != shape:
                raise InputError(
                    f"{self.path}: tensor {tensors[name].stored!r} has shape {list(tensors[name].shape)}, the metadata "
                    f"require {list(shape)}"
                )
        if left := sorted(set(self.stored) - self.used - {"rope_freqs.weight"}):
            raise InputError(
                f"{self.path}: tensor {left[0]!r} is not part of a gpt-oss ({len(left)} unexpected tensors)"
            )
        return tensors

    def _tensor(self, name: str) -> LazyTensor:
        if name == "unembed.weight" and "output.weight" not in self.stored:
            self.notes.append("the file has no output.weight: the unembedding is the embedding")
            return self._plain("token_embd.weight")
        if name in _ENDS:
            return self._plain(_ENDS[name])
        _, layer, rest = name.split(".", 2)
        prefix = f"blk.{layer}."
        if rest.startswith("mlp.experts.") and not rest.endswith("down.bias"):
            return self._experts(prefix, rest.removeprefix("mlp.experts."))
        if rest[:6] in ("attn.q", "attn.k", "attn.v") and f"{prefix}attn_qkv.weight" in self.stored:
            return self._fused(prefix, rest)
        return self._plain(*(prefix + own for own in _NAMES[rest]))

    def _stored(self, *names: str) -> _Stored:
        name = next((name for name in names if name in self.stored), None)
        if name is None:
            raise InputError(f"{self.path}: tensor {' or '.join(map(repr, names))} is missing")
        self.used.add(name)
        return self.stored[name]

    def _plain(self, *names: str) -> LazyTensor:
        stored = self._stored(*names)
        decode = None if stored.is_float else stored.values
        return LazyTensor(stored.name, stored.tensor.shape, precision(stored.tensor.kind), stored.values, decode)

    def _fused(self, prefix: str, rest: str) -> LazyTensor:
        _, part, kind = rest.split(".")
        q, kv = self.cfg.n_heads * self.cfg.d_head, self.cfg.n_key_value_heads * self.cfg.d_head
        fused = self._plain(f"{prefix}attn_qkv.{kind}")
        if fused.shape[0] != q + 2 * kv:
            raise InputError(f"{self.path}: tensor {fused.stored!r} has {fused.shape[0]} rows, expected {q + 2 * kv}")
        starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return fused.rows(*starts[part])

    def _experts(self, prefix: str, rest: str) -> LazyTensor:
        part, kind = rest.split(".")
        suffix = "bias" if kind == "bias" else "weight"
        if part == "down" or f"{prefix}ffn_gate_up_exps.weight" in self.stored:
            sources = [self._stored(f"{prefix}ffn_{part}_exps.{suffix}")]
        else:
            sources = [self._stored(f"{prefix}ffn_{own}_exps.{suffix}") for own in ("gate", "up")]
        if len({stored.tensor.shape for stored in sources}) > 1:
            raise InputError(f"{self.path}: {sources[0].name!r} and {sources[1].name!r} have different shapes")
        first = sources[0].tensor.shape
        if len(first) != (2 if kind == "bias" else 3):
            raise InputError(f"{self.path}: tensor {sources[0].name!r} has shape {list(first)}")
        experts, rows = first[0], first[1] * len(sources)
        name, stored_as = " and ".join(stored.name for stored in sources), precision(sources[0].tensor.kind)
        if kind in ("blocks", "scales"):
            packed = self.packed_experts.setdefault(name, _PackedExperts(sources))
            if kind == "blocks":
                return LazyTensor(name, packed.shape, stored_as, packed.blocks, in_place=packed.in_place)
            return LazyTensor(name, packed.shape[:-1], stored_as, packed.scales, in_place=packed.in_place)
        shape, values = ((experts, rows), _values) if kind == "bias" else ((experts, first[-1], rows), _transposed)
        decode = None if sources[0].is_float else functools.partial(values, sources)
        return LazyTensor(name, shape, stored_as, functools.partial(values, sources), decode)


class _PackedExperts:
    """The packed matrices of a layer's experts, whose bytes and scales one pass over the file separates.

    The scales wait here for their reader, which asks for them after the bytes when a model is loaded.
    """

    def __init__(self, sources: Sequence[_Stored]) -> None:
        self.sources = list(sources)
        experts, rows, columns = sources[0].tensor.shape
        self.shape = (experts, rows * len(sources), columns // GROUP, GROUP // 2)
        self._scales: Tensor | None = None

    def in_place(self) -> GgmlMxfp4:
        """Return the matrices as the file holds them, memory-mapped."""
        parts = tuple(torch.from_numpy(stored.groups()) for stored in self.sources)
        return GgmlMxfp4(parts, self.sources[0].tensor.kind != OLLAMA_MXFP4)

    def blocks(self) -> Tensor:
        """Return the bytes [expert, out, group, 16] in the published order."""
        blocks, self._scales = self.in_place().published()
        self._release()
        return blocks

    def scales(self) -> Tensor:
        """Return the scales [expert, out, group]."""
        scales, self._scales = self._scales, None
        if scales is not None:
            return scales
        by_expert = _interleaved([torch.from_numpy(stored.groups()[..., 0].copy()) for stored in self.sources])
        self._release()
        return by_expert

    def _release(self) -> None:
        for stored in self.sources:
            stored.file.release(stored.name)


def _values(sources: list[_Stored], dtype: torch.dtype = torch.float32) -> Tensor:
    return _interleaved([stored.values(dtype) for stored in sources])


def _transposed(sources: list[_Stored], dtype: torch.dtype = torch.float32) -> Tensor:
    return _values(sources, dtype).mT.contiguous()


def _interleaved(parts: list[Tensor]) -> Tensor:
    """Return rows of the parts in turn: [expert, row, …] of gate and up to [expert, 2 · row, …]."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, 2).flatten(1, 2)


def _q8_0(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the values of rows of Q8_0 (a float16 scale and 32 signed bytes a block), at three times gguf's speed."""
    blocks = torch.from_numpy(rows).view(len(rows), -1, 34)
    scales = blocks[..., :2].view(torch.float16).float()
    return (blocks[..., 2:].view(torch.int8) * scales).flatten(1).numpy()


def _tokenizer(path: Path, metadata: Mapping[str, Any], d_vocab: int) -> Tokenizer:
    """Return the tokenizer of the file: o200k_harmony, or the tokenizer.json of a file with another vocabulary."""
    tokens, template = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.chat_template")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{path}: tokenizer.ggml.tokens is missing: the file has no vocabulary")
    if len(tokens) != d_vocab:
        raise InputError(
            f"{path}: {len(tokens):,} tokens for an embedding of {d_vocab:,} rows: they do not match, "
            "convert the model again"
        )
    own = metadata.get("tokenizer.huggingface.json")
    return tokenizer_of_tokens(
        path, tokens, own if isinstance(own, str) else None, template if isinstance(template, str) else None
    )


def _digest(files: Sequence[GgufFile]) -> str:
    """Return a fingerprint: all headers and sizes, and 64 evenly spaced 64-KiB blocks of each file."""
    total = hashlib.sha256()
    for file in files:
        size = file.path.stat().st_size
        total.update(hashlib.sha256(file.header + str(size).encode()).digest())
        with file.path.open("rb") as opened:
            for block in range(64):
                opened.seek(block * max(size - 65_536, 0) // 63)
                total.update(opened.read(65_536))
    return total.hexdigest()
