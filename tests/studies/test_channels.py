"""The channels study: planted directions are found and nothing where there is none; CKA against its formula."""

import dataclasses

import numpy as np
import pytest

from workbench.studies import channels
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


def with_activations(run: SyntheticTokens, seed: int, shift: float, position: float = 0.0):
    """Recorded activations with a planted direction between channels, and one along position."""
    from types import SimpleNamespace

    rng = np.random.default_rng(seed)
    n, d = len(run.tokens["channel"]), 12
    direction = np.eye(d)[3]
    prompt = rng.normal(0, 1, (len(run.sequences), d))[run.tokens["sequence"]]
    x = rng.normal(size=(2, n, d)) + prompt
    x[1] += shift * (run.tokens["channel"] == 4)[:, None] * direction
    x[1] += position * run.tokens["position"][:, None] * np.eye(d)[5]
    spec = SimpleNamespace(activations=(SimpleNamespace(hook="hook_resid_post", layers=(0, 1), reduce="raw"),))

    @dataclasses.dataclass(frozen=True)
    class Recorded(SyntheticTokens):
        @property
        def spec(self):
            return spec

    ids = np.random.default_rng(9).integers(0, 40, n)
    tokens = {"id": ids} | dict(run.tokens) | {"hook_resid_post": x.astype(np.float32)}
    return Recorded(run.digest, run.sequences, run.model, tokens, run.truth)


def test_a_probe_finds_a_planted_direction_and_nothing_where_there_is_none():
    run = with_activations(planted_tokens(n_prompts=40), 0, shift=3.0)
    result = channels.geometry(run, "hook_resid_post", "analysis", "final")
    assert result["auc"][1] > 0.9
    assert abs(float(result["auc"][0]) - 0.5) < 0.08
    assert abs(float(result["selectivity"][0])) < 0.1
    assert result["distance"][1] > 3 * result["distance"][0]
    assert abs(float(result["cka"][0, 1]) - float(result["cka"][1, 0])) < 1e-9
    along = with_activations(planted_tokens(n_prompts=40), 0, shift=0.0, position=0.3)
    halves = channels.geometry(along, "hook_resid_post", "analysis", "final")
    assert halves["auc_half"][1] > 0.8, "position alone: the halves of analysis show it"


def test_debiased_cka_against_the_plain_formula_and_its_bias():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60, 300))

    def plain(a, b):
        k, m = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        n = len(k)
        one = np.ones(n)
        return (
            np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
        ) / (n * (n - 3))

    assert channels._hsic(x, y) == pytest.approx(plain(x, y))
    assert abs(channels.debiased_cka(x, y)) < 0.05
    assert channels.debiased_cka(x, 3 * x) == pytest.approx(1)
    centred = [v - v.mean(0) for v in (x, y)]
    biased = np.linalg.norm(centred[0].T @ centred[1]) ** 2 / np.prod([np.linalg.norm(v.T @ v) for v in centred])
    assert biased > 0.5, "what the debiasing is for"


def test_permuting_prompts_shows_the_bias_of_cka_on_clustered_tokens():
    """Of unrelated layers. Negative control: the debiased CKA alone is far above 0, as tokens of a prompt are alike."""
    biased, corrected, related = [], [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(8, 25, 20)
        prompt = np.repeat(np.arange(20), sizes)
        x, y = (rng.normal(size=(20, 12))[prompt] + 0.5 * rng.normal(size=(len(prompt), 12)) for _ in range(2))
        values = np.stack([x, y, x @ rng.normal(size=(12, 12))])
        bias = channels.permuted_cka(values, prompt, rng, permutations=8)
        biased.append(channels.debiased_cka(x, y))
        corrected.append(biased[-1] - bias[0, 1])
        related.append(channels.debiased_cka(x, values[2]) - bias[0, 2])
    assert np.mean(biased) > 0.2, "negative control"
    assert abs(np.mean(corrected)) < 0.08
    assert np.mean(related) > 0.3


def test_prompts_are_exchanged_as_units():
    prompt = np.repeat(np.arange(6), [3, 5, 4, 1, 6, 2])
    moved = channels.exchange_prompts(prompt, np.random.default_rng(0))
    taken = [np.unique(prompt[moved[prompt == one]]) for one in range(6)]
    assert sorted(int(one[0]) for one in taken) == list(range(6))
    assert all(len(one) == 1 for one in taken)


def test_a_few_outliers_make_cka_and_not_its_robust_variant():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200, 20))
    x[:6] += 100
    y[:6] += 100
    assert channels.debiased_cka(x, y) > 0.9, "negative control"
    assert channels.debiased_cka(channels.unit_tokens(x), channels.unit_tokens(y)) < 0.2
