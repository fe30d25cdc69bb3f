"""A mean over tokens whose sampling unit is the prompt: a ratio of sums, with the jackknife's interval."""

import numpy as np
import scipy.stats
from jaxtyping import Float, Num

from workbench.studies.resampling import LEVEL
from workbench.studies.statistics import Array


def ratio(
    sums: Num[np.ndarray, "prompt *cells"], tokens: Num[np.ndarray, " prompt"]
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Σ sums / Σ tokens and its 95 % interval: delete-one jackknife, Student's t; NaN where there is nothing.

    Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    used = tokens > 0
    sums, tokens = sums[used].astype(np.float64), tokens[used].astype(np.float64)
    cells, n = sums.shape[1:], len(tokens)
    if not n:
        missing = np.full(cells, np.nan)
        return missing, missing, missing
    value = sums.sum(0) / tokens.sum()
    if n < 2:
        return value, np.full(cells, np.nan), np.full(cells, np.nan)
    per_token = tokens.reshape(-1, *[1] * len(cells))
    influence = (sums - value * per_token) / np.maximum(tokens.sum() - per_token, 1)
    error = np.sqrt(((influence - influence.mean(0)) ** 2).sum(0) * (n - 1) / n)
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
    return value, value - half, value + half
