"""TransformerLens' own tools work on the model as it is, and its bridge gives the same, name by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix, patching
from transformer_lens.head_detector import detect_head

import workbench as wb
from tests.conftest import DATA
from tests.model.conftest import BASE, random_model
from workbench.hooks.interventions import applied, patch
from workbench.hooks.names import BLOCK, hook_points
from workbench.model.transformer import GptOss

TOKENS = torch.tensor([[6, 10, 8, 19, 22, 7, 6, 12, 8, 27, 30, 34, 29, 31, 7, 6, 13, 5, 14, 8, *range(23, 60)]])
CLOSE = dict(rtol=1e-4, atol=1e-4)  # two float32 implementations; the largest difference seen is 3e-5, on logits
# What the bridge has no tensor for.
ONLY_OURS = {
    "attn.hook_sink": "it keeps sinks inside the softmax",
    "attn.hook_result": "it adds heads up in one product",
    "mlp.experts.hook_gate": "its experts are one fused module",
    "mlp.experts.hook_pre": "as above",
    "mlp.experts.hook_post": "as above",
    "mlp.experts.hook_out": "as above",
}


@pytest.fixture(scope="module")
def nano() -> GptOss:
    return wb.load("nano", dtype=torch.float32)


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE).requires_grad_(False)


X = torch.randint(BASE.d_vocab, (2, 20), generator=torch.Generator().manual_seed(4))
Y = X.roll(3, 1)


@torch.no_grad()
def test_every_hook_point_is_the_bridges_or_said_to_be_ours(nano: GptOss) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(DATA / "nano", dtype=torch.float32, attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(str(DATA / "nano"), hf_model=hf, device="cpu", dtype=torch.float32)
    _, theirs = bridge.run_with_cache(TOKENS)
    _, ours = nano.run_with_cache(TOKENS)
    assert ONLY_OURS.keys() <= BLOCK.keys()
    compared = 0
    for name in hook_points(nano.cfg.n_layers):
        if name.startswith("blocks.") and name.split(".", 2)[2] in ONLY_OURS:
            assert name not in theirs, f"{name}: the bridge has it now, compare it"
            continue
        got, want = ours[name], theirs[name]
        if name.endswith("attn_scores"):  # masked ones are −inf here, a very negative number there
            seen = got > -torch.inf
            got, want = got[seen], want[seen]
        elif name.endswith("hook_expert_weights"):  # of all experts there, of the chosen ones here
            chosen = ours[name.replace("weights", "indices")]
            got = torch.zeros(*chosen.shape[:2], nano.cfg.num_experts).scatter_(-1, chosen, got)
        got = got.reshape(want.shape)  # its experts have no batch axis
        if got.is_floating_point():
            torch.testing.assert_close(got, want, **CLOSE, msg=name)
        else:
            assert torch.equal(got.sort(-1).values, want.sort(-1).values), name
        compared += 1
    assert compared == 5 - 1 + nano.cfg.n_layers * (len(BLOCK) - len(ONLY_OURS))


@torch.no_grad()
def test_parts_of_the_stream_sum_to_it(base: GptOss) -> None:
    _, cache = base.run_with_cache(X)
    assert isinstance(cache, ActivationCache)
    last = cache["resid_post", BASE.n_layers - 1]
    torch.testing.assert_close(cache.decompose_resid().sum(0), last, **CLOSE)
    torch.testing.assert_close(cache.decompose_resid(2, mlp_input=True).sum(0), cache["resid_mid", 2], **CLOSE)
    torch.testing.assert_close(cache.accumulated_resid(2)[1], cache["resid_pre", 1], **CLOSE)
    full, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    torch.testing.assert_close(full.sum(0), last, **CLOSE)
    assert labels[:2] == base.all_head_labels()[:2]
    assert labels[-2:] == ["embed", "bias"]
    assert not torch.allclose(full[:-1].sum(0), last, **CLOSE), "the biases are nothing: their row could be wrong"
    with pytest.raises(ValueError, match=r"workbench\.experiments\.attribution"):
        base.accumulated_bias(1)


@torch.no_grad()
def test_heads_are_computed_from_z_as_the_model_computes_them(base: GptOss) -> None:
    _, complete = base.run_with_cache(X)
    _, cache = base.run_with_cache(X, names_filter=lambda name: "hook_result" not in name)
    cache.compute_head_results()
    for layer in range(BASE.n_layers):
        torch.testing.assert_close(cache["result", layer], complete["result", layer], **CLOSE)
    assert cache.stack_head_results().shape == (BASE.n_layers * BASE.n_heads, *X.shape, BASE.d_model)


@torch.no_grad()
def test_logit_attributions_sum_to_the_difference_of_logits(base: GptOss) -> None:
    logits, cache = base.run_with_cache(X)
    right, wrong = torch.tensor([3, 50]), torch.tensor([7, 90])
    stack = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
    got = cache.logit_attrs(stack, tokens=right, incorrect_tokens=wrong, pos_slice=-1).sum(0)
    final = logits[:, -1]
    want = final.gather(1, right[:, None]) - final.gather(1, wrong[:, None])
    torch.testing.assert_close(got, want[:, 0], **CLOSE)
    lens = cache.apply_ln_to_stack(cache.accumulated_resid(), recompute_ln=True)[-1] @ base.W_U
    torch.testing.assert_close(lens, logits, **CLOSE)


@torch.no_grad()
def test_a_cache_without_its_batch_axis(base: GptOss) -> None:
    _, cache = base.run_with_cache(X[:1], remove_batch_dim=True)
    assert cache["pattern", 1].shape == (BASE.n_heads, 20, 20)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", BASE.n_layers - 1], **CLOSE)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3].sum() - logits[:, -1, 7].sum()


STREAM: dict[str, tuple[Callable[..., Tensor], str]] = {
    "resid_pre": (patching.get_act_patch_resid_pre, "hook_resid_pre"),
    "resid_mid": (patching.get_act_patch_resid_mid, "hook_resid_mid"),
    "attn_out": (patching.get_act_patch_attn_out, "hook_attn_out"),
    "mlp_out": (patching.get_act_patch_mlp_out, "hook_mlp_out"),
}
HEADS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "z": (patching.get_act_patch_attn_head_out_all_pos, "attn.hook_z"),
    "q": (patching.get_act_patch_attn_head_q_all_pos, "attn.hook_q"),
    "k": (patching.get_act_patch_attn_head_k_all_pos, "attn.hook_k"),
    "v": (patching.get_act_patch_attn_head_v_all_pos, "attn.hook_v"),
    "pattern": (patching.get_act_patch_attn_head_pattern_all_pos, "attn.hook_pattern"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STREAM)
def test_patching_the_stream_by_position(base: GptOss, name: str) -> None:
    helper, point = STREAM[name]
    _, clean = base.run_with_cache(X[:1, :6])
    got = helper(base, Y[:1, :6], clean, metric)
    assert got.shape == (BASE.n_layers, 6)
    for layer, pos in ((0, 2), (1, 5), (2, 0)):
        with applied(base, patch(f"blocks.{layer}.{point}", clean, tokens=[pos])):
            assert float(got[layer, pos]) == pytest.approx(float(metric(base(Y[:1, :6]))), abs=1e-4)
    assert float(got.std()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_patching_a_head(base: GptOss, name: str) -> None:
    helper, point = HEADS[name]
    _, clean = base.run_with_cache(X[:1, :6])
    got = helper(base, Y[:1, :6], clean, metric)
    heads = BASE.n_key_value_heads if name in "kv" else BASE.n_heads
    assert got.shape == (BASE.n_layers, heads)
    for layer, head in ((0, 0), (2, heads - 1)):

        def swap(x: Tensor, hook: Any, head: int = head) -> Tensor:
            axis = 1 if name == "pattern" else 2
            return x.index_copy(axis, torch.tensor([head]), clean[hook.name].narrow(axis, head, 1))

        want = metric(base.run_with_hooks(Y[:1, :6], fwd_hooks=[(f"blocks.{layer}.{point}", swap)]))
        assert float(got[layer, head]) == pytest.approx(float(want), abs=1e-4)


@torch.no_grad()
def test_patching_every_block_and_every_head_at_once(base: GptOss) -> None:
    _, clean = base.run_with_cache(X[:1, :4])
    assert patching.get_act_patch_block_every(base, Y[:1, :4], clean, metric).shape == (3, BASE.n_layers, 4)
    by_pos = patching.get_act_patch_attn_head_out_by_pos(base, Y[:1, :4], clean, metric)
    assert by_pos.shape == (BASE.n_layers, 4, BASE.n_heads)


@torch.no_grad()
def test_the_head_detector_finds_a_head_that_looks_back_by_one(nano: GptOss) -> None:
    def back(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 5] = torch.diag(torch.ones(pattern.shape[-1] - 1), -1)
        return pattern

    text = "12+34;56*78=9"
    with nano.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", back)]):
        result = detect_head(nano, text, "previous_token_head", exclude_bos=False)
    assert result.shape == (nano.cfg.n_layers, nano.cfg.n_heads)
    assert divmod(int(result.argmax()), nano.cfg.n_heads) == (1, 5)
    assert float(result.max()) == pytest.approx(1)


@torch.no_grad()
def test_weights_are_what_the_model_multiplies_with(base: GptOss) -> None:
    _, cache = base.run_with_cache(X)
    for layer, block in enumerate(base.blocks):
        x = cache[f"blocks.{layer}.ln1.hook_normalized"] * block.ln1.weight
        per = BASE.n_heads // BASE.n_key_value_heads
        for point, w, b, shared in (("q", "W_Q", "b_Q", 1), ("k", "W_K", "b_K", per), ("v", "W_V", "b_V", per)):
            got = torch.einsum("bpm,hmd->bphd", x, getattr(base, w)[layer]) + getattr(base, b)[layer]
            want = cache[f"blocks.{layer}.attn.hook_{point}"].repeat_interleave(shared, 2)
            torch.testing.assert_close(got, want, **CLOSE)
        z = cache["z", layer]
        out = torch.einsum("bphd,hdm->bpm", z, block.attn.W_O) + block.attn.b_O
        torch.testing.assert_close(out, cache["attn_out", layer], **CLOSE)
    torch.testing.assert_close(cache["ln_final.hook_normalized"] * base.ln_final.weight @ base.W_U, base(X), **CLOSE)
    assert torch.equal(base.W_E[X], cache["hook_embed"])
    assert not base.b_U.any()


def test_factored_matrices_are_the_products_of_their_weights(base: GptOss) -> None:
    assert isinstance(base.QK, FactoredMatrix)
    assert base.OV.shape == (BASE.n_layers, BASE.n_heads, BASE.d_model, BASE.d_model)
    torch.testing.assert_close(base.OV.AB[1, 2], base.W_V[1, 2] @ base.W_O[1, 2], **CLOSE)
    torch.testing.assert_close(base.blocks[1].attn.QK[2].AB, base.W_Q[1, 2] @ base.W_K[1, 2].mT, **CLOSE)
    values = torch.linalg.eigvals(base.OV.AB[0, 0]).abs().sort(descending=True).values[: BASE.d_head]
    torch.testing.assert_close(
        base.OV[0, 0].eigenvalues.abs().sort(descending=True).values, values, rtol=1e-2, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("which", ["base", "nano"])
def test_an_experts_weights_are_unpacked_one_at_a_time(which: str, request: pytest.FixtureRequest) -> None:
    model: GptOss = request.getfixturevalue(which)
    _, cache = model.run_with_cache(X % model.cfg.d_vocab)
    experts, block = cache["blocks.1.mlp.hook_expert_indices"], model.blocks[1].mlp.experts
    e = int(experts[0, 5, 2])
    x = (cache["blocks.1.ln2.hook_normalized"] * model.blocks[1].ln2.weight)[0, 5]
    gate, up, post, out = (cache[f"blocks.1.mlp.experts.hook_{n}"][0, 5, 2] for n in ("gate", "pre", "post", "out"))
    torch.testing.assert_close(x @ block.W_gate(e).float() + block.b_gate(e), gate, **CLOSE)
    torch.testing.assert_close(x @ block.W_in(e).float() + block.b_in(e), up, **CLOSE)
    torch.testing.assert_close(post @ block.W_out(e).float() + block.b_out(e), out, **CLOSE)


@pytest.mark.parametrize("which", ["base", "nano"])
def test_the_biases_of_all_experts_are_those_of_each(which: str, request: pytest.FixtureRequest) -> None:
    model: GptOss = request.getfixturevalue(which)
    layers, experts = range(model.cfg.n_layers), range(model.cfg.num_experts)
    for name in ("b_gate", "b_in", "b_out"):
        stacked = getattr(model, name)
        one_by_one = torch.stack(
            [torch.stack([getattr(model.blocks[layer].mlp.experts, name)(e) for e in experts]) for layer in layers]
        )
        assert torch.equal(stacked, one_by_one), name
        assert torch.equal(model.blocks[1].mlp.__getattribute__(name), stacked[1])
        assert not torch.equal(stacked.flip(1), one_by_one), "negative control: another order of experts"
    assert not torch.equal(model.b_gate, model.b_in), "negative control"


def test_words_and_ids(nano: GptOss) -> None:
    assert nano.to_str_tokens("12+3") == ["1", "2", "+", "3"]
    assert nano.to_string(torch.tensor([nano.to_single_token("7"), nano.to_single_token("<|end|>")])) == "7<|end|>"
    with pytest.raises(ValueError, match=r"'12' is 2 tokens, expected one: \['1', '2'\]"):
        nano.to_single_token("12")
    ids = torch.tensor([5, 9])
    assert torch.equal(nano.tokens_to_residual_directions(ids), nano.W_U.mT[ids] * nano.ln_final.weight)


def test_a_config_states_where_its_model_is_and_stays_equal(base: GptOss) -> None:
    assert base.cfg.device == torch.device("cpu")
    assert base.cfg.dtype == torch.float32
    assert base.cfg == BASE
    assert "_model" not in base.cfg.to_json()
    with pytest.raises(AttributeError, match="config alone"):
        BASE.device  # noqa: B018
