"""The direct effects of an expert are those of its own writes, and ablations are those of `forbid`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import expert_logits
from workbench.experiments.from_run import transcripts
from workbench.figures import expert_logits as figures
from workbench.hooks.sae import SAE, load_sae
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


def test_direct_effects_are_those_of_each_token(model: GptOss) -> None:
    """A loop over tokens that takes the expert's write out of the last stream, with the norm's scale fixed."""
    rows = transcripts(wb.open_run(DATA / "demo.zarr"), [0, 7])
    result = expert_logits.load(model, rows, n=3)
    layer, expert = 2, int(result["tokens"].values[2].argmax())
    total, n = torch.zeros(model.cfg.d_vocab), 0
    with torch.no_grad():
        for row in rows:
            _, cache = model.run_with_cache(torch.from_numpy(np.asarray(row.tokens).astype(np.int64))[None])
            chosen = cache[f"blocks.{layer}.mlp.hook_expert_indices"][0]
            for pos, slot in (chosen == expert).nonzero().tolist():
                gate = cache[f"blocks.{layer}.mlp.hook_expert_weights"][0, pos, slot]
                write = gate * cache[f"blocks.{layer}.mlp.experts.hook_out"][0, pos, slot]
                normed = write / cache["ln_final.hook_scale"][0, pos] * model.ln_final.weight
                total += model.unembed.weight @ normed
                n += 1
    effect = total / n - (total / n).mean()
    assert int(result["tokens"][layer, expert]) == n
    cell = result.sel(layer=layer, expert=expert)
    assert cell["top_token"].values.tolist() == effect.topk(3).indices.tolist()
    np.testing.assert_allclose(cell["bottom_logit"].values, effect.topk(3, largest=False).values, rtol=1e-3, atol=1e-5)
    other = result.sel(layer=layer, expert=(expert + 1) % model.cfg.num_experts)
    assert not np.allclose(other["top_logit"].values, effect.topk(3).values, rtol=1e-3)  # the negative control
    assert cell["top_text"].values[0] == model.tokenizer.decode([int(cell["top_token"][0])])
    with pytest.raises(InputError, match="at least one sequence"):
        expert_logits.load(model, [])


def test_direct_effects_of_features_are_those_of_the_decoder_in_the_final_stream(model: GptOss, tmp_path: Path) -> None:
    """A loop over features in float64; the stream is the decoder row, whose norm's scale is 1."""
    sae = load_sae(write_sae(tmp_path / "sae", model.cfg.d_model, d_sae=6))
    ds = expert_logits.feature_logits(model, sae, n=4)
    for feature in range(6):
        normed = sae.W_dec[feature].double() * model.ln_final.weight.double()
        effect = model.unembed.weight.double() @ normed
        effect = effect - effect.mean()
        cell = ds.sel(feature=feature)
        assert cell["top_token"].values.tolist() == effect.topk(4).indices.tolist()
        np.testing.assert_allclose(cell["top_logit"], effect.topk(4).values, rtol=1e-4)
        np.testing.assert_allclose(cell["bottom_logit"], effect.topk(4, largest=False).values, rtol=1e-4)
        without_norm = model.unembed.weight.double() @ sae.W_dec[feature].double()
        without_norm -= without_norm.mean()
        assert not np.allclose(cell["top_logit"], without_norm.topk(4).values, rtol=1e-3), "negative control: no norm"
    assert cell["top_text"].values[0] == model.tokenizer.decode([int(cell["top_token"][0])])
    scaled = SAE(replace(sae.cfg, rescale_acts_by_decoder_norm=True), dict(sae.named_parameters()))
    length = sae.W_dec.norm(dim=-1).numpy()
    own = expert_logits.feature_logits(model, scaled, n=4)["top_logit"]
    np.testing.assert_allclose(own, ds["top_logit"] / length[:, None], rtol=1e-4)
    narrow = load_sae(write_sae(tmp_path / "narrow", model.cfg.d_model - 1))
    with pytest.raises(InputError, match="of the residual stream of this model"):
        expert_logits.feature_logits(model, narrow)


def test_ablations_name_their_experts(model: GptOss) -> None:
    rows = transcripts(wb.open_run(DATA / "demo.zarr"), range(0, 120, 5))
    result = expert_logits.ablations(model, rows, [(0, 1), (3, 2)])
    assert result["layer"].values.tolist() == [0, 3]
    assert result["expert"].values.tolist() == [1, 2]
    assert np.isfinite(result["change"].values).all()
    assert (result["low"] <= result["change"]).all()
    with pytest.raises(InputError, match="no expert was given: give at least one"):
        expert_logits.ablations(model, rows, [])


def test_the_experiment_is_drawn_with_the_tokens_of_the_largest_effects(model: GptOss) -> None:
    rows = transcripts(wb.open_run(DATA / "demo.zarr"), [0, 7])
    (ds,) = expert_logits.experiment(model, rows, tokens=2).values()
    figure = figures.largest(ds)
    values = next(trace for trace in figure.data if trace.type == "heatmap")
    np.testing.assert_allclose(values.z, ds["top_logit"].isel(rank=0), rtol=1e-6)
    layer, expert = np.unravel_index(np.nanargmax(values.z), values.z.shape)
    assert repr(str(ds["top_text"].values[layer, expert, 0])) in values.customdata[layer, expert, 0]
    assert f"Layer {layer}, expert {expert} raises" in ds.attrs["summary"].splitlines()[1]
    with pytest.raises(InputError, match="at least 1"):
        expert_logits.experiment(model, rows, tokens=0)
