"""A recorder keeps what passes, once, in the dtype asked for, and states what never came."""

import pytest
import torch

from tests.model.conftest import BASE, random_model
from workbench.hooks.recorders import Recorder


@torch.no_grad()
def test_it_keeps_tokens_first_over_several_passes() -> None:
    model = random_model(BASE)
    recorder = Recorder({"blocks.1.hook_resid_post": torch.bfloat16, "blocks.0.mlp.hook_expert_indices": torch.uint8})
    parts = torch.randint(BASE.d_vocab, (1, 30), generator=torch.Generator().manual_seed(0)).split([12, 18], 1)
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        for part in parts:
            model(part)
    recorded = recorder.take()
    assert recorded["blocks.1.hook_resid_post"].shape == (30, BASE.d_model)
    assert recorded["blocks.1.hook_resid_post"].dtype == torch.bfloat16
    assert recorded["blocks.0.mlp.hook_expert_indices"].dtype == torch.uint8
    _, cache = model.run_with_cache(parts[1])
    torch.testing.assert_close(
        recorded["blocks.1.hook_resid_post"][12:], cache["blocks.1.hook_resid_post"][0].bfloat16(), rtol=0, atol=0
    )


def test_it_is_empty_after_taking_and_lists_what_never_fired() -> None:
    recorder = Recorder({"blocks.1.hook_resid_post": torch.float32})
    with pytest.raises(RuntimeError, match=r"never fired: .*hook_resid_post"):
        recorder.take()


@torch.no_grad()
def test_what_it_kept_is_a_copy() -> None:
    model = random_model(BASE)
    recorder = Recorder({"hook_embed": torch.float32})
    x = torch.arange(9)[None]
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        model(x)
    recorded = recorder.take()["hook_embed"]
    recorded.zero_()
    assert model.embed(x).abs().sum() > 0
