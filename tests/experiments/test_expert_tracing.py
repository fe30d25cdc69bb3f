"""Expert tracing: the only expert that a layer has left restores all that the layer does, and silent ones nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import expert_tracing as tracing
from workbench.experiments.effects import logprobs
from workbench.experiments.final_channel import final_tokens
from workbench.experiments.from_run import transcripts
from workbench.experiments.random_controls import rank
from workbench.figures import experiments as figures
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

LAYER, EXPERT = 3, 14  # of nano's last layer, chosen by many tokens of answers
GENERATED = tracing.CLASSES.index("generated tokens")


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [r for r in every if r.effort == "low" and r.meta["task"] in ("recall", "sort", "reverse")][::4][:14]


@contextmanager
def only_expert(model: GptOss, layer: int, expert: int) -> Iterator[None]:
    """All experts of a layer but one write nothing."""
    down = model.blocks[layer].mlp.experts.down
    held = [down.bias, down.blocks, down.scales]
    before = [t.detach().clone() for t in held]
    with torch.no_grad():
        for t in (down.bias, down.blocks):
            own_tensor = t[expert].clone()
            t.zero_()
            t[expert] = own_tensor
    try:
        yield
    finally:
        with torch.no_grad():
            for t, old in zip(held, before, strict=True):
                t.copy_(old)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_the_expert_that_carries_a_layer_is_found(nano: GptOss, rows: list[Transcript]) -> None:
    with only_expert(nano, LAYER, EXPERT):
        result = tracing.experiment(nano, rows, cells=1)["experts"]
        estimates = tracing._screened(nano, rows[:2], 3.0, 0)
        one = tracing.traced(nano, rows[0], 3.0, 0)
        silent = [(LAYER, one.difference(LAYER, expert)) for expert in range(16) if expert != EXPERT]
        values = tracing.restored(nano, one, [(0, torch.zeros_like(one.noise)), *silent])
    own = result.isel(cell=0)
    assert str(own["cell"].item()) == f"layer {LAYER} expert {EXPERT}, generated tokens"
    assert float(own["change"]) == pytest.approx(float(own["layer"]), abs=1e-3), "alone, it is all of its layer"
    assert float(own["low"]) > 0
    assert float(own["p_rank"]) <= 0.05
    assert float(own["recovery"]) > 0.1
    np.testing.assert_array_equal(np.delete(estimates[:, LAYER], EXPERT, 1), 0)
    np.testing.assert_allclose(values[1:], values[0], atol=1e-4, err_msg="the negative control: silent experts")
    assert "more than controls" in result.attrs["summary"]
    assert result.attrs["prompts"] == 7, "the prompts that were measured, not those of the screening"
    assert all(item.draw().data for item in figures.gallery({"experts": result}).values())


def test_the_clean_value_is_that_of_an_ordinary_pass_and_everything_restored_is_clean(
    nano: GptOss, rows: list[Transcript]
) -> None:
    one = tracing.traced(nano, rows[1], 3.0, 1)
    clean = float(logprobs(nano, [rows[1]], final_tokens(nano))[0])
    assert tracing._clean(nano, one) == pytest.approx(clean, abs=1e-3)
    noisy = tracing.restored(nano, one, [(0, torch.zeros_like(one.noise))])[0]
    assert noisy < clean - 1
    last = nano.cfg.n_layers - 1
    quiet = tracing._Traced(one.row, one.tokens, one.noise, one.kind, (one.experts[1],) * 2, (one.wrote[1],) * 2)
    nothing = tracing.restored(nano, quiet, [(last, quiet.difference(last, None))])[0]
    assert nothing == pytest.approx(noisy, abs=1e-4)
    words = nano.tokenizer.decode(rows[1].tokens[one.kind.numpy() == 0].tolist())
    assert words.split()[0] in ("home", "sort", "reverse")


def test_controls_have_the_norm_and_come_from_other_sequences(nano: GptOss, rows: list[Transcript]) -> None:
    every = [tracing.traced(nano, row, 3.0, i) for i, row in enumerate(rows[:3])]
    pools = tracing._directions(every, LAYER)
    for pool in pools:
        np.testing.assert_allclose(pool.norm(dim=-1).numpy(), 1, atol=1e-5)
    own = tracing._directions(every[:1] + every[:1], LAYER)[0]
    assert not any((pools[0] @ v).max() > 1 - 1e-6 for v in own[:20])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_restorations_that_are_random_are_rarely_called_more_than_controls(
    nano: GptOss, rows: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Null: what each expert restores is drawn as its controls are, so that its rank p is uniform.

    Negative control: beside controls of a third of the norm, to first order, many of them would be called.

    `pytest --long -s -k random_are_rarely tests/experiments/test_expert_tracing.py` prints the rates.
    """
    real, directions = tracing._Traced.difference, tracing._directions
    pools: dict[int, dict[int, torch.Tensor]] = {}
    rng = torch.Generator().manual_seed(0)

    def drawn(one: tracing._Traced, layer: int, expert: int | None) -> torch.Tensor:
        own = real(one, layer, expert)
        if expert is None:
            return own
        pool = pools[layer][id(one)]
        chosen = pool[torch.randint(len(pool), (len(own),), generator=rng)]
        return chosen.to(own) * own.norm(dim=-1, keepdim=True)

    def remembered(every: list[tracing._Traced], layer: int, most: int = 256) -> list[torch.Tensor]:
        own = directions(every, layer, most)
        pools[layer] = {id(one): pool for one, pool in zip(every, own, strict=True)}
        return own

    monkeypatch.setattr(tracing._Traced, "difference", drawn)
    monkeypatch.setattr(tracing, "_directions", remembered)
    cells = [tracing.Cell(GENERATED, layer, expert) for layer, expert in ((1, 5), (2, 9), (LAYER, EXPERT))]
    trials = 24
    families = 0
    ranks: list[float] = []
    smaller: list[float] = []
    for seed in range(trials):
        result = tracing._confirmed(nano, rows[:6], cells, 3.0, 20, seed)
        families += bool(((result["p_family"] <= 0.05) & (result["distance"] > 0) & (result["low"] > 0)).any())
        ranks += result["p_rank"].values.tolist()
        sides = zip(result["change"].values, result["random"].values.T, strict=True)
        smaller += [rank(float(change), random / 3).p for change, random in sides]
    ranked = np.mean(np.array(ranks) <= 0.05)
    quarters = np.quantile(ranks, [0.25, 0.5, 0.75])
    print(
        f"families called {families / trials:.3f}, rank p ≤ 0.05 {ranked:.3f}, quartiles of p {quarters.round(2)}, "
        f"beside controls of a third of the norm {np.mean(np.array(smaller) <= 0.05):.3f}"
    )
    assert families <= 4, "of 24: 5 % and chance"
    assert ranked <= 0.1
    np.testing.assert_allclose(quarters, [0.25, 0.5, 0.75], atol=0.15)
    assert np.mean(np.array(smaller) <= 0.05) > 0.25, "negative control"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"noise": 0.0}, "noise=0, cells=5"), ({"cells": 0}, "cells=0"), ({"controls": 5}, "controls=5: at least 20")],
)
def test_wrong_options_are_refused(nano: GptOss, rows: list[Transcript], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tracing.experiment(nano, rows, **options)
    with pytest.raises(InputError, match="prompts in one half"):
        tracing.experiment(nano, rows[:6])
