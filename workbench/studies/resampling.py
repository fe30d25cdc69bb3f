"""Bootstrap and permutation tests whose sampling unit is the prompt (or the sequence), never the token.

Tokens of one sequence are not independent, so whole units are resampled, swapped or reassigned. Every statistic here is
a function of weighted sums over units, which makes a replicate one row of a matrix product.

A plug-in entropy or divergence is biased by sampling, and its bootstrap replicates carry that bias a second time; a
percentile or BCa interval of such a measure misses the truth most of the time when units are few. Hence three
intervals: `percentile` and `bca` for (ratios of) means, `recentred` for entropies and divergences.

Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13, 14; Phipson & Smyth 2010 for p.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.studies.statistics import Array

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
# rows of a permutation product at once: 1,024 × 10,000 units is 80 MB
BLOCK = 1024

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
    raise InputError(f"interval={method!r} is unknown; choose bca or percentile")


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
    """Yield rows as float64, a bounded number at a time: they are stored as single bytes."""
    for start in range(0, len(matrix), BLOCK):
        yield matrix[start : start + BLOCK].astype(np.float64)
