"""Intervals and tests whose sampling unit is the prompt (or the sequence), never the token.

Tokens of one sequence are not independent, so whole units are resampled, swapped or reassigned. Every statistic here is
a function of weighted sums over units, which makes a replicate one row of a matrix product.

A plug-in entropy or divergence is biased by sampling, and its bootstrap replicates carry that bias a second time; a
percentile or BCa interval of such a measure misses the truth most of the time when units are few. Hence three
intervals: `percentile` and `bca` for (ratios of) means, `recentred` for entropies and divergences.

Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13, 14; Phipson & Smyth 2010 for p.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int, Num

from workbench.errors import InputError
from workbench.studies.statistics import Array, false_discovery

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
# rows of a permutation product at once: 1,024 × 10,000 units is 80 MB
BLOCK = 1024
LEAST_UNITS = 5  # below, no interval is given
FEW_UNITS = 20  # below, a warning goes with it

IntervalMethod = Literal["percentile", "bca"]
Interval = tuple[Float[Array, "*cells"], Float[Array, "*cells"]]


def bootstrap_weights(n_units: int, n_boot: int, rng: np.random.Generator) -> Float[np.ndarray, "replicate unit"]:
    """Return the fraction of draws of each unit [replicate unit]; each row sums to 1.

    Raises:
        InputError: there is no replicate.
    """
    if n_boot < 1:
        raise InputError(f"n_boot={n_boot}; an interval needs at least 1 bootstrap replicate")
    return rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_boot) / n_units


def percentile_interval(replicates: Float[np.ndarray, "replicate *cells"]) -> Interval:
    """Return the central 95 % of the replicates."""
    low, high = np.quantile(replicates, TAILS, axis=0)
    return low, high


def recentred_interval(replicates: Float[np.ndarray, "replicate *cells"], estimate: Float[Array, "*cells"]) -> Interval:
    """Return the central 95 % of the replicates, moved so that their mean lies on a bias-corrected estimate."""
    low, high = percentile_interval(replicates - replicates.mean(axis=0) + estimate)
    return low, high


def bias_corrected(
    observed: Float[Array, "*cells"], replicates: Float[np.ndarray, "replicate *cells"]
) -> Float[Array, "*cells"]:
    """Return the observed value less the bias that the bootstrap shows."""
    return 2 * observed - replicates.mean(axis=0)


def bca_interval(
    observed: Float[Array, "*cells"],
    replicates: Float[np.ndarray, "replicate *cells"],
    influence: Float[np.ndarray, "unit *cells"],
) -> Interval:
    """Return the bias-corrected and accelerated interval; `influence` is each unit's influence on the statistic.

    Where the replicates do not vary (an expert that nobody chose) the interval is that one value; where all of them
    lie on one side of the observed value there is no such interval, and it is NaN.
    """
    from scipy.stats import norm

    below = ((replicates < observed).mean(axis=0) + (replicates <= observed).mean(axis=0)) / 2
    spread = (influence**2).sum(axis=0)
    skewness = (influence**3).sum(axis=0)
    acceleration = np.divide(skewness, 6 * spread**1.5, out=np.zeros_like(spread), where=spread > 0)
    bias = norm.ppf(below)
    ordered = np.sort(replicates, axis=0)

    def edge(tail: float) -> Float[Array, "*cells"]:
        z = np.where(np.isfinite(bias), bias, 0.0) + norm.ppf(tail)
        value = _quantile_of_ordered(ordered, norm.cdf(bias + z / (1 - acceleration * z)))
        return np.where(np.isfinite(bias), value, np.nan)

    return edge(TAILS[0]), edge(TAILS[1])


def mean_interval(
    method: IntervalMethod,
    observed: Float[Array, "*cells"],
    replicates: Float[np.ndarray, "replicate *cells"],
    influence: Float[np.ndarray, "unit *cells"],
) -> Interval:
    """Return the interval of a mean, or of a ratio of means, by the named method.

    Raises:
        InputError: the method is unknown.
    """
    if method == "bca":
        return bca_interval(observed, replicates, influence)
    if method == "percentile":
        return percentile_interval(replicates)
    raise InputError(f"interval={method!r} is not possible; choose bca or percentile")


def _quantile_of_ordered(
    ordered: Float[np.ndarray, "replicate *cells"], level: Float[Array, "*cells"]
) -> Float[Array, "*cells"]:
    """Linear interpolation between order statistics, with a level of its own for every cell."""
    place = level * (ordered.shape[0] - 1)
    lower = np.floor(place).astype(np.intp)
    upper = np.minimum(lower + 1, ordered.shape[0] - 1)
    at_lower = np.take_along_axis(ordered, lower[None], axis=0)[0]
    at_upper = np.take_along_axis(ordered, upper[None], axis=0)[0]
    return at_lower + (place - lower) * (at_upper - at_lower)


def count_at_least(
    null: Float[np.ndarray, "permutation *cells"], observed: Float[Array, "*cells"]
) -> Int[Array, "*cells"]:
    """Return the number of permutations as extreme as observed; ties count, also those that rounding has split."""
    return np.asarray((null >= observed - 1e-12 * np.abs(observed) - 1e-15).sum(axis=0))


def permutation_p(count: Int[Array, "*cells"], n_permutations: int) -> Float[Array, "*cells"]:
    """Return p from the number of permutations at least as extreme; the data are one of them, so p is never 0."""
    return (1 + count) / (1 + n_permutations)


class Paired:
    """Two conditions of the same units: the test swaps the two within a unit, the bootstrap draws units whole."""

    def __init__(self, n_units: int, n_permutations: int, n_boot: int, rng: np.random.Generator) -> None:
        self.n = n_units
        self.weights = bootstrap_weights(n_units, n_boot, rng)
        self.signs = rng.choice(np.array([-1, 1], dtype=np.int8), size=(n_permutations, n_units))

    def permuted(
        self, a: Float[np.ndarray, "unit expert"], b: Float[np.ndarray, "unit expert"]
    ) -> Iterator[tuple[Float[np.ndarray, "block expert"], Float[np.ndarray, "block expert"]]]:
        """Yield the mean of either condition after each random swap, block by block."""
        middle, half = (a + b).mean(axis=0) / 2, (a - b) / (2 * self.n)
        for block in _blocks(self.signs):
            difference = block @ half
            # a mean share is never below 0, but its rounding may be, and a logarithm follows
            yield np.maximum(middle + difference, 0), np.maximum(middle - difference, 0)

    def permutation_sd(
        self, a: Float[np.ndarray, "unit expert"], b: Float[np.ndarray, "unit expert"]
    ) -> Float[np.ndarray, "expert"]:
        """Return the standard deviation of the difference of means under all swaps."""
        return np.sqrt(((a - b) ** 2).sum(axis=0)) / self.n

    def resampled(
        self, a: Float[np.ndarray, "unit expert"], b: Float[np.ndarray, "unit expert"]
    ) -> tuple[Float[np.ndarray, "replicate expert"], Float[np.ndarray, "replicate expert"]]:
        """Return the mean of either condition in each bootstrap replicate."""
        return self.weights @ a, self.weights @ b

    def influence(
        self, a: Float[np.ndarray, "unit expert"], b: Float[np.ndarray, "unit expert"]
    ) -> Float[np.ndarray, "unit expert"]:
        """Return each unit's influence on the difference of means."""
        difference = a - b
        return (difference - difference.mean(axis=0)) / self.n


