"""Problems of both published models to compile the MXFP4 kernels for."""

from typing import Any

import triton.language as tl

from workbench.kernels.gpu import mxfp4, tiles
from workbench.kernels.gpu.aot import CompileCase
from workbench.kernels.mxfp4 import GROUP


def compile_cases() -> list[CompileCase]:
    """Return both codec kernels on the gate and up matrix of one expert of gpt-oss."""
    tile, groups = tiles.codec_tile(), 5760 * 2880 // GROUP
    aligned = frozenset({"blocks", "scales", "out", "groups"})
    packed: dict[str, Any] = {"blocks": "*u8", "scales": "*u8", "groups": "i32"}
    return [
        CompileCase(
            mxfp4._dequantise, "mxfp4.dequantise", "one 5760×2880 matrix", tile, {**packed, "out": "*bf16"},
            {**tile.blocks, "DTYPE": tl.bfloat16}, aligned, bytes=groups * 81.0,
        ),
        CompileCase(
            mxfp4._quantise, "mxfp4.quantise", "one 5760×2880 matrix", tile, {**packed, "weight": "*fp32"}, tile.blocks,
            aligned - {"out"} | {"weight"}, bytes=groups * 145.0, options={"enable_fp_fusion": False},
        ),
    ]  # fmt: skip
