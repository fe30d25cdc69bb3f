"""Problems of both published models to compile the moments kernels for."""

from workbench.kernels.gpu import moments, tiles
from workbench.kernels.gpu.aot import CompileCase


def compile_cases() -> list[CompileCase]:
    """Return both kernels on a residual stream of 8,192 tokens with 64 labels."""
    tile, tokens, d, n_labels = tiles.moments_tile(), 8192, 2880, 64
    pieces = tokens // tile.blocks["SPLIT"] + n_labels
    index, wide = dict.fromkeys(("ends", "offsets", "order", "owner"), "*i64"), ("sums", "squares")
    first = {"x": "*bf16", **index, **dict.fromkeys(wide, "*fp32"), "D": "i32", "n_labels": "i32"}
    second = dict.fromkeys((*wide, "out_sums", "out_squares"), "*fp32") | {"ends": "*i64", "D": "i32"}
    problem = f"{tokens} tokens of {d}, {n_labels} labels"
    return [
        CompileCase(
            moments._pieces, "moments.pieces", problem, tile, first, tile.blocks, frozenset(first) - {"n_labels"},
            flops=3.0 * tokens * d, bytes=tokens * (2.0 * d + 8) + 8.0 * pieces * d,
        ),
        CompileCase(
            moments._add, "moments.add", problem, tile, second, tile.blocks, frozenset(second),
            flops=2.0 * pieces * d, bytes=8.0 * (pieces + n_labels) * d,
        ),
    ]  # fmt: skip
