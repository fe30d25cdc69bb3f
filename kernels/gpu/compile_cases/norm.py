"""Problems of both published models to compile the norm kernels for."""

from workbench.kernels.gpu import norm, tiles
from workbench.kernels.gpu.aot import CompileCase


def compile_cases() -> list[CompileCase]:
    """Return the kernels on a residual stream of 8,192 tokens of gpt-oss."""
    tokens, d = 8192, 2880
    tile, problem = tiles.norm_tile(d), f"{tokens} tokens of {d}"
    constants = {"D": d, **tile.blocks}
    return [
        CompileCase(
            norm._rms_norm, "norm.rms_norm", problem, tile,
            {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"},
            constants, frozenset({"x", "weight", "out"}), flops=5.0 * tokens * d, bytes=4.0 * tokens * d,
        ),
        CompileCase(
            norm._rms_scale, "norm.rms_scale", problem, tile, {"x": "*bf16", "out": "*fp32", "eps": "fp32"},
            constants, frozenset({"x", "out"}), flops=2.0 * tokens * d, bytes=tokens * (2.0 * d + 4),
        ),
    ]  # fmt: skip
