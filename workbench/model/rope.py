"""Rotary positions with YaRN, as gpt-oss uses them.

YaRN stretches the slow rotations by a factor, leaves the fast ones alone, ramps between the two (gpt-oss rounds
neither end of the ramp), and multiplies cos and sin by a concentration, so that q · k grows by its square.

Reference: YaRN (arXiv 2309.00071), section 3.2 and 3.4; openai/gpt-oss, gpt_oss/torch/model.py, RotaryEmbedding.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels.rotary import rotate
from workbench.model.config import Rope

__all__ = ["concentration", "cos_sin", "inverse_frequencies", "rotate"]


def concentration(rope: Rope) -> float:
    """Return the factor of cos and sin: 0.1 · ln(factor) + 1, or 1 without YaRN."""
    return 1.0 if rope.factor is None or rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0


def inverse_frequencies(rope: Rope, d_head: int) -> Float[Tensor, " half"]:
    """Return radians a position turns each of the d_head / 2 pairs, in float32."""
    half = d_head // 2
    index = torch.arange(half, dtype=torch.float64)
    plain = rope.theta ** (-2 * index / d_head)
    if rope.factor is None:
        return plain.float()

    def turning(beta: float) -> float:
        """Return the pair that makes `beta` turns within the original context."""
        return half * math.log(rope.original_ctx / (beta * 2 * math.pi)) / math.log(rope.theta)

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_head - 1)
    ramp = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).float()


def cos_sin(
    rope: Rope, d_head: int, positions: Int[Tensor, "batch pos"], frequencies: Float[Tensor, " half"] | None = None
) -> tuple[Float[Tensor, "batch pos half"], Float[Tensor, "batch pos half"]]:
    """Return the rotation of every position in float32, concentration included.

    frequencies: those of `inverse_frequencies`, on the device of the positions, to which they are copied otherwise.
    """
    if frequencies is None:
        frequencies = inverse_frequencies(rope, d_head).to(positions.device)
    angle = positions[..., None].float() * frequencies
    scale = concentration(rope)
    return angle.cos() * scale, angle.sin() * scale
