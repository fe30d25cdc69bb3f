"""Top-k routing: from router logits to experts, gates, and the order in which experts read their tokens.

gpt-oss takes the k largest logits and softmaxes over *those k only*; the usual softmax over all experts
before the selection is another model.

Reference: openai/gpt-oss, gpt_oss/torch/model.py, MLPBlock.forward.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels import cpu, dispatch


def top_k(logits: Float[Tensor, "tokens expert"], k: int) -> Int[Tensor, "tokens slot"]:
    """Return ids of the k largest logits, descending; equal logits go to the smaller id."""
    if gpu := dispatch.triton("routing", logits):
        return gpu.top_k(logits, k)
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def gate(logits: Float[Tensor, "tokens expert"], experts: Int[Tensor, "tokens slot"]) -> Float[Tensor, "tokens slot"]:
    """Return weights of the selected experts: softmax over their logits alone; rows sum to 1."""
    if gpu := dispatch.triton("routing", logits):
        return gpu.gate(logits, experts)
    few = 0 < len(logits) <= cpu.FEW_ROWS and logits.dtype == torch.float32
    if few and cpu.compiled(logits, experts):
        from workbench.kernels.cpu import layer

        return layer.gate(logits, experts)
    return logits.gather(-1, experts).softmax(-1)


def group(
    experts: Int[Tensor, "tokens slot"], num_experts: int
) -> tuple[Int[Tensor, "tokens*slot"], Int[Tensor, "expert"]]:
    """Return slots (token · k + slot) ordered by the expert they go to, and how many each expert receives."""
    flat = experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)
