"""Rotary positions in torch and in Triton against complex multiplication in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import rotary as reference
from workbench.kernels.gpu import rotary as kernels

both = pytest.mark.parametrize("rotary", [reference, kernels], ids=["torch", "kernel"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def case(batch: int, pos: int, heads: int, d_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(heads)
    angle = torch.rand(batch, pos, d_head // 2, generator=rng) * 6
    return torch.randn(batch, pos, heads, d_head, generator=rng).to(dtype), 1.3 * angle.cos(), 1.3 * angle.sin()


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + d_head / 2) as complex numbers."""
    a, b = x.double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.cat([turned.real, turned.imag], -1)


@both
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (2, 5, 3, 10), (1, 9, 64, 64)])
def test_pairs_turn_like_complex_numbers(rotary: object, sizes: tuple[int, int, int, int]) -> None:
    x, cos, sin = case(*sizes, torch.float32)
    got = rotary.rotate(x, cos, sin).double()  # type: ignore[attr-defined]
    torch.testing.assert_close(got, exact(x, cos, sin), rtol=1e-6, atol=1e-6)
    if sizes[3] > 2:
        neighbours = exact(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin).unflatten(-1, (2, -1)).mT.flatten(-2)
        assert not torch.allclose(got, neighbours, atol=1e-2), "pairs of neighbours are another model"
    assert not torch.allclose(got, exact(x, cos, -sin), atol=1e-2), "the other direction is another model"


@both
def test_bfloat16_is_rounded_once(rotary: object) -> None:
    x, cos, sin = case(1, 20, 8, 64, torch.bfloat16)
    got = rotary.rotate(x, cos, sin)  # type: ignore[attr-defined]
    ulp = exact(x, cos, sin).abs().clamp(min=1e-2) * 2**-8
    assert ((got.double() - exact(x, cos, sin)).abs() <= ulp).all()
