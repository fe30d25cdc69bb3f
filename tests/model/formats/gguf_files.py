"""GGUF files as llama.cpp and Ollama write them, made from canonical tensors by code that shares nothing with ours."""

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tests.model.conftest import BASE, YARN
from workbench.model.checkpoint import BUNDLED
from workbench.model.config import Config
from workbench.model.export import RandomTensors

F32, F16, Q8_0, BF16, MXFP4, OLLAMA_MXFP4 = 0, 1, 8, 30, 39, 4
NANO = BUNDLED["nano"]
CFG = replace(BASE, d_vocab=72, n_ctx=131_072)
ODD = replace(
    CFG, n_heads=6, n_key_value_heads=2, d_head=24, num_experts=5, experts_per_token=3, rope=replace(YARN, factor=4.0)
)
Stored = tuple[tuple[int, ...], int, bytes]  # shape, type, data


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Path:
    """Write version 3 of the format, from its specification."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value_of(value: Any) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list) and all(isinstance(one, int) for one in value):
            return struct.pack("<IIQ", 9, 5, len(value)) + b"".join(struct.pack("<i", one) for one in value)
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(name) + value_of(value) for name, value in metadata.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        header += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def metadata(cfg: Config, arch: str, tokenizer: Path) -> dict[str, Any]:
    from workbench import harmony

    vocabulary = harmony.tokenizer(tokenizer)
    tokens = [vocabulary.decode([id]).replace(" ", "Ġ") for id in range(vocabulary.d_vocab)]
    own = {
        "block_count": cfg.n_layers,
        "embedding_length": cfg.d_model,
        "feed_forward_length": cfg.d_mlp,
        "attention.head_count": cfg.n_heads,
        "attention.head_count_kv": cfg.n_key_value_heads,
        "attention.key_length": cfg.d_head,
        "attention.sliding_window": cfg.window_size,
        "attention.layer_norm_rms_epsilon": cfg.eps,
        "expert_count": cfg.num_experts,
        "expert_used_count": cfg.experts_per_token,
        "context_length": cfg.n_ctx,
        "rope.freq_base": cfg.rope.theta,
        "rope.scaling.factor": cfg.rope.factor,
        "rope.scaling.original_context_length": cfg.rope.original_ctx,
    }
    return {
        "general.architecture": arch,
        **{f"{arch}.{name}": value for name, value in own.items()},
        "tokenizer.ggml.tokens": tokens + [f"[PAD{id}]" for id in range(vocabulary.d_vocab, cfg.d_vocab)],
        "tokenizer.huggingface.json": (tokenizer / "tokenizer.json").read_text(),
        "tokenizer.chat_template": "{{ messages }}",
    }


def floats(tensor: Tensor, kind: int = F32) -> Stored:
    if kind == BF16:
        return tuple(tensor.shape), kind, tensor.bfloat16().contiguous().view(torch.int16).numpy().tobytes()
    packed = gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType(kind))
    return tuple(tensor.shape), kind, packed.tobytes()


def packed(blocks: Tensor, scales: Tensor, kind: int = MXFP4) -> Stored:
    """17 bytes for each 32 values, one value at a time."""
    values = np.stack([blocks.numpy() & 15, blocks.numpy() >> 4], -1).reshape(*blocks.shape[:-1], 32)
    codes = values[..., :16] | (values[..., 16:] << 4) if kind == MXFP4 else blocks.numpy()
    content = np.concatenate([scales.numpy()[..., None], codes], -1)
    return (*blocks.shape[:2], blocks.shape[2] * 32), kind, content.tobytes()


def llama_cpp(cfg: Config, t: Mapping[str, Tensor], matrices: int = BF16) -> dict[str, Stored]:
    """The names of llama.cpp."""
    stored = {
        "token_embd.weight": floats(t["embed.weight"], matrices),
        "output.weight": floats(t["unembed.weight"], matrices),
        "output_norm.weight": floats(t["ln_final.weight"]),
    }
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}.", f"blk.{layer}."
        for part, name in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items():
            stored[f"{theirs}{name}.weight"] = floats(t[f"{ours}attn.{part}.weight"], matrices)
            stored[f"{theirs}{name}.bias"] = floats(t[f"{ours}attn.{part}.bias"])
        stored |= {
            f"{theirs}attn_norm.weight": floats(t[ours + "ln1.weight"]),
            f"{theirs}post_attention_norm.weight": floats(t[ours + "ln2.weight"]),
            f"{theirs}attn_sinks.weight": floats(t[ours + "attn.sinks"]),
            f"{theirs}ffn_gate_inp.weight": floats(t[ours + "mlp.router.weight"]),
            f"{theirs}ffn_gate_inp.bias": floats(t[ours + "mlp.router.bias"]),
        }
        for own, part, rows in (
            ("gate", "gate_up", slice(0, None, 2)),
            ("up", "gate_up", slice(1, None, 2)),
            ("down", "down", slice(None)),
        ):
            stem = f"{ours}mlp.experts.{part}."
            stored[f"{theirs}ffn_{own}_exps.bias"] = floats(t[stem + "bias"][:, rows])
            stored[f"{theirs}ffn_{own}_exps.weight"] = (
                packed(t[stem + "blocks"][:, rows], t[stem + "scales"][:, rows])
                if stem + "blocks" in t
                else floats(t[stem + "weight"].mT[:, rows], matrices)
            )
    return stored


OLLAMA_NAMES = {"attn_output": "attn_out", "attn_sinks.weight": "attn_sinks", "post_attention_norm": "ffn_norm"}


def ollama(cfg: Config, t: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Ollama's names of autumn 2025, with llama.cpp's types."""
    renamed_tensors = {}
    for name, stored in llama_cpp(cfg, t).items():
        renamed = name
        for theirs, other in OLLAMA_NAMES.items():
            renamed = renamed.replace(theirs, other)
        renamed_tensors[renamed] = stored
    return renamed_tensors


def first_ollama(cfg: Config, t: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Ollama's names of August 2025: fused matrices, and MXFP4 as type 4 in the published order."""
    stored = {
        name: stored
        for name, stored in ollama(cfg, t).items()
        if "_exps" not in name and not any(f"attn_{part}." in name for part in "qkv")
    }
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}.", f"blk.{layer}."
        for kind, stored_as in (("weight", BF16), ("bias", F32)):
            rows = torch.cat([t[f"{ours}attn.{part}.{kind}"] for part in "qkv"])
            stored[f"{theirs}attn_qkv.{kind}"] = floats(rows, stored_as)
        for part in ("gate_up", "down"):
            stem = f"{ours}mlp.experts.{part}."
            stored[f"{theirs}ffn_{part}_exps.weight"] = packed(t[stem + "blocks"], t[stem + "scales"], OLLAMA_MXFP4)
            stored[f"{theirs}ffn_{part}_exps.bias"] = floats(t[stem + "bias"])
    return stored


GENERATIONS = {
    "llama.cpp": ("gpt-oss", llama_cpp),
    "Ollama, autumn 2025": ("gptoss", ollama),
    "Ollama, August 2025": ("gptoss", first_ollama),
}


def written(path: Path, generation: str = "llama.cpp", cfg: Config = CFG, **changed: Any) -> Path:
    """Write a random model of a generation of programs; changed: metadata to replace."""
    arch, make = GENERATIONS[generation]
    return write(path, metadata(cfg, arch, NANO) | changed, make(cfg, RandomTensors(cfg)))
