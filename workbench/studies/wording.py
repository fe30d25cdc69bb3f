"""The wording of differences: one phrase and one unit for each quantity in all summaries, highlights and reports."""

import math
from typing import NamedTuple

import numpy as np


class Wording(NamedTuple):
    """How a comparison of one quantity is written: its sides, the factor of its numbers, the unit of differences."""

    levels: str
    factor: float
    unit: str

    @property
    def digits(self) -> int:
        """Return the decimals of a number."""
        return 1 if self.factor == 100 else 3

    def sides(self, mean_a: float, mean_b: float, side_a: str, side_b: str) -> str:
        """Return both means with the names of their sides."""
        return self.levels.format(a=self.factor * mean_a, b=self.factor * mean_b, side_a=side_a, side_b=side_b)

    def interval(self, difference: float, low: float, high: float) -> str:
        """Return a difference with its unit and its interval, if there is one."""
        limits = f" [{self._signed(low)}, {self._signed(high)}]" if np.isfinite([low, high]).all() else ""
        return f"{self._signed(difference)}{limits} {self.unit}".rstrip()

    def bound(self, size: float) -> str:
        """Return ± a size with its unit, rounded up: one decimal of a number, and two digits of a smaller one."""
        scaled = self.factor * size
        if not np.isfinite(scaled) or scaled <= 0:
            return f"±{scaled:.{self.digits}f} {self.unit}".rstrip()
        digits = max(self.digits, 1 - math.floor(math.log10(scaled)))
        up = math.ceil(scaled * 10**digits * (1 - 1e-9)) / 10**digits
        return f"±{up:.{digits}f} {self.unit}".rstrip()

    def _signed(self, value: float) -> str:
        return f"{self.factor * value:+.{self.digits}f}"


_WORDINGS = {
    "experts": Wording("{a:.1f} % of routed slots in {side_a}, {b:.1f} % in {side_b}", 100.0, "points"),
    "sink": Wording("sink attention {a:.1f} % in {side_a}, {b:.1f} % in {side_b}", 100.0, "points"),
    "entropy": Wording("entropy of the prediction {a:.3f} nat in {side_a}, {b:.3f} in {side_b}", 1.0, "nat"),
    "logprob": Wording("log-probability of the token {a:.3f} nat in {side_a}, {b:.3f} in {side_b}", 1.0, "nat"),
}
_OTHER = Wording("{a:.3f} in {side_a}, {b:.3f} in {side_b}", 1.0, "")


def wording(what: object) -> Wording:
    """Return the wording of a quantity by its name, as `contrast` names it; any other is written as it is."""
    return _WORDINGS.get(str(what), _OTHER)
