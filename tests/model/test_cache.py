"""A windowed cache gives the same bits as a full one, holds what it must, and refuses to go further back."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.conftest import random_model
from tests.model.test_attention import ODD
from workbench.errors import InputError
from workbench.hooks.recorders import SequenceRecorder
from workbench.model import cache as cache_module
from workbench.model import generation_loop, load, memory
from workbench.model.cache import ALIGNMENT, BACK, SLACK, KVCache, held_positions
from workbench.model.config import PUBLISHED, Config
from workbench.model.transformer import GptOss

CPU = torch.device("cpu")
CAPACITY = 420
Chunks = Sequence[tuple[int, Sequence[int] | None]]  # tokens of each pass, and the real ones of each row


def new_cache(cfg: Config, batch: int, *, windowed: bool = True, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(cfg, batch, CAPACITY, dtype=dtype, device=CPU, windowed=windowed)


@pytest.fixture(scope="module")
def small() -> GptOss:
    return random_model(replace(ODD, n_layers=3, windows=(5, None, 20))).requires_grad_(False)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases move every few tokens, so that short passes cover what long ones do with the real sizes."""
    for name, value in (("ALIGNMENT", 8), ("BACK", 4), ("SLACK", 24)):
        monkeypatch.setattr(cache_module, name, value)


def outputs(model: GptOss, batch: int, chunks: Chunks, *, windowed: bool) -> list[Tensor]:
    """The residual stream of the real tokens of each pass."""
    rng = torch.Generator().manual_seed(0)
    cache = new_cache(model.cfg, batch, windowed=windowed, dtype=model.dtype)
    rows = []
    for new, n_real in chunks:
        x = torch.randint(model.cfg.d_vocab, (batch, new), generator=rng)
        out = model.residual(x, cache=cache, n_real=n_real)
        rows += [row[:n] for row, n in zip(out, n_real or [new] * batch, strict=True)]
    moved = any(base for held in cache._held.values() for base in held.bases)
    assert moved == windowed, "the bases of windowed layers, and only theirs, should move"
    return rows


def decode(steps: int, new: int = 1) -> Chunks:
    return [(new, None)] * steps


# With little room: layers hold 29 and 44 positions, and move when they are full.
SHORT: dict[str, tuple[int, Chunks]] = {
    "a long decode": (1, [(20, None), *decode(35)]),
    "a decode of unequal rows": (2, [(25, [25, 4]), *decode(42)]),
    "two tokens at a time": (2, [(20, [3, 20]), *decode(20, new=2)]),
    "a prompt in chunks": (1, [(50, None), (33, None), (20, None), *decode(3)]),
    "unequal prompts in chunks": (
        3,
        [(50, [50, 50, 31]), (45, [45, 7, 0]), (50, [30, 0, 0]), (50, [1, 1, 50]), *decode(3)],
    ),
}
# With the real sizes: nano's windowed layers hold 224 positions.
REAL: dict[str, tuple[int, Chunks]] = {
    "a prompt in chunks": (1, [(230, None), (100, None), (50, None), *decode(2)]),
    "unequal prompts in chunks": (2, [(250, [250, 31]), (130, [100, 0]), (20, [1, 20]), *decode(2)]),
}
LONG: dict[str, tuple[int, Chunks]] = {
    "a long decode": (1, [(7, None), *decode(400)]),
    "a decode of unequal rows": (2, [(140, [140, 9]), *decode(270)]),
}


@torch.no_grad()
def check_same_bits(model: GptOss, passes: tuple[int, Chunks]) -> None:
    batch, chunks = passes
    windowed, full = (outputs(model, batch, chunks, windowed=w) for w in (True, False))
    for i, (a, b) in enumerate(zip(windowed, full, strict=True)):
        assert torch.equal(a, b), f"row {i % batch} of pass {i // batch}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHORT)
