"""Receiver heads: a head that gathers attention on one sentence is found, and heads that attend at random are not."""

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import receiver_heads
from workbench.experiments.attention_patterns import load
from workbench.experiments.branching import Analysis, analysis_of
from workbench.experiments.from_run import transcripts
from workbench.figures import experiments as figures
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

APART, SENTENCES = 4, 14
FEW = pytest.mark.filterwarnings("ignore:only .* prompts")


def attention(rng: np.random.Generator, heads: int = 6, planted: float = 0.0) -> np.ndarray:
    """Random attention between sentences; head 0 gives the third sentence more of it."""
    drawn = rng.gamma(2.0, size=(heads, SENTENCES, SENTENCES))
    drawn[0, :, 2] += planted
    lower = np.tril(drawn)
    return np.asarray(lower / lower.sum(-1, keepdims=True))


def test_a_planted_receiver_head_has_kurtosis_beyond_chance_and_random_heads_have_not() -> None:
    rng = np.random.default_rng(0)
    planted = np.stack([receiver_heads.kurtosis(attention(rng, planted=20.0), APART, 40, rng) for _ in range(30)])
    excess = planted[:, 0] - planted[:, 1]
    error = excess.std(0, ddof=1) / np.sqrt(30)
    assert excess[:, 0].mean() > 5 * error[0]
    assert np.abs(excess[:, 1:].mean(0) / error[1:]).max() < 3.5, "null: five heads that attend at random"
    late = np.tril(np.tile(np.arange(SENTENCES) ** 2.0 + 1, (1, SENTENCES, 1)))
    ordered = receiver_heads.kurtosis(late, APART, 40, rng)
    assert ordered[0, 0] < 0, "negative control: a gradient along the analysis is no receiver"


def test_attention_of_sentences_is_that_of_their_tokens() -> None:
    """An independent mean of the pattern. Negative control: sums in place of means."""
    model = wb.load("nano", dtype=torch.float32)
    one = next(a for row in rows() if (a := analysis_of(row, model.tokenizer)) is not None)
    found = receiver_heads.sentence_attention(model, one)
    pattern = load(model, one.row.tokens.tolist(), layers=[1])["pattern"].sel(layer=1).values
    spans = [slice(a, b) for a, b in zip(one.cuts, one.cuts[1:], strict=False)]
    plain = np.array([[pattern[:, i, j].mean((1, 2)) for j in spans] for i in spans]).transpose(2, 0, 1)
    np.testing.assert_allclose(found[1], plain, atol=1e-5)
    sums = np.array([[pattern[:, i, j].sum((1, 2)) for j in spans] for i in spans]).transpose(2, 0, 1)
    assert not np.allclose(found[1], sums, atol=1e-2), "negative control"


def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [r for r in every if r.effort == "high" and r.meta["task"] in ("product", "chain")][:8]


@FEW
def test_a_head_of_nano_that_attends_to_one_sentence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = wb.load("nano", dtype=torch.float32), np.random.default_rng(0)

    def planted(model: GptOss, one: Analysis) -> list[np.ndarray]:
        n, heads = 18, model.cfg.n_heads
        layers = [np.tril(rng.gamma(2.0, size=(heads, n, n))) for _ in range(model.cfg.n_layers)]
        layers[2][1, :, 1] += 30
        return layers

    found = receiver_heads.experiment(model, rows(), apart=2, shuffles=20)["heads"]
    assert found["change"].shape == (model.cfg.n_layers, model.cfg.n_heads)
    assert all(item.draw().data for item in figures.gallery({"heads": found}).values())
    monkeypatch.setattr(receiver_heads, "sentence_attention", planted)
    found = receiver_heads.experiment(model, rows(), apart=2, shuffles=20)["heads"]
    best = np.unravel_index(np.argmax(found["change"].values), found["change"].shape)
    assert best == (2, 1)
    assert "layer 2 head 1" in found.attrs["summary"]


def test_wrong_options_are_refused() -> None:
    model = wb.load("nano", dtype=torch.float32)
    with pytest.raises(InputError, match="apart=0"):
        receiver_heads.experiment(model, rows(), apart=0)
    with pytest.raises(InputError, match="prompts have an analysis of 40 sentences or more"):
        receiver_heads.experiment(model, rows(), apart=36)
