"""TransformerLens' calling conventions give the results that they name, padding on either side included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.errors import InputError
from workbench.hooks.names import hook_points
from workbench.model import calling
from workbench.model.transformer import GptOss

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def nano() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_text_lists_and_ids_in_any_container_are_the_same_input(nano: GptOss) -> None:
    ids = nano.to_tokens("12+34")
    want = nano(ids)
    for given in ("12+34", ["12+34"], ids[0], ids.tolist(), ids.to(torch.int32), ids.numpy(), {"input_ids": ids}):
        assert torch.equal(nano(given), want), type(given)


def test_a_digit_string_is_text_and_never_an_id(nano: GptOss) -> None:
    assert nano.to_tokens("7").tolist() == [[nano.to_single_token("7")]]
    assert torch.equal(nano("7"), nano(torch.tensor([[nano.to_single_token("7")]])))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(nano: GptOss, side: str) -> None:
    texts = ["12+34", "7*8", "123456"]
    got = nano(texts, padding_side=side)
    width = got.shape[1]
    for row, text in zip(got, texts, strict=True):
        n = nano.to_tokens(text).shape[1]
        own = row[width - n :] if side == "left" else row[:n]
        torch.testing.assert_close(own, nano(text)[0], **CLOSE)


def test_an_attention_mask_marks_padding_on_the_left(nano: GptOss) -> None:
    ids, filler = nano.to_tokens("12+34"), torch.tensor([[3, 3]])
    padded = torch.cat([filler, ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(nano(padded, attention_mask=mask)[:, 2:], nano(ids), **CLOSE)
    assert not torch.allclose(nano(padded)[:, 2:], nano(ids), atol=1e-2), "without the mask they are tokens"


def test_hooks_see_rows_that_are_padded_on_the_left_as_they_were_passed(
    nano: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every hook point, on every axis of positions."""
    texts = ["12+34", "7*8"]

    def largest_difference() -> float:
        _, cache = nano.run_with_cache(texts, padding_side="left")
        worst = 0.0
        for row, text in enumerate(texts):
            _, alone = nano.run_with_cache(text)
            start = 5 - nano.to_tokens(text).shape[1]
            for name, axes in hook_points(nano.cfg.n_layers).items():
                index = [
                    slice(start, None) if axis in ("pos", "query_pos", "key_pos") else slice(None)
                    for axis in axes.split()
                ]
                got, want = cache[name][row : row + 1][tuple(index)], alone[name]
                if want.is_floating_point():
                    both = torch.isfinite(want)  # scores of later keys are -inf
                    worst = max(worst, float((got - want)[both].abs().max()))
                else:
                    assert torch.equal(got, want), name
        return worst

    assert largest_difference() < 1e-3
    monkeypatch.setattr(calling, "_moved", lambda module, inputs, value, **options: value)
    with pytest.raises(AssertionError):  # negative control: hooks see the rows as they are computed
        assert largest_difference() < 1e-3


def test_an_edit_of_rows_that_are_padded_on_the_left_acts_on_the_tokens_that_it_names(nano: GptOss) -> None:
    def edit(stream: Tensor, hook: Any) -> Tensor:
        stream[:, -2] *= 3
        return stream

    hooks = [("blocks.1.hook_resid_pre", edit)]
    together = nano.run_with_hooks(["12+34", "7*8"], padding_side="left", fwd_hooks=hooks)
    for row, text in zip(together, ["12+34", "7*8"], strict=True):
        alone = nano.run_with_hooks(text, fwd_hooks=hooks)[0]
        torch.testing.assert_close(row[-len(alone) :], alone, **CLOSE)
        assert not torch.allclose(alone, nano(text)[0], atol=1e-2)


def test_token_masks_follow_rows_that_are_padded_on_the_left(nano: GptOss) -> None:
    seen = {}

    def read_context(stream: Tensor, hook: Any) -> None:
        assert nano.context is not None
        seen["mask"] = nano.context.mask(lambda ids: ids == nano.to_single_token("7"))
        seen["positions"], seen["sequence"] = nano.context.positions, nano.context.sequence

    nano.run_with_hooks(["12+34", "7*8"], padding_side="left", fwd_hooks=[("hook_embed", read_context)])
    assert seen["mask"].tolist() == [[False] * 5, [False, False, True, False, False]]
    assert seen["positions"][1, 2:].tolist() == [0, 1, 2]
    assert seen["sequence"].tolist() == [[0] * 5, [-1, -1, 1, 1, 1]]


def test_backward_hooks_on_rows_that_are_padded_on_the_left_are_refused(nano: GptOss) -> None:
    with pytest.raises(InputError, match="backward hooks on rows that are padded on the left"):
        nano.run_with_hooks(["1", "12"], padding_side="left", bwd_hooks=[("hook_embed", lambda grad, hook: None)])


@pytest.mark.parametrize("chosen", [-1, (1, 4), [0, 2]])
def test_positions_are_selected_on_the_axis_of_positions(nano: GptOss, chosen: Any) -> None:
    """At every hook point. The rule of the second axis from the end selects slots and heads instead."""
    _, complete = nano.run_with_cache("12+34")
    _, cache = nano.run_with_cache("12+34", pos_slice=chosen)
    second_from_end = []
    for name, axes in hook_points(nano.cfg.n_layers).items():
        dim = [axis in ("pos", "query_pos") for axis in axes.split()].index(True)
        index = torch.arange(5)[slice(*chosen) if isinstance(chosen, tuple) else chosen]
        want = complete[name].index_select(dim, index.reshape(-1))
        assert torch.equal(cache[name], want), name
        second_from_end.append(dim == complete[name].dim() - 2)
    assert not all(second_from_end)


