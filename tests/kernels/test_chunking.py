"""Chunks along an axis give the same result as one step, and no step sees more positions than the limit."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import chunking


@pytest.mark.parametrize("positions", [1, 7, 8, 23])
def test_chunks_give_the_result_of_one_step(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(chunking, "POSITIONS", 8)
    a, b = torch.randn(2, positions, 3), torch.randn(2, positions, 3)
    widths: list[int] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        widths.append(x.shape[1])
        return x * y

    assert torch.equal(chunking.chunked(step, a, b, dim=1), a * b)
    assert sum(widths) == positions
    assert max(widths) <= 8


def test_a_step_whose_positions_depend_on_each_other_gives_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: chunks are no free choice, so a sum over positions must differ."""
    monkeypatch.setattr(chunking, "POSITIONS", 8)
    x = torch.arange(20.0)[None]
    assert not torch.equal(chunking.chunked(lambda t: t.cumsum(1), x, dim=1), x.cumsum(1))
