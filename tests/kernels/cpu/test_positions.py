"""Norm and rotation by `workbench.kernels.cpu.position_loops`, against float64, torch's bits and wrong results."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu, norm, rotary

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import positions

HALF_ULP = 2.0**-8  # of bfloat16, relative
ROWS = [(1, 1), (3, 1), (2, 16), (1, 700)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rows", ROWS)
def test_the_norm_of_rows(rows: tuple[int, int], number_of_threads: int) -> None:
    x, weight, eps = normal(0, *rows, 96) * 1e-2, normal(1, 96), 1e-5  # eps matters
    scale = (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    got, normalized = positions.rms_scale(x, eps), positions.rms_norm(x, weight, eps)
    assert error(got, scale) < 1e-6
    assert error(positions.rms_scale(x, 0.0), scale) > 1e-3
    assert error(normalized, x.double() / scale * weight.double()) < HALF_ULP
    assert error(positions.rms_norm(x, weight.roll(1), eps), x.double() / scale * weight.double()) > 4 * HALF_ULP
    assert torch.equal(normalized, (x.float() / got * weight.float()).bfloat16())
    assert not torch.equal(normalized, (x.float() / got.bfloat16().float() * weight.float()).bfloat16())


@pytest.mark.parametrize("rows", ROWS)
def test_rotations_have_the_bits_of_torch(rows: tuple[int, int], number_of_threads: int) -> None:
    x, angle = normal(0, *rows, 3, 64), normal(1, *rows, 32).float()
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()
    got, want = positions.rotate(x, cos, sin), rotary._rotate(x, cos, sin)
    assert torch.equal(got, want)
    assert not torch.equal(positions.rotate(x, cos, -sin), want)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.complex(cos.double(), sin.double())[:, :, None]
    assert error(got, torch.cat([turned.real, turned.imag], -1)) < HALF_ULP


def test_rows_that_are_not_contiguous_and_no_rows() -> None:
    x, weight, angle = normal(0, 2, 96, 5).mT, normal(1, 96), normal(2, 2, 5, 16).float()
    assert torch.equal(positions.rms_norm(x, weight, 1e-5), positions.rms_norm(x.contiguous(), weight, 1e-5))
    heads = x.unflatten(-1, (3, 32))
    assert torch.equal(positions.rotate(heads, angle, angle), positions.rotate(heads.contiguous(), angle, angle))
    assert positions.rms_norm(x[:, :0], weight, 1e-5).shape == (2, 0, 96)
    assert positions.rotate(heads[:, :0], angle[:, :0], angle[:, :0]).shape == (2, 0, 3, 32)


def test_nan_stays_in_its_row() -> None:
    x = normal(0, 1, 4, 96)
    x[0, 2, 7] = torch.nan
    got = positions.rms_norm(x, normal(1, 96), 1e-5).isnan()
    assert got[0, 2].all()
    assert got.sum() == 96


def test_bfloat16_takes_the_loops_and_other_values_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("rms_norm", "rms_scale", "rotate"):
        original = getattr(positions, name)
        monkeypatch.setattr(
            positions, name, lambda *given, name=name, original=original: calls.append(name) or original(*given)
        )
    x, weight, angle = normal(0, 1, 50, 96), normal(1, 96), normal(2, 1, 50, 16).float()
    norm.rms_norm(x, weight, 1e-5)
    norm.rms_scale(x, 1e-5)
    rotary.rotate(x.unflatten(-1, (3, 32)), angle, angle)
    assert calls == ["rms_norm", "rms_scale", "rotate"]
    norm.rms_norm(x.float(), weight.float(), 1e-5)
    norm.rms_norm(x[..., :90], weight[:90], 1e-5)
    norm.rms_norm(x.clone().requires_grad_(), weight, 1e-5)
    rotary.rotate(x.unflatten(-1, (6, 16)), angle[..., :8], angle[..., :8])
    assert len(calls) == 3