def test_the_same_bits_as_from_a_cache_of_everything(
    small: GptOss, name: str, dtype: torch.dtype, little_room: None
) -> None:
    check_same_bits(copy.deepcopy(small).to(dtype), SHORT[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REAL)
def test_nano_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    check_same_bits(load("nano", device="cpu", dtype=dtype), REAL[name])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_nano_gives_the_same_bits_for_long(name: str, dtype: torch.dtype) -> None:
    check_same_bits(load("nano", device="cpu", dtype=dtype), LONG[name])


@pytest.mark.parametrize("name", ["a long decode", "a decode of unequal rows"])
def test_a_base_that_moves_too_far_fails(
    small: GptOss, name: str, little_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: two keys fewer than the window reaches."""
    monkeypatch.setattr(cache_module, "ALIGNMENT", 1)
    monkeypatch.setattr(cache_module, "BACK", -2)
    with pytest.raises(AssertionError, match=r"row . of pass"):
        check_same_bits(small, SHORT[name])


def test_padding_that_is_kept_fails(small: GptOss, little_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: every token of a padded batch is taken for a real one."""
    begin = KVCache.begin
    monkeypatch.setattr(KVCache, "begin", lambda self, tokens, n_real=None: begin(self, tokens))
    alone = outputs(small, 1, [(20, None), *decode(12)], windowed=True)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(small.cfg.d_vocab, (1, n), generator=rng) for n in (20, *[1] * 12)]
    cache = new_cache(small.cfg, 2)
    first = torch.nn.functional.pad(rows[0], (0, 20))
    out = [small.residual(first.expand(2, -1), cache=cache, n_real=[20, 40])[0, :20]]
    out += [small.residual(x.expand(2, -1), cache=cache)[0] for x in rows[1:]]
    assert not torch.allclose(torch.cat(out[1:]), torch.cat(alone[1:]), atol=1e-2)


@torch.no_grad()
def test_hooks_see_every_key_at_its_position(small: GptOss, little_room: None) -> None:
    """Scores and patterns of windowed layers have one shape and the same bits, and reading them changes nothing."""
    names = [f"blocks.{layer}.attn.hook_{point}" for layer in range(3) for point in ("pattern", "attn_scores")]
    x = torch.randint(small.cfg.d_vocab, (2, 50), generator=torch.Generator().manual_seed(1))
    recorded: list[dict[str, Tensor]] = []
    results = []
    for windowed in (True, False):
        cache = new_cache(small.cfg, 2, windowed=windowed)
        small.residual(x[:, :40], cache=cache, n_real=[40, 33])
        plain = [small.residual(x[:, i : i + 1], cache=cache) for i in range(40, 49)]
        _, new_keys = small.run_with_cache(x[:, 49:], cache=cache, names_filter=names)
        recorded.append(dict(new_keys))
        results.append(torch.cat(plain, 1))
        cache.truncate([n - 1 for n in cache.host_lengths])
        small.residual(x[:, 49:], cache=cache)
    assert torch.equal(*results)
    for name in names:
        assert recorded[0][name].shape == (2, 6, 1, 50), name
        assert torch.equal(recorded[0][name], recorded[1][name]), name


@torch.no_grad()
def test_what_truncate_cannot_restore_is_refused(small: GptOss, little_room: None) -> None:
    x = torch.randint(small.cfg.d_vocab, (1, 120), generator=torch.Generator().manual_seed(2))
    cache = new_cache(small.cfg, 1)
    small.residual(x[:, :100], cache=cache)
    want = [small.residual(x[:, i : i + 1], cache=cache) for i in range(100, 120)]
    for back in range(1, cache_module.BACK + 1):  # always possible, wherever the bases are
        cache.truncate([120 - back])
        again = [small.residual(x[:, i : i + 1], cache=cache) for i in range(120 - back, 120)]
        assert torch.equal(torch.cat(again, 1), torch.cat(want[-back:], 1))
    with pytest.raises(InputError, match=r"cannot be truncated to 40: layers with a window of 5 .* windowed=False"):
        cache.truncate([40])
    assert cache.host_lengths == [120], "a refused truncation changes nothing"
    with pytest.raises(InputError, match="has 120 positions and cannot be truncated to 121"):
        cache.truncate([121])
    with pytest.raises(InputError, match="2 lengths for a cache of 1 rows"):
        cache.truncate([1, 2])
    full = new_cache(small.cfg, 1, windowed=False)
    small.residual(x, cache=full)
    full.truncate(torch.tensor([40]))
    assert full.lengths.tolist() == [40]


@torch.no_grad()
def test_a_cache_that_is_too_small_or_for_other_rows_is_refused(small: GptOss) -> None:
    cache = KVCache(small.cfg, 2, 5, dtype=torch.float32, device=CPU)
    small.residual(torch.zeros(2, 4, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match="the cache holds 5 positions, 6 are needed"):
        small.residual(torch.zeros(2, 2, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match="3 rows of tokens for a cache of 2 rows"):
        small.residual(torch.zeros(3, 1, dtype=torch.long), cache=cache)


class StoppedError(Exception):
    pass


def stop(t: Tensor, hook: object) -> None:
    raise StoppedError


@torch.no_grad()
def test_a_pass_that_fails_leaves_a_usable_cache_or_a_refusal(small: GptOss, little_room: None) -> None:
    x = torch.randint(small.cfg.d_vocab, (1, 120), generator=torch.Generator().manual_seed(3))
    cache, other = new_cache(small.cfg, 1), new_cache(small.cfg, 1)
    for held, parts in ((cache, (0, 60, 61)), (other, (0, 60, 61))):
        for begin, end in itertools.pairwise(parts):
            if held is cache:  # one that fails half-way before each of them
                with small.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", stop)]), pytest.raises(StoppedError):
                    small.residual(x[:, begin:end], cache=held)
            out = small.residual(x[:, begin:end], cache=held)
    assert torch.equal(out, small.residual(x[:, 60:61], cache=_back(other)))
    with small.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", stop)]), pytest.raises(StoppedError):
        small.residual(x[:, 61:], cache=cache)  # longer than layer 0 can hold, which has let go of earlier keys
    with pytest.raises(InputError, match="half-way"):
        small.residual(x[:, 61:], cache=cache)
    with pytest.raises(InputError, match="half-way"):
        cache.truncate([61])


def _back(cache: KVCache) -> KVCache:
    cache.truncate([n - 1 for n in cache.host_lengths])
    return cache


@torch.no_grad()
def test_layers_that_a_pass_leaves_out_stay_in_step(small: GptOss, little_room: None) -> None:
    """A pass of the first layers alone does not spoil the windows of the others."""
    x = torch.randint(small.cfg.d_vocab, (1, 90), generator=torch.Generator().manual_seed(4))
    windowed, full = new_cache(small.cfg, 1), new_cache(small.cfg, 1, windowed=False)
    for cache in (windowed, full):
        small.residual(x[:, :30], cache=cache)
        small.residual(x[:, 30:80], cache=cache, layers=range(2))
    a, b = (small.residual(x[:, 80:], cache=cache) for cache in (windowed, full))
    assert torch.equal(a, b)


def greedy(model: GptOss, prompts: list[list[int]], **options: int) -> list[list[int]]:
    generated: list[list[int]] = model.generate(prompts, max_new_tokens=12, stop=(), **options)
    return generated


def test_generation_reads_prompts_in_chunks(small: GptOss, little_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks give the same tokens, and hooks see every token once, at its own place."""
    rng = torch.Generator().manual_seed(5)
    prompts = [torch.randint(small.cfg.d_vocab, (n,), generator=rng).tolist() for n in (61, 9, 20, 40, 1)]
    points = {"blocks.2.attn.hook_sink": torch.float32, "ln_final.hook_normalized": torch.float32}

    def recorded() -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        recorder = SequenceRecorder(small, points)
        with small.hooks(fwd_hooks=recorder.fwd_hooks):
            return greedy(small, prompts), recorder.take()

    want, records = recorded()
    widths: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(generation_loop, "PREFILL_TOKENS", 100)
        patch.setattr(generation_loop, "_LEAST_COLUMNS", 1)
        with small.hooks(fwd_hooks=[("hook_embed", lambda t, hook: widths.append(t.shape[1]))]):
            chunked, records_chunked = recorded()
    assert chunked == want
    assert widths[:4] == [20, 20, 20, 1]
    for ours, theirs in zip(records_chunked, records, strict=True):
        for name in points:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "kilobytes", "before"), [("20b", 24.6, 49.2), ("120b", 36.9, 73.7)])
def test_bytes_of_a_token(size: str, kilobytes: float, before: float) -> None:
    """Half the layers have a window of 128 and hold 320 positions, however long the row is."""
    cfg = PUBLISHED[size]
    assert memory.cache(cfg) / 1000 == pytest.approx(before, abs=0.05)
    growth = memory.cache_row(cfg, 4097) - memory.cache_row(cfg, 4096)
    assert growth / 1000 == pytest.approx(kilobytes, abs=0.05)
    rows, positions = 2, 4096
    with torch.device("meta"):
        cache = KVCache(cfg, rows, positions, dtype=torch.bfloat16, device=torch.device("meta"))
    held = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert held == rows * memory.cache_row(cfg, positions)
    fixed = cfg.n_layers // 2 * 320 * 2 * 8 * 64 * 2
    assert held == rows * (positions * growth + fixed)
    assert held < 0.55 * rows * positions * memory.cache(cfg)
    assert memory.cache_row(cfg, 300) == 300 * memory.cache(cfg), "a short row is held whole"


def test_sizes_fit_together() -> None:
    for window in (1, 5, 128):
        held = held_positions(window, 10**6)
        assert held - (window - 1 + BACK + ALIGNMENT - 1) == SLACK - BACK - ALIGNMENT + 2 > 0
