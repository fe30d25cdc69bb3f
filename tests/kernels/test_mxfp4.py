"""The codec against a table written out here, every scale included, and the packed product against the dense one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.kernels import cpu, mxfp4
from workbench.kernels.mxfp4 import GROUP, Mxfp4, dequantise, linear, quantise

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def slow(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One value at a time in float64."""
    out = []
    for group, scale in zip(blocks.view(-1, 16).tolist(), scales.flatten().tolist(), strict=True):
        for byte in group:
            for nibble in (byte & 15, byte >> 4):
                out.append(math.nan if scale == 255 else VALUES[nibble] * 2.0 ** (scale - 127))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1, 1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    got, want = dequantise(blocks, scales, dtype).flatten().double(), slow(blocks, scales)
    want[want.abs() >= 2.0**128] = want[want.abs() >= 2.0**128].sign() * math.inf  # bfloat16 ends there
    assert torch.equal(got.nan_to_num(nan=1e300), want.nan_to_num(nan=1e300))
    assert (got[:512] != 0).any(), "subnormals must not be flushed"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-100, 100))
def test_packed_values_survive_the_round_trip(seed: int, log2_size: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (3, 2, 16), dtype=torch.uint8, generator=rng)
    scales = torch.full((3, 2), int(127 + log2_size), dtype=torch.uint8)
    values = dequantise(blocks, scales, torch.float32)
    assert torch.equal(dequantise(*quantise(values), torch.float32), values)


def test_quantising_takes_the_nearest_value_of_the_better_scale() -> None:
    weight = torch.randn(64, 4 * GROUP, generator=torch.Generator().manual_seed(0)) * 0.1
    blocks, scales = quantise(weight)
    groups = weight.view(64, 4, GROUP)
    table = torch.tensor(VALUES)
    best = torch.full((64, 4), math.inf)
    for exponent in range(-12, 4):
        grid = table * 2.0**exponent
        best = best.minimum((groups[..., None] - grid).abs().amin(-1).square().sum(-1))
    error = (dequantise(blocks, scales, torch.float32).view(64, 4, GROUP) - groups).square().sum(-1)
    torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-9)


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [0.0] * 24)
    assert dequantise(*quantise(ties), torch.float32)[:8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


def test_zero_and_tiny_groups_stay_finite() -> None:
    weight = torch.cat([torch.zeros(GROUP), torch.full((GROUP,), 1e-44), torch.full((GROUP,), 3e38)])
    assert torch.isfinite(dequantise(*quantise(weight), torch.float32)).all()


@pytest.mark.parametrize("bad", [torch.full((GROUP,), math.nan), torch.full((GROUP,), math.inf)])
def test_what_the_format_cannot_hold_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(bad)


def test_a_width_that_is_no_multiple_of_32_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantise(torch.zeros(4, 33))


@pytest.mark.parametrize("rows", [1, 63, 431])
def test_the_packed_product_and_its_gradient_equal_the_dense(rows: int) -> None:
    """1,100 outputs: the last chunk of 512 is a partial one."""
    rng = torch.Generator().manual_seed(rows)
    weight = Mxfp4(*quantise(torch.randn(1100, 96, generator=rng)))
    dense = dequantise(*weight, torch.float64).mT
    x = torch.randn(rows, 96, generator=rng, dtype=torch.float64, requires_grad=True)
    y = torch.randn(rows, 1100, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(linear(x, weight), x @ dense)
    (got,) = torch.autograd.grad((linear(x, weight) * y).sum(), x)
    torch.testing.assert_close(got, y @ dense.mT)


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("outputs", [1100, 1104])
def test_the_packed_product_of_bfloat16_in_float32(rows: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors that multiply bfloat16 slowly: products and gradients are rounded once."""
    if cpu.unavailable():
        pytest.skip("bfloat16 is widened beside the compiled kernels only")
    rng = torch.Generator().manual_seed(rows)
    monkeypatch.setattr(cpu, "_widens", lambda: True)
    monkeypatch.setattr(mxfp4, "_WIDE_CHUNK", 96 * 515)  # 1,104 outputs: the last chunk is a partial one
    weight = Mxfp4(*quantise(torch.randn(outputs, 96, generator=rng)))
    dense = dequantise(*weight, torch.float64).mT
    x = torch.randn(rows, 96, generator=rng).bfloat16().requires_grad_()
    y = torch.randn(rows, outputs, generator=rng).bfloat16()

    def rounded_once(got: torch.Tensor, want: torch.Tensor) -> bool:
        return got.dtype == torch.bfloat16 and bool(((got - want).abs() <= want.abs() * 2**-8 + 1e-4).all())

    for used in (weight, Mxfp4(weight.blocks, weight.scales.roll(1, 0))):  # the other one is a negative control
        out = linear(x, used)
        (gradient,) = torch.autograd.grad((out * y).sum(), x)
        assert rounded_once(out, x.double() @ dense) == (used is weight)
        assert rounded_once(gradient, y.double() @ dense.mT) == (used is weight)
