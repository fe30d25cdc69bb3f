"""Products of many rows by tiles of a matrix, `workbench.kernels.cpu.tiles`, against float64.

The loops are those of `workbench.kernels.cpu.dense_tile_loops` and `workbench.kernels.cpu.integer_tile_loops`, with the
integers of `workbench.kernels.cpu.integer_groups` and the jobs of `workbench.kernels.cpu.tile_jobs`.
"""

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu, dense, moe, mxfp4
from workbench.kernels.mxfp4 import Mxfp4, dequantise, quantise

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import products, tiles, vectors

integers = pytest.mark.skipif(not vectors.adds_products_of_words(), reason="needs AVX-512 VNNI")
if not tiles.available():
    pytest.skip("tiles need AVX-512", allow_module_level=True)

EXPERTS = 5
ROWS = [1, 4, 5, 13, 26, 75, 512, 700]  # every number of rows of a block is among theirs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    """The largest error, in units of what rounding to bfloat16 allows."""
    return float(((got.double() - want).abs() / (want.abs() * 2**-8 + 1e-5 * want.abs().max())).max())


def stack(outputs: int, inputs: int) -> tuple[Mxfp4, Tensor]:
    return Mxfp4(*quantise(normal(EXPERTS, outputs, inputs))), normal(EXPERTS, outputs, seed=1).bfloat16()


def chosen(tokens: int, slots: int = 3) -> Tensor:
    """Experts that differ by orders of magnitude in how often they are chosen; the last one is not."""
    draws = torch.rand(tokens, slots, generator=torch.Generator().manual_seed(2))
    return (draws**4 * (EXPERTS - 1)).long()


def slow(x: Tensor, weight: Mxfp4, bias: Tensor, experts: Tensor) -> Tensor:
    return torch.einsum("ti,tsoi->tso", x.double(), dequantise(*weight, torch.float64)[experts]) + bias[experts]


def test_blocks_hold_all_rows_and_have_every_size() -> None:
    sizes = range(1, tiles._JOB_ROWS + 1)
    for rows in sizes:
        blocks, count = tiles._blocks(rows)
        assert (blocks - 1) * count < rows <= blocks * count <= tiles.JOB_ROWS
    assert {tiles._blocks(rows)[1] for rows in sizes} == set(range(4, 13))


@pytest.mark.parametrize("rows", [*range(1, 27), *range(33, 59)])
def test_every_size_of_a_block_equals_float64(rows: int) -> None:
    x, weight = normal(rows, 160).bfloat16(), normal(32, 160, seed=1).bfloat16()
    assert error(tiles.dense_linear(x, weight, None), x.double() @ weight.double().mT) < 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (96, 288)])
def test_dense_and_packed_products_equal_float64(rows: int, outputs: int, inputs: int, number_of_threads: int) -> None:
    x, bias = normal(rows, inputs).bfloat16(), normal(outputs, seed=2).bfloat16()
    matrix = normal(outputs, inputs, seed=1).bfloat16()
    want = x.double() @ matrix.double().mT
    assert error(tiles.dense_linear(x, matrix, None), want) < 1
    assert error(tiles.dense_linear(x, matrix, bias), want + bias) < 1
    packed = Mxfp4(*quantise(matrix.float()))
    assert error(tiles.packed_linear(x, packed), x.double() @ dequantise(*packed, torch.float64).mT) < 1


@pytest.mark.parametrize("tokens", [2, 40, 700])
def test_expert_products_equal_float64(tokens: int, number_of_threads: int) -> None:
    weight, bias = stack(64, 160)
    x, experts = normal(tokens, 160, seed=3).bfloat16(), chosen(tokens)
    slots = products.Slots(experts, EXPERTS)
    got = tiles.expert_linear(x, weight, bias, slots)
    assert error(got, slow(x, weight, bias, experts)) < 1
    assert torch.equal(tiles.expert_linear(x.repeat_interleave(3, 0), weight, bias, slots), got)


@integers
def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = normal(600, 288).bfloat16(), normal(96, 288, seed=1).bfloat16()
    packed = Mxfp4(*quantise(matrix.float()))
    complete, unpacked = tiles.dense_linear(x, matrix, None), tiles.packed_linear(x, packed)
    for rows in (slice(0, 1), slice(7, 20), slice(100, 600)):
        assert torch.equal(tiles.packed_linear(x[rows], packed), unpacked[rows])
    for rows in (slice(0, 33), slice(100, 600)):
        assert torch.equal(tiles.dense_linear(x[rows], matrix, None), complete[rows])
    few = tiles.dense_linear(x[:32], matrix, None)  # in float32
    for rows in (slice(0, 1), slice(7, 20)):
        assert torch.equal(tiles.dense_linear(x[rows], matrix, None), few[rows])
    assert not torch.equal(few, complete[:32])
    monkeypatch.setattr(vectors, "adds_products_of_words", lambda: False)
    assert torch.equal(tiles.dense_linear(x, matrix, None)[:32], few)


