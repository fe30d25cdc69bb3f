"""Measures of a discrete distribution over experts, and the correction for testing many cells at once.

All work on the last axis and keep the others, so one call serves every layer, head or replicate. A distribution
without a single count is missing (NaN), which is not the same as an even or an empty one.
Entropies are in nats, divergences in bits.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Num

if TYPE_CHECKING:
    Array = np.ndarray
else:
    Array = np.ndarray | np.generic  # numpy makes a scalar of an array without axes


ALPHA = 0.05  # false discovery rate, or probability of an error of a test, up to which an effect is called shown


def share(counts: Num[Array, "*cells expert"]) -> Float[Array, "*cells expert"]:
    """Return counts as fractions of their sum; NaN where nothing was counted."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def entropy(p: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return Shannon entropy in nats, 0 log 0 = 0; the plug-in estimate, so biased downwards by sampling."""
    return -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(axis=-1)


def effective_number(p: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return exp(entropy): how many equally used experts would give this entropy (a Hill number of order 1)."""
    return np.exp(entropy(p))


def gini(p: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return the Gini coefficient of the shares: 0 when all are equal, 1 − 1/n when one expert takes everything."""
    n = p.shape[-1]
    rank = np.arange(1, n + 1)
    return (np.sort(p, axis=-1) * (2 * rank - n - 1)).sum(axis=-1) / n


def max_violation(p: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return MaxVio: the largest load over the mean load, less one. Reference: Wang et al. 2024, arXiv 2408.15664."""
    return p.max(axis=-1) * p.shape[-1] - 1


def coefficient_of_variation(p: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return the standard deviation of the load over its mean, across all experts (no n − 1: they are not a sample)."""
    return p.std(axis=-1) * p.shape[-1]


def jensen_shannon(p: Float[Array, "*cells expert"], q: Float[Array, "*cells expert"]) -> Float[Array, "*cells"]:
    """Return Jensen–Shannon divergence in bits, in [0, 1]; the plug-in estimate, so biased upwards by sampling."""
    # the difference of entropies cancels to −1e−17 for equal distributions
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0) / np.log(2)


def false_discovery(p: Float[Array, "*cells"]) -> Float[Array, "*cells"]:
    """Return Benjamini–Hochberg q over every cell that was tested (all axes are one family; NaN was not tested)."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p)
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested])
    return q
