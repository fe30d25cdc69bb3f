"""The whole model on Triton's kernels, interpreted: the same numbers as on torch's, at every hook configuration."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from workbench.hooks.names import hook_points
from workbench.kernels import dispatch
from workbench.kernels.mxfp4 import quantise
from workbench.model.layers import ExpertMatrix
from workbench.model.transformer import GptOss

CFG = replace(BASE, n_layers=2, windows=(8, None))


@pytest.fixture(scope="module")
def model() -> GptOss:
    """Packed experts, for dense ones are torch's business everywhere."""
    dense = random_model(CFG)
    packed = GptOss(CFG, packed=True)
    state = dict(dense.state_dict())
    for name, module in dense.named_modules():
        if isinstance(module, ExpertMatrix):
            blocks, scales = quantise(state.pop(f"{name}.weight").mT.contiguous())
            state |= {f"{name}.blocks": blocks, f"{name}.scales": scales}
    packed.load_state_dict(state)
    return packed.requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(CFG.d_vocab, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From here on CPU tensors are taken for a GPU's."""
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    return monkeypatch


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def test_logits_without_a_hook(model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    ours = model(tokens)
    on_triton.undo()
    assert relative_error(ours, model(tokens)) <= 1e-5


@torch.no_grad()
def test_every_hook_point_has_the_same_tensor(model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    _, ours = model.run_with_cache(tokens)
    on_triton.undo()
    _, theirs = model.run_with_cache(tokens)
    assert set(ours) == set(hook_points(CFG.n_layers))
    for name, want in theirs.items():
        if want.is_floating_point():
            finite = torch.isfinite(want)
            assert torch.equal(finite, torch.isfinite(ours[name])), name
            assert relative_error(ours[name][finite], want[finite]) <= 1e-5, name
        else:
            assert torch.equal(ours[name], want), name


@torch.no_grad()
@pytest.mark.parametrize("point", ["attn.hook_sink", "mlp.experts.hook_post", "mlp.experts.hook_out"])
def test_one_hook_alone_and_its_edit(point: str, model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    """A fused path gives way to the one that has the tensor, and an edit goes on from there."""
    hooks = [(f"blocks.1.{point}", lambda t, hook: t * 0.5)]
    ours = model.run_with_hooks(tokens, fwd_hooks=hooks)
    on_triton.undo()
    assert relative_error(ours, model.run_with_hooks(tokens, fwd_hooks=hooks)) <= 1e-5
    assert relative_error(ours, model(tokens)) > 1e-3


@torch.no_grad()
def test_packed_sequences(model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    row = tokens.flatten()[None]
    ours = model(row, packed=[20, 1, 27])
    on_triton.undo()
    assert relative_error(ours, model(row, packed=[20, 1, 27])) <= 1e-5


def test_generation_with_unequal_prompts(model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    prompts = [tokens[0, :21].tolist(), tokens[1, :5].tolist()]
    on_triton.setattr(model, "cuda_graphs", False)  # which the tests of workbench.model.decode_graph record
    ours = model.generate(prompts, max_new_tokens=3, stop=[])
    on_triton.undo()
    assert ours == model.generate(prompts, max_new_tokens=3, stop=[])


def test_gradients_reach_the_embedding(model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        leaves: list[Tensor] = []

        def start(t: Tensor, hook: object) -> Tensor:
            leaves.append(t.detach().requires_grad_())
            return leaves[0]

        with model.hooks(fwd_hooks=[("hook_embed", start)]):
            model(tokens[:1]).logsumexp(-1).sum().backward()
        grad = leaves[0].grad
        assert grad is not None
        return grad

    ours = gradient()
    on_triton.undo()
    assert relative_error(ours, gradient()) <= 1e-4


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_on_torch(
    model: GptOss, tokens: Tensor, on_triton: pytest.MonkeyPatch
) -> None:
    rounded = GptOss(CFG, packed=True)
    rounded.load_state_dict(
        {n: t.bfloat16().float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    )
    half = GptOss(CFG, packed=True)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    ours = half(tokens)
    on_triton.undo()
    truth, theirs = rounded(tokens), half(tokens)
    distance = [torch.linalg.vector_norm(x.float() - truth, dim=-1).median() for x in (ours, theirs)]
    assert distance[0] <= 1.5 * distance[1]
