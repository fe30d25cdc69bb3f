"""YaRN against the published constants of gpt-oss and against its definition."""

import math
from dataclasses import replace

import torch

from tests.model.conftest import YARN
from workbench.model.rope import concentration, cos_sin, inverse_frequencies, rotate


def test_the_published_concentration_and_ramp() -> None:
    assert math.isclose(concentration(YARN), 1.3465735902799727)
    plain = inverse_frequencies(replace(YARN, factor=None), 64).double()
    mix = (plain - inverse_frequencies(YARN, 64).double()) / (plain - plain / 32)
    ramp = [(i - 8.0927791) / (17.3980245 - 8.0927791) for i in range(32)]
    torch.testing.assert_close(mix, torch.tensor(ramp, dtype=torch.float64).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_only_the_distance_of_two_positions_matters_and_the_length_grows_by_the_concentration() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i: int, j: int) -> float:
        turn = [rotate(x, *cos_sin(YARN, 64, torch.tensor([[p]]))) for x, p in ((q, i), (k, j))]
        return float((turn[0] * turn[1]).sum())

    assert math.isclose(score(900, 870), score(130, 100), rel_tol=1e-3)
    assert math.isclose(score(0, 0), float((q * k).sum()) * concentration(YARN) ** 2, rel_tol=1e-6)
    assert not math.isclose(score(900, 870), score(130, 101), rel_tol=1e-2)
