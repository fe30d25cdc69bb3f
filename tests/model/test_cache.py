"""A windowed cache gives the same bits as one that holds everything, holds what it must, and refuses to go further back."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from tests.model.test_attention import ODD
from workbench.errors import InputError
from workbench.model import cache as cache_module
from workbench.model import generate as generation
from workbench.model import load, memory
from workbench.model.cache import ALIGNMENT, BACK, SLACK, KVCache, held_positions
from workbench.model.config import PUBLISHED, Config
from workbench.model.transformer import GptOss

CPU = torch.device("cpu")
CAPACITY = 420
Chunks = Sequence[tuple[int, Sequence[int] | None]]  # tokens of each pass, and the real ones of each row


def new_cache(cfg: Config, batch: int, *, windowed: bool = True, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(cfg, batch, CAPACITY, dtype=dtype, device=CPU, windowed=windowed)


@pytest.fixture(scope="module", params=["nano", "odd sizes"])
def model(request: pytest.FixtureRequest) -> GptOss:
    if request.param == "nano":
        return load("nano", device="cpu", dtype=torch.float32)
    return random_model(replace(ODD, n_layers=3, windows=(5, None, 20))).requires_grad_(False)


def outputs(model: GptOss, batch: int, chunks: Chunks, *, windowed: bool) -> list[Tensor]:
    """The residual stream of the real tokens of each pass."""
    rng = torch.Generator().manual_seed(0)
    cache = new_cache(model.cfg, batch, windowed=windowed, dtype=model.dtype)
    found = []
    for new, n_real in chunks:
        x = torch.randint(model.cfg.d_vocab, (batch, new), generator=rng)
        out = model.residual(x, cache=cache, n_real=n_real)
        found += [row[:n] for row, n in zip(out, n_real or [new] * batch, strict=True)]
    return found


PASSES: dict[str, tuple[int, Chunks]] = {
    "a long decode": (1, [(7, None), *[(1, None)] * 300]),
    "a decode of unequal rows": (2, [(40, [40, 9]), *[(1, None)] * 280]),
    "two tokens at a time": (2, [(30, [3, 30]), *[(2, None)] * 140]),
    "a prompt in chunks": (1, [(100, None), (130, None), (90, None), (60, None), *[(1, None)] * 3]),
    "unequal prompts in chunks": (
        3, [(100, [100, 100, 31]), (110, [110, 7, 0]), (100, [60, 0, 0]), (100, [1, 1, 100]), *[(1, None)] * 3]),
}  # fmt: skip


@torch.no_grad()
def check_same_bits(model: GptOss, name: str) -> None:
    batch, chunks = PASSES[name]
    windowed, full = (outputs(model, batch, chunks, windowed=w) for w in (True, False))
    for i, (a, b) in enumerate(zip(windowed, full, strict=True)):
        assert torch.equal(a, b), f"row {i % batch} of pass {i // batch}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PASSES)
def test_the_same_bits_as_from_a_cache_of_everything(model: GptOss, name: str, dtype: torch.dtype) -> None:
    check_same_bits(model.to(dtype), name)
