"""The routing kernels against their torch references, ties and all, and the tile schedule against a list of tiles."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import routing
from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.routing import gate, group, max_tiles, tile_of, top_k


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


# Published pruned models have 24 and 96 experts: Triton's blocks must be powers of two for every count.
COUNTS = (3, 5, 17, 21, 24, 25, 96, 100, 128, 4096)
SIZES = [(1, 1, 1), (9, 5, 3), (50, 32, 4), (200, 128, 4), (3, 4, 4), *((20, n, 3) for n in COUNTS)]


@pytest.mark.parametrize(("tokens", "num_experts", "k"), SIZES)
def test_top_k_equals_the_stable_sort(tokens: int, num_experts: int, k: int) -> None:
    """Rounded to halves, so that most rows have ties at the edge."""
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(0)).mul(2).round() / 2
    assert torch.equal(top_k(logits, k), routing.top_k(logits, k))


def test_equal_logits_go_to_the_smaller_id_whatever_their_sign() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -0.0, 0.0, -1.0], [-inf, -inf, -inf, -inf], [-3.0, -2.0, -2.0, -inf], [1.0, inf, nan, inf]]
    )
    assert top_k(logits, 3).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 0], [2, 1, 3]]
    assert torch.equal(top_k(logits, 3), routing.top_k(logits, 3))
    larger_id_first = logits.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :3]
    assert not torch.equal(top_k(logits, 3), 3 - larger_id_first)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), SIZES)
def test_gates_equal_the_softmax_over_the_chosen(tokens: int, num_experts: int, k: int) -> None:
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(1)) * 3
    ids = routing.top_k(logits, k)
    got = gate(logits, ids)
    torch.testing.assert_close(got.double(), routing.gate(logits.double(), ids), rtol=1e-6, atol=1e-7)
    if k < num_experts:
        softmax_first = logits.softmax(-1).gather(-1, ids)
        assert not torch.allclose(got, softmax_first, rtol=1e-3)


def test_gates_of_an_edited_choice_and_their_gradient() -> None:
    """Ids in any order, as an intervention may leave them."""
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 2
    ids = torch.tensor([[7, 0, 3]]).repeat(6, 1)
    toward = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    a, b = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (got,) = torch.autograd.grad((gate(a, ids) * toward).sum(), a)
    (want,) = torch.autograd.grad((routing.gate(b, ids) * toward).sum(), b)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def routings() -> list[Tensor]:
    rng = torch.Generator().manual_seed(4)
    return [
        torch.randint(5, (1, 3), generator=rng),
        torch.randint(5, (700, 4), generator=rng),  # more than one block of slots
        torch.full((30, 2), 4),  # all to the last
        torch.tensor([[0, 4], [4, 0]]),  # none to the middle ones
    ]


@pytest.mark.parametrize("experts", routings(), ids=["one token", "many", "all to one", "empty experts"])
def test_slots_are_grouped_by_expert_and_keep_their_order(experts: Tensor) -> None:
    got = group(experts, 5)
    order, counts = routing.group(experts, 5)
    assert torch.equal(got.order.long(), order)
    assert torch.equal(got.counts.long(), counts)
    assert got.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    unstable = experts.flatten().flip(0).argsort(stable=True)
    assert len(experts) == 1 or not torch.equal(got.order.long(), len(unstable) - 1 - unstable)


@triton.jit
def _tiles(offsets, out, E: tl.constexpr, BLOCK_M: tl.constexpr):
    expert, start, end = tile_of(tl.program_id(0), offsets, E, BLOCK_M)
    at = out + tl.program_id(0) * 3
    tl.store(at, expert)
    tl.store(at + 1, start)
    tl.store(at + 2, end)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([16, 32]))
def test_every_tile_is_scheduled_once_and_the_rest_know_it(counts: list[int], block_m: int) -> None:
    slots = sum(counts)
    if not slots:
        return
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    want = [
        [e, int(offsets[e]) + start, int(offsets[e + 1])]
        for e, n in enumerate(counts)
        for start in range(0, n, block_m)
    ]
    most = max_tiles(slots, len(counts), block_m)
    assert len(want) <= most
    got = torch.full((most, 3), -1, dtype=torch.int32)
    _tiles[(most,)](offsets, got, len(counts), block_m)
    assert got[: len(want)].tolist() == want
    assert (got[len(want) :, 0] == len(counts)).all()


@pytest.mark.parametrize("num_experts", COUNTS)
def test_tiles_fit_every_number_of_experts(num_experts: int) -> None:
    assert tiles.fits(tiles.top_k_tile(num_experts))
    for slots in (1, 4, 100, 8192, 65536, 10**6):
        tile = tiles.group_tile(slots, num_experts)
        assert tiles.fits(tile)
        assert tile.blocks["BLOCK"] % tile.blocks["STEP"] == 0, "no step goes beyond the slots of a program"
    if num_experts not in (128, 4096):
        assert not tiles.fits(tiles.Tile({"BLOCK": 2048 // num_experts}, 4, 1)), "the size before the correction"
