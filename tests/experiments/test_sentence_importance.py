"""Branching: a planted decisive sentence is found, nothing else is, nulls are calibrated, and files resume."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import sentence_importance
from workbench.experiments.branch_answers import Answered
from workbench.experiments.branch_importance import commitment, difference_of_shares, importance, similarity
from workbench.experiments.branching import BranchPoint, analysis_of, branch_points, sample, sentence_ends, token_points
from workbench.experiments.from_run import transcripts
from workbench.figures import sentence_importance as figures
from workbench.harmony.transcripts import Transcript

DECISIVE = 2  # of five sentences
RETURNS = 0.3  # probability of the sentence q at each later place
OPEN, CLOSE, END = (
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|return|>",
)


@functools.cache
def tokenizer_of_nano() -> Any:
    return wb.load("nano").tokenizer


class Writer:
    """A fake model: it writes five one-letter sentences, and its answer is the letter of one of them.

    Each letter is x or y at random. Without a decisive sentence the answer is random, too.
    """

    def __init__(self, decisive: int | None = DECISIVE) -> None:
        self.tokenizer, self.cfg = tokenizer_of_nano(), SimpleNamespace(n_ctx=1024)
        self.checkpoint, self.decisive, self.calls = SimpleNamespace(digest="writer"), decisive, 0

    def generate(self, prompts: list[list[int]], *, samples: int, seed: list[int], **_: Any) -> list[list[int]]:
        self.calls += 1
        rows = [ids for ids in prompts for _ in range(samples)]
        return [self._continue(ids, np.random.default_rng(s)) for ids, s in zip(rows, seed, strict=True)]

    def _continue(self, ids: Sequence[int], rng: np.random.Generator) -> list[int]:
        _, _, written = self.tokenizer.decode(list(ids)).partition(OPEN)
        analysis, closed, _ = written.partition(CLOSE)
        letters = [s for s in analysis.split(";") if s]
        new = ";" if analysis and not closed and not analysis.endswith(";") else ""
        while not closed and len(letters) < 5:
            letters.append(self._letter(letters, rng))
            new += letters[-1] + ";"
        answer = self._answer(letters, rng)
        return self.ids(f"{new}{'' if closed else CLOSE}{answer}{END}")

    def _letter(self, letters: Sequence[str], rng: np.random.Generator) -> str:
        return str(rng.choice(["x", "y"]))

    def _answer(self, letters: Sequence[str], rng: np.random.Generator) -> str:
        if self.decisive is None:
            return str(rng.choice(["x", "y"]))
        return letters[self.decisive] if len(letters) > self.decisive else "z"

    def ids(self, text: str) -> list[int]:
        """The ids of a text with special tokens."""
        special = self.tokenizer.special
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
        return [i for p in parts if p for i in ([special[p]] if p in special else self.tokenizer.encode(p))]

    def transcript(self, name: str, letters: str, answer: str) -> Transcript:
        start = "<|start|>user<|message|>say x<|end|><|start|>assistant"
        text = f"{start}{OPEN}{''.join(c + ';' for c in letters)}{CLOSE}{answer}{END}"
        ids = np.array(self.ids(text), np.int32)
        return Transcript(name, name, "high", ids, len(self.ids(start)), "x")


class Returning(Writer):
    """It answers q where a sentence is q, wherever; after a first sentence that is not, it writes q with p of 0.3."""

    def _letter(self, letters: Sequence[str], rng: np.random.Generator) -> str:
        p = 0.5 if not letters else 0.0 if "q" in letters else RETURNS
        return "q" if rng.random() < p else str(rng.choice(["x", "y"]))

    def _answer(self, letters: Sequence[str], rng: np.random.Generator) -> str:
        return "q" if "q" in letters else "z"


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer()


@pytest.fixture(scope="module")
def rows(writer: Writer) -> list[Transcript]:
    letters = ("xyxyx", "yxyxx", "xxxxx", "yyyyy", "xyyxy", "yyxxy")
    return [writer.transcript(f"c{i}", text, text[DECISIVE]) for i, text in enumerate(letters)]


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_the_sentence_that_decides_is_found_and_no_other(writer: Writer, rows: list[Transcript]) -> None:
    result = sentence_importance.experiment(
        writer, rows, samples=40, edits="filler,removed,mistake,paraphrase", rounds=2
    )  # type: ignore[arg-type]
    sentences = result["sentences"]
    assert sentences.sizes["sentence"] == 30
    decisive = sentences["number"].values == DECISIVE
    assert (sentences["q"].values[decisive] <= 0.05).all()
    assert (sentences["low"].values[decisive] > 0.5).all()
    assert (sentences["high"].values[decisive] >= 0.95).all(), "the truth, an effect of 1, is near the interval"
    assert (sentences["q"].values[~decisive] <= 0.05).sum() <= 1
    covers = (sentences["low"] <= 0) & (sentences["high"] >= 0)
    assert covers.values[~decisive].mean() > 0.8
    forced = sentences["forced"].values
    assert (forced[sentences["number"].values >= DECISIVE] == 1).all()
    assert (forced[sentences["number"].values < DECISIVE] == 0).all()
    np.testing.assert_allclose(result["conversations"]["committed"], 3 / 5)
    assert np.median(sentences["filler_effect"].values[decisive]) > 0.2
    assert (sentences["mistake_low"].values[decisive] > 0.5).all(), "another letter is another answer"
    assert np.isnan(sentences["paraphrase_effect"].values).all(), "a letter alone has no paraphrase in the list"
    assert (sentences["kl_low"].values[decisive] > 0).all()
    assert (result["conversations"]["boundary"] == 3).all()
    assert np.isfinite(sentences["removed_p"].values[sentences["number"].values < 4][1:]).any()
    assert "change the distribution of answers" in sentences.attrs["summary"]
    assert "  mistake: 6 of 30 sentences change the answers" in sentences.attrs["summary"]
    assert "  paraphrase: 0 of 0 sentences change the answers; nowhere possible." in sentences.attrs["summary"]
    drawn = figures.gallery(result)
    assert len(drawn) == 7
    assert all(item.draw().data and len(item.table()) for item in drawn.values())


def test_answers_that_no_sentence_decides_have_no_decisive_sentence(rows: list[Transcript]) -> None:
    writer = Writer(decisive=None)
    result = sentence_importance.experiment(writer, rows[:4], samples=30)["sentences"]  # type: ignore[arg-type]
    assert float(result["q"].min()) > 0.01


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_a_sentence_that_comes_back_is_important_once_it_stays_out() -> None:
    """The planted truth: without q the answer is never q. Negative control: resampling its place alone misses that."""
    writer = Returning()
    rows = [writer.transcript("c0", "qxyxy", "q")]
    result = sentence_importance.experiment(writer, rows, samples=60, rounds=8)["sentences"]  # type: ignore[arg-type]
    first = result.isel(sentence=0)
    assert float(first["returned"]) == pytest.approx(1 - (1 - RETURNS) ** 4, abs=0.2)
    assert float(first["effect"]) < 0.5
    assert float(first["absent_effect"]) == 1
    assert float(first["absent_low"]) > 0.85
    assert float(first["resamplings"]) > 0.5
    assert float(first["absent"]) >= 50
    alone = sentence_importance.experiment(writer, rows, samples=60)["sentences"]  # type: ignore[arg-type]
    assert float(alone["absent"][0]) < float(first["absent"])
    assert float(alone["absent_effect"][0]) == 1
    assert float(alone["resamplings"][0]) == 0


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_the_token_that_decides_is_found(writer: Writer, rows: list[Transcript]) -> None:
    result = sentence_importance.experiment(writer, rows[:2], samples=30, unit="token")["sentences"]  # type: ignore[arg-type]
    assert result.sizes["sentence"] == 2 * 10
    decisive = result["number"].values == 2 * DECISIVE  # every second token is a semicolon, which is never another
    assert (result["low"].values[decisive] > 0.5).all()
    assert (result["other"].values[result["number"].values % 2 == 1] == 0).all()
    assert np.isnan(result["returned"].values).all()
    points = token_points(rows[0], [5, rows[0].n_prompt, len(rows[0].tokens)])
    assert [len(p.ids) for p in points] == [5, rows[0].n_prompt, len(rows[0].tokens)]
    with pytest.raises(InputError, match="position 0: c0 has"):
        token_points(rows[0], [0])


def test_comparing_with_the_wrong_sentence_would_miss_it(writer: Writer, rows: list[Transcript]) -> None:
    """Negative control: sides shifted by one sentence give the decisive one no effect."""
    one = analysis_of(rows[0], writer.tokenizer)
    assert one is not None
    points = branch_points(one)
    branches = sample(writer, points, samples=40)  # type: ignore[arg-type]
    answered = Answered(writer.tokenizer, one, points, branches, 1.0)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    assert importance(*answered.sides(DECISIVE), 0, rng).p < 0.01
    shifted = (answered.answers["continue", DECISIVE], answered.answers["continue", DECISIVE - 1])
    assert importance(*shifted, 0, rng).p > 0.05


def test_p_is_uniform_without_a_difference_and_intervals_cover() -> None:
    rng = np.random.default_rng(1)
    p, covered, kl_covered = [], [], []
    truth = 0.3 * np.log(0.3 / 0.7) + 0.7 * np.log(0.7 / 0.3)
    for _ in range(150):
        sides = (rng.choice(2, 50, p=[0.7, 0.3]), rng.choice(2, 40, p=[0.3, 0.7]))
        different = importance(*sides, 0, rng, permutations=199)
        kl_covered.append(different.kl_low <= truth <= different.kl_high)
    assert np.mean(kl_covered) > 0.88
    for _ in range(300):
        with_sentence, other = rng.choice(4, 40, p=[0.5, 0.2, 0.2, 0.1]), rng.choice(4, 15, p=[0.5, 0.2, 0.2, 0.1])
        result = importance(with_sentence, other, 0, rng, permutations=199)
        p.append(result.p)
        covered.append(result.low <= 0 <= result.high)
        kl_covered.append(result.kl_low == 0)
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.085
    assert np.mean(covered) > 0.92
    assert np.mean(kl_covered[150:]) > 0.9, "the interval of equal sides begins at 0"
    assert np.isnan(importance(with_sentence, other[:4], 0, rng).p)
    equal = importance(np.zeros(20, int), np.ones(20, int), 0, rng)
    assert equal.kl_low < equal.kl < equal.kl_high, "an interval has a width also where all samples of a side are equal"
    effect, low, high = difference_of_shares(30, 30, 0, 30)
    assert (effect, high) == (1, pytest.approx(1))
    assert low < 0.95


def test_a_file_resumes_and_is_refused_to_another_job(writer: Writer, rows: list[Transcript], tmp_path: Path) -> None:
    one = analysis_of(rows[0], writer.tokenizer)
    assert one is not None
    points, store = branch_points(one), tmp_path / "run.branches.jsonl"
    complete = sample(writer, points, samples=10)  # type: ignore[arg-type]
    sample(writer, points[:5], samples=10, store=store)  # type: ignore[arg-type]
    before = writer.calls
    assert sample(writer, points, samples=10, store=store) == complete  # type: ignore[arg-type]
    assert 0 < writer.calls - before < 12
    before = writer.calls
    assert sample(writer, points, samples=10, store=store) == complete  # type: ignore[arg-type]
    assert writer.calls == before
    more = sample(writer, points[:3], samples=14, store=store)  # type: ignore[arg-type]
    assert more == sample(writer, points[:3], samples=14)  # type: ignore[arg-type]
    assert more[points[0].id][:10] == complete[points[0].id]
    assert sample(writer, points, samples=10, store=store) == complete  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"was started with temperature 1.0, and this call has 2.0: choose another file"
    ):
        sample(writer, points, samples=10, temperature=2.0, store=store)  # type: ignore[arg-type]
    other = [BranchPoint(p.conversation, p.sentence, p.kind, (*p.ids, 1)) for p in points[:1]]
    with pytest.raises(InputError, match="with another prefix"):
        sample(writer, other, samples=10, store=store)  # type: ignore[arg-type]


def test_a_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    row = transcripts(wb.open_run(DATA / "demo.zarr"))[0]
    points, options = token_points(row, [5]), {"samples": 1, "max_new_tokens": 1, "store": tmp_path / "s.jsonl"}
    sample(wb.load("nano", dtype=torch.float32), points, **options)
    with pytest.raises(InputError, match="was started with dtype float32, and this call has bfloat16"):
        sample(wb.load("nano", dtype=torch.bfloat16), points, **options)


def test_sentences_end_at_marks_and_not_in_numbers() -> None:
    assert sentence_ends(["So", " 3", ".", "5", ".", " Then", "?", " done"]) == [5, 7, 8]
    assert sentence_ends(["a", ";", "b", "\n\n", "c", ".”", " d"]) == [2, 4, 6, 7]
    assert sentence_ends(["计算", "。", "好"]) == [2, 3]
    assert similarity([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75
    assert similarity([], []) == 1
    assert commitment([True, False, True, True]) == 2
    assert commitment([True, True]) == 0


def test_sentences_of_nano_join_to_its_analysis_and_long_ones_are_grouped() -> None:
    tokenizer = wb.load("nano").tokenizer
    row = next(r for r in transcripts(wb.open_run(DATA / "demo.zarr")) if r.id == "product-00/high/0")
    one = analysis_of(row, tokenizer)
    assert one is not None
    assert one.n_sentences == 8
    assert one.answer == "696"
    assert tokenizer.decode(one.sentence(1)) == "2*9=81;"
    grouped = analysis_of(row, tokenizer, most=3)
    assert grouped is not None
    assert grouped.n_sentences == 3
    assert [t for i in range(3) for t in grouped.sentence(i)] == [t for i in range(8) for t in one.sentence(i)]
    low = next(r for r in transcripts(wb.open_run(DATA / "demo.zarr")) if r.id == "product-00/low/0")
    assert analysis_of(low, tokenizer) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "samples=5, similar=1: expected at least 10"),
        ({"similar": 2.0}, "similar=2: expected"),
        ({"temperature": 0.0}, "at temperature 0: expected"),
        ({"edits": "shuffled"}, "edits='shuffled': expected filler, removed, mistake, paraphrase"),
        ({"unit": "word"}, "unit='word', rounds=0: expected sentence or token"),
        ({"paraphrases": "host"}, "paraphrases=host needs a model at a host"),
        ({"paraphrases": "missing.jsonl"}, "paraphrases='missing.jsonl' cannot be read"),
    ],
)
def test_wrong_options_are_refused(
    writer: Writer, rows: list[Transcript], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sentence_importance.experiment(writer, rows, **options)  # type: ignore[arg-type]
