"""Problems of both published models to compile the attention kernels for."""

from typing import Any

import torch

from workbench.kernels.gpu import attention, attention_gradient, tiles
from workbench.kernels.gpu.aot import CompileCase
from workbench.kernels.gpu.tiles import Tile


def compile_cases(target: str = "sm_90") -> list[CompileCase]:
    """Return every kernel with the tiles that `target` gets; both models have the same heads."""
    return [s for window in (128, None) for s in _compile_cases(window, target)]


def _compile_cases(window: int | None, target: str, heads: int = 64, kv: int = 8, d: int = 64) -> list[CompileCase]:
    """Prefill of one sequence of 8,192 tokens and its gradient; decoding of 64 sequences on 4,096 keys each."""
    n, rows, past = 8192, 64, 4096
    which = "full" if window is None else f"window {window}"
    pairs = n * (n + 1) / 2 if window is None else n * window - window * (window - 1) / 2
    seen = past if window is None else window
    shape = {"RATIO": heads // kv, "D": d, "WIDTH": d, "WINDOW": window or 0}
    strides = dict.fromkeys((f"{t}_{axis}" for t in "qkv" for axis in ("batch", "token", "head")), "i32")
    number, wide, index = "*bf16", "*fp32", "*i64"
    layout = {"starts": index, "query_pos": index, "queries": "i32", "scale": "fp32", **strides}
    rowwise = {name: kind for name, kind in layout.items() if name != "starts"}
    statistics = {"lse": wide, "sink": wide}
    qkv = {"q": number, "k": number, "v": number}
    activations = 2.0 * n * d * (2 * heads + 2 * kv)  # q, k, v and z

    def case(
        name: str, kernel: Any, problem: str, tile: Tile, types: dict[str, str], constants: dict[str, Any],
        flops: float, read: float, products: bool = True,
    ) -> CompileCase:  # fmt: skip
        aligned = frozenset(a for a, kind in types.items() if kind.startswith("*") or a in strides or a == "chunk")
        return CompileCase(
            kernel, f"attention.{name}", problem, tile, types, {**constants, **tile.blocks}, aligned,
            products, flops, read,
        )  # fmt: skip

    forward = tiles.attention_tile(d, torch.bfloat16, target)
    rows_back = tiles.queries_gradient_tile(torch.bfloat16, target)
    keys_back = tiles.keys_gradient_tile(torch.bfloat16, target)
    decode = tiles.decode_tile(heads // kv, torch.bfloat16, target)
    parts = {"parts": wide, "tops": wide, "totals": wide}
    splits = 4
    partial = rows * kv * splits * decode.blocks["BLOCK_M"] * (d + 2) * 4.0
    every = {"HEADS": heads, **shape, "PACKED": True}
    merged = {"HEADS": heads, "SINKS": True, "SPLITS": splits, "BLOCK_M": decode.blocks["BLOCK_M"]}
    merged |= {name: shape[name] for name in ("RATIO", "D", "WIDTH")}
    prefill, step = f"prefill of 8,192 tokens, {which}", f"decode of 64 tokens on 4,096 keys, {which}"
    gradient = {**qkv, "dz": number, "lse": wide, "delta": wide}
    cases = [
        case("forward", attention._forward, prefill, forward,
                 {**qkv, "sinks": number, "z": number, **statistics, **layout},
                 {**every, "SINKS": True}, 4.0 * d * heads * pairs, activations + 8.0 * n * heads),
        case("queries' gradient", attention_gradient._queries_gradient, prefill, rows_back,
                 {**gradient, "dq": number, **layout},
                 every, 6.0 * d * heads * pairs, activations + 2.0 * n * d * heads),
        case("keys' gradient", attention_gradient._keys_gradient, prefill, keys_back,
                 {**gradient, "dk": number, "dv": number, **layout, "keys": "i32"},
                 every, 8.0 * d * heads * pairs, activations + 4.0 * n * d * kv),
        case("split", attention._split, step, decode, {**qkv, **parts, **rowwise, "chunk": "i32"}, shape,
                 4.0 * d * heads * rows * seen, rows * seen * kv * d * 4.0 + partial),
    ]  # fmt: skip
    if window is None:  # the same for every window
        merge = Tile({}, num_warps=1, num_stages=1)
        types = {**parts, "sinks": number, "z": number, **statistics, "queries": "i32", "splits": "i32"}
        cases.append(
            case("merge", attention._merge, step, merge, types, merged, 2.0 * rows * heads * d * splits, partial, False)
        )
    return cases
