"""Sums and sums of squares of an activation by label, so that means leave the GPU instead of tokens.

A label is whatever an average is taken over, say sequence × channel. Means and variances of any coarser grouping
follow by adding rows.

Reference: none beyond the definition; accumulated in float64, so that a million tokens cost no accuracy.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor


class Moments(NamedTuple):
    """Tokens a label, the sum of their activations, and the sum of the squares."""

    count: Int64[Tensor, "label"]
    sum: Float32[Tensor, "label d"]
    squares: Float32[Tensor, "label d"]


def moments(x: Float[Tensor, "tokens d"], labels: Int[Tensor, "tokens"], n_labels: int) -> Moments:
    """Moments of the rows of each label 0 … n_labels − 1; rows of a negative label are left out."""
    keep = labels >= 0
    count = torch.bincount(labels[keep], minlength=n_labels)
    if len(count) > n_labels:
        raise ValueError(f"labels go up to {len(count) - 1}, but n_labels is {n_labels}: they must be smaller")
    total, squares = x.new_zeros(2, n_labels, x.shape[1], dtype=torch.float64)
    for rows, chosen in zip(x.split(65536), labels.split(65536), strict=True):
        wide, chosen = rows[chosen >= 0].double(), chosen[chosen >= 0]
        total.index_add_(0, chosen, wide)
        squares.index_add_(0, chosen, wide.square())
    return Moments(count, total.float(), squares.float())
