"""RMSNorm in torch and in Triton against float64, and the hooked path equal to the fused one bit for bit."""

import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import norm as reference
from workbench.kernels.gpu import norm as kernels

EPS = 1e-5
both = pytest.mark.parametrize("norm", [reference, kernels], ids=["torch", "kernel"])
SHAPES = [(1, 1), (3, 5, 96), (2, 7, 33), (4, 2880)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).mul(3).to(dtype), torch.rand(shape[-1], generator=rng).to(dtype) + 0.5


def exact(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_with_float64(norm: object, shape: tuple[int, ...]) -> None:
    x, weight = case(shape, torch.float32)
    torch.testing.assert_close(norm.rms_norm(x, weight, EPS).double(), exact(x, weight), rtol=3e-6, atol=1e-6)  # type: ignore[attr-defined]


@both
def test_broken_implementations_are_noticed(norm: object) -> None:
    x, weight = case((4, 96), torch.float32)
    x *= 1e-3  # eps matters
    got = norm.rms_norm(x, weight, EPS).double()  # type: ignore[attr-defined]
    torch.testing.assert_close(got, exact(x, weight), rtol=3e-6, atol=1e-6)
    without_eps, by_deviation = exact(x, weight, 0.0), exact(x - x.mean(-1, keepdim=True), weight)
    for broken in (without_eps, by_deviation, exact(x, torch.ones_like(weight))):
        assert not torch.allclose(got, broken, rtol=1e-3)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_in_the_open_gives_the_same_bits(norm: object, dtype: torch.dtype) -> None:
    """What a hooked model computes in steps equals the fused result; a scale rounded to bfloat16 does not."""
    x, weight = case((50, 96), dtype)
    scale = norm.rms_scale(x, EPS)  # type: ignore[attr-defined]
    fused = norm.rms_norm(x, weight, EPS)  # type: ignore[attr-defined]
    assert torch.equal((x.float() / scale * weight.float()).to(dtype), fused)
    assert not torch.equal((x.float() / scale.bfloat16().float() * weight.float()).to(dtype), fused)


def test_gradients_take_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.dispatch, "on_gpu", lambda x: True)
    x, weight = case((3, 32), torch.float32)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(reference.rms_norm(x, weight, EPS).square().sum(), x)
    assert torch.isfinite(grad).all()
    assert grad.abs().sum() > 0


def test_a_shape_that_the_signature_does_not_admit_is_noticed() -> None:
    """The checks that `tests/conftest.py` installs are there."""
    x, weight = case((4, 96), torch.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="weight"):
        reference.rms_norm(x, weight[:5], EPS)
