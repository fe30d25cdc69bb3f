"""Trainable updates become folders that PEFT reads, and change nothing before they are trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.model.adapters import SHAPE, X, dense_and_packed
from tests.model.conftest import SHAPES, to_hf
from workbench.adapters import trainable
from workbench.adapters.trainable import Options, attach, attach_existing, detach, write_folder
from workbench.errors import InputError
from workbench.model.lora import load_adapter, unload_adapter
from workbench.model.low_rank import LowRank
from workbench.model.transformer import GptOss

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
EVERY = tuple(trainable.TRAINABLE)


@pytest.fixture(scope="module")
def models() -> tuple[GptOss, GptOss]:
    return dense_and_packed(SHAPES[SHAPE])


@torch.no_grad()
def stirred(model: GptOss, options: Options) -> dict[str, LowRank]:
    """Updates as if they had been trained."""
    updates = attach(model, options, seed=3)
    rng = torch.Generator().manual_seed(4)
    for update in updates.values():
        update.b.normal_(0, 0.1, generator=rng)
    return updates


@pytest.mark.parametrize("parts", [(name,) for name in EVERY] + [EVERY])
def test_peft_computes_the_same_from_a_written_folder(
    models: tuple[GptOss, GptOss], parts: tuple[str, ...], tmp_path: Path
) -> None:
    model, dense = models
    options = Options(parts, rank=3, alpha=7.0)
    with torch.no_grad():
        plain = model(X)
        updates = stirred(model, options)
        wanted = model(X)
        write_folder(model, updates, options, tmp_path / "adapter")
        detach(model, updates)
        assert torch.equal(model(X), plain)
        peft = PeftModel.from_pretrained(to_hf(dense), tmp_path / "adapter").eval()
        scale = wanted.abs().max()
        assert (wanted - plain).abs().max() / scale > 1e-2
        assert (peft(X).logits - wanted).abs().max() / scale <= 1e-5
        load_adapter(model, tmp_path / "adapter")
        assert (model(X) - wanted).abs().max() / scale <= 1e-5
        unload_adapter(model)


def test_an_untrained_update_changes_nothing_and_has_pefts_distribution(models: tuple[GptOss, GptOss]) -> None:
    model = models[0]
    with torch.no_grad():
        plain = model(X)
        updates = attach(model, Options(EVERY, rank=16), seed=0)
        assert torch.equal(model(X), plain)
    a = updates["blocks.0.mlp.experts.gate_up"].a.detach()
    bound = model.cfg.d_model**-0.5
    assert a.shape == (model.cfg.num_experts, model.cfg.d_model, 16)
    assert 0.98 * bound < a.abs().max() <= bound
    assert abs(float(a.mean())) < 0.05 * bound
    detach(model, updates)


def test_a_folder_is_continued_where_it_is(models: tuple[GptOss, GptOss], tmp_path: Path) -> None:
    model = models[0]
    options = Options(EVERY, rank=3, alpha=7.0)
    before = stirred(model, options)
    write_folder(model, before, options, tmp_path / "adapter")
    detach(model, before)
    after = attach_existing(model, options, tmp_path / "adapter")
    detach(model, after)
    assert set(after) == set(before)
    for part, update in after.items():
        torch.testing.assert_close(update.a, before[part].a, rtol=0, atol=0)
        torch.testing.assert_close(update.b, before[part].b, rtol=1e-6, atol=0)
        assert update.a.requires_grad
        assert update.scale == options.scale
    for other, reason in (
        (Options(EVERY, rank=4, alpha=7.0), "'rank': 3"),
        (Options(("attention",), rank=3, alpha=7.0), "differ in blocks"),
    ):
        with pytest.raises(InputError, match=reason):
            attach_existing(model, other, tmp_path / "adapter")
        assert model.adapter is None
        assert model.blocks[0].mlp.experts.gate_up.lora is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parts": ("attention", "mlp")}, "choose from attention, router, experts"),
        ({"parts": ()}, "choose from"),
        ({"rank": 0}, "positive whole number"),
        ({"alpha": float("nan")}, "positive number"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Options(**options)


def test_a_folder_states_what_it_adapts(models: tuple[GptOss, GptOss], tmp_path: Path) -> None:
    model = models[0]
    updates = attach(model, Options(("attention", "router")), seed=0)
    write_folder(model, updates, Options(("attention", "router")), tmp_path / "adapter")
    detach(model, updates)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config["target_parameters"] == ["mlp.router.weight"]
    assert (config["r"], config["lora_alpha"]) == (8, 16.0)
