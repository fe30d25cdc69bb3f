"""Problems of both published models to compile the expert kernels for."""

from typing import Any

import torch

from workbench.kernels.gpu import moe, tiles
from workbench.kernels.gpu.aot import CompileCase
from workbench.kernels.gpu.tiles import Tile


def compile_cases(target: str = "sm_90") -> list[CompileCase]:
    """Return every kernel with the tiles that `target` gets, for both models: a prefill and a decoding step each.

    Of one token's step only 20b's: the same tiles serve both models.
    """
    prefill, decode = ("prefill of 8,192 tokens", 8192 * 4), ("decode of 64 tokens", 64 * 4)
    cases = [
        ("gpt-oss-20b, float32", 32, prefill, torch.float32),
        ("gpt-oss-20b", 32, ("decode of 1 token", 4), torch.bfloat16),
        *(
            (m, e, p, torch.bfloat16)
            for m, e in (("gpt-oss-20b", 32), ("gpt-oss-120b", 128))
            for p in (prefill, decode)
        ),
    ]
    return [
        case
        for model, num_experts, (problem, slots), dtype in cases
        for case in _compile_cases(f"{model}, {problem}", num_experts, slots, dtype, target)
    ]


def _compile_cases(
    problem: str, num_experts: int, slots: int, dtype: torch.dtype, target: str, d: int = 2880, k: int = 4
) -> list[CompileCase]:
    """d is d_model and d_mlp."""
    number = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    hit = num_experts * (1 - (1 - k / num_experts) ** (slots // k))  # experts, were the routing random
    forward = tiles.moe_tile(slots, num_experts, dtype, target)
    backward = tiles.moe_transposed_tile(slots, num_experts, dtype, target)
    packed = {"blocks": "*u8", "scales": "*u8", "order": "*i32", "offsets": "*i32", "out": number}
    packed |= dict.fromkeys(("stride_expert", "stride_tile_row", "stride_tile_column", "stride_row"), "i32")
    scalars = {"limit": "fp32", "alpha": "fp32"}

    def case(
        name: str,
        kernel: Any,
        tile: Tile,
        types: dict[str, str],
        constants: dict[str, Any],
        flops: float,
        values: float,
    ) -> CompileCase:
        """values: read and written beside the packed weights, for each of the slots."""
        aligned = frozenset(
            a for a, kind in types.items() if kind.startswith("*") or a in ("stride_expert", "stride_tile_row", "D")
        )
        products = kernel in (moe._linear, moe._transposed)
        weights = hit * constants["N"] * constants["K"] * 17 / 32 if products else 0.0
        return CompileCase(
            kernel, f"moe.{name}", problem, tile, types, {**constants, **tile.blocks}, aligned,
            products and dtype == torch.bfloat16, slots * flops, weights + slots * values * dtype.itemsize,
        )  # fmt: skip

    def product(name: str, kernel: Any, tile: Tile, n: int, shared: int, activate: bool = False) -> CompileCase:
        constants = {"E": num_experts, "N": n, "K": d, "SHARED": shared}
        types, written = {"y": number, **packed}, d
        if kernel is moe._linear:
            constants, written = {**constants, "ACTIVATE": activate}, n // 2 if activate else n
            types = {"x": number, "bias": number, **packed, **scalars}
        read = (d if kernel is moe._linear else n) / shared
        return case(name, kernel, tile, types, constants, 2.0 * n * d, read + written)

    sums = {"y": number, "gates": "*fp32", "out": number, "D": "i32"}
    activated = {"h": number, "post": number, **scalars}
    activation = {"h": number, "dpost": number, "gates": "*fp32", "dh": number, "dgates": "*fp32", **scalars}
    return [
        product("gate_up", moe._linear, forward, 2 * d, k, activate=True),
        product("gate_up tapped", moe._linear, forward, 2 * d, k),
        product("down", moe._linear, forward, d, 1),
        product("down backward", moe._transposed, backward, d, k),
        product("gate_up backward", moe._transposed, backward, 2 * d, 1),
        case("combine", moe._combine, tiles.combine_tile(), sums, {"SLOTS": k, "GATED": True}, 2.0 * d, d + d / k),
        case("swiglu", moe._activate, tiles.swiglu_tile(), activated, {"F": d}, 8.0 * d, 3.0 * d),
        case("swiglu backward", moe._swiglu_backward, tiles.swiglu_tile(), activation, {"F": d, "GATED": True},
                 16.0 * d, 5.0 * d),
    ]  # fmt: skip
