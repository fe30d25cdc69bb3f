"""Intervals and tests of means over prompts, for every study and experiment; the sampling unit is the prompt.

Differences between channels and efforts, and changes by an intervention, are often skewed or rare: most prompts change
little and a few change much. Student's t interval then covers the mean too seldom (0.80 to 0.93 where 10 to 30 % of 8
to 50 prompts change), and a percentile bootstrap even less. Two estimators correct this, both nowhere narrower than
Student's t: `mean_test` by Hall's transformation, in closed form for thousands of cells and for prompts that do not
weigh alike, and `mean_effect` by the bootstrap-t together with `mean_test`. Shares of answers have
`share_interval` and differences of them `share_change_interval`; other quantities between 0 and 1 have `within_bounds`.
All of these stay within their bounds and have a width also where all prompts agree.

Reference: Hall 1992, On the removal of skewness by transformation; Efron & Tibshirani 1993, An Introduction to the
Bootstrap, chapters 11 (jackknife) and 12 (bootstrap-t); Schuirmann 1987 (two one-sided tests); Wilson 1927; Korn &
Graubard 1998 (effective sample size of clustered shares); Agresti & Min 2005.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Num

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.studies.resampling import LEVEL, bootstrap_weights
from workbench.studies.statistics import Array

MIN_PROMPTS, ENOUGH_PROMPTS = 5, 20  # fewer than MIN_PROMPTS are refused, fewer than ENOUGH_PROMPTS give a warning
SMALLEST_EFFECT = 0.1  # nats: about 10 % of a probability; an effect within ± this is called absent
Method = Literal["bootstrap-t", "t"]
Cells = Float[np.ndarray, " *cells"]
# The skewness of a sample of n understates that of the distribution. Times 1 + 8 / n, as simulations show, intervals of
# skewed and rare values cover the mean in at least 93 % from 12 prompts on (docs/statistics.md).
_SKEWNESS_OF_FEW = 8.0
# The variance of a replicate is mixed with this much of one observation of the sample's variance, so that a replicate
# without any of the rare changed prompts does not make the interval infinite.
_PRIOR_OBSERVATIONS = 0.3


class FewPromptsWarning(UserWarning):
    """Intervals over so few prompts depend on the shape of the distribution."""


class MeanTest(NamedTuple):
    """Limits of the 95 % interval of a mean, p of "the mean is zero", and the equivalence bound, for every cell.

    bound: the smallest bound within which the mean is shown to lie (two one-sided tests, 5 %).
    """

    low: Float[Array, "*cells"]
    high: Float[Array, "*cells"]
    p: Float[Array, "*cells"]
    bound: Float[Array, "*cells"]


def mean_test(mean: Float[Array, "*cells"], influence: Float[np.ndarray, "prompt *cells"], freedom: float) -> MeanTest:
    """Return the interval and test of a mean over prompts: Student's t corrected for skewness, nowhere narrower than t.

    influence: deviations of the prompts whose root sum of squares is the standard error. Hall's transformation
    g(t) = t + k t² / 3 + k² t³ / 27 + k / 6, with k the skewness of the mean, is closer to Student's distribution than
    t itself where values are skewed; the interval holds all means that either statistic does not reject. k is that of
    the sample times 1 + 8 / n, and at most the skewness with the widest interval: beyond it, a more skewed sample would
    have a narrower one. A cell in which all prompts agree has that value as its interval, and p of 1 if it is zero,
    else that of the sign test, 2 ** (1 - prompts): a few prompts with few tokens agree by chance.

    Reference: Hall 1992, On the removal of skewness by transformation, J. R. Stat. Soc. B 54.
    """
    error = np.sqrt((influence**2).sum(0))
    return test_of_moments(mean, error, (influence**3).sum(0), freedom)


def test_of_moments(
    mean: Float[Array, "*cells"],
    error: Float[Array, "*cells"],
    third: Float[Array, "*cells"],
    freedom: Float[Array, "*#cells"] | float,
) -> MeanTest:
    """Return `mean_test` from the standard error and the sum of the cubes of the influence of every cell."""
    varies = ~(error == 0)  # an unknown error stays unknown
    safe = np.where(varies, error, 1.0)
    widest = _widest_skewness(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom))
    k = np.clip((1 + _SKEWNESS_OF_FEW / (np.asarray(freedom) + 1)) * third / safe**3, -widest, widest)
    t = np.where(varies, mean / safe, np.where(mean == 0, 0.0, np.inf))
    p_t = np.where(varies | (mean == 0), 2 * scipy.stats.t.sf(np.abs(t), freedom), 2.0 ** -np.asarray(freedom))
    t = np.where(varies, t, 0.0)
    p_hall = 2 * scipy.stats.t.sf(np.abs(t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6), freedom)

    def limits(level: float) -> tuple[np.ndarray, np.ndarray]:
        edge = scipy.stats.t.ppf((1 + level) / 2, freedom)
        most, least = np.maximum(edge, _without_skewness(edge, k)), np.minimum(-edge, _without_skewness(-edge, k))
        return np.asarray(mean - error * most), np.asarray(mean - error * least)

    (low, high), (low_90, high_90) = limits(LEVEL), limits(2 * LEVEL - 1)
    return MeanTest(low, high, np.where(varies, np.maximum(p_t, p_hall), p_t), np.maximum(-low_90, high_90))


def _without_skewness(g: Float[Array, "*#cells"] | float, k: Float[Array, "*cells"]) -> Float[Array, "*cells"]:
    """Return the t that Hall's transformation with skewness k takes to g."""
    straight = np.abs(k) < 1e-8
    k = np.where(straight, 1.0, k)
    return np.asarray(np.where(straight, g, 3 / k * (np.cbrt(1 + k * (g - k / 6)) - 1)))


