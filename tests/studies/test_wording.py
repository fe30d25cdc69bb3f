"""One wording and one unit for each quantity."""

import math

from workbench.studies.wording import wording


def test_shares_are_percent_and_differences_of_shares_are_points() -> None:
    words = wording("experts")
    assert words.sides(0.0572, 0.1691, "analysis", "final") == "5.7 % of routed slots in analysis, 16.9 % in final"
    assert words.interval(-0.1119, -0.1224, -0.1031) == "-11.2 [-12.2, -10.3] points"
    assert words.bound(0.0312) == "±3.2 points", "rounded up: what is excluded lies beyond it"
    assert words.bound(0.031) == "±3.1 points"
    assert words.bound(0.000312) == "±0.032 points", "never ±0.0, which would exclude any difference"
    assert words.bound(0.0) == "±0.0 points"
    assert words.bound(float("nan")) == "±nan points"


def test_nats_are_nats_and_other_quantities_are_as_they_are() -> None:
    assert wording("entropy").interval(0.01234, -0.5, 1) == "+0.012 [-0.500, +1.000] nat"
    assert wording("logprob").bound(0.25) == "±0.250 nat"
    assert wording("expert_norm").interval(1, 0.5, 1.5) == "+1.000 [+0.500, +1.500]"


def test_a_difference_without_an_interval_has_no_limits() -> None:
    assert wording("logprob").interval(0.047, math.nan, math.nan) == "+0.047 nat"
    assert wording("experts").interval(-0.1119, -math.inf, math.inf) == "-11.2 points"
