"""Effects of interventions are what they would be by hand; the experts that are named are the ones that matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from tests.model.conftest import BASE, random_model
from workbench.errors import InputError
from workbench.experiments import effects
from workbench.experiments.from_run import recorded, transcripts
from workbench.harmony.transcripts import Prompt, Transcript
from workbench.hooks.interventions import applied, forbid, force, patch, route
from workbench.model.transformer import GptOss


def rows_of(lengths: list[int]) -> list[Transcript]:
    rng = np.random.default_rng(0)
    return [
        Transcript(f"s{i}", f"p{i // 2}", "", rng.integers(0, BASE.d_vocab, n).astype(np.int32), 1)
        for i, n in enumerate(lengths)
    ]


def odd(ids: np.ndarray) -> np.ndarray:
    return ids % 2 == 1


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE).requires_grad_(False)


@pytest.fixture(scope="module")
def arithmetic() -> list[Transcript]:
    rows = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in rows if row.effort == "high" and row.correct and row.meta["task"] == "product"][:8]


@torch.no_grad()
def test_log_probabilities_are_those_of_each_sequence_alone(base: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([9, 30, 1, 17])
    monkeypatch.setattr(effects, "FORWARD_TOKENS", 40)
    monkeypatch.setattr(effects, "_LOGIT_ROWS", 3)
    got = effects.logprobs(base, rows, odd, forbid(1, [2]))
    for row, value in zip(rows, got, strict=True):
        ids = torch.from_numpy(row.tokens).long()
        with applied(base, forbid(1, [2])):
            logp = base(ids[None])[0].log_softmax(-1)
        own = [float(logp[i - 1, ids[i]]) for i in range(1, len(ids)) if ids[i] % 2]
        assert value == pytest.approx(sum(own), abs=1e-3) if own else np.isnan(value)


def test_prompts_are_the_unit_of_a_paired_mean() -> None:
    """Their interval covers the mean; negative control: with sequences as the unit it covers far too seldom."""
    rng = np.random.default_rng(1)
    prompt = rng.normal(0.5, 1, (400, 30))
    change = np.repeat(prompt, 10, axis=1) + rng.normal(0, 0.1, (400, 300))
    _, low, high = effects.paired(change, np.repeat(np.arange(30), 10).astype(str), n_boot=400)
    assert 0.92 <= ((low <= 0.5) & (high >= 0.5)).mean() <= 0.985
    _, low, high = effects.paired(change, np.arange(300).astype(str), n_boot=400)
    assert ((low <= 0.5) & (high >= 0.5)).mean() < 0.6


@pytest.mark.filterwarnings("ignore:only 5 prompts")
def test_sequences_without_a_value_take_no_part() -> None:
    change = np.array([1.0, np.nan, 3.0, np.nan, 5.0, 1.0, 0.0])
    assert effects.paired(change, list("aabcdef"), n_boot=50)[0] == 2.0
    with pytest.raises(InputError, match="4 prompts have a value, and an interval needs at least 5"):
        effects.paired(change, list("aabcdea"))


def test_matched_sets_are_others_of_the_same_layers_and_about_the_same_load() -> None:
    load = np.random.default_rng(0).dirichlet(np.full(16, 3.0), 4)
    chosen = [(0, 3), (0, 4), (2, 9)]
    wanted = sum(load[cell] for cell in chosen)
    sets = effects.load_matched(load, chosen, 20)
    assert len({tuple(s) for s in sets}) == 20
    for cells in sets:
        assert sorted(layer for layer, _ in cells) == [0, 0, 2]
        assert not set(cells) & set(chosen)
        assert sum(load[cell] for cell in cells) == pytest.approx(wanted, rel=0.25)
    load[0, 3] = 10
    with pytest.raises(InputError, match="only 0 of 5 random sets"):
        effects.load_matched(load, chosen, 5)
    with pytest.raises(InputError, match="9 of 16 experts of layer 1 are selected"):
        effects.load_matched(load, [(1, expert) for expert in range(9)], 5)


@pytest.mark.filterwarnings("ignore:only 5 prompts")
def test_the_only_expert_that_writes_is_the_only_one_that_is_missed() -> None:
    planted = random_model(BASE).requires_grad_(False)
    for layer, block in enumerate(planted.blocks):
        down = block.mlp.experts.down
        silent = [e for e in range(BASE.num_experts) if (layer, e) != (1, 5)]
        down.weight.data[silent], down.bias.data[silent] = 0, 0
    rows = rows_of([20, 31, 25, 30, 22, 18, 21, 20, 30, 16, 12, 12])

    def group(row: Transcript) -> str:
        return "few" if row.prompt_id == "p5" else "all"

    got = effects.expert_ablations(planted, rows, odd, way="zero", n_boot=100, group=group)
    assert "1 prompt, 5 are needed" in got.attrs["not_tested"]
    assert np.isnan(got["p"].sel(group="few")).all()
    assert bool((got["q"] >= got["p"]).sel(group="all").all())
    missed = got["change"].sel(group="all")
    assert abs(float(missed.sel(layer=1, expert=5))) > 0.1
    assert float(np.abs(missed.where((missed.layer != 1) | (missed.expert != 5))).max()) < 1e-3
    assert got["share"].sum("expert").values == pytest.approx(1)
    forbidden = effects.expert_ablations(planted, rows, odd, n_boot=100, group=group)
    assert float(np.abs(forbidden["change"].sel(layer=1, group="all")).max("expert").item()) > 0.1
    assert not np.allclose(forbidden["change"].sel(group="all"), missed)


def test_load_counts_the_meant_tokens_only(base: GptOss) -> None:
    rows = rows_of([20, 31])
    load = effects.expert_load(base, rows, odd)
    counts = np.zeros((BASE.n_layers, BASE.num_experts))
    for row in rows:
        with torch.no_grad():
            _, cache = base.run_with_cache(torch.from_numpy(row.tokens).long()[None])
        for layer in range(BASE.n_layers):
            chosen = cache[f"blocks.{layer}.mlp.hook_expert_indices"][0][torch.from_numpy(odd(row.tokens))]
            counts[layer] += np.bincount(chosen.flatten(), minlength=BASE.num_experts)
    np.testing.assert_allclose(load, counts / counts.sum(1, keepdims=True))
    assert np.isnan(effects.expert_load(base, rows, lambda ids: ids < 0)).all()


@pytest.mark.filterwarnings("ignore:only 8 prompts")
def test_forcing_every_recorded_choice_undoes_a_random_router(nano: GptOss, arithmetic: list[Transcript]) -> None:
    rows, spoken = arithmetic, wb.harmony.token_set(tokenizer=nano.tokenizer, channel=["analysis", "final"])
    noise = torch.randn(nano.cfg.d_model, nano.cfg.num_experts, generator=torch.Generator().manual_seed(0)) * 0.3
    lost = route(2, lambda x, logits: x @ noise)
    routes = effects.routing(nano, rows)
    back = [force(2, [e], effects.RoutedTo(rows, routes, 2, e)) for e in range(nano.cfg.num_experts)]
    used = [edit for e, edit in enumerate(back) if any((chosen[2] == e).any() for chosen in routes)]
    got = effects.effects(nano, rows, {"lost": lost, "forced": [lost, *used]}, spoken, n_boot=200)
    assert float(got["high"].sel(intervention="lost")) < -5
    assert got.attrs["family"] == "2 interventions"
    assert bool((got["q"] >= got["p"]).all())
    assert float(got["change"].sel(intervention="forced")) > 0.5 * float(got["change"].sel(intervention="lost"))
    with pytest.raises(InputError, match="was not recorded"):
        effects.RoutedTo(rows, routes, 2, 0)([1, 2, 3])


def test_answers_are_marked(nano: GptOss) -> None:
    prompts = [
        Prompt("a", [{"role": "user", "content": "24*29"}], "696"),
        Prompt("b", [{"role": "user", "content": "24*29"}], "697"),
    ]
    assert effects.answers(nano, prompts, "high").tolist() == [True, False]
    with pytest.raises(InputError, match="2 prompts have a value"):
        effects.accuracy(np.array([True, False]))
    changed = effects.answers(nano, prompts, "high", forbid(3, [3]), forbid(0, [3, 9]), max_new_tokens=90)
    assert changed.tolist() == [False, False]
    with pytest.raises(InputError, match="'c' has no answer"):
        effects.answers(nano, [replace(prompts[0], id="c", answer=None)], "high")


def test_a_run_gives_its_transcripts_back() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    some = transcripts(run, [5, 2])
    assert [row.id for row in some] == [run.sequences.loc[5, "id"], run.sequences.loc[2, "id"]]
    assert np.array_equal(some[0].tokens, run.sequence(5)["id"].to_numpy())
    with pytest.raises(InputError, match="600"):
        transcripts(run, [600])


@torch.no_grad()
def test_a_recorded_routing_can_be_patched_in(nano: GptOss, arithmetic: list[Transcript]) -> None:
    run = wb.open_run(DATA / "demo.zarr")
    ids = torch.from_numpy(arithmetic[0].tokens).long()[None]
    chosen = recorded(run, arithmetic[0].id, "mlp.hook_expert_indices")
    plain, sinks = nano(ids), recorded(run, arithmetic[0].id, "attn.hook_sink")
    noise = torch.randn(nano.cfg.d_model, nano.cfg.num_experts, generator=torch.Generator().manual_seed(0))
    with applied(nano, *(route(layer, lambda x, logits: x @ noise) for layer in range(4)), patch(list(chosen), chosen)):
        _, cache = nano.run_with_cache(ids)
    assert all(torch.equal(cache[name], chosen[name]) for name in chosen)
    with applied(nano, patch(list(chosen), chosen), patch(list(sinks), sinks)):
        torch.testing.assert_close(nano(ids), plain, rtol=2e-2, atol=2e-2)  # sinks are stored as float16
    with pytest.raises(InputError, match="it recorded routing, sinks"):
        recorded(run, 0, "hook_resid_post")