def test_rows_that_are_chosen_are_multiplied_in_their_order() -> None:
    x, packed = normal(40, 96).bfloat16(), Mxfp4(*quantise(normal(64, 96, seed=1)))
    rows, bias = torch.tensor([7, 39, 7, 0, 12]), normal(64, seed=2).bfloat16()
    complete = tiles.packed_linear(x, packed, bias)
    assert torch.equal(tiles.packed_linear(x, packed, bias, rows), complete[rows])
    assert not torch.equal(tiles.packed_linear(x, packed, None, rows), complete[rows])


@pytest.mark.parametrize("broken", ["neighbouring expert", "nibbles exchanged", "one scale", "one input", "bias"])
def test_the_comparison_rejects_broken_implementations(broken: str) -> None:
    weight, bias = stack(64, 160)
    x, experts = normal(40, 160, seed=3).bfloat16(), chosen(40)
    want = slow(x, weight, bias, experts)
    if broken == "neighbouring expert":
        experts = experts + 1
    elif broken == "nibbles exchanged":
        weight = weight._replace(blocks=(weight.blocks << 4) | (weight.blocks >> 4))
    elif broken == "one scale":
        scales = weight.scales.clone()
        scales[0, 7, 1] += 1
        weight = weight._replace(scales=scales)
    elif broken == "one input":
        x = x.clone()
        x[5, 159] += 1
    else:
        bias = bias.roll(1, 1)
    assert error(tiles.expert_linear(x, weight, bias, products.Slots(experts, EXPERTS)), want) > 2