def _widest_skewness(edge: Float[Array, "*#cells"] | float) -> Float[Array, "*#cells"]:
    """Return the skewness at which the limit that Hall's transformation takes to `edge` is farthest from the mean."""
    different, of = np.unique(np.ravel(edge), return_inverse=True)
    k = np.linspace(0.9, 1.3, 401)[:, None] / different
    farthest = np.argmin(_without_skewness(-different, k), axis=0)
    return np.asarray(np.take_along_axis(k, farthest[None], 0)[0][of].reshape(np.shape(edge)))


def ratio(
    sums: Num[np.ndarray, "prompt *cells"], tokens: Num[np.ndarray, " prompt"]
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Return Σ sums / Σ tokens and its 95 % interval; NaN without tokens, no interval below five prompts."""
    value, tested = ratio_test(sums, tokens)
    return value, tested.low, tested.high


def ratio_test(
    sums: Num[np.ndarray, "prompt *cells"], tokens: Num[np.ndarray, " prompt"]
) -> tuple[Float[Array, "*cells"], MeanTest]:
    """Return Σ sums / Σ tokens with interval and test: delete-one jackknife, corrected for skewness (`mean_test`).

    Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    used = tokens > 0
    sums, tokens = sums[used].astype(np.float64), tokens[used].astype(np.float64)
    cells, n = sums.shape[1:], len(tokens)
    value = sums.sum(0) / tokens.sum() if n else np.full(cells, np.nan)
    if n < MIN_PROMPTS:
        missing = np.full(cells, np.nan)
        return value, MeanTest(missing, missing, missing, missing)
    per_token = tokens.reshape(-1, *[1] * len(cells))
    influence = (sums - value * per_token) / np.maximum(tokens.sum() - per_token, 1)
    return value, mean_test(value, (influence - influence.mean(0)) * np.sqrt((n - 1) / n), n - 1.0)


def mean_of_prompts(
    means: Float[np.ndarray, "prompt *cells"],
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Return the mean over prompts and its 95 % interval; NaN without prompts, no interval below five."""
    n = len(means)
    value = means.mean(0) if n else np.full(means.shape[1:], np.nan)
    if n < MIN_PROMPTS:
        return value, np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    tested = mean_test(value, (means - value) / np.sqrt(n * (n - 1)), n - 1.0)
    return value, tested.low, tested.high


def within_bounds(
    value: Float[Array, "*cells"], low: Float[Array, "*cells"], high: Float[Array, "*cells"], n: int
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Return the limits of a quantity between 0 and 1: cut at its bounds, and where they agree Wilson's of n prompts.

    Reference: Wilson 1927.
    """
    size, z = max(n, 1), scipy.stats.norm.ppf((1 + LEVEL) / 2)
    share = np.clip(value, 0, 1)
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    agree = high - low < 1e-12
    low, high = np.where(agree, middle - half, low), np.where(agree, middle + half, high)
    low, high = np.minimum(low, value), np.maximum(high, value)  # not beside the value by rounding
    return np.asarray(np.clip(low, 0, 1)), np.asarray(np.clip(high, 0, 1))


class MeanEffect(NamedTuple):
    """A mean over prompts, its 95 % interval, p of no change, and whether it lies within the bounds of equivalence.

    Where all prompts have the same value there is no interval: low and high are NaN, and p is 1 if it is zero, else
    that of the sign test, 2 ** (1 - prompts).
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


def few_prompts(n: int) -> str:
    """Return the warning that goes with an interval over n prompts; empty from `ENOUGH_PROMPTS` on."""
    if n >= ENOUGH_PROMPTS:
        return ""
    if n < MIN_PROMPTS:
        return f"only {count_of(n, 'prompt')}: an interval needs at least {MIN_PROMPTS}"
    return (
        f"only {count_of(n, 'prompt')}: intervals of fewer than {ENOUGH_PROMPTS} depend on the shape of "
        f"the distribution"
    )


def check_prompts(n: int) -> None:
    """Refuse fewer than five prompts, and warn of fewer than twenty.

    Raises:
        InputError: there are fewer than MIN_PROMPTS prompts.
    """
    if n < MIN_PROMPTS:
        raise InputError(
            f"{count_of(n, 'prompt has', 'prompts have')} a value, and an interval needs at least "
            f"{MIN_PROMPTS}: add prompts"
        )
    if text := few_prompts(n):
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

    low, high = bounds(LEVEL)
    low_90, high_90 = bounds(2 * LEVEL - 1)
    bound = np.maximum(-low_90, high_90)
    if method == "bootstrap-t":  # replicates of few prompts show too little of the skewness
        influence = np.moveaxis(means - mean[..., None], -1, 0) / np.sqrt(n * (n - 1))
        hall = mean_test(mean, influence, n - 1.0)
        low, high, p = np.minimum(low, hall.low), np.maximum(high, hall.high), np.maximum(p, hall.p)
        bound = np.maximum(bound, hall.bound)
    sign_test = np.where(mean == 0, 1.0, 2.0 ** (1 - n))
    low, high, p = (np.where(constant, value, own) for value, own in ((np.nan, low), (np.nan, high), (sign_test, p)))
    return MeanEffect(mean, low, high, p, ~constant & (bound < smallest_effect), n)


def _studentized(
    means: Float[np.ndarray, "*cells prompt"], n_boot: int, seed: int
) -> Float[np.ndarray, "*cells replicate"]:
    """Return t of bootstrap replicates about the mean of the sample."""
    n, centred = means.shape[-1], means - means.mean(-1, keepdims=True)
    weights = bootstrap_weights(n, n_boot, np.random.default_rng(seed)).T
    shift = centred @ weights
    variance = np.maximum((centred**2) @ weights - shift**2, 0)
    full_variance = (centred**2).mean(-1, keepdims=True)
    error = np.sqrt((n * variance + _PRIOR_OBSERVATIONS * full_variance) / (n + _PRIOR_OBSERVATIONS) / (n - 1))
    return np.divide(shift, error, out=np.zeros_like(shift), where=error > 0)


def share_interval(
    values: Float[np.ndarray, "*cells sequence"], units: Sequence[str] | np.ndarray
) -> tuple[Cells, Cells, Cells]:
    """Return a fraction, mean over prompts (units [sequence]), and its 95 % Wilson interval.

    Sequences of a prompt are not independent: the sample size is the one at which independent answers would vary as
    much as the prompts do; where all answers agree, the number of prompts.

    Raises:
        InputError: fewer than five prompts have a value.
    """
    means = prompt_means(values, units)
    check_prompts(means.shape[-1])
    return wilson(means, int((~np.isnan(values.reshape(-1, values.shape[-1])).all(0)).sum()))


def wilson(means: Float[np.ndarray, "*cells prompt"], answers: int) -> tuple[Cells, Cells, Cells]:
    """Return the mean of the prompts' fractions, of this many answers in all, and its 95 % Wilson interval."""
    n = means.shape[-1]
    share, variance = means.mean(-1), means.var(-1, ddof=1) / n
    binomial = share * (1 - share)
    size = np.divide(binomial, variance, out=np.full(share.shape, float(n)), where=variance > 0)
    size = np.where(binomial <= 0, n, np.clip(size, 1.0, answers))
    z = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) if answers > n else scipy.stats.norm.ppf((1 + LEVEL) / 2)
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(binomial / size + z**2 / (4 * size**2))
    return share, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def share_of_answers(
    right: Float[np.ndarray, " prompt"], known: Num[np.ndarray, " prompt"]
) -> tuple[float, float, float]:
    """Return the mean over prompts of their share of right answers, with Wilson's interval.

    Without an answer all are NaN, and with fewer than five prompts the limits are.
    """
    if not len(known):
        return np.nan, np.nan, np.nan
    if len(known) < MIN_PROMPTS:
        return float((right / known).mean()), np.nan, np.nan
    share, low, high = wilson(right / known, int(known.sum()))
    return float(share), float(low), float(high)


def share_change_interval(
    values: Float[np.ndarray, "*cells sequence"], units: Sequence[str] | np.ndarray
) -> tuple[Cells, Cells, Cells]:
    """Return the mean over prompts (units [sequence]) of a change of 1 and 0, −1 to 1, and its 95 % interval.

    Raises:
        InputError: fewer than five prompts have a value.
    """
    means = prompt_means(values, units)
    check_prompts(means.shape[-1])
    return share_change(means)


def share_change(means: Float[np.ndarray, "*cells prompt"]) -> tuple[Cells, Cells, Cells]:
    """Return the mean of the prompts' changes of a fraction, −1 to 1, and its 95 % interval.

    Two pseudo-prompts are added, half a prompt each for better and for worse and one unchanged, so that the interval
    has a width also where no answer changed.
    """
    n = means.shape[-1]
    middle = means.sum(-1) / (n + 2)
    variance = ((means**2).sum(-1) + 1) / (n + 2) - middle**2
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt(variance / (n + 2))
    return means.mean(-1), np.clip(middle - half, -1, 1), np.clip(middle + half, -1, 1)
