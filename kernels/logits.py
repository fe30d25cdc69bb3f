"""Log-probability of a chosen token and entropy of the distribution, from logits.

Reference: the definitions; entropy = log Z − Σ p · logit, which needs one pass over the vocabulary.
Cost: reads the logits once on a GPU, and writes 8 bytes a row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels import dispatch


class Prediction(NamedTuple):
    """Of each row, in nats and float32 (float64 for float64 logits)."""

    logprob: Float[Tensor, " row"]
    entropy: Float[Tensor, " row"]


def logprob(logits: Float[Tensor, "*rows d_vocab"], chosen: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return the log-probability in nats of the chosen tokens, in at least float32, with a gradient."""
    return log_probabilities(logits).gather(-1, chosen[..., None].to(logits.device))[..., 0]


def log_probabilities(logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows d_vocab"]:
    """Return the log-probabilities in nats of all tokens, in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def predict(logits: Float[Tensor, "row d_vocab"], chosen: Int[Tensor, " row"]) -> Prediction:
    """Return the log-probability of the chosen token and the entropy of every row.

    A logit of −∞ has probability 0 and adds nothing to the entropy. A row with NaN gives NaN.
    """
    if (gpu := dispatch.triton("logits", logits)) and dispatch.without_gradient(logits):
        return gpu.predict(logits, chosen)
    logp = log_probabilities(logits)
    weighted = (logp.exp() * logp).masked_fill(logp == -torch.inf, 0.0)
    return Prediction(logp.gather(-1, chosen[:, None].to(logp.device))[:, 0], -weighted.sum(-1))