def test_every_byte_under_every_scale_is_exact() -> None:
    """Subnormal scales and NaN included: rows with a single 1 give the columns of the matrix."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)[:, None]
    want = dequantise(blocks, scales)
    usable = torch.arange(256).repeat_interleave(16) < 253  # infinity times the zeros beside the 1 is NaN
    got = tiles.packed_linear(torch.eye(32, dtype=torch.bfloat16), Mxfp4(blocks, scales)).mT
    assert torch.equal(got[usable], want[usable])
    assert got[-16:].isnan().all()
    exchanged = tiles.packed_linear(
        torch.eye(32, dtype=torch.bfloat16), Mxfp4((blocks << 4) | (blocks >> 4), scales)
    ).mT
    assert not torch.equal(exchanged[usable], want[usable])


@integers
def test_nan_and_infinity_stay_in_their_rows() -> None:
    x, matrix = normal(20, 64).bfloat16(), normal(32, 64, seed=1).bfloat16()
    x[3, 5], x[11, 0] = torch.nan, torch.inf
    got, packed = tiles.dense_linear(x, matrix, None), tiles.packed_linear(x, Mxfp4(*quantise(matrix.float())))
    assert got[3].isnan().all()
    assert got[11].isinf().all()
    many = tiles.dense_linear(x.repeat(2, 1), matrix, None)[:20]
    assert many[[3, 11]].isnan().all()
    assert packed[[3, 11]].isnan().all()
    others = [n for n in range(20) if n not in (3, 11)]
    assert got[others].isfinite().all()
    assert many[others].isfinite().all()
    assert packed[others].isfinite().all()


def eight_bits(x: Tensor) -> Tensor:
    """Inputs rounded to 8-bit integers in groups of 32, as other programs round them before products of integers."""
    groups = x.double().unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step).round() * step).flatten(-2)


def test_sums_over_inputs_of_similar_size_are_exact() -> None:
    """Integers from 1 to 127 in one group, times one power of two: the sum is rounded once, to bfloat16."""
    x = torch.randint(1, 128, (50, 32), generator=torch.Generator().manual_seed(0)) * 2.0**-3
    packed = Mxfp4(*quantise(normal(64, 32, seed=1)))
    values = dequantise(*packed, torch.float64)
    got = tiles.packed_linear(x.bfloat16(), packed)
    assert torch.equal(got, (x.double() @ values.mT).bfloat16())
    assert not torch.equal(got, (eight_bits(x) @ values.mT).bfloat16())


@pytest.mark.parametrize("outlier", [1.0, 100.0, 30000.0])
def test_inputs_much_smaller_than_one_of_their_group_lose_less_than_bfloat16_does(outlier: float) -> None:
    """The bound of the documentation: 2^-15 of the largest input of a group, for each input."""
    x, packed = normal(40, 288).bfloat16(), Mxfp4(*quantise(normal(96, 288, seed=1)))
    x[:, 7::32] *= outlier
    values = dequantise(*packed, torch.float64)
    largest = x.double().unflatten(1, (-1, 32)).abs().amax(-1)
    bound = 2.0**-15 * largest @ values.abs().unflatten(1, (-1, 32)).sum(-1).mT
    want = x.double() @ values.mT
    got = tiles.packed_linear(x, packed).double()
    assert ((got - want).abs() <= bound + want.abs() * 2**-8).all()
    if outlier == 100:
        coarse = (eight_bits(x) @ values.mT - want).abs()
        assert (coarse > bound + want.abs() * 2**-8).any()


def group_norms(x: Tensor) -> Tensor:
    return x.double().unflatten(-1, (-1, 32)).norm(dim=-1)


def group_sizes(x: Tensor) -> Tensor:
    return x.double().unflatten(-1, (-1, 32)).abs().sum(-1)


@integers
@pytest.mark.parametrize("outlier", [1.0, 100.0, 30000.0])
@pytest.mark.parametrize("alike", [False, True])
def test_dense_products_lose_less_than_bfloat16_does(outlier: float, alike: bool) -> None:
    """The bound of the documentation: 2^-15 of the norm of a group, for each number. Alike numbers have large sums."""
    x, matrix = normal(40, 288).bfloat16(), normal(96, 288, seed=1).bfloat16()
    if alike:
        x = x.sign() * 1.9921875
        matrix[:40] = x
    x[:, 7::32] *= outlier
    matrix[:, 11::32] *= outlier
    own, other = group_norms(x) * 2.0**-15, group_norms(matrix) * 2.0**-15
    bound = group_sizes(x) @ other.mT + own @ group_sizes(matrix).mT + 32 * own @ other.mT
    want = x.double() @ matrix.double().mT
    allowed = bound + want.abs() * 2**-8
    assert ((tiles.dense_linear(x, matrix, None).double() - want).abs() <= allowed).all()
    if not alike and outlier == 100:
        assert ((eight_bits(x) @ eight_bits(matrix).mT - want).abs() > allowed).any()


@integers
def test_dense_numbers_of_similar_size_are_exact() -> None:
    """Integers from 1 to 127 in groups, times powers of two: a sum is rounded once, to bfloat16."""
    rng = torch.Generator().manual_seed(0)
    x, matrix = (torch.randint(1, 128, (rows, 32), generator=rng) for rows in (50, 64))
    got = tiles.dense_linear((x * 2.0**-3).bfloat16(), (matrix * 2.0**5).bfloat16(), None)
    want = x.double() @ matrix.double().mT * 4
    assert torch.equal(got, want.bfloat16())
    assert not torch.equal(got, (eight_bits(x) @ matrix.double().mT * 4).bfloat16())


@integers
def test_nan_and_infinity_of_a_matrix_stay_in_their_outputs() -> None:
    x, matrix = normal(40, 64).bfloat16(), normal(64, 64, seed=1).bfloat16()
    matrix[3, 5], matrix[44, 0] = torch.nan, torch.inf
    got = tiles.dense_linear(x, matrix, None).isnan()
    assert got[:, [3, 44]].all()
    assert got.sum() == 80


@pytest.mark.parametrize("size", [2.0**-133, 2.0**-120, 2.0**-60, 2.0**60, 2.0**118])
def test_inputs_of_any_size(size: float) -> None:
    x, packed = normal(9, 64).clamp(-1.9, 1.9).bfloat16() * size, Mxfp4(*quantise(normal(32, 64, seed=1)))
    want = x.double() @ dequantise(*packed, torch.float64).mT
    got = tiles.packed_linear(x, packed).double()
    step = 2.0**-126  # of the integers of the smallest inputs
    bound = step * dequantise(*packed, torch.float64).abs().sum(1)
    assert ((got - want).abs() <= want.abs() * 2**-8 + 1e-4 * want.abs().max() + bound).all()
    assert not got.isfinite().logical_not().any()
    assert (got != 0).any() == (size > step)
    x, matrix = x * min(1, 2.0**110 / size), normal(32, 64, seed=1).bfloat16()
    for rows, weight in ((x.repeat(4, 1), matrix), (matrix.repeat(2, 1), x)):  # numbers of any size, in both
        want = rows.double() @ weight.double().mT
        got = tiles.dense_linear(rows, weight.repeat(32, 1), None).double()[:, : len(weight)]
        bound = 2 * step * torch.minimum(group_sizes(rows).sum(1)[:, None], group_sizes(weight).sum(1)) + 1e-30
        assert ((got - want).abs() <= want.abs() * 2**-8 + 1e-4 * want.abs().max() + bound).all()


def test_matrices_of_other_kinds_are_not_covered() -> None:
    assert tiles.covers_dense(torch.zeros(64, 96, dtype=torch.bfloat16))
    assert not tiles.covers_dense(torch.zeros(64, 96))
    assert not tiles.covers_dense(torch.zeros(48, 96, dtype=torch.bfloat16))
    assert not tiles.covers_dense(torch.zeros(64, 48, dtype=torch.bfloat16))
    assert not tiles.covers_dense(torch.zeros(96, 64, dtype=torch.bfloat16).mT)
    weight, _ = stack(64, 96)
    assert tiles.covers_packed(*weight)
    assert not tiles.covers_packed(weight.blocks[:, :40].contiguous(), weight.scales[:, :40].contiguous())
    assert not tiles.covers_packed(weight.blocks.flip(0).mT, weight.scales)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products by tiles that were computed."""
    made: list[str] = []
    for name in ("dense_linear", "packed_linear", "expert_linear", "write_expert_rows"):
        original = getattr(tiles, name)
        monkeypatch.setattr(
            tiles, name, lambda *given, name=name, original=original: made.append(name) or original(*given)
        )
    monkeypatch.setattr(cpu, "_widens", lambda: True)
    return made


