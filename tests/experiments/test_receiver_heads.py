"""Receiver heads: a head that gathers attention on one sentence is found, and heads that attend at random are not.

Also tests `workbench.figures.receiver_heads`.
"""

from dataclasses import replace

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
from workbench.figures import receiver_heads as figures
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


@pytest.mark.parametrize("ranked", [True, False])
def test_a_planted_receiver_head_has_kurtosis_beyond_chance_and_random_heads_have_not(ranked: bool) -> None:
    rng = np.random.default_rng(0)

    def measured(values: np.ndarray) -> np.ndarray:
        return receiver_heads.kurtosis(receiver_heads._scored_rows(values, APART, ranked), APART, 40, rng)

    planted = np.stack([measured(attention(rng, planted=20.0)) for _ in range(30)])
    excess = planted[:, 0] - planted[:, 1]
    error = excess.std(0, ddof=1) / np.sqrt(30)
    assert excess[:, 0].mean() > 5 * error[0]
    assert np.abs(excess[:, 1:].mean(0) / error[1:]).max() < 3.5, "null: five heads that attend at random"
    late = np.tril(np.tile(np.arange(SENTENCES) ** 2.0 + 1, (1, SENTENCES, 1)))
    ordered = measured(late)
    assert ordered[0, 0] < 0, "negative control: a gradient along the analysis is not a receiver"
    near = np.tril(rng.gamma(2.0, size=(1, SENTENCES, SENTENCES)))
    near[0, np.arange(APART, SENTENCES), np.arange(SENTENCES - APART)] = 0  # too near by one, which must not count
    scored = receiver_heads._scored_rows(near, APART + 1, ranked)
    assert np.isnan(scored[0, np.arange(APART, SENTENCES), np.arange(SENTENCES - APART)]).all()


def test_vertical_scores_are_column_means_of_rows_that_are_far_enough() -> None:
    """A loop as the oracle. Negative control: all rows below the diagonal."""
    values = attention(np.random.default_rng(3), heads=2)
    scores = receiver_heads.vertical_scores(receiver_heads._scored_rows(values, APART, False), APART)
    rows = range(APART + 1, SENTENCES)  # of fewer rows none has two sentences to compare
    plain = [
        [np.mean([head[row, column] for row in rows if row - column >= APART]) for column in range(SENTENCES - APART)]
        for head in values
    ]
    np.testing.assert_allclose(scores, plain)
    near = receiver_heads.vertical_scores(receiver_heads._scored_rows(values, 1, False), 1)
    assert not np.allclose(near[:, : SENTENCES - APART], plain), "negative control"


def test_attention_of_sentences_is_that_of_their_tokens() -> None:
    """An independent mean of the pattern. Negative control: sums in place of means."""
    model = wb.load("nano", dtype=torch.float32)
    one = next(a for row in rows() if (a := analysis_of(row, model.tokenizer)) is not None)
    weights = receiver_heads.sentence_attention(model, one)
    pattern = load(model, one.row.tokens.tolist(), layers=[1])["pattern"].sel(layer=1).values
    spans = [slice(a, b) for a, b in zip(one.cuts, one.cuts[1:], strict=False)]
    plain = np.array([[pattern[:, i, j].mean((1, 2)) for j in spans] for i in spans]).transpose(2, 0, 1)
    np.testing.assert_allclose(weights[1], plain, atol=1e-5)
    sums = np.array([[pattern[:, i, j].sum((1, 2)) for j in spans] for i in spans]).transpose(2, 0, 1)
    assert not np.allclose(weights[1], sums, atol=1e-2), "negative control"


def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [r for r in every if r.effort == "high" and r.meta["task"] in ("product", "chain")][:8]


@FEW
def test_a_head_of_nano_that_attends_to_one_sentence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = wb.load("nano", dtype=torch.float32), np.random.default_rng(0)

    def planted(model: GptOss, one: Analysis) -> list[np.ndarray]:
        n, heads = one.n_sentences, model.cfg.n_heads
        layers = [np.tril(rng.gamma(2.0, size=(heads, n, n))) for _ in range(model.cfg.n_layers)]
        layers[2][1, :, 1] += 30
        return layers

    result = receiver_heads.experiment(model, rows(), apart=2, shuffles=20)["heads"]
    assert result["change"].shape == (model.cfg.n_layers, model.cfg.n_heads)
    monkeypatch.setattr(receiver_heads, "sentence_attention", planted)
    both = receiver_heads.experiment(model, rows(), apart=2, shuffles=20, heads=1)
    result, sentences = both["heads"], both["sentences"]
    assert float(sentences["score"].where(sentences["number"] == 1).mean()) > 1.5, "the sentence that is attended to"
    assert float(sentences["score"].where(sentences["number"] != 1).max()) < 1.5
    assert all(item.draw().data for item in figures.gallery(both).values())
    best = np.unravel_index(np.argmax(result["change"].values), result["change"].shape)
    assert best == (2, 1)
    assert "layer 2 head 1" in result.attrs["summary"]


@FEW
def test_a_head_that_attends_to_the_first_sentence_is_named_and_prompts_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three of eight analyses are of one prompt. Negative controls: other heads, and every analysis as a prompt."""
    model, rng = wb.load("nano", dtype=torch.float32), np.random.default_rng(0)
    of_sequence: dict[str, list[np.ndarray]] = {}

    def planted(model: GptOss, one: Analysis) -> list[np.ndarray]:
        if one.row.id not in of_sequence:
            n, heads = one.n_sentences, model.cfg.n_heads
            layers = [np.tril(rng.gamma(2.0, size=(heads, n, n))) for _ in range(model.cfg.n_layers)]
            layers[2][1, :, 0] += 30
            of_sequence[one.row.id] = layers
        return of_sequence[one.row.id]

    monkeypatch.setattr(receiver_heads, "sentence_attention", planted)
    every = rows()
    few = [replace(row, prompt_id="one") if i < 3 else row for i, row in enumerate(every)]
    result, ungrouped = (receiver_heads.experiment(model, r, apart=2, shuffles=20)["heads"] for r in (few, every))
    assert float(result["first"].sel(layer=2, head=1)) == 1
    assert float(result["first"].sel(layer=0).max()) < 1, "negative control"
    np.testing.assert_allclose(result["kurtosis"] - result["shuffled"], result["change"], atol=1e-12)
    assert not np.allclose(result["kurtosis"], ungrouped["kurtosis"]), "negative control"
    assert "layer 2 head 1" in result.attrs["summary"]
    assert "most to the first sentence in 100% of analyses" in result.attrs["summary"]


def test_wrong_options_are_refused() -> None:
    model = wb.load("nano", dtype=torch.float32)
    with pytest.raises(InputError, match="apart=0"):
        receiver_heads.experiment(model, rows(), apart=0)
    with pytest.raises(InputError, match="scores='sums', heads=16: expected ranks or attention"):
        receiver_heads.experiment(model, rows(), scores="sums")
    with pytest.raises(InputError, match="prompts have an analysis of 40 sentences or more"):
        receiver_heads.experiment(model, rows(), apart=36)
