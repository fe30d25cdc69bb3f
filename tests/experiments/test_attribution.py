"""The parts of a logit sum to it, each is what its name states, and nothing is lost."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from tests.model.conftest import BASE, random_model
from tests.model.live_memory import LiveBytes
from workbench.errors import InputError
from workbench.experiments import attribution, residual_attribution
from workbench.experiments.attribution import by_expert, logit_parts, ranked, total
from workbench.experiments.lens import logit_lens
from workbench.hooks.edits import applied
from workbench.hooks.interventions import steer
from workbench.hooks.sae import SAE, SAEConfig, splice
from workbench.model.low_rank import LowRank
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (2, 30), generator=torch.Generator().manual_seed(1))
BEFORE_LAST = slice(0, -1)
NORMS = ("frozen", "path", "layers")
# Of what no part explains, twice the most that is seen: 4.7e-15, 2.4e-6, 1.8e-5, and 0.16 on logits of up to 27.
TOLERANCE = {"random, float64": 1e-14, "random, float32": 5e-6, "nano, float32": 4e-5, "nano, bfloat16": 0.25}


def parts_of(model: GptOss, generated: tuple[Tensor, list[int]], name: str, **options: Any) -> xr.Dataset:
    tokens, lengths = (X, None) if name.startswith("random") else (generated[0][:3], generated[1][:3])
    return logit_parts(model, tokens, at=BEFORE_LAST, of="next", n_real=lengths, **options)


def unexplained(parts: xr.Dataset) -> float:
    """The most that the named parts alone, without rest and rounding, are off."""
    return float(abs(parts.rest.sum(("layer", "block")) + parts.rounding).max())


@pytest.mark.parametrize("name", list(TOLERANCE))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("minus", [3, "mean"])
def test_parts_sum_to_the_logit(
    models: dict[str, GptOss], generated: tuple[Tensor, list[int]], name: str, norm: Any, minus: Any
) -> None:
    parts = parts_of(models[name], generated, name, norm=norm, minus=minus)
    assert float(abs(total(parts) - parts.logit).max()) < 1e-11
    assert unexplained(parts) < TOLERANCE[name]


def test_the_logit_is_the_models_own(exact: GptOss) -> None:
    parts = logit_parts(exact, X, of=7, minus=X)
    logits = exact(X)
    expected = logits[..., 7] - logits.gather(-1, X[..., None])[..., 0]
    torch.testing.assert_close(torch.from_numpy(parts.logit.to_numpy()), expected.flatten())


def without_biases(attn: Any, z: Tensor, g: Tensor) -> dict[str, Tensor]:
    return meter_heads(attn, z, g) | {"attn_bias": torch.zeros(len(g), dtype=g.dtype)}


def ungated(mlp: Any, out: Tensor, gates: Tensor, chosen: Tensor, g: Tensor) -> dict[str, Tensor]:
    return meter_experts(mlp, out, torch.ones_like(gates), chosen, g)


def without_expert_bias(mlp: Any, out: Tensor, gates: Tensor, chosen: Tensor, g: Tensor) -> dict[str, Tensor]:
    parts = meter_experts(mlp, out, gates, chosen, g)
    return parts | {"expert_bias": 0 * parts["expert_bias"]}


def forgetting_the_norm(model: GptOss, term: Tensor) -> Tensor:
    return direction(model, term) / model.ln_final.weight.double()


meter_heads, meter_experts, direction = residual_attribution.heads, residual_attribution.experts, attribution._direction
BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no attention bias": (residual_attribution, "heads", without_biases),
    "no expert bias": (residual_attribution, "experts", without_expert_bias),
    "ungated experts": (residual_attribution, "experts", ungated),
    "no norm weight": (attribution, "_direction", forgetting_the_norm),
}


@pytest.mark.parametrize("broken", list(BROKEN))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", list(TOLERANCE))
def test_the_sum_sees_broken_parts(
    models: dict[str, GptOss], generated: Any, name: str, norm: Any, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*BROKEN[broken])
    assert unexplained(parts_of(models[name], generated, name, norm=norm)) > TOLERANCE[name]


def test_frozen_parts_are_those_of_a_cache(exact: GptOss) -> None:
    """Against hook_result and hook_out, by hand."""
    _, cache = exact.run_with_cache(X)
    u = exact.unembed.weight[7] * exact.ln_final.weight / cache["ln_final.hook_scale"]
    parts = logit_parts(exact, X, of=7)
    for layer in range(BASE.n_layers):
        here = parts.sel(layer=layer)
        gates = cache[f"blocks.{layer}.mlp.hook_expert_weights"].flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy(here.gate.to_numpy()), gates)
        heads = torch.einsum("bphm,bpm->bph", cache[f"blocks.{layer}.attn.hook_result"], u).flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy(here.heads.to_numpy()), heads)
        slots = torch.einsum("bpsm,bpm->bps", cache[f"blocks.{layer}.mlp.experts.hook_out"], u)
        slots = (slots * cache[f"blocks.{layer}.mlp.hook_expert_weights"]).flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy((here.experts + here.expert_bias).to_numpy()), slots)
        bias = exact.blocks[layer].mlp.experts.down.bias[cache[f"blocks.{layer}.mlp.hook_expert_indices"]]
        bias = (torch.einsum("bpsm,bpm->bps", bias, u) * cache[f"blocks.{layer}.mlp.hook_expert_weights"]).flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy(here.expert_bias.to_numpy()), bias)


def test_layers_add_up_to_steps_of_the_logit_lens(exact: GptOss) -> None:
    parts, lens = logit_parts(exact, X, of=7, norm="layers"), logit_lens(exact, X, of=7).logit
    attn = parts.heads.sum("head") + parts.attn_bias + parts.rest.sel(block="attn")
    mlp = (parts.experts + parts.expert_bias).sum("slot") + parts.rest.sel(block="mlp")
    steps = xr.concat([attn, mlp], "block").transpose("point", "layer", "block").to_numpy().reshape(len(lens), -1)
    assert abs(parts.embed.to_numpy() - lens.isel(depth=0)).max() < 1e-10
    assert abs(steps - lens.diff("depth").to_numpy()).max() < 1e-10
    frozen = logit_parts(exact, X, of=7)
    assert abs(frozen.embed.to_numpy() - lens.isel(depth=0)).max() > 0.1, "a scale held fixed must not pass"


def test_a_path_gives_the_embedding_its_own_logit(exact: GptOss) -> None:
    parts, lens = logit_parts(exact, X, of=7, norm="path"), logit_lens(exact, X, of=7).logit
    assert abs(parts.embed - lens.isel(depth=0)).max() < 1e-10


@pytest.mark.parametrize("norm", NORMS)
def test_weights_over_the_vocabulary_are_the_weighted_sum(exact: GptOss, norm: Any) -> None:
    weights = torch.zeros(BASE.d_vocab, dtype=torch.float64)
    weights[5], weights[9] = 2.0, -0.5
    complete = logit_parts(exact, X, of=weights, norm=norm)
    five, nine = (logit_parts(exact, X, of=token, norm=norm) for token in (5, 9))
    for name in (*attribution.PARTS, "logit"):
        assert abs(complete[name] - (2 * five[name] - 0.5 * nine[name])).max() < 1e-11, name
    other = logit_parts(exact, X, of=5, minus=9, norm=norm)
    assert abs(other.heads - (five.heads - nine.heads)).max() < 1e-11


@pytest.mark.parametrize("norm", NORMS)
def test_padding_and_the_choice_of_points_change_nothing(exact: GptOss, norm: Any) -> None:
    lengths = [30, 17]
    padded = logit_parts(exact, X, at=[3, -1], of=7, norm=norm, n_real=lengths)
    assert padded.sequence.values.tolist() == [0, 0, 1, 1]
    assert padded.position.values.tolist() == [3, 29, 3, 16]
    alone = logit_parts(exact, X[1:, :17], of=7, norm=norm)
    for name in attribution.PARTS:
        assert (
            abs(padded[name].isel(point=[2, 3]).to_numpy() - alone[name].isel(point=[3, 16]).to_numpy()).max() < 1e-11
        )


@pytest.mark.parametrize("norm", NORMS)
def test_what_an_edit_adds_to_a_block_is_its_rest(exact: GptOss, norm: Any) -> None:
    vector = torch.linspace(-1, 1, BASE.d_model, dtype=torch.float64)
    with applied(exact, steer("blocks.1.hook_mlp_out", vector)):
        parts = logit_parts(exact, X, of=7, norm=norm)
    assert abs(total(parts) - parts.logit).max() < 1e-11
    assert abs(parts.rest.sel(layer=1, block="mlp")).min() > 1e-4
    assert abs(parts.rest.drop_sel(layer=1)).max() < 1e-12
    assert abs(parts.rest.sel(block="attn")).max() < 1e-12


def test_what_an_sae_lacks_is_rest(exact: GptOss) -> None:
    rng = torch.Generator().manual_seed(4)
    shapes = {"W_enc": (64, 32), "W_dec": (32, 64), "b_enc": (32,), "b_dec": (64,)}
    weights = {name: torch.randn(shape, generator=rng, dtype=torch.float64) / 8 for name, shape in shapes.items()}
    at = "blocks.2.hook_attn_out"
    sae = SAE(SAEConfig("standard", 64, 32, torch.float64, True, "none", "none", 0, False, at), weights)
    plain = exact.run_with_cache(X)[1]
    with splice(exact, sae, use_error_term=False):
        parts = logit_parts(exact, X, of=7)
        scale = exact.run_with_cache(X)[1]["ln_final.hook_scale"]
    direction = exact.unembed.weight[7] * exact.ln_final.weight
    lacking = -(sae.error(plain[at]) / scale) @ direction
    assert abs(total(parts) - parts.logit).max() < 1e-11
    np.testing.assert_allclose(parts.rest.sel(layer=2, block="attn"), lacking.flatten(), atol=1e-12)
    with splice(exact, sae):
        assert unexplained(logit_parts(exact, X, of=7)) < 1e-12


def test_adapters_are_in_the_parts_of_what_they_adapt() -> None:
    model, rng = random_model(BASE).double(), torch.Generator().manual_seed(3)
    pair = [
        torch.randn(shape, generator=rng, dtype=torch.float64) / 8
        for shape in ((128, 2), (2, 64), (8, 96, 2), (8, 2, 64))
    ]
    plain = logit_parts(model, X, of=7)
    model.blocks[1].attn.o.lora, model.blocks[1].mlp.experts.down.lora = LowRank(*pair[:2]), LowRank(*pair[2:])
    parts = logit_parts(model, X, of=7)
    assert unexplained(parts) < 1e-12
    assert abs(parts.heads - plain.heads).sel(layer=1).max() > 0.01


def test_experts_sum_over_their_slots_and_the_largest_come_first(exact: GptOss) -> None:
    parts = logit_parts(exact, X, of=7)
    experts = by_expert(parts)
    slots = (parts.experts + parts.expert_bias).sum("slot")
    assert abs(experts.sum("expert") - slots).max() < 1e-12
    first = parts.isel(point=4, layer=2, slot=1)
    assert experts.isel(point=4, layer=2, expert=int(first.expert)) == first.experts + first.expert_bias
    table = ranked(parts, n=10_000, point=4)
    assert table.logits.abs().is_monotonic_decreasing
    assert table.logits.sum() == pytest.approx(float(parts.logit[4]))
    row = table[(table.part == "experts") & (table.layer == 2) & (table.slot == 1)].iloc[0]
    assert (row.expert, row.logits) == (int(first.expert), float(first.experts))


def growth() -> int:
    """How much more is alive at the most with eight layers than with two."""
    peaks = []
    for n_layers in (2, 8):
        model = random_model(replace(BASE, n_layers=n_layers, windows=(16,) * n_layers, n_ctx=1024)).requires_grad_(
            False
        )
        with LiveBytes() as live:
            logit_parts(model, torch.zeros(2, 1000, dtype=torch.long), of=7)
        peaks.append(live.peak)
    return peaks[1] - peaks[0]


def test_one_layers_activations_are_held_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    six_layers_of_slots = 6 * 2000 * BASE.experts_per_token * BASE.d_model * 4
    assert growth() < six_layers_of_slots / 2
    held, see = [], residual_attribution.Meter._see

    def hoard(self: Any, x: Tensor, hook: Any) -> None:
        see(self, x, hook)
        held.append(self._seen[hook.name.split(".", 2)[2]])

    monkeypatch.setattr(residual_attribution.Meter, "_see", hoard)
    assert growth() > six_layers_of_slots


def test_input_that_means_nothing_is_refused(exact: GptOss) -> None:
    with pytest.raises(InputError, match="no token follows"):
        logit_parts(exact, X, of="next")
    with pytest.raises(InputError, match="vocabulary has 0 to 100"):
        logit_parts(exact, X, of=101)
    with pytest.raises(InputError, match="no token of these 2 sequences"):
        logit_parts(exact, X, at=[99], of=7)
    with pytest.raises(InputError, match="norm 'l2'"):
        attribution.check_norm("l2")
