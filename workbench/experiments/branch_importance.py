"""Statistics of branches: how much the distribution of answers depends on a sentence, with intervals over samples.

All functions take answers as category numbers. The unit is the sample: they describe one conversation.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

LEAST_SAMPLES = 5  # on either side; with fewer, nothing is tested
PERMUTATIONS = 999
_SMOOTHING = 0.5  # added to every answer's count (Jeffreys)
_Z = float(scipy.stats.norm.ppf(0.975))


class Importance(NamedTuple):
    """What keeping a sentence does to the answers, against continuations that have another one in its place.

    effect: probability of the conversation's own answer with it less without, with its interval (Agresti and Caffo).
    kl: divergence of the answers without it from those with it, in nats, with its interval (bootstrap of samples from
    the smoothed shares, shifted by the bias that the bootstrap shows; it has a width also where all samples of a side
    are equal); kl_null: its mean if there were no difference; p: permutation test of kl. NaN where a side has fewer
    than five samples.
    """

    effect: float
    low: float
    high: float
    kl: float
    kl_low: float
    kl_high: float
    kl_null: float
    p: float


def importance(
    with_sentence: Int[np.ndarray, " sample"],
    other: Int[np.ndarray, " sample"],
    own: int,
    rng: np.random.Generator,
    permutations: int = PERMUTATIONS,
) -> Importance:
    """Return the importance of a sentence from the answers with it and with another in its place.

    own: the category of the conversation's own answer.
    """
    n_kept, n_other = len(with_sentence), len(other)
    if min(n_kept, n_other) < LEAST_SAMPLES:
        return Importance(*[float("nan")] * len(Importance._fields))
    effect, low, high = difference_of_shares((with_sentence == own).sum(), n_kept, (other == own).sum(), n_other)
    pooled = np.unique(np.concatenate([with_sentence, other]), return_inverse=True)[1]
    n = int(pooled.max()) + 1
    observed = _divergence(pooled[None, n_kept:], pooled[None, :n_kept], n)[0]
    shuffled = rng.permuted(np.tile(pooled, (permutations, 1)), axis=1)
    null = _divergence(shuffled[:, n_kept:], shuffled[:, :n_kept], n)
    p = (1 + int((null >= observed - 1e-12).sum())) / (permutations + 1)
    without, with_it = (_resampled(side, n, permutations, rng) for side in (pooled[n_kept:], pooled[:n_kept]))
    drawn = _divergence(without, with_it, n)
    limits = np.quantile(drawn, (0.025, 0.975)) - (drawn.mean() - observed)
    kl_low, kl_high = np.maximum(limits, 0)
    return Importance(effect, low, high, float(observed), float(kl_low), float(kl_high), float(null.mean()), p)


def _resampled(
    codes: Int[np.ndarray, " sample"], n: int, draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "draw sample"]:
    """Return samples of the same size from the smoothed shares of n answers."""
    counts = np.bincount(codes, minlength=n) + _SMOOTHING
    return rng.choice(n, size=(draws, len(codes)), p=counts / counts.sum())


def difference_of_shares(x: int, n: int, y: int, m: int) -> tuple[float, float, float]:
    """Return x/n − y/m and its 95 % interval (Agresti and Caffo 2000), which has a width also at 0 and 1."""
    a, b = (x + 1) / (n + 2), (y + 1) / (m + 2)
    half = _Z * np.sqrt(a * (1 - a) / (n + 2) + b * (1 - b) / (m + 2))
    return float(x / n - y / m), float(max(a - b - half, -1)), float(min(a - b + half, 1))


def _divergence(
    a: Int[np.ndarray, "replicate sample_a"], b: Int[np.ndarray, "replicate sample_b"], n: int
) -> Float[np.ndarray, " replicate"]:
    """Return the Kullback–Leibler divergence of a from b in nats, counts smoothed."""
    shares = []
    for codes in (a, b):
        offset = np.arange(len(codes))[:, None] * n
        counts = np.bincount((codes + offset).ravel(), minlength=len(codes) * n).reshape(len(codes), n) + _SMOOTHING
        shares.append(counts / counts.sum(1, keepdims=True))
    return np.asarray((shares[0] * np.log(shares[0] / shares[1])).sum(1))


def similarity(a: list[int], b: list[int]) -> float:
    """Return how alike two sentences are: 1 less the edit distance of their tokens over the longer one's length."""
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / longest


def commitment(matches: list[bool]) -> int:
    """Return after how many sentences the forced answer is the own one and stays so: 0 to the number of sentences.

    matches: whether the most frequent forced answer after 0, 1, … sentences is the own one.
    """
    first = len(matches)
    while first and matches[first - 1]:
        first -= 1
    return first
