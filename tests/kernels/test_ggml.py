"""The two orders of MXFP4 are each other's inverse, and the compiled loop and numpy write the same bytes.

Also tests `workbench.model.formats.gguf_loops`.
"""

import numpy as np
import pytest
import torch

from workbench.kernels import cpu, ggml
from workbench.kernels.ggml import from_ggml, new_memory, separate, to_ggml, widen_q8_0
from workbench.kernels.mxfp4 import dequantise

RNG = np.random.default_rng(0)


def test_the_orders_are_inverse_and_differ() -> None:
    published = RNG.integers(0, 256, (3, 5, 16), dtype=np.uint8)
    back = np.empty_like(published)
    from_ggml(to_ggml(published), back)
    np.testing.assert_array_equal(back, published)
    assert not np.array_equal(to_ggml(published), published)


def test_ggml_has_value_j_and_value_j_plus_16_in_byte_j() -> None:
    codes = RNG.integers(0, 16, 32, dtype=np.uint8)
    ggml = (codes[:16] | codes[16:] << 4)[None, None]
    published = np.empty_like(ggml)
    from_ggml(ggml, published)
    np.testing.assert_array_equal(published[0, 0], codes[0::2] | codes[1::2] << 4)


@pytest.mark.parametrize("reorder", [True, False])
def test_the_compiled_loop_and_numpy_write_the_same(reorder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable():
        pytest.skip("numba compiles nothing here")
    source = RNG.integers(0, 256, (4, 3, 17), dtype=np.uint8)

    def separated() -> tuple[torch.Tensor, torch.Tensor]:
        blocks, scales = torch.zeros(8, 3, 16, dtype=torch.uint8), torch.zeros(8, 3, dtype=torch.uint8)
        separate(source, blocks, scales, 1, 2, reorder=reorder)
        return blocks, scales

    compiled = separated()
    monkeypatch.setattr(ggml.cpu, "unavailable", lambda: "switched off")
    for got, want in zip(compiled, separated(), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(compiled[1][1::2], torch.from_numpy(source[..., 0]))
    assert not compiled[0][0::2].any(), "other rows are left alone"


def test_q8_0_is_rounded_to_bfloat16_as_torch_rounds_it() -> None:
    """Every scale and code of 64 Ki blocks: also infinite, NaN and subnormal scales, and ties between two values."""
    pytest.importorskip("workbench.kernels.cpu.ggml_loops", reason="numba compiles nothing here")
    scales = np.arange(2**16, dtype=np.uint16)
    codes = RNG.integers(-128, 128, (2**16, 32), dtype=np.int8)
    blocks = np.concatenate([scales[:, None].view(np.uint8), codes.view(np.uint8)], 1)
    got = torch.empty(2**16, 32, dtype=torch.bfloat16)
    widen_q8_0(blocks, got)
    exact = torch.from_numpy(codes).float() * torch.from_numpy(scales.view(np.float16)).float()[:, None]
    want = exact.bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    truncated = (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert not torch.equal(truncated.nan_to_num(), want.nan_to_num()), "the negative control rounds towards zero"


def test_new_memory_has_its_shape_in_pages_of_either_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_memory((3, 5)).shape == (3, 5)
    monkeypatch.setattr(ggml, "_HUGE", 1)
    large = new_memory((3, 5))
    assert large.shape == (3, 5)
    assert not large.any()
    assert dequantise(large.new_zeros(1, 1, 16), large.new_full((1, 1), 127)).shape == (1, 32)


def test_the_order_of_nibbles_is_exact_both_ways() -> None:
    published = np.random.default_rng(0).integers(0, 256, (70, 5, 16), dtype=np.uint8)
    values = np.stack([published & 15, published >> 4], -1).reshape(70, 5, 32)
    stored = to_ggml(published)
    assert np.array_equal(np.concatenate([stored & 15, stored >> 4], -1), values)
    back = np.empty_like(published)
    from_ggml(stored, back)
    assert np.array_equal(back, published)
    from_ggml(published, back)  # the comparison sees bytes that are in the published order already
    assert not np.array_equal(back, published)


@pytest.mark.parametrize("reason", [None, "chosen by the test"], ids=["compiled", "numpy"])
def test_blocks_are_separated_alike_by_both_codes(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up in turn, with the bytes in ggml's order and in the published one."""
    monkeypatch.setattr(cpu, "unavailable", lambda: reason)
    rng = np.random.default_rng(1)
    published, exponents = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((2, 7, 3, 16), (2, 7, 3)))
    blocks, scales = torch.zeros(14, 3, 16, dtype=torch.uint8), torch.zeros(14, 3, dtype=torch.uint8)
    for source in (0, 1):
        codes = to_ggml(published[source]) if source else published[source]
        stored = np.concatenate([exponents[source][..., None], codes], -1)
        separate(stored, blocks, scales, source, 2, reorder=bool(source))
        assert np.array_equal(blocks[source::2], published[source])
        assert np.array_equal(scales[source::2], exponents[source])
        separate(stored, blocks, scales, source, 2, reorder=not source)  # negative control
        assert not np.array_equal(blocks[source::2], published[source])
