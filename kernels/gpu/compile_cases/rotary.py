"""Problems of both published models to compile the rotation kernel for."""

from workbench.kernels.gpu import rotary, tiles
from workbench.kernels.gpu.aot import CompileCase


def compile_cases() -> list[CompileCase]:
    """Return the kernel on the queries of 8,192 tokens of gpt-oss."""
    tokens, heads, half = 8192, 64, 32
    tile = tiles.rotary_tile(heads, half)
    return [
        CompileCase(
            rotary._rotate, "rotary.rotate", f"{tokens} tokens, {heads} heads", tile,
            {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16"},
            {"HEADS": heads, "HALF": half, **tile.blocks},
            frozenset({"x", "cos", "sin", "out"}), flops=6.0 * tokens * heads * half,
            bytes=tokens * (8.0 * heads * half + 8 * half),
        ),
    ]  # fmt: skip
