"""Write a model as a GGUF file that llama.cpp, LM Studio and Ollama read, without changing a value.

MXFP4 experts stay MXFP4, bfloat16 matrices stay bfloat16, and vectors and the router are float32, as llama.cpp
expects them. The vocabulary is written as tokens, and a tokenizer.json that is not o200k_harmony's as a whole.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.ggml import to_ggml
from workbench.model.config import GROUP, PUBLISHED, Config
from workbench.model.formats.gguf_file import BF16, F32, MXFP4, block_and_bytes
from workbench.model.formats.gguf_merges import merges, unmerged, vocabulary_tokens
from workbench.model.lazy_tensors import Tensors
from workbench.model.names import shapes
from workbench.model.opened_checkpoint import Checkpoint
from workbench.outputs import staged

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
D_VOCAB = PUBLISHED["20b"].d_vocab
_NAMES = {
    "embed.weight": "token_embd.weight",
    "ln_final.weight": "output_norm.weight",
    "unembed.weight": "output.weight",
    "ln1.weight": "attn_norm.weight",
    "ln2.weight": "post_attention_norm.weight",
    **{f"attn.{p}.{kind}": f"attn_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")},
    "attn.o.weight": "attn_output.weight",
    "attn.o.bias": "attn_output.bias",
    "attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
}


def write_gguf(checkpoint: Checkpoint, target: str | Path) -> Path:
    """Write a checkpoint as a GGUF file; it is renamed into place when complete. Memory holds one tensor at a time.

    Raises:
        InputError: the file exists, or GGUF cannot express the model.
    """
    import gguf

    path = Path(target)
    if path.exists():
        raise InputError(f"{path} exists: choose another file, or move it away")
    _check(checkpoint.cfg)
    with staged(path, command="write_gguf", owned=lambda existing: False) as part:
        writer = gguf.GGUFWriter(part, "gpt-oss")
        try:
            _write(writer, checkpoint, path.stem)
        finally:
            for file in writer.fout or ():
                with suppress(OSError):  # a full disk, which the error names
                    file.close()
    return path


def _write(writer: Any, checkpoint: Checkpoint, name: str) -> None:
    """Write header, vocabulary and tensors."""
    import gguf

    _add_config(writer, checkpoint.cfg, name)
    _add_vocabulary(writer, checkpoint)
    for tensor, shape, kind, _ in _tensors(checkpoint):
        block, size = block_and_bytes(kind) or (1, 0)
        writer.add_tensor_info(
            tensor, shape, np.dtype(np.float32), math.prod(shape) // block * size, gguf.GGMLQuantizationType(kind)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, read in _tensors(checkpoint):
        writer.write_tensor_data(read())
    writer.close()


def _check(cfg: Config) -> None:
    """Refuse what the readers of GGUF files take for granted."""
    window = cfg.window_size
    if cfg.layer_experts is not None:
        raise InputError("GGUF has one number of experts for all layers; this model has several: export safetensors")
    if window is None or cfg.windows != tuple(window if layer % 2 == 0 else None for layer in range(cfg.n_layers)):
        raise InputError(f"GGUF cannot express windows {cfg.windows}: one window in layers 0, 2, … is expected")
    for name, expected in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if getattr(cfg, name) != expected:
            raise InputError(f"GGUF cannot express {name} {getattr(cfg, name)}: readers assume {expected}")


def _add_config(writer: Any, cfg: Config, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.n_ctx)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_expert_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_key_value_heads)
    writer.add_key_length(cfg.d_head)
    writer.add_value_length(cfg.d_head)
    writer.add_layer_norm_rms_eps(cfg.eps)
    writer.add_expert_count(cfg.num_experts)
    writer.add_expert_used_count(cfg.experts_per_token)
    writer.add_sliding_window(cfg.window_size)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_rope_dimension_count(cfg.d_head)
    if cfg.rope.factor is not None:
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(cfg.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(cfg.rope.original_ctx)
        writer.add_rope_scaling_yarn_beta_fast(cfg.rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(cfg.rope.beta_slow)


def _add_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    tokens = vocabulary_tokens(tokenizer, checkpoint.cfg.d_vocab)
    special = set(tokenizer.special.values())
    kinds = [_CONTROL if id in special else _NORMAL if id < tokenizer.d_vocab else _UNUSED for id in range(len(tokens))]
    made = merges(tokens, special)
    if len(tokens) != D_VOCAB:
        for id in unmerged(tokens, special, made):
            if kinds[id] == _NORMAL:  # llama.cpp reads a word that no merge makes as its characters, unless it is told
                tokens[id], kinds[id] = tokenizer.decode([id]), _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp needs a list of merges; where there are none, one of special tokens, which is never applied
    writer.add_token_merges(made or [f"{tokens[0]} {tokens[0]}"])
    for name, add in (
        ("<|startoftext|>", writer.add_bos_token_id),
        ("<|return|>", writer.add_eos_token_id),
        ("<|endoftext|>", writer.add_pad_token_id),
    ):
        if name in tokenizer.special:
            add(tokenizer.special[name])
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    if len(tokens) != D_VOCAB and tokenizer.tokenizer_json is not None:
        writer.add_string("tokenizer.huggingface.json", tokenizer.tokenizer_json)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], int, Callable[[], npt.NDArray[Any]]]]:
    """Yield name, shape, ggml type and the function that reads the data, of every tensor of the file."""
    tensors = checkpoint.tensors
    for name, shape in shapes(checkpoint.cfg, checkpoint.experts).items():
        prefix, rest = "", name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix = f"blk.{layer}."
        if not rest.startswith("mlp.experts."):
            yield prefix + _NAMES[rest], shape, *_plain(tensors, name, rest)
        elif not rest.endswith(".scales"):  # they are in the blocks
            part, kind = rest.removeprefix("mlp.experts.").split(".")
            yield from _experts(tensors, name, prefix, part, kind, shape)


def _plain(tensors: Tensors, name: str, rest: str) -> tuple[int, Callable[[], npt.NDArray[Any]]]:
    """Return the type and the data of a tensor that is not an expert's: vectors and the router as float32."""
    wide = rest.endswith((".bias", "sinks")) or rest.startswith(("ln", "mlp.router")) or _stored_wide(tensors, name)
    return (F32 if wide else BF16), lambda: _floats(tensors[name], wide)


