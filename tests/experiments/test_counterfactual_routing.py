"""Counterfactual routes: the router's own and equal experts change nothing, others do, where they should."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import counterfactual_routing as routing
from workbench.experiments.from_run import transcripts
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import route
from workbench.model.transformer import GptOss

LAYER = 1  # whose experts are made equal


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort == "low" and row.meta["task"] in ("recall", "sort", "reverse")][::3]


@contextmanager
def equal_experts(model: GptOss) -> Iterator[None]:
    """All experts of a layer are copies of its first."""
    experts = model.blocks[LAYER].mlp.experts
    held = [t for part in (experts.gate_up, experts.down) for t in (part.bias, part.blocks, part.scales)]
    before = [t.detach().clone() for t in held]
    with torch.no_grad():
        for t in held:
            t.copy_(t[:1].expand_as(t).clone())
    try:
        yield
    finally:
        with torch.no_grad():
            for t, old in zip(held, before, strict=True):
                t.copy_(old)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_equal_experts_make_every_random_route_equal_and_others_do_not(nano: GptOss, rows: list[Transcript]) -> None:
    with equal_experts(nano):
        result = routing.experiment(nano, rows, routes=3)["routes"]
    random = result.sel(which="random experts")["change"]
    assert abs(float(random.sel(layer=LAYER))) < 1e-5
    assert float(np.abs(random.drop_sel(layer=LAYER)).max()) > 0.05, "the negative control: layers whose experts differ"
    assert float(random.sel(layer=3)) < 0
    assert float(result["q"].sel(which="random experts", layer=LAYER)) > 0.05
    assert "of random routes are better" in result.attrs["summary"]


def test_the_routers_own_route_changes_nothing_and_only_one_token_is_rerouted(
    nano: GptOss, rows: list[Transcript]
) -> None:
    sequences, positions = routing.drawn_positions(nano, rows, "final", np.random.default_rng(0))
    where = routing._Positions(sequences, positions)
    base = routing.next_logprobs(nano, sequences, positions)
    same = routing.next_logprobs(nano, sequences, positions, route(2, lambda x, logits: logits, where))
    np.testing.assert_allclose(same, base, atol=1e-5)
    earlier = [max(at - 1, 0) for at in positions]
    rerouted = route(0, routing.random_experts(1), where)
    before, after = (routing.next_logprobs(nano, sequences, earlier, *edits) for edits in ((), (rerouted,)))
    np.testing.assert_allclose(before, after, atol=1e-5)
    changed = routing.next_logprobs(nano, sequences, positions, rerouted)
    assert np.abs(changed - base).max() > 1e-3
    for row, at, value in list(zip(sequences, positions, base, strict=True))[:3]:
        logits = nano(torch.from_numpy(row.tokens.astype(np.int64))[None])[0, at].log_softmax(-1)
        assert value == pytest.approx(float(logits[int(row.tokens[at + 1])]), abs=1e-4)


@pytest.fixture
def planted(nano: GptOss, monkeypatch: pytest.MonkeyPatch) -> Callable[..., xr.Dataset]:
    """The experiment with planted changes by sequence: 30 sequences of one prompt, and one of nine others."""
    prompts = ["often"] * 30 + [f"p{i}" for i in range(9)]

    def experiment(changes: Callable[[list[str]], np.ndarray], units: list[str] = prompts) -> xr.Dataset:
        rows = [Transcript(f"s{i}", unit, "", np.full(4 + i, i, np.int32), 1) for i, unit in enumerate(units)]
        monkeypatch.setattr(routing, "drawn_positions", lambda *_: (rows, [1] * len(rows)))
        before = np.zeros(len(rows))
        monkeypatch.setattr(routing, "next_logprobs", lambda *args: changes(prompts) if args[3:] else before)
        return routing.experiment(nano, rows, routes=2)["routes"]

    return experiment


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_each_prompt_counts_once_in_every_number(planted: Callable[..., xr.Dataset]) -> None:
    """Negative control: sequences as units, of which 30 of 39 are of one prompt."""
    better = {"often": 1.0}
    result = planted(lambda prompts: np.array([better.get(p, -1.0) for p in prompts]))
    for name, wanted in (("change", -0.8), ("better", 0.1), ("best", -0.8)):
        np.testing.assert_allclose(result[name], wanted)
    pooled = planted(
        lambda prompts: np.array([better.get(p, -1.0) for p in prompts]), units=[f"u{i}" for i in range(39)]
    )
    assert float(pooled["better"][0]) == pytest.approx(30 / 39)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_routes_without_an_effect_are_rarely_shown(planted: Callable[..., xr.Dataset]) -> None:
    """Every prompt has an effect of its own, around zero, in all cells. Negative control: sequences as units."""
    rng = np.random.default_rng(0)

    def shown(**options: list[str]) -> int:
        own: dict[str, float] = {}

        def changes(prompts: list[str]) -> np.ndarray:
            return np.array([own.setdefault(p, rng.normal()) for p in prompts]) + rng.normal(0, 0.1, len(prompts))

        return int((planted(changes, **options)["q"] <= 0.05).any())

    assert sum(shown() for _ in range(20)) <= 3
    assert sum(shown(units=[f"u{i}" for i in range(39)]) for _ in range(15)) > 5, "negative control"


def test_routers() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert routing.replaced(0)(logits, logits).topk(2).indices.tolist() == [[2, 1]]
    assert routing.replaced(1)(logits, logits).topk(2).indices.tolist() == [[0, 1]]
    random = routing.random_experts(0)(logits, logits)
    assert sorted(random[0].tolist()) == [0, 1, 2, 3]


def test_wrong_options_are_refused(nano: GptOss, rows: list[Transcript]) -> None:
    with pytest.raises(InputError, match="routes=1: at least 2"):
        routing.experiment(nano, rows, routes=1)
    with pytest.raises(InputError, match="channel='prompt': use analysis or final"):
        routing.experiment(nano, rows, channel="prompt")
    with pytest.raises(InputError, match="0 prompts have tokens of the analysis channel"):
        routing.experiment(nano, [r for r in rows if r.meta["task"] == "recall"], channel="analysis")
