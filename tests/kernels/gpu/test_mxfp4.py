"""The codec's kernels against the torch codec bit for bit, and tiles against the matrix they were made from."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import mxfp4
from workbench.kernels.gpu.mxfp4 import dequantise, dot_packed, load_tile, operand, quantise
from workbench.kernels.mxfp4 import GROUP, Mxfp4

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, where it is meant


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN and -0 does not equal 0."""
    number = ~b.isnan()
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[number], b[number])
        and torch.equal(a[number].signbit(), b[number].signbit())
    )


def every_byte_and_scale() -> tuple[Tensor, Tensor]:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1, 1)
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    got = dequantise(blocks, scales, dtype)
    assert same(got, mxfp4.dequantise(blocks, scales, dtype))
    assert got[255].isnan().all()
    assert (dtype == torch.float16) or (got[0] != 0).any(), "subnormals must not be flushed"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (129, 1)])
def test_any_number_of_groups(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(100, 140, shape, dtype=torch.uint8, generator=rng)
    assert same(dequantise(blocks, scales), mxfp4.dequantise(blocks, scales))


def test_the_wrong_nibble_order_would_be_noticed() -> None:
    blocks, scales = every_byte_and_scale()
    swapped = (blocks >> 4) | (blocks << 4)
    assert not same(dequantise(blocks, scales), mxfp4.dequantise(swapped, scales))


SIZES = [(size, torch.float32) for size in (1.0, 3e37, 1e-20, 1e-30, 1e-38, 1e-42)]


# The interpreter reads bfloat16's subnormals as zero: no smaller ones of that type.
@pytest.mark.parametrize(("size", "dtype"), [*SIZES, (1.0, torch.bfloat16), (1e-30, torch.bfloat16)])
def test_quantising_equals_torch_bit_for_bit(size: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(37, 3 * GROUP, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(quantise(weight), mxfp4.quantise(weight), strict=True))


def test_quantising_ties_zeros_and_the_largest() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)
    groups = [ties, -ties, torch.zeros(GROUP), -torch.zeros(GROUP), torch.full((GROUP,), 3e38), torch.eye(GROUP)[3]]
    weight = torch.stack(groups)
    assert all(torch.equal(a, b) for a, b in zip(quantise(weight), mxfp4.quantise(weight), strict=True))


def test_the_better_of_two_scales_is_taken() -> None:
    """Both choices occur, and always taking the floor would be noticed."""
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(2))
    floor = torch.frexp(weight.abs().amax(-1)).exponent - 3 + 127
    widened = quantise(weight)[1][:, 0] - floor
    assert sorted(set(widened.tolist())) == [0, 1]


@pytest.mark.parametrize(
    ("weight", "message"), [(torch.full((GROUP,), torch.inf), "NaN or infinity"), (torch.zeros(2, 33), "groups of 32")]
)
def test_what_the_format_cannot_hold_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise(weight)


def packed(experts: int, out: int, columns: int) -> Mxfp4:
    rng = torch.Generator().manual_seed(3)
    return Mxfp4(*mxfp4.quantise(torch.randn(experts, out, columns, generator=rng)))


@triton.jit
def _read(
    blocks,
    scales,
    x,
    y,
    stride_expert,
    stride_tile_row,
    stride_tile_column,
    stride_row,
    MIXED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[expert] = x · Wᵀ for 16 rows of x, tile by tile."""
    i, expert = tl.program_id(0), tl.program_id(1)
    k, m, n = tl.arange(0, COLUMNS), tl.arange(0, 16), i * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([16, ROWS], tl.float32)
    for j in range((K + COLUMNS - 1) // COLUMNS):
        at = j * COLUMNS + k
        a = tl.load(x + m[:, None] * K + at[None, :], mask=at[None, :] < K, other=0.0)
        w, s = load_tile(
            blocks,
            scales,
            expert * stride_expert,
            i,
            j,
            stride_tile_row,
            stride_tile_column,
            stride_row,
            N,
            K,
            ROWS,
            COLUMNS,
        )
        acc = tl.dot_scaled(a, None, "bf16", w.T, s, "e2m1", acc) if MIXED else dot_packed(a, w, s, acc)
    tl.store(y + (expert * 16 + m[:, None]) * N + n[None, :], acc, mask=n[None, :] < N)


def product(weight: Mxfp4, x: Tensor, mixed: bool = False) -> Tensor:
    rows, columns = 32, 64
    w = operand(weight, rows, columns)
    y = torch.empty(len(weight.scales), 16, w.out)
    grid = (triton.cdiv(w.out, rows), len(weight.scales))
    _read[grid](w.blocks, w.scales, x, y, *w.strides, mixed, w.out, w.columns, rows, columns)
    return y


@pytest.mark.parametrize(("out", "columns"), [(64, 128), (72, 96), (5, 32), (33, 160)])
def test_tiles_read_the_matrix_of_the_published_layout(out: int, columns: int) -> None:
    weight = packed(2, out, columns)
    x = torch.randn(16, columns, generator=torch.Generator().manual_seed(4))
    plain = product(weight, x)
    dense = mxfp4.dequantise(*weight, torch.float64)
    torch.testing.assert_close(plain.double(), x.double() @ dense.mT, rtol=1e-5, atol=1e-4)
    shifted = dense.roll(1, -2) if out > 1 else dense
    assert not torch.allclose(plain.double(), x.double() @ shifted.mT, rtol=1e-2)


@pytest.mark.skipif(
    not hasattr(triton.runtime.interpreter.InterpreterBuilder, "create_dot_scaled"),
    reason="this Triton's interpreter has no mixed product",
)
def test_tritons_mixed_product_reads_the_same_matrix() -> None:
    """The kernels use the instruction on a GPU and its replacement here: both must mean the same layout."""
    weight = packed(2, 72, 96)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    torch.testing.assert_close(product(weight, x, mixed=True), product(weight, x), rtol=1e-5, atol=1e-4)