def test_loss_is_the_cross_entropy_of_the_next_token(nano: GptOss) -> None:
    ids = nano.to_tokens("12+34;56")
    want = torch.nn.functional.cross_entropy(nano(ids)[0, :-1], ids[0, 1:])
    torch.testing.assert_close(nano(ids, return_type="loss"), want)
    logits, loss = nano(ids, return_type="both")
    torch.testing.assert_close(loss, nano.loss_fn(logits, ids))
    per_token = nano(ids, return_type="loss", loss_per_token=True)
    assert per_token.shape == (1, ids.shape[1] - 1)
    torch.testing.assert_close(per_token.mean(), want)
    assert nano(ids, return_type=None) is None
    shifted = torch.nn.functional.cross_entropy(nano(ids)[0], ids[0])
    assert not torch.allclose(shifted, want, atol=1e-2), "the loss of the same token is another number"


def test_the_loss_of_a_batch_leaves_padding_out(nano: GptOss) -> None:
    texts = ["12+34", "7*8"]
    total = sum(float(nano(t, return_type="loss", loss_per_token=True).sum()) for t in texts)
    tokens = sum(nano.to_tokens(t).shape[1] - 1 for t in texts)
    for side in ("left", "right"):
        assert float(nano(texts, return_type="loss", padding_side=side)) == pytest.approx(total / tokens, rel=1e-4)


def test_layers_can_be_run_in_two_calls(nano: GptOss) -> None:
    ids = nano.to_tokens("12+34")
    stream = nano(ids, stop_at_layer=2)
    _, cache = nano.run_with_cache(ids)
    assert torch.equal(stream, cache["resid_pre", 2])
    assert torch.equal(nano(stream, start_at_layer=2), nano(ids))
    assert not torch.equal(nano(stream, start_at_layer=1), nano(ids))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.tensor([[1, 99999]])), "token id 99999 is not in the vocabulary: expected 0 to 71"),
        (lambda m: m(torch.tensor([[-1, 5]])), "token id -1 is not in the vocabulary"),
        (lambda m: m(torch.zeros((1, 0), dtype=torch.long)), "no tokens"),
        (lambda m: m(torch.tensor([[1.5]])), "whole numbers"),
        (lambda m: m("1", stop_at_layer=99), "stop_at_layer=99: the model has layers 0 to 3"),
        (lambda m: m(m.to_tokens("1"), start_at_layer=1), "start_at_layer takes a residual stream"),
        (lambda m: m.generate("1", temperature=-1), "temperature -1"),
        (lambda m: m.generate("1", temperature=float("nan")), "temperature nan"),
        (lambda m: m.generate("1", max_new_tokens=-1), "max_new_tokens -1"),
        (lambda m: m.generate(["1", "2"], seed=[1]), "1 seeds for 2 prompts"),
        (lambda m: m.generate("1", top_p=0), "top_p 0"),
        (lambda m: m.run_with_hooks("1", fwd_hooks=[("blocks.1.hook_resid_pst", None)]), "blocks.1.hook_resid_post"),
        (lambda m: m.run_with_cache("1", names_filter="blocks.9.hook_resid_post"), "the last layer is 3"),
        (lambda m: m.run_with_cache("1")[1]["resid_pst", 1], "resid_p"),
    ],
)
def test_what_has_no_meaning_is_one_clear_error(nano: GptOss, call: Any, words: str) -> None:
    with pytest.raises(InputError) as raised:
        call(nano)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_a_mixture_of_experts_does_not_have_states_where_it_is(nano: GptOss) -> None:
    with pytest.raises(AttributeError, match=r"each expert has its own, as in model.blocks\[0\].mlp.experts.W_in\(5\)"):
        _ = nano.W_in
    with pytest.raises(AttributeError, match="rotary"):
        _ = nano.W_pos


def test_short_names_of_activations(nano: GptOss) -> None:
    _, cache = nano.run_with_cache("12+34")
    for short, full in (
        (("sink", 1), "blocks.1.attn.hook_sink"),
        (("router", 1), "blocks.1.mlp.router.hook_out"),
        (("post", 0), "blocks.0.mlp.experts.hook_post"),
        (("resid_post", -1), "blocks.3.hook_resid_post"),
        (("scale", 0, "ln2"), "blocks.0.ln2.hook_scale"),
        ("embed", "hook_embed"),
    ):
        assert cache[short] is cache[full]


def test_generation_returns_what_it_was_given(nano: GptOss) -> None:
    prompt = "12+34"
    ids = nano.to_tokens(prompt)
    (new,) = nano.generate(ids.tolist(), max_new_tokens=5)
    assert nano.generate(ids, max_new_tokens=5).tolist() == [ids[0].tolist() + new]
    assert nano.generate(prompt, max_new_tokens=5) == nano.to_string(ids[0].tolist() + new)
    assert nano.generate([prompt, prompt], max_new_tokens=5) == [nano.to_string(ids[0].tolist() + new)] * 2
    assert nano.generate(ids, max_new_tokens=0).tolist() == ids.tolist()
    assert nano.generate(ids[0], max_new_tokens=2).tolist() == ids[0].tolist() + new[:2]


def test_non_finite_logits_are_never_tokens(nano: GptOss) -> None:
    def spoil(t: Tensor, hook: object) -> Tensor:
        return t * torch.nan

    with nano.hooks(fwd_hooks=[("blocks.2.hook_resid_post", spoil)]):
        for options in ({}, {"temperature": 1.0}):
            with pytest.raises(InputError, match="not finite"):
                nano.generate("12+34", max_new_tokens=3, **options)


def test_layer_ranges() -> None:
    assert list(calling.layer_range(4, None, None)) == [0, 1, 2, 3]
    assert list(calling.layer_range(4, 1, -1)) == [1, 2]
    with pytest.raises(InputError):
        calling.layer_range(4, 5, None)
