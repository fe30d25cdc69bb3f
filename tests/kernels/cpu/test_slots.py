"""SwiGLU and the sum over slots by `workbench.kernels.cpu.slot_loops`, against float64 and against wrong results."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import products, slots

HALF_ULP = 2.0**-8  # of bfloat16, relative
LIMIT, ALPHA = 7.0, 1.702


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def slow(pairs: Tensor) -> Tensor:
    gate, up = pairs[..., 0::2].double().clamp(max=LIMIT), pairs[..., 1::2].double().clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


@pytest.mark.parametrize("shape", [(1, 3, 192), (5, 3, 192), (500, 64), (0, 64)])
def test_activations(shape: tuple[int, ...], number_of_threads: int) -> None:
    pairs = normal(len(shape), *shape) * 6
    if pairs.numel():
        pairs[0].view(-1)[0], pairs[0].view(-1)[2] = -120.0, 120.0
    got = slots.swiglu(pairs, LIMIT, ALPHA)
    assert got.shape == (*shape[:-1], shape[-1] // 2)
    if not pairs.numel():
        return
    assert error(got, slow(pairs)) < HALF_ULP
    exchanged = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    for broken in (exchanged, pairs.roll(2, -1), pairs.clamp(max=5)):
        assert error(got, slow(broken)) > 4 * HALF_ULP


def test_nan_stays_in_its_activation() -> None:
    pairs = normal(0, 4, 64)
    pairs[1, 6], pairs[2, 33] = torch.nan, torch.nan
    where = slots.swiglu(pairs, LIMIT, ALPHA).isnan().nonzero()
    assert where.tolist() == [[1, 3], [2, 16]]


@pytest.mark.parametrize(("rows", "count"), [(3, 4), (700, 4), (2, 1)])
def test_the_sum_over_slots(rows: int, count: int, number_of_threads: int) -> None:
    out, gates = normal(0, rows, count, 96), torch.rand(rows, count, generator=torch.Generator().manual_seed(1))
    want = torch.einsum("tsd,ts->td", out.double(), gates.double())
    assert error(slots.combine(out, gates), want) < HALF_ULP
    assert error(slots.combine(out, gates.roll(1, 0)), want) > 4 * HALF_ULP


def test_widths_that_vectors_do_not_divide_are_not_covered() -> None:
    assert slots.covers(96)
    assert not slots.covers(88)
    assert not slots.covers(0)


def test_only_ordinary_bfloat16_is_given_to_the_loops() -> None:
    rows, gates = normal(0, 2, 32), torch.ones(2, 2)
    assert cpu.slot_steps((rows,), gates) is slots
    assert cpu.slot_steps((rows, rows.float())) is None
    assert cpu.slot_steps((rows.clone().requires_grad_(),)) is None


def test_all_loops_can_be_compiled_before_they_are_needed() -> None:
    """As `make test` does beside its first tests."""
    cpu.compile_loops()
    assert slots._loops.cache_info().currsize == products._loops.cache_info().currsize == 1
