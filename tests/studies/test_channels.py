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
    found = channels.geometry(run, "hook_resid_post", "analysis", "final")
    assert found["auc"][1] > 0.9
    assert abs(float(found["auc"][0]) - 0.5) < 0.08
    assert abs(float(found["selectivity"][0])) < 0.1
    assert found["distance"][1] > 3 * found["distance"][0]
    assert abs(float(found["cka"][0, 1]) - float(found["cka"][1, 0])) < 1e-9
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
