"""Tests of a mean of differences within prompts, and of the difference between the means of different prompts.

The standard error is the delete-one jackknife of the weighted mean, which for equal weights is that of Student's
one-sample t-test; its degrees of freedom are Kish's effective number of prompts less one. Intervals and tests are
corrected for skewness (`workbench.studies.intervals.mean_test`), and q is Benjamini–Hochberg over all cells.

    tested = paired_test(difference)   # [prompt, layer, expert] -> "difference", "low", "high", "p", "q", "different"

Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11; Kish 1965, Survey Sampling.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.studies.intervals import MIN_PROMPTS, mean_test
from workbench.studies.statistics import ALPHA, false_discovery


def paired_test(
    difference: Float[np.ndarray, "prompt *cells"], weight: Float[np.ndarray, " prompt"] | None = None
) -> dict[str, Any]:
    """Return limits, p, q and verdict of every cell's mean of differences within prompts; weight: by default alike."""
    weight = np.ones(len(difference)) if weight is None else weight
    influence, freedom = paired_influence(difference, weight)
    return tested_cells(weighted_mean(difference, weight), influence, freedom, len(difference) >= MIN_PROMPTS)


def unpaired_test(a: Float[np.ndarray, "prompt_a *cells"], b: Float[np.ndarray, "prompt_b *cells"]) -> dict[str, Any]:
    """Return the same of the difference between the means of different prompts (Welch, fewer prompts less one)."""
    parts = [v - v.mean(0) for v in (a, b)]
    scaled = [v / np.sqrt(len(v) * max(len(v) - 1, 1)) for v in parts]
    n = min(len(a), len(b))
    influence = np.concatenate([scaled[0], -scaled[1]])
    return tested_cells(np.asarray(a.mean(0) - b.mean(0)), influence, n - 1.0, n >= MIN_PROMPTS)


def weighted_mean(
    values: Float[np.ndarray, "prompt *cells"], weight: Float[np.ndarray, " prompt"]
) -> Float[np.ndarray, "*cells"]:
    """Return the weighted mean over prompts of every cell; NaN where there is no prompt."""
    if not len(weight):
        return np.full(values.shape[1:], np.nan)
    return np.asarray(np.tensordot(weight / weight.sum(), values, 1))


def paired_influence(
    difference: Float[np.ndarray, "prompt *cells"], weight: Float[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, "prompt *cells"], float]:
    """Return deviations whose root sum of squares is the error of the weighted mean, and the degrees of freedom."""
    n = len(weight)
    if n < 2:
        return np.full(difference.shape, np.nan), 0.0
    rest = (weight.sum() - weight).reshape(-1, *[1] * (difference.ndim - 1))
    own = weight.reshape(rest.shape)
    influence = own * (difference - weighted_mean(difference, weight)) / rest
    return (influence - influence.mean(0)) * np.sqrt((n - 1) / n), float(weight.sum() ** 2 / (weight**2).sum() - 1)


def tested_cells(
    difference: Float[np.ndarray, "*cells"], influence: Float[np.ndarray, "prompt *cells"], freedom: float, enough: bool
) -> dict[str, Any]:
    """Return limits, p, q and verdict of every cell; missing if there are not enough prompts for a test."""
    if not enough:
        influence = np.full((1, *difference.shape), np.nan)
    tested = mean_test(difference, influence, max(freedom, 1.0))
    q = np.asarray(false_discovery(tested.p))
    results = {"difference": difference, **tested._asdict(), "q": q}
    results["different"] = (q < ALPHA) & (tested.low * tested.high > 0)
    if difference.ndim:
        results |= {"size": _root_of_sum(difference**2), "noise": _root_of_sum((influence**2).sum(0))}
    return results


def _root_of_sum(squares: Float[np.ndarray, "*cells column"]) -> Float[np.ndarray, "*cells"]:
    """Return the root of the sum over the columns that exist; NaN where there is none."""
    return np.sqrt(np.where(np.isnan(squares).all(-1), np.nan, np.nansum(squares, -1)))
