"""Log-probability and entropy on the GPU in one pass over the vocabulary, without a tensor of log-probabilities.

A row's maximum, the sum of its weights and the weighted sum of its logits are updated block by block: then
log Z = maximum + log sum, and the entropy is log Z minus the mean logit.

Reference: `workbench.kernels.logits`; the online softmax of Milakov and Gimelshein 2018, arXiv 1805.02867.
Cost: reads the logits once; torch's log_softmax and the sums after it read and write them six times in float32.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import on_device_of_first
from workbench.kernels.logits import Prediction


@triton.jit
def _predict(logits, chosen, logprob, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total, mean = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
        new = tl.where(x == x, tl.maximum(top, x), x)  # noqa: PLR0124 - a NaN stays
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far: all weights are 0
        shrink, weight = tl.exp(top - safe), tl.exp(x - safe)
        total = total * shrink + weight
        mean = mean * shrink + weight * tl.where(x == float("-inf"), 0.0, x)
        top = new
    highest = tl.max(top, 0)
    lane = tl.exp(top - highest)  # each lane's share, relative to the row's maximum
    z = tl.sum(total * lane, 0)
    log_z = highest + tl.log(z)
    token = tl.load(chosen + row)
    tl.store(logprob + row, tl.load(logits + row * V + token).to(tl.float32) - log_z)
    tl.store(entropy + row, log_z - tl.sum(mean * lane, 0) / z)


@on_device_of_first
def predict(logits: Float[Tensor, "row d_vocab"], chosen: Int[Tensor, " row"]) -> Prediction:
    """Return the log-probability of the chosen token and the entropy of every row, in float32."""
    logits, chosen, tile = logits.contiguous(), chosen.to(logits.device).contiguous(), tiles.logits_tile()
    logprob, entropy = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _predict[(len(logits),)](
            logits, chosen, logprob, entropy, logits.shape[1], **tile.blocks, **tile.options
        )  # fmt: skip
    return Prediction(logprob, entropy)
