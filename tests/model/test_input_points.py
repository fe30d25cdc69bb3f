"""An edit of what one part reads changes this part alone, and reading it changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.errors import InputError
from workbench.model.transformer import GptOss

LAYER, HEAD = 1, 5


@pytest.fixture(scope="module")
def loaded() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture
def model(loaded: GptOss) -> Iterator[GptOss]:
    loaded.set_use_hook_mlp_in(True)
    loaded.set_use_attn_in(True)
    loaded.set_use_split_qkv_input(True)
    yield loaded
    for switch in (loaded.set_use_hook_mlp_in, loaded.set_use_attn_in, loaded.set_use_split_qkv_input):
        switch(False)
    loaded.set_ungroup_grouped_query_attention(False)


@pytest.fixture(scope="module")
def tokens(loaded: GptOss) -> Tensor:
    return loaded.to_tokens("12+34;56*78=9")


@torch.no_grad()
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_input_of_a_head(model: GptOss, tokens: Tensor, part: str) -> None:
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0))
    head = HEAD if part == "q" else 0
    block = model.blocks[LAYER]

    def change_input(x: Tensor) -> Tensor:
        assert x.shape[2] == (8 if part == "q" else block.attn.n_key_value_heads)
        x[:, 4:, head] += noise  # in place: the stream itself must not move
        return x

    stream = model.run_with_cache(tokens)[1]["resid_pre", LAYER]
    weight, bias = (
        getattr(block.attn, part).get_parameter(n).unflatten(0, (-1, block.attn.d_head)) for n in ("weight", "bias")
    )

    def change_output(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        x[:, first:, head] = block.ln1.normalize(stream + noise)[:, first:] @ weight[head].mT + bias[head]
        return x

    def run(point: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
        logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.{point}", lambda x, hook: edit(x))])
        return logits

    got = run(f"hook_{part}_input", change_input)
    torch.testing.assert_close(got, run(f"attn.hook_{part}", lambda x: change_output(x, 4)), rtol=1e-4, atol=1e-4)
    assert (got - model(tokens)).abs().max() > 1e-2
    other = run(f"attn.hook_{part}", lambda x: change_output(x, 5))
    assert (got - other).abs().max() > 1e-2  # negative control: other positions


@torch.no_grad()
@pytest.mark.parametrize(("point", "out"), [("hook_mlp_in", "hook_mlp_out"), ("hook_attn_in", "hook_attn_out")])
def test_the_input_of_a_part(model: GptOss, tokens: Tensor, point: str, out: str) -> None:
    def zero(x: Tensor, hook: Any) -> Tensor:
        return x.mul_(0)

    with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.{point}", zero)]):
        cache = model.run_with_cache(tokens)[1]
    plain = model.run_with_cache(tokens)[1]
    before = "resid_mid" if point == "hook_mlp_in" else "resid_pre"
    torch.testing.assert_close(cache[before, LAYER], plain[before, LAYER], rtol=0, atol=0)
    if point == "hook_mlp_in":
        block = model.blocks[LAYER]
        wanted = block.mlp(torch.zeros_like(plain[before, LAYER]))
        torch.testing.assert_close(cache[f"blocks.{LAYER}.{out}"], wanted)
    assert (cache[f"blocks.{LAYER}.{out}"] - plain[f"blocks.{LAYER}.{out}"]).abs().max() > 1e-2


@torch.no_grad()
def test_reading_changes_no_bit_and_without_points_nothing_is_computed(model: GptOss, tokens: Tensor) -> None:
    names = {
        f"blocks.{i}.{p}"
        for i in range(4)
        for p in ("hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    }
    assert names <= set(model.hook_dict)
    small = wb.load("nano", dtype=torch.bfloat16, device="cpu")
    wanted = small(tokens)
    for switch in (small.set_use_hook_mlp_in, small.set_use_attn_in, small.set_use_split_qkv_input):
        switch(True)
    logits, cache = small.run_with_cache(tokens)
    assert torch.equal(logits, wanted)
    assert cache["blocks.2.hook_q_input"].shape == (1, tokens.shape[1], 8, 128)
    small.set_use_split_qkv_input(False)
    assert "blocks.2.hook_q_input" not in small.hook_dict
    with pytest.raises(InputError, match=r"call model.set_use_split_qkv_input\(True\) first"):
        small.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_q_input", lambda x, hook: x)])


def test_gradients_reach_the_input_of_a_head(model: GptOss, tokens: Tensor) -> None:
    seen = []

    def keep(x: Tensor, hook: Any) -> Tensor:
        seen.append(x.requires_grad_())
        return x

    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.hook_q_input", keep)])
        (gradient,) = torch.autograd.grad(logits[0, -1, 7], seen)
    assert gradient.shape == (1, tokens.shape[1], 8, 128)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_ungrouped_keys(model: GptOss, tokens: Tensor) -> None:
    wanted = model(tokens)
    model.set_ungroup_grouped_query_attention(True)
    logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert cache["k", 0].shape[2] == model.cfg.n_heads
    with pytest.raises(InputError, match="a cache holds grouped keys"):
        model.generate(tokens, max_new_tokens=1)