def _stored_wide(tensors: Tensors, name: str) -> bool:
    return tensors.entries[name].precision != "BF16"


def _floats(tensor: Tensor, wide: bool) -> npt.NDArray[Any]:
    if wide:
        return tensor.float().contiguous().numpy()
    return tensor.bfloat16().contiguous().view(torch.int16).numpy()


def _experts(
    tensors: Tensors, name: str, prefix: str, part: str, kind: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], int, Callable[[], npt.NDArray[Any]]]]:
    """Yield the tensors of one matrix of the experts: gate and up separately."""
    parts = {"gate": 0, "up": 1} if part == "gate_up" else {"down": None}
    for own, first in parts.items():
        rows = slice(None) if first is None else slice(first, None, 2)
        count = shape[-1] if kind in ("weight", "bias") else shape[1]
        count = count if first is None else count // 2
        if kind == "bias":
            read = functools.partial(_rows, tensors, name, rows, wide=True)
            yield f"{prefix}ffn_{own}_exps.bias", (shape[0], count), F32, read
        elif kind == "weight":
            wide = _stored_wide(tensors, name)
            read = functools.partial(_rows, tensors, name, rows, wide=wide)
            yield f"{prefix}ffn_{own}_exps.weight", (shape[0], count, shape[1]), F32 if wide else BF16, read
        else:
            read = functools.partial(_packed, tensors, name, rows)
            yield f"{prefix}ffn_{own}_exps.weight", (shape[0], count, shape[2] * GROUP), MXFP4, read


def _rows(tensors: Tensors, name: str, rows: slice, *, wide: bool) -> npt.NDArray[Any]:
    """Return rows of the outputs of every expert: of a bias [expert, out], or of a dense weight [expert, in, out]."""
    tensor = tensors[name]
    return _floats((tensor if tensor.dim() == 2 else tensor.mT)[:, rows], wide)


def _packed(tensors: Tensors, name: str, rows: slice) -> npt.NDArray[Any]:
    """Return blocks of 17 bytes [expert, row, group · 17]."""
    blocks, scales = (tensors[name.replace(".blocks", kind)][:, rows].numpy() for kind in (".blocks", ".scales"))
    return np.concatenate([scales[..., None], to_ggml(blocks)], -1).reshape(*blocks.shape[:2], -1)