class Independent:
    """Two groups of different units: the test reassigns units to the groups, the bootstrap draws within each."""

    def __init__(self, n_a: int, n_b: int, n_permutations: int, n_boot: int, rng: np.random.Generator) -> None:
        self.n_a, self.n_b = n_a, n_b
        self.weights_a = bootstrap_weights(n_a, n_boot, rng)
        self.weights_b = bootstrap_weights(n_b, n_boot, rng)
        first = np.broadcast_to(np.arange(n_a + n_b) < n_a, (n_permutations, n_a + n_b))
        self.in_a = rng.permuted(first, axis=1)

    def permuted(
        self, a: Float[np.ndarray, "unit_a expert"], b: Float[np.ndarray, "unit_b expert"]
    ) -> Iterator[tuple[Float[np.ndarray, "block expert"], Float[np.ndarray, "block expert"]]]:
        """Yield the mean of either group after each random reassignment, block by block."""
        units = np.concatenate([a, b])
        total = units.sum(axis=0)
        for block in _blocks(self.in_a):
            in_a = block @ units
            yield in_a / self.n_a, np.maximum(total - in_a, 0) / self.n_b

    def permutation_sd(
        self, a: Float[np.ndarray, "unit_a expert"], b: Float[np.ndarray, "unit_b expert"]
    ) -> Float[np.ndarray, "expert"]:
        """Return the standard deviation of the difference of means under all reassignments."""
        return np.concatenate([a, b]).std(axis=0, ddof=1) * np.sqrt(1 / self.n_a + 1 / self.n_b)

    def resampled(
        self, a: Float[np.ndarray, "unit_a expert"], b: Float[np.ndarray, "unit_b expert"]
    ) -> tuple[Float[np.ndarray, "replicate expert"], Float[np.ndarray, "replicate expert"]]:
        """Return the mean of either group in each bootstrap replicate."""
        return self.weights_a @ a, self.weights_b @ b

    def influence(
        self, a: Float[np.ndarray, "unit_a expert"], b: Float[np.ndarray, "unit_b expert"]
    ) -> Float[np.ndarray, "unit expert"]:
        """Return each unit's influence on the difference of means."""
        return np.concatenate([(a - a.mean(axis=0)) / self.n_a, -(b - b.mean(axis=0)) / self.n_b])


