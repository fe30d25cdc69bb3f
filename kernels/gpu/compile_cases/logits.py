"""Problems of both published models to compile the log-probability kernel for."""

from workbench.kernels.gpu import logits, tiles
from workbench.kernels.gpu.aot import CompileCase


def compile_cases() -> list[CompileCase]:
    """Return the kernel on the logits of 256 tokens of gpt-oss."""
    rows, vocabulary, tile = 256, 201_088, tiles.logits_tile()
    return [
        CompileCase(
            logits._predict, "logits.predict", f"{rows} tokens of {vocabulary}", tile,
            {"logits": "*bf16", "chosen": "*i64", "logprob": "*fp32", "entropy": "*fp32", "V": "i32"}, tile.blocks,
            frozenset({"logits", "chosen", "logprob", "entropy", "V"}), flops=8.0 * rows * vocabulary,
            bytes=2.0 * rows * vocabulary,
        ),
    ]  # fmt: skip
