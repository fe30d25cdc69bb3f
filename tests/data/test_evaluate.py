"""Evaluation asks what training never saw, marks exactly, and its card states what was measured.

Also tests `workbench.data.command`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from workbench.data import prompts
from workbench.data.card import card
from workbench.data.conversations import prompt_messages
from workbench.data.evaluate import accuracy, answers, evaluate, paired
from workbench.data.prompts import questions, rows
from workbench.data.tasks import FAMILIES
from workbench.data.train import Training, write
from workbench.harmony.rendering import EFFORTS, render
from workbench.harmony.transcripts import read_prompts
from workbench.model import load
from workbench.model.checkpoint import BUNDLED


def test_questions_are_different_and_of_the_test_split() -> None:
    asked = questions(30)
    assert all(problem.is_test for turns in asked for problem in turns)
    assert len({turns[-1] for turns in asked}) == 30 * len(FAMILIES)
    assert sum(len(turns) == 2 for turns in asked) == 3 * len(FAMILIES)


def test_questions_do_not_depend_on_how_many_are_asked() -> None:
    few, many = questions(4), questions(8)
    assert few[:4] == many[:4]


def test_prompts_can_be_read_and_are_those_in_the_repository(tmp_path: Path) -> None:
    prompts.main(tmp_path / "prompts.jsonl")
    read = read_prompts(tmp_path / "prompts.jsonl")
    assert [(p.id, p.messages, p.answer, p.meta) for p in read] == [tuple(row.values()) for row in rows()]
    bundled = Path(prompts.__file__).with_name("prompts.jsonl")
    assert bundled.read_text() == (tmp_path / "prompts.jsonl").read_text()


def test_wilson_s_interval_of_nine_in_ten() -> None:
    """Wilson (1927), by hand: centre (p + z²/2n) / (1 + z²/n)."""
    marked = pd.DataFrame({"task": "sum", "effort": "low", "right": [True] * 9 + [False], "tokens": 4})
    (cell,) = accuracy(marked).to_dict("records")
    z2, n, p = 1.959964**2, 10, 0.9
    half = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
    assert cell["low"] == pytest.approx((p + z2 / (2 * n) - half) / (1 + z2 / n), abs=1e-6)
    assert cell["high"] == pytest.approx((p + z2 / (2 * n) + half) / (1 + z2 / n), abs=1e-6)
    assert (cell["accuracy"], cell["n"], cell["new_tokens"]) == (0.9, 10, 4)


def test_a_paired_difference_counts_what_changed() -> None:
    before = pd.DataFrame({"right": [True, True, True, False, False]})
    after = pd.DataFrame({"right": [True, False, True, True, True]})
    change = paired(before, after)
    assert (change["lost"], change["gained"], change["difference"]) == (1, 2, pytest.approx(0.2))
    assert change["low"] < change["difference"] < change["high"]
    same = paired(before, before)
    assert same["low"] == same["high"] == 0


class Oracle:
    """A fake model that answers every prompt with a given final message, right or wrong."""

    def __init__(self, finals: list[str]) -> None:
        self.tokenizer = load(BUNDLED["nano"], device="cpu").tokenizer
        self.finals = finals

    def generate(self, rows: list[list[int]], **_: object) -> list[list[int]]:
        mark, encode = self.tokenizer.mark, self.tokenizer.encode
        finals, self.finals = self.finals[: len(rows)], self.finals[len(rows) :]
        return [[mark("channel"), *encode("final"), mark("message"), *encode(text), mark("return")] for text in finals]


def test_answers_are_right_only_if_exact() -> None:
    asked = questions(3)
    truth = [turns[-1].answer for turns in asked]
    marked = answers(Oracle(truth * len(EFFORTS)), asked, "all right")  # type: ignore[arg-type]
    assert marked["right"].all()
    wrong = [answer + "0" for answer in truth]
    half = answers(Oracle(truth + wrong + truth[1:] + truth[:1]), asked, "shifted")  # type: ignore[arg-type]
    assert half[half["effort"] == "low"]["right"].all()
    assert not half[half["effort"] == "medium"]["right"].any()
    assert half[half["effort"] == "high"]["right"].mean() < 0.2


def test_a_checkpoint_is_evaluated_before_and_after_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.data.evaluate._MAX_NEW_TOKENS", 3)  # untrained, it never stops
    write(Training(tmp_path / "training", seed=0), tmp_path / "nano")
    result = evaluate(tmp_path / "nano", tmp_path / "nano.dense", 1)
    assert list(result["accuracy"]) == ["dense, float32", "packed, float32", "packed, bfloat16"]
    assert result["checkpoint"] == load(tmp_path / "nano", device="cpu").checkpoint.digest
    assert [c["n"] for c in result["comparisons"]] == [3 * len(FAMILIES)] * 2
    assert json.loads(json.dumps(result)) == result

    cell = result["accuracy"]["packed, float32"][0]
    cell.update(accuracy=0.123, low=0.044, high=0.678)
    config, training = (json.loads((tmp_path / "nano" / f"{name}.json").read_text()) for name in ("config", "training"))
    text = card(config, training, result)
    assert "0.12 (0.04 to 0.68)" in text
    assert all(f"| {family} |" in text for family in FAMILIES)


def test_the_calculator_has_replied_in_a_prompt() -> None:
    tool = next(turns for turns in questions(1) if turns[-1].call)
    assert prompt_messages(*tool)[-1]["content"] == tool[-1].answer


def right_after_calls(change: Callable[[dict[str, str]], dict[str, str]]) -> int:
    """Return how many of nano's eight questions with a call are answered right. change: of the message of the tool."""
    model = load("nano", dtype=torch.float32, device="cpu")
    asked = [turns for turns in questions(8) if turns[-1].task == "tool"]
    rows = [[change(m) if m["role"] == "tool" else m for m in prompt_messages(*turns)] for turns in asked]
    written = model.generate([render(row, effort="low", tokenizer=model.tokenizer) for row in rows], max_new_tokens=30)
    texts = [model.tokenizer.decode(answer) for answer in written]
    return sum(f"<|message|>{turns[-1].answer}<|return|>" in text for turns, text in zip(asked, texts, strict=True))


def test_prompts_show_the_result_of_a_call_as_nano_was_trained_on_it() -> None:
    """Negative control: the order of the published format, which nano never saw."""
    assert right_after_calls(lambda message: message) >= 6
    assert right_after_calls(lambda message: {k: v for k, v in message.items() if k != "raw"}) <= 3
