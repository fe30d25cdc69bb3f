"""Random controls as the null of a chosen intervention: does it change more than random ones of the same kind do?

An interval of the difference from the random controls' mean does not answer this. It holds the controls fixed, and
calls half of all random sets different from the others, as any two sets of experts do different things. The null is
the distribution of the controls' own effects, and the chosen intervention is ranked among them.

Reference: Phipson & Smyth 2010 (p of a rank is never zero).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from workbench.errors import InputError

MIN_CONTROLS = 20  # with fewer, no rank has p ≤ 0.05
CONTROLS = 99  # p of at least 0.01, so that five tests together can have q ≤ 0.05


class Rank(NamedTuple):
    """Where an effect lies among those of random controls.

    p: share of all effects, the chosen one included, that are at least as far from their common median. distance: from
    the controls' mean in units of their standard deviation; NaN where they do not differ.
    """

    p: float
    distance: float
    mean: float
    as_low: int


def check_controls(n: int) -> None:
    """Refuse fewer than 20 controls.

    Raises:
        InputError: there are fewer than MIN_CONTROLS.
    """
    if n < MIN_CONTROLS:
        raise InputError(f"controls={n}: at least {MIN_CONTROLS} random controls are needed for p of 0.05")


def rank(chosen: float, controls: Float[np.ndarray, " control"]) -> Rank:
    """Return the two-sided rank of an effect among those of random controls of the same kind.

    The centre is the median of all, the chosen one included: under the null all are exchangeable, so p is exact.
    """
    every = np.append(controls, chosen)
    far = np.abs(every - np.median(every))
    p = float((far >= far[-1] - 1e-12).mean())
    spread = float(controls.std(ddof=1)) if len(controls) > 1 else 0.0
    distance = (chosen - float(controls.mean())) / spread if spread > 1e-12 else float("nan")
    return Rank(p, distance, float(controls.mean()), int((controls <= chosen).sum()))


def family_p(
    chosen: Float[np.ndarray, " test"], controls: Float[np.ndarray, "control test"]
) -> Float[np.ndarray, " test"]:
    """Return p of each of several ranks, adjusted for all of them: the family-wise error rate (single-step max-T).

    Distances are from the common median in units of the common standard deviation; p of a test is the share of all, the
    chosen one included, whose largest distance over the tests is at least as large. So doses need no more controls
    than one dose.

    Reference: Westfall & Young 1993, Resampling-Based Multiple Testing.
    """
    every = np.vstack([controls, chosen])
    spread = every.std(axis=0, ddof=1)
    centred = np.abs(every - np.median(every, axis=0))
    far = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-12)
    return np.asarray((far.max(axis=1)[:, None] >= far[-1] - 1e-12).mean(axis=0))