def test_many_rows_are_multiplied_by_tiles_where_bfloat16_is_slow(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, matrix = normal(2, 40, 96).bfloat16(), normal(64, 96, seed=1).bfloat16()
    packed = Mxfp4(*quantise(matrix.float()))
    got = dense.linear(x, matrix), mxfp4.linear(x[0], packed)
    assert calls == ["dense_linear", "packed_linear"]
    dense.linear(x[:, :2], matrix)
    leaf = x[0].clone().requires_grad_()
    mxfp4.linear(leaf, packed).sum().backward()
    assert len(calls) == 2 + 1  # the product itself needs no gradient of the matrix
    assert leaf.grad is not None
    monkeypatch.setattr(cpu, "_widens", lambda: False)
    torch.testing.assert_close((dense.linear(x, matrix), mxfp4.linear(x[0], packed)), got, rtol=2**-6, atol=0.05)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(32, []), (33, ["expert_linear", "write_expert_rows"] * 2), (300, ["write_expert_rows"] * 2)],
)
def test_experts_take_the_kernel_for_their_number_of_tokens(
    tokens: int, expected: list[str], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, gate_up_bias = stack(128, 96)
    down, down_bias = stack(96, 64)
    weights = moe.Experts(gate_up, gate_up_bias, down, down_bias, 7.0, 1.702)
    x, experts = normal(tokens, 96, seed=5).bfloat16(), torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
    gates = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(moe, "_FEW_ROWS", 100)
    got = moe.moe(x, experts, gates, weights)
    assert calls == expected
    monkeypatch.setattr(cpu, "compiled", lambda *tensors: None)
    want = moe.moe(
        x.double(),
        experts,
        gates.double(),
        moe.Experts(
            *(dequantise(*m, torch.float64).mT if isinstance(m, Mxfp4) else m.double() for m in weights[:4]), 7.0, 1.702
        ),
    )
    assert (got - want).norm() / want.norm() < 0.01
    assert (got - want.roll(1, 0)).norm() / want.norm() > 0.5


@pytest.mark.parametrize("most", [1, 200, 2048])
def test_shares_of_experts_have_the_results_of_single_experts(
    most: int, number_of_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, gate_up_bias = stack(128, 96)
    down, down_bias = stack(96, 64)
    weights = moe.Experts(gate_up, gate_up_bias, down, down_bias, 7.0, 1.702)
    x, experts, gates = normal(300, 96, seed=5).bfloat16(), chosen(300), torch.full((300, 3), 1 / 3)
    monkeypatch.setattr(cpu, "_widens", lambda: True)
    monkeypatch.setattr(moe, "_FEW_ROWS", 0)
    monkeypatch.setattr(moe, "_SHARE_ROWS", most)
    counts = torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    shares = moe._shares(counts)
    assert [pair for share, _ in shares for pair in share] == [(e, n) for e, n in enumerate(counts) if n]
    assert all(rows == sum(n for _, n in share) and (rows <= most or len(share) == 1) for share, rows in shares)
    assert len(shares) == {1: 4, 200: 3, 2048: 1}[most]
    got = moe.moe(x, experts, gates, weights)
    monkeypatch.setattr(moe, "_by_tiles", lambda *given: None)
    assert torch.equal(got, moe.moe(x, experts, gates, weights))
    monkeypatch.undo()
    assert not torch.equal(got, moe.moe(x, (experts + 1) % EXPERTS, gates, weights))
