"""Router prediction: routing that follows tokens or bigrams is predicted by those, and noise by nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.figures import default
from workbench.studies import router_prediction
from workbench.studies.probe_folds import ridge
from workbench.studies.probes import bigrams, previous_ids
from workbench.studies.router_prediction import study

E, K, WORDS = 8, 2, 5


class Run:
    """Layer 0 routes by token, layer 1 by bigram, layer 2 by the experts of layer 1 alone, layer 3 at random."""

    path, digest = "run.zarr", "planted"
    model = {"n_layers": 4, "num_experts": E, "experts_per_token": K}  # noqa: RUF012 - as those of runs

    def __init__(self, seed: int, n_prompts: int = 12, length: int = 60) -> None:
        rng = np.random.default_rng(seed)
        n = n_prompts * length
        ids = rng.integers(0, WORDS, n)
        before = np.roll(ids, 1)
        table = np.array([rng.permutation(E)[:K] for _ in range(WORDS * WORDS)])
        shuffled = np.array([rng.permutation(E)[:K] for _ in range(n)])
        follows = rng.permutation(E)
        first = np.where(rng.random(n)[:, None] < 0.8, table[ids], shuffled)
        second = np.where(rng.random(n)[:, None] < 0.6, table[ids * WORDS + before], shuffled)
        third = follows[second]
        last = np.array([rng.permutation(E)[:K] for _ in range(n)])
        self.sequences = pd.DataFrame(
            {"id": [f"s{i}" for i in range(n_prompts)], "prompt_id": [f"p{i}" for i in range(n_prompts)]}
        )
        sequence = np.repeat(np.arange(n_prompts), length)
        self._block = {
            "sequence": sequence,
            "id": ids,
            "channel": np.full(n, 2),
            "position": np.tile(np.arange(length), n_prompts),
            "experts": np.stack([first, second, third, last]),
        }
        self.spec = SimpleNamespace(selected=[])

    def blocks(self, *names: str, layer: int = 0) -> Any:
        yield self._block


def test_routing_is_predicted_by_what_causes_it_and_noise_by_nothing() -> None:
    result = study(Run(0))["recall"]  # type: ignore[arg-type]
    recall = result["recall"].to_pandas()
    assert recall.loc[0, "token"] > recall.loc[0, "load"] + 0.3
    assert recall.loc[1, "bigram"] > recall.loc[1, "token"] + 0.15
    better = (result["q"] < 0.05) & (result["beyond_bigram_low"] > 0)
    assert bool(better.sel(layer=2, predictor="layer before"))
    assert recall.loc[2, "layer before"] > 0.99
    assert not better.sel(layer=3).any(), "the negative control: random experts"
    assert abs(recall.loc[3] - K / E).max() < 0.06
    assert "beyond the bigram: layer before" in result.attrs["summary"]
    assert all(item.draw().data for item in default.gallery({"recall": result}).values())


def test_regressions_know_the_load_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 4 and 5 are at nine tenths of tokens, whatever came before. Negative control: scores without the load."""
    run, rng = Run(1), np.random.default_rng(1)
    usual = rng.random(run._block["experts"].shape[1]) < 0.9
    run._block["experts"][3] = np.where(usual[:, None], [4, 5], run._block["experts"][3])
    recall = study(run)["recall"]["recall"].sel(layer=3).to_pandas()  # type: ignore[arg-type]
    assert recall["load"] > 0.85
    assert recall["layer before"] > recall["load"] - 0.03

    def centred(x: Any, y: Any) -> Any:
        return lambda other: ridge(x, y)(other) - y.mean(0)

    monkeypatch.setattr(router_prediction, "ridge", centred)
    blind = study(run)["recall"]["recall"].sel(layer=3).to_pandas()  # type: ignore[arg-type]
    assert blind["layer before"] < recall["load"] - 0.2, "negative control"


def test_recalls_of_prompts_with_habits_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Null: routing depends on nothing but the prompt, so that every predictor has recall k / E.

    Prompts have experts and lengths of their own. Negative control: prompts counted as if no other was fitted on them.
    """
    rng, n, recalls = np.random.default_rng(0), 24, []
    for _ in range(60):
        prompt = np.repeat(np.arange(n), rng.integers(10, 30, n))
        rows, fold = len(prompt), (rng.permutation(n) % router_prediction.FOLDS)[prompt]
        ids, habit = rng.integers(0, WORDS, rows), rng.dirichlet(np.full(E, 5.0), n)
        chosen = np.argsort(rng.gumbel(size=(rows, E)) + np.log(habit)[prompt], axis=1)[:, -K:]
        noise = {"layer before": router_prediction._one_hot(rng.integers(0, E, (rows, 1)), E)}
        pair, truth = bigrams(ids, previous_ids(ids, prompt)), router_prediction._one_hot(chosen, E)
        hits = router_prediction._recalls(truth, K, ids, pair, noise, fold)
        recalls.append([np.bincount(prompt, own) / np.bincount(prompt) for own in hits.values()])

    def covered_and_shown() -> tuple[float, float]:
        values = [np.array(own).T[:, None] for own in recalls]  # prompt, layer, predictor
        own = [router_prediction._tested(v) for v in values]
        beyond = [router_prediction._tested(v - v[..., [2]]) for v in values]
        covered = np.mean([(one["low"] <= K / E) & (one["high"] >= K / E) for one in own])
        return float(covered), float(np.mean([one["p"][0, [0, 1, 3]] <= 0.05 for one in beyond]))

    covered, shown = covered_and_shown()
    assert covered >= 0.92
    assert shown <= 0.07
    monkeypatch.setattr(router_prediction, "_SHARED", 1.0)
    covered, shown = covered_and_shown()
    assert covered < 0.9, "negative control"
    assert shown > 0.07


def test_nano_is_predicted_better_by_its_tokens_than_by_load() -> None:
    result = study(wb.open_run(DATA / "demo.zarr"), max_tokens=1500)["recall"]
    recall = result["recall"].to_pandas()
    assert (recall["token"] > recall["load"]).all()
    assert recall.loc[0, "token"] > 0.6


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(InputError, match="3 prompts: at least 5 are needed"):
        study(Run(0, n_prompts=3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'hook_resid_post' is not in run\.zarr"):
        study(Run(0), hook="hook_resid_post")  # type: ignore[arg-type]