def _blocks(matrix: np.ndarray) -> Iterator[Float[np.ndarray, "block unit"]]:
    """Rows as float64, a bounded number at a time: they are stored as single bytes."""
    for start in range(0, len(matrix), BLOCK):
        yield matrix[start : start + BLOCK].astype(np.float64)


def ratio(
    sums: Num[np.ndarray, "prompt *cells"], tokens: Num[np.ndarray, " prompt"]
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Return Σ sums / Σ tokens and its 95 % interval: delete-one jackknife, Student's t; NaN where there is nothing.

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


class Estimate(NamedTuple):
    """A mean over units with its 95 % interval and the two-sided p of "the mean is zero", for every cell."""

    mean: Float[Array, "*cells"]
    low: Float[Array, "*cells"]
    high: Float[Array, "*cells"]
    p: Float[Array, "*cells"]
    n_units: Int[Array, "*cells"]
    warning: str  # empty from FEW_UNITS units on


class Equivalence(NamedTuple):
    """Two one-sided tests: `equivalent` where the mean is shown to lie within ± bound."""

    p: Float[Array, "*cells"]
    equivalent: Bool[Array, "*cells"]
    low: Float[Array, "*cells"]
    high: Float[Array, "*cells"]


def small_sample_warning(n_units: int) -> str:
    """Return the warning for a mean over few units; empty from `FEW_UNITS` on."""
    if n_units >= FEW_UNITS:
        return ""
    return (
        f"The interval rests on {n_units} units only; below {FEW_UNITS} it depends on how the values are distributed."
    )


def check_units(n_units: int) -> None:
    """Refuse an interval over fewer than `LEAST_UNITS` units.

    Raises:
        InputError: there are fewer.
    """
    if n_units < LEAST_UNITS:
        raise InputError(
            f"{n_units} units (prompts), and an interval needs at least {LEAST_UNITS}: add prompts to the run"
        )


def t_interval(values: Float[np.ndarray, "*cells unit"], level: float = LEVEL) -> Estimate:
    """Return Student's t interval of the mean over units (the last axis); NaN units are left out of a cell.

    A cell with fewer than `LEAST_UNITS` known units has a mean but neither limits nor p (NaN). A cell whose units are
    all zero has p = 1; one whose units share another value has a p of 0 and an interval without width.

    Raises:
        InputError: there are fewer than `LEAST_UNITS` units.
    """
    values = np.asarray(values, dtype=np.float64)
    check_units(values.shape[-1])
    n, mean, error = _mean_and_error(values)
    half = scipy.stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * error
    t = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    enough = n >= LEAST_UNITS
    p = np.where(enough, 2 * scipy.stats.t.sf(np.abs(t), np.maximum(n - 1, 1)), np.nan)
    low, high = (np.where(enough, mean + sign * half, np.nan) for sign in (-1, 1))
    return Estimate(mean, low, high, p, n, small_sample_warning(int(n.max(initial=0))))


def bootstrap_t_interval(
    values: Float[np.ndarray, "*cells unit"], *, n_boot: int = 2000, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Return the bootstrap-t interval of the mean over units (the last axis), for skewed values; p by inverting it.

    Units must be known (not NaN) in all cells. A replicate whose drawn units are all equal has no t; its t is that of
    a standard error a hundredth of the observed one.

    Raises:
        InputError: there are fewer than `LEAST_UNITS` units.

    Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 12.5.
    """
    values = np.asarray(values, dtype=np.float64)
    n_units = values.shape[-1]
    check_units(n_units)
    weights = bootstrap_weights(n_units, n_boot, np.random.default_rng(seed)).T
    flat = values.reshape(-1, n_units)
    n, mean, error = _mean_and_error(flat)
    low, high, p = (np.empty(len(flat)) for _ in range(3))
    rows = max(1, 4_000_000 // n_boot)
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        centred = flat[part] - mean[part, None]
        shift = centred @ weights
        spread = np.sqrt(np.maximum((centred**2) @ weights - shift**2, 0) / (n_units - 1))
        spread = np.maximum(spread, error[part, None] / 100)
        t = np.divide(shift, spread, out=np.zeros_like(shift), where=spread > 0)
        lower, upper = np.quantile(t, ((1 - level) / 2, (1 + level) / 2), axis=-1)
        low[part], high[part] = mean[part] - upper * error[part], mean[part] - lower * error[part]
        observed = np.divide(mean[part], error[part], out=np.zeros(len(shift)), where=error[part] > 0)[:, None]
        tail = np.minimum((t >= observed).sum(-1), (t <= observed).sum(-1))
        p[part] = np.minimum(1, 2 * (1 + tail) / (1 + n_boot))
    p = np.where(error > 0, p, np.where(mean == 0, 1.0, 0.0))
    shape = values.shape[:-1]
    warning = small_sample_warning(n_units)
    return Estimate(
        mean.reshape(shape), low.reshape(shape), high.reshape(shape), p.reshape(shape), n.reshape(shape), warning
    )


def wilson_interval(values: Float[np.ndarray, "*cells unit"], level: float = LEVEL) -> Estimate:
    """Return Wilson's interval of a proportion: the mean over units of values in [0, 1].

    It lies within [0, 1] and always has a width. A unit counts as one trial however many samples it averages, so the
    interval is wider than needed where units average several. p is that of the proportion 0.5. NaN: not known.

    Raises:
        InputError: there are fewer than `LEAST_UNITS` units, or a value lies outside [0, 1].
    """
    from statsmodels.stats.proportion import proportion_confint

    values = np.asarray(values, dtype=np.float64)
    check_units(values.shape[-1])
    if (wrong := values[(values < 0) | (values > 1)]).size:
        raise InputError(f"{wrong[0]!r} is no proportion; values from 0 to 1 are expected")
    n, mean, _ = _mean_and_error(values)
    enough = n >= LEAST_UNITS
    low, high = proportion_confint(np.where(enough, mean * n, 0), np.maximum(n, 1), 1 - level, "wilson")
    low, high = (np.where(enough, np.clip(limit, 0, 1), np.nan) for limit in (low, high))
    p = np.where(enough, 2 * scipy.stats.norm.sf(np.abs(mean - 0.5) * 2 * np.sqrt(n)), np.nan)
    return Estimate(mean, low, high, p, n, small_sample_warning(int(n.max(initial=0))))


def benjamini_hochberg(p: Float[Array, "*cells"]) -> Float[Array, "*cells"]:
    """Return q: Benjamini–Hochberg over every cell that was tested (NaN was not), one family."""
    return false_discovery(p)


def equivalence(values: Float[np.ndarray, "*cells unit"], bound: float, alpha: float = 0.05) -> Equivalence:
    """Return two one-sided t-tests (TOST) that the mean over units lies within ± `bound`.

    `low` and `high` are the 1 − 2 alpha interval, which lies within the bounds exactly where p < alpha.

    Raises:
        InputError: there are fewer than `LEAST_UNITS` units, or the bound is not above 0.

    Reference: Schuirmann 1987; Lakens 2017.
    """
    if not bound > 0:
        raise InputError(f"bound={bound!r}; the smallest effect of interest is above 0, in the unit of the values")
    found = t_interval(values, 1 - 2 * alpha)
    n, mean, error = _mean_and_error(np.asarray(values, dtype=np.float64))
    nearest = bound - np.abs(mean)
    t = np.divide(nearest, error, out=np.where(nearest > 0, np.inf, -np.inf), where=error > 0)
    p = np.where(n >= LEAST_UNITS, scipy.stats.t.sf(t, np.maximum(n - 1, 1)), np.nan)
    return Equivalence(p, p < alpha, found.low, found.high)


def _mean_and_error(
    values: Float[np.ndarray, "*cells unit"],
) -> tuple[Int[Array, "*cells"], Float[Array, "*cells"], Float[Array, "*cells"]]:
    """Return every cell's number of known units, their mean (NaN: none) and its standard error (0 for one unit)."""
    known = np.isfinite(values)
    n = known.sum(-1)
    mean = np.divide(np.where(known, values, 0).sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)
    squares = np.where(known, values - mean[..., None], 0.0) ** 2
    # the rounding of a mean of equal values is not a spread
    squares = np.where(squares <= (1e-14 * np.abs(values)) ** 2, 0.0, squares)
    error = np.sqrt(squares.sum(-1) / np.maximum(n - 1, 1) / np.maximum(n, 1))
    return n, mean, error
