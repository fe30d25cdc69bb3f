"""Activation checkpointing: the same gradients from a fraction of the memory, edits twice and records once."""

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from tests.model.live_memory import LiveBytes
from tests.model.test_gradients import loss, packed
from workbench.hooks.hook_points import recomputing
from workbench.hooks.interventions import ablate, applied, remove_sinks, resample
from workbench.hooks.recorders import Recorder, SequenceRecorder
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (1, 120), generator=torch.Generator().manual_seed(6))
LENGTHS = [70, 50]
EDITS = (
    ablate(1, [2], tokens=slice(5, None), how="resample"),
    remove_sinks(0, tokens=[3, 4, 5]),
    resample("blocks.2.hook_resid_mid", torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), tokens=[9, 30]),
)


@pytest.fixture
def model() -> GptOss:
    return packed(random_model(BASE)).requires_grad_(False)


def gradients(model: GptOss, names: list[str]) -> dict[str, Tensor]:
    deltas: dict[str, Tensor] = {}

    def add(x: Tensor, hook: object) -> Tensor:
        name = str(hook.name)  # type: ignore[attr-defined]
        if name not in deltas:
            deltas[name] = torch.zeros_like(x, requires_grad=True)
        return x + deltas[name]

    with applied(model, *EDITS):
        loss(model.run_with_hooks(X, fwd_hooks=[(name, add) for name in names], packed=LENGTHS)).backward()
    return {name: delta.grad for name, delta in deltas.items() if delta.grad is not None}


def test_gradients_are_the_same_also_under_edits(model: GptOss) -> None:
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.mlp.experts.hook_post", "blocks.2.hook_resid_mid"]
    plain = gradients(model, names)
    model.checkpointing = True
    again = gradients(model, names)
    assert plain.keys() == again.keys() == set(names)
    for name in names:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_second_time_hooks_see_their_own_pass(model: GptOss) -> None:
    """Two passes before the backward ones: each recomputation must ask its own pass where its tokens are."""
    model.checkpointing = True
    seen: list[tuple[bool, int]] = []

    def look(x: Tensor, hook: object) -> None:
        assert model.context is not None
        seen.append((recomputing(), x.shape[1] - int(model.context.mask(lambda ids: ids >= 0).sum())))

    start = torch.zeros(BASE.d_model, requires_grad=True)
    hooks = [("hook_embed", lambda x, hook: x + start), ("blocks.1.hook_resid_mid", look)]
    with model.hooks(fwd_hooks=hooks):
        (loss(model(X)) + loss(model(X[:, :7]))).backward()
    assert sorted(again for again, _ in seen) == [False, False, True, True]
    assert all(missing == 0 for _, missing in seen)
    assert not recomputing()


def test_what_is_recorded_and_counted_is_so_once(model: GptOss) -> None:
    model.checkpointing = True
    name = "blocks.1.hook_resid_mid"
    recorders = Recorder({name: torch.float32}), SequenceRecorder(model, {name: torch.float32})
    start = torch.zeros(BASE.d_model, requires_grad=True)
    hooks = [("hook_embed", lambda x, hook: x + start), *recorders[0].fwd_hooks, *recorders[1].fwd_hooks]
    with applied(model, *EDITS) as report, model.hooks(fwd_hooks=hooks):
        loss(model(X, packed=LENGTHS)).backward()
        assert [matched.tokens for matched in report] == [110, 6, 4]
    assert recorders[0].take()[name].shape == (120, BASE.d_model)
    assert [len(recorded[name]) for recorded in recorders[1].take()] == LENGTHS


def test_memory_is_a_stream_a_block(model: GptOss) -> None:
    def held(checkpointing: bool) -> int:
        model.checkpointing = checkpointing
        start = torch.zeros(BASE.d_model, requires_grad=True)
        with LiveBytes(model.state_dict().values()) as counted:
            out = model.run_with_hooks(X, fwd_hooks=[("hook_embed", lambda x, hook: x + start)])
            live = counted.live
        del out
        return live

    stream = X.numel() * BASE.d_model * 4
    outside = X.numel() * (BASE.d_vocab + 3 * BASE.d_model) * 4 + 50_000
    held(True)  # makes the table of MXFP4 values, which stays for as long as the process
    assert held(True) <= (BASE.n_layers + 1) * stream + outside
    assert held(False) > 4 * held(True)


def test_a_pass_without_gradients_or_with_a_cache_computes_once(model: GptOss) -> None:
    model.checkpointing = True
    calls: list[int] = []
    with torch.no_grad():
        model.run_with_hooks(X, fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: calls.append(1))])
        assert model.generate(X[:, :5], max_new_tokens=3, stop=[]).shape == (X.shape[0], 8)
    assert calls == [1]
