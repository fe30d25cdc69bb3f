"""Intervals and tests for effects of interventions; the sampling unit is the prompt, whose sequences are averaged.

Damage by an intervention is skewed and rare: most prompts change little and a few change much. A percentile bootstrap
then covers the mean far too seldom (0.49 at 2 prompts, 0.84 at 5). `mean_effect` studentizes: the bootstrap-t interval,
nowhere narrower than Student's t. Shares have `share_interval` and differences of shares `share_change_interval`; both
stay within their bounds and have a width also where all prompts agree.

Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 12 (bootstrap-t); Schuirmann 1987 (two
one-sided tests); Wilson 1927; Korn & Graubard 1998 (effective sample size of clustered shares); Agresti & Min 2005.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from workbench.errors import InputError
from workbench.studies.resampling import LEVEL, bootstrap_weights

MIN_PROMPTS, ENOUGH_PROMPTS = 5, 20  # fewer than MIN_PROMPTS are refused, fewer than ENOUGH_PROMPTS give a warning
SMALLEST_EFFECT = 0.1  # nats: about 10 % of a probability; an effect within ± this is called absent
Method = Literal["bootstrap-t", "t"]
Cells = Float[np.ndarray, " *cells"]
# The variance of a replicate is mixed with this much of one observation of the sample's variance, so that a replicate
# without any of the rare changed prompts does not make the interval infinite.
_PRIOR_OBSERVATIONS = 0.3


class FewPromptsWarning(UserWarning):
    """Intervals over so few prompts depend on the shape of the distribution."""


class MeanEffect(NamedTuple):
    """A mean over prompts, its 95 % interval, p of no change, and whether it lies within the bounds of equivalence.

    Where all prompts have the same value there is no interval: low and high are NaN, and p is 1.
    """

    change: Cells
    low: Cells
    high: Cells
    p: Cells
    equivalent: Bool[np.ndarray, " *cells"]
    prompts: int


def prompt_means(
    values: Float[np.ndarray, "*cells sequence"], units: Sequence[str] | np.ndarray
) -> Float[np.ndarray, "*cells prompt"]:
    """Return the mean of each prompt's sequences; those with NaN in all cells are left out. units: [sequence]."""
    present = ~np.isnan(values.reshape(-1, values.shape[-1])).all(0)
    if not present.any():
        return np.empty((*values.shape[:-1], 0))
    _, unit = np.unique(np.asarray(units)[present], return_inverse=True)
    members = np.eye(unit.max() + 1)[unit]
    return np.asarray((values[..., present] @ members) / members.sum(0))


def check_prompts(n: int) -> None:
    """Refuse fewer than five prompts, and warn of fewer than twenty.

    Raises:
        InputError: there are fewer than MIN_PROMPTS prompts.
    """
    if n < MIN_PROMPTS:
        raise InputError(f"{n} prompts have a value, and an interval needs at least {MIN_PROMPTS}: add prompts")
    if n < ENOUGH_PROMPTS:
        text = f"only {n} prompts: intervals of fewer than {ENOUGH_PROMPTS} depend on the shape of the distribution"
        warnings.warn(text, FewPromptsWarning, stacklevel=3)


