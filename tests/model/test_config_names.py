"""A config answers what TransformerLens' users ask: its own constants, and those of its model where it has one."""

import pytest
import torch

from tests.model.conftest import BASE
from workbench.model.transformer import GptOss


def test_constants_agree_with_the_fields() -> None:
    assert BASE.attn_scale == BASE.d_head**0.5
    assert BASE.d_vocab_out == BASE.d_vocab
    assert BASE.rotary_dim == BASE.d_head
    assert BASE.rotary_base == BASE.rope.theta
    assert BASE.attn_types == ["local", "global", "local"]
    assert BASE.window_size == 16
    assert BASE.use_local_attn
    assert BASE.to_dict() == BASE.to_json()


def test_a_models_config_has_its_device_and_switches() -> None:
    model = GptOss(BASE)
    assert model.cfg == BASE
    assert (model.cfg.device, model.cfg.dtype, model.cfg.n_devices) == (torch.device("cpu"), torch.float32, 1)
    for switch in ("use_hook_mlp_in", "use_attn_in", "use_split_qkv_input"):
        assert not getattr(model.cfg, switch)
        getattr(model, f"set_{switch}")(True)
        assert getattr(model.cfg, switch)
    model.set_ungroup_grouped_query_attention(True)
    assert model.cfg.ungroup_grouped_query_attention


def test_a_config_alone_has_no_device() -> None:
    with pytest.raises(AttributeError, match=r"ask a model's, model\.cfg"):
        _ = BASE.device
