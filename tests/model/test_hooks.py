"""Every hook point exists, has the documented shape, and an edit at it acts downstream."""

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from workbench.hooks.names import hook_points
from workbench.kernels import attention
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (2, 40), generator=torch.Generator().manual_seed(1))
SIZES = dict(
    batch=2,
    pos=40,
    query_pos=40,
    key_pos=40,
    head=BASE.n_heads,
    kv=BASE.n_key_value_heads,
    d_head=BASE.d_head,
    slot=BASE.experts_per_token,
    expert=BASE.num_experts,
    d_model=BASE.d_model,
    d_mlp=BASE.d_mlp,
    d_vocab=BASE.d_vocab,
)


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE)


@torch.no_grad()
def test_the_list_of_hook_points_is_what_the_model_has(base: GptOss) -> None:
    assert set(hook_points(BASE.n_layers)) == set(base.hook_dict)


@torch.no_grad()
def test_every_hook_fires_once_in_order_with_the_documented_shape(base: GptOss) -> None:
    _, cache = base.run_with_cache(X)
    expected = hook_points(BASE.n_layers)
    assert list(cache.keys()) == list(expected)
    for name, axes in expected.items():
        assert tuple(cache[name].shape) == tuple(SIZES.get(a) or int(a) for a in axes.split()), name


@torch.no_grad()
def test_looking_changes_nothing(base: GptOss) -> None:
    plain = base(X)
    for name in base.hook_dict:
        assert torch.equal(base.run_with_hooks(X, fwd_hooks=[(name, lambda t, hook: None)]), plain) or torch.allclose(
            base.run_with_hooks(X, fwd_hooks=[(name, lambda t, hook: None)]), plain, rtol=1e-4, atol=1e-5
        ), name


@torch.no_grad()
@pytest.mark.parametrize("name", list(hook_points(BASE.n_layers)))
def test_every_edit_acts(base: GptOss, name: str) -> None:
    def edit(t: Tensor, hook: object) -> Tensor:
        if not t.is_floating_point():
            return (t + 1) % BASE.num_experts
        return t + torch.linspace(0.1, 0.5, t.shape[-1]).expand_as(t)

    assert not torch.allclose(base.run_with_hooks(X, fwd_hooks=[(name, edit)]), base(X), atol=1e-3)


@torch.no_grad()
def test_pattern_rows_and_the_sink_sum_to_one(base: GptOss) -> None:
    _, cache = base.run_with_cache(X)
    for layer in range(BASE.n_layers):
        total = cache[f"blocks.{layer}.attn.hook_pattern"].sum(-1) + cache[f"blocks.{layer}.attn.hook_sink"].mT
        torch.testing.assert_close(total, torch.ones_like(total))


@torch.no_grad()
def test_editing_the_sink_rescales_the_pattern_on_both_paths(base: GptOss) -> None:
    seen = {}

    def half(p: Tensor, hook: object) -> Tensor:
        return torch.full_like(p, 0.5)

    def keep(t: Tensor, hook: object) -> None:
        seen["row sums"] = t.sum(-1)

    name = "blocks.1.attn.hook_sink"
    fast = base.run_with_hooks(X, fwd_hooks=[(name, half)])
    opened = base.run_with_hooks(X, fwd_hooks=[(name, half), ("blocks.1.attn.hook_pattern", keep)])
    torch.testing.assert_close(seen["row sums"], torch.full_like(seen["row sums"], 0.5))
    torch.testing.assert_close(fast, opened, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_editing_router_logits_reroutes(base: GptOss) -> None:
    def only_expert_3(t: Tensor, hook: object) -> Tensor:
        return t + 100 * (torch.arange(t.shape[-1]) == 3)

    seen = {}

    def keep(t: Tensor, hook: object) -> None:
        seen["experts"] = t

    base.run_with_hooks(
        X, fwd_hooks=[("blocks.0.mlp.router.hook_out", only_expert_3), ("blocks.0.mlp.hook_expert_indices", keep)]
    )
    assert (seen["experts"][..., 0] == 3).all()


@torch.no_grad()
def test_a_head_that_sees_no_key_rests_wholly_on_its_sink(base: GptOss) -> None:
    """A knockout of every key must not give NaN."""
    seen = {}

    def keep(t: Tensor, hook: object) -> None:
        seen["sink"] = t

    hooks = [
        ("blocks.1.attn.hook_attn_scores", lambda t, hook: torch.full_like(t, -torch.inf)),
        ("blocks.1.attn.hook_sink", keep),
    ]
    logits = base.run_with_hooks(X, fwd_hooks=hooks)
    assert torch.isfinite(logits).all()
    assert (seen["sink"] == 1).all()


@torch.no_grad()
def test_the_residual_stream_is_the_sum_of_its_parts(base: GptOss) -> None:
    _, cache = base.run_with_cache(X)
    parts = cache["hook_embed"] + sum(
        cache[f"blocks.{layer}.hook_attn_out"] + cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(BASE.n_layers)
    )
    torch.testing.assert_close(parts, cache[f"blocks.{BASE.n_layers - 1}.hook_resid_post"], rtol=1e-4, atol=1e-4)
    gated = cache["blocks.0.mlp.experts.hook_out"] * cache["blocks.0.mlp.hook_expert_weights"][..., None]
    torch.testing.assert_close(gated.sum(-2), cache["blocks.0.hook_mlp_out"], rtol=1e-4, atol=1e-4)
    heads = cache["blocks.0.attn.hook_result"].sum(-2) + base.blocks[0].attn.o.bias
    torch.testing.assert_close(heads, cache["blocks.0.hook_attn_out"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_sequences_equal_one_at_a_time(base: GptOss) -> None:
    lengths = [7, 40, 1, 33]
    row = torch.randint(BASE.d_vocab, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    packed, cache = base.run_with_cache(row, packed=lengths, names_filter=lambda n: "hook_pattern" in n)
    alone = torch.cat([base(part) for part in row.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base(row, packed=lengths), alone, rtol=1e-4, atol=1e-5)
    across = cache["blocks.1.attn.hook_pattern"][0, :, 7:47, :7]
    assert (across == 0).all(), "a packed sequence sees its neighbour"


@torch.no_grad()
def test_right_padding_changes_nothing(base: GptOss) -> None:
    padded = torch.nn.functional.pad(X[:, :25], (0, 15), value=9)
    torch.testing.assert_close(base(padded)[:, :25], base(X[:, :25]), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_open_path_runs_unless_hooked(base: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(type(base.blocks[0].attn), "_materialized", lambda *a: calls.append(a) or attention.attention)
    with torch.no_grad():
        base(X)
    assert not calls


def test_gradients_reach_a_hooked_point(base: GptOss) -> None:
    grads = {}

    def keep(g: Tensor, hook: object) -> None:
        grads["resid"] = g

    with base.hooks(bwd_hooks=[("blocks.1.hook_resid_mid", keep)]):
        base(X)[:, -1].logsumexp(-1).sum().backward()
    base.zero_grad()
    assert grads["resid"].abs().sum() > 0


def test_more_tokens_than_the_context_are_refused(base: GptOss) -> None:
    with pytest.raises(ValueError, match=r"513 tokens .* context of 512"):
        base(torch.zeros(1, 513, dtype=torch.long))