def mean_effect(
    values: Float[np.ndarray, "*cells sequence"],
    units: Sequence[str] | np.ndarray,
    *,
    method: Method = "bootstrap-t",
    smallest_effect: float = SMALLEST_EFFECT,
    n_boot: int = 2000,
    seed: int = 0,
) -> MeanEffect:
    """Return the mean over prompts (units [sequence]) of a change per sequence, with its interval and tests.

    smallest_effect: the effect is `equivalent` to none if its 90 % interval lies within ± this (two one-sided tests at
    5 %). method "t" is for values that are known to be normal.

    Raises:
        InputError: fewer than five prompts have a value, or the method is unknown.
    """
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: use {' or '.join(get_args(Method))}")
    means = prompt_means(values, units)
    n = means.shape[-1]
    check_prompts(n)
    mean, error = means.mean(-1), means.std(-1, ddof=1) / np.sqrt(n)
    constant = error <= 1e-12 * np.abs(mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(constant, 0.0, mean / error)
    p = 2 * scipy.stats.t.sf(np.abs(t), n - 1)
    replicates = _studentized(means, n_boot, seed) if method == "bootstrap-t" else None
    if replicates is not None:
        more = np.minimum((replicates >= t[..., None]).sum(-1), (replicates <= t[..., None]).sum(-1))
        p_bootstrap = np.minimum(2 * (more + 1) / (n_boot + 1), 1)
        p = np.where(more > 0, np.maximum(p, p_bootstrap), p)  # beyond the last replicate: Student's tail

    def bounds(level: float) -> tuple[Cells, Cells]:
        half = scipy.stats.t.ppf((1 + level) / 2, n - 1)
        lower, upper = np.full(mean.shape, -half), np.full(mean.shape, half)
        if replicates is not None:
            tails = np.quantile(replicates, ((1 - level) / 2, (1 + level) / 2), axis=-1)
            lower, upper = np.minimum(lower, tails[0]), np.maximum(upper, tails[1])
        return mean - upper * error, mean - lower * error

    low, high = (np.where(constant, np.nan, edge) for edge in bounds(LEVEL))
    low_90, high_90 = bounds(2 * LEVEL - 1)
    equivalent = ~constant & (low_90 > -smallest_effect) & (high_90 < smallest_effect)
    return MeanEffect(mean, low, high, np.where(constant, 1.0, p), equivalent, n)


def _studentized(
    means: Float[np.ndarray, "*cells prompt"], n_boot: int, seed: int
) -> Float[np.ndarray, "*cells replicate"]:
    """Return t of bootstrap replicates about the mean of the sample."""
    n, centred = means.shape[-1], means - means.mean(-1, keepdims=True)
    weights = bootstrap_weights(n, n_boot, np.random.default_rng(seed)).T
    shift = centred @ weights
    variance = np.maximum((centred**2) @ weights - shift**2, 0)
    whole = (centred**2).mean(-1, keepdims=True)
    error = np.sqrt((n * variance + _PRIOR_OBSERVATIONS * whole) / (n + _PRIOR_OBSERVATIONS) / (n - 1))
    return np.divide(shift, error, out=np.zeros_like(shift), where=error > 0)


def false_discovery(p: Float[np.ndarray, " *cells"]) -> Float[np.ndarray, " *cells"]:
    """Return q of each cell of a family (Benjamini–Hochberg): the false discovery rate at which it is rejected."""
    q, tested = np.full(np.shape(p), np.nan), ~np.isnan(p)
    if tested.any():
        q[tested] = scipy.stats.false_discovery_control(np.asarray(p)[tested])
    return q


def share_interval(
    values: Float[np.ndarray, "*cells sequence"], units: Sequence[str] | np.ndarray
) -> tuple[Cells, Cells, Cells]:
    """Return a fraction, mean over prompts (units [sequence]), and its 95 % Wilson interval.

    Sequences of a prompt are not independent: the sample size is the one at which independent answers would vary as
    much as the prompts do; where all answers agree, the number of prompts.
    """
    means = prompt_means(values, units)
    n = means.shape[-1]
    check_prompts(n)
    share, variance = means.mean(-1), means.var(-1, ddof=1) / n
    binomial = share * (1 - share)
    present = int((~np.isnan(values.reshape(-1, values.shape[-1])).all(0)).sum())
    size = np.divide(binomial, variance, out=np.full(share.shape, float(n)), where=variance > 0)
    size = np.where(binomial <= 0, n, np.clip(size, 1.0, present))
    z = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) if present > n else scipy.stats.norm.ppf((1 + LEVEL) / 2)
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(binomial / size + z**2 / (4 * size**2))
    return share, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def share_change_interval(
    values: Float[np.ndarray, "*cells sequence"], units: Sequence[str] | np.ndarray
) -> tuple[Cells, Cells, Cells]:
    """Return the mean over prompts (units [sequence]) of a change of 1 and 0, −1 to 1, and its 95 % interval.

    Two pseudo-prompts are added, half a prompt each for better and for worse and one unchanged, so that the interval
    has a width also where no answer changed.
    """
    means = prompt_means(values, units)
    n = means.shape[-1]
    check_prompts(n)
    middle = means.sum(-1) / (n + 2)
    variance = ((means**2).sum(-1) + 1) / (n + 2) - middle**2
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt(variance / (n + 2))
    return means.mean(-1), np.clip(middle - half, -1, 1), np.clip(middle + half, -1, 1)
