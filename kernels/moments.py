"""Sums and sums of squares of an activation by label, so that only means are copied from the GPU, not tokens.

A label is whatever an average is taken over, say sequence × channel. Means and variances of any coarser grouping
follow by adding rows.

Reference: none beyond the definition; accumulated in float64, so that a million tokens cost no accuracy.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from workbench.kernels import dispatch


class Moments(NamedTuple):
    """Tokens a label, the sum of their activations, and the sum of the squares."""

    counts: Int64[Tensor, "label"]
    sums: Float32[Tensor, "label d"]
    squares: Float32[Tensor, "label d"]


def moments(x: Float[Tensor, "tokens d"], labels: Int[Tensor, "tokens"], n_labels: int) -> Moments:
    """Return moments of the rows of each label 0 … n_labels − 1; rows of a negative label are left out."""
    if gpu := dispatch.triton("moments", x):
        return gpu.moments(x, labels, n_labels)
    keep = labels >= 0
    counts = torch.bincount(labels[keep], minlength=n_labels)
    if len(counts) > n_labels:
        raise ValueError(f"labels go up to {len(counts) - 1}, but n_labels is {n_labels}: they must be smaller")
    total, squares = x.new_zeros(2, n_labels, x.shape[1], dtype=torch.float64)
    for rows, chosen in zip(x[keep].split(65536), labels[keep].split(65536), strict=True):
        total.index_add_(0, chosen, rows.double())
        squares.index_add_(0, chosen, rows.double().square())
    return Moments(counts, total.float(), squares.float())
