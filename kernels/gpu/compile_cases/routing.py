"""Problems of both published models to compile the routing kernels for."""

from workbench.kernels.gpu import routing, tiles
from workbench.kernels.gpu.aot import CompileCase


def compile_cases() -> list[CompileCase]:
    """Return every kernel for the experts of both models, at a prefill of 8,192 tokens."""
    return [s for num_experts in (32, 128) for s in _compile_cases(num_experts, tokens=8192, k=4)]


def _compile_cases(num_experts: int, tokens: int, k: int) -> list[CompileCase]:
    problem, slots = f"{num_experts} experts, {tokens} tokens", tokens * k
    choose, weigh, tile = tiles.top_k_tile(num_experts), tiles.top_k_tile(k), tiles.group_tile(slots, num_experts)
    routed = {"E": num_experts, "SLOTS": k}
    sizes = {key: tile.blocks[key] for key in ("BLOCK", "STEP")}
    return [
        CompileCase(
            routing._top_k, "routing.top_k", problem, choose, {"logits": "*fp32", "ids": "*i64", "tokens": "i32"},
            {**routed, **choose.blocks}, frozenset({"logits", "ids", "tokens"}),
            bytes=tokens * (4.0 * num_experts + 8 * k),
        ),
        CompileCase(
            routing._gate, "routing.gate", problem, weigh,
            {"logits": "*fp32", "ids": "*i64", "gates": "*fp32", "tokens": "i32"},
            {**routed, **weigh.blocks}, frozenset({"logits", "ids", "gates", "tokens"}), bytes=slots * 16.0,
        ),
        CompileCase(
            routing._count, "routing.count", problem, tile, {"ids": "*i64", "partial": "*i32", "slots": "i32"},
            {"E": num_experts, **sizes}, frozenset({"ids", "partial", "slots"}), bytes=slots * 8.0,
        ),
        CompileCase(
            routing._place, "routing.place", problem, tile,
            {"ids": "*i64", "partial": "*i32", "counts": "*i32", "offsets": "*i32", "order": "*i32", "slots": "i32",
             "blocks": "i32"},
            {"E": num_experts, **tile.blocks}, frozenset({"ids", "partial", "counts", "offsets", "order", "slots"}),
            bytes=slots * 12.0,
        ),
    ]  # fmt: skip
