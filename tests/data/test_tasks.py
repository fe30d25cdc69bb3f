"""nano's problems are right, split by their own text, and rendered in the harmony format."""

import hashlib
import random
import re
from collections.abc import Callable
from functools import partial

import pytest

from workbench import harmony
from workbench.data.conversations import conversation, prompt_messages, spell, training_example
from workbench.data.prompts import questions
from workbench.data.tasks import DISH, FAMILIES, HOME, WEIGHTS, Problem, draw
from workbench.errors import InputError
from workbench.harmony.rendering import EFFORTS
from workbench.model.checkpoint import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> harmony.Tokenizer:
    return harmony.tokenizer(BUNDLED["nano"])


SOLVERS: dict[str, Callable[[list[str]], str]] = {
    "product": lambda words: str(eval(words[0])),
    "chain": lambda words: str(eval(words[0])),
    "sum": lambda words: str(eval(words[0])),
    "tool": lambda words: str(eval(words[1])),
    "sort": lambda words: "".join(sorted(words[1])),
    "reverse": lambda words: "".join(reversed(words[1])),
    "count": lambda words: str(sum(c == words[1] for c in words[3])),
    "recall": lambda words: " ".join(HOME[name] for name in words[2:]),
    "two-hop": lambda words: " ".join(DISH[HOME[name]] for name in words[2:]),
    "conflict": lambda words: words[1],
}


def solve(problem: Problem) -> str:
    """An answer found another way than the family's own; the developer's rule goes before the question."""
    return SOLVERS[problem.task]((problem.rule or problem.question).split())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_answers_are_right_and_steps_lead_there(family: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        problem = draw(rng, family)
        assert problem.answer == solve(problem)
        assert problem.task == family
        for equation in f"{problem.sketch};{problem.steps}".replace(" ", ";").split(";"):
            left, equals, right = equation.partition("=")
            if equals:
                column = left.count("+") == 2
                assert eval(re.sub(r"\d+", partial(_number, column=column), left)) == written(right, column)
        if family in ("product", "chain"):
            assert problem.answer[::-1] in problem.steps


def written(digits: str, column: bool) -> int:
    """A column of a sum has its total as always; every other number of an analysis is low digit first."""
    return int(digits if column else digits[::-1])


def _number(match: re.Match[str], column: bool) -> str:
    return str(written(match[0], column))


def test_steps_with_letters_keep_count() -> None:
    rng = random.Random(8)
    for _ in range(50):
        count = draw(rng, "count")
        _, letter, _, word = count.question.split()
        *running, last = count.steps.split()
        assert "".join(step[0] for step in running) == word
        assert [int(step[1:]) for step in running if step[0] == letter] == list(range(1, word.count(letter) + 1))
        assert last == letter + count.answer
        ordered = draw(rng, "sort")
        pairs, fours, again = (part.split() for part in ordered.steps.split(";"))
        assert again == [ordered.answer]
        assert " ".join(fours) == ordered.sketch
        for runs, size in ((pairs, 2), (fours, 4)):
            word = ordered.question.split()[1]
            assert runs == ["".join(sorted(word[i : i + size])) for i in range(0, len(word), size)]
        backwards = draw(rng, "reverse")
        *numbered, again = backwards.steps.split()
        assert "".join(step[1] for step in numbered) == backwards.question.split()[1]
        assert again == backwards.answer


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_splits_share_no_question(family: str) -> None:
    rng = random.Random(2)
    train = {draw(rng, family) for _ in range(300)}
    test = {draw(rng, family, test=True) for _ in range(60)}
    assert test
    assert not {(p.rule, p.question) for p in train} & {(p.rule, p.question) for p in test}


def test_the_split_is_the_same_in_every_process() -> None:
    """Chosen by SHA-256 of family and question, here recomputed; Python's own hash differs from run to run."""
    rng = random.Random(7)
    problems = [FAMILIES["product"](rng) for _ in range(2000)]
    test = [p for p in problems if hashlib.sha256(f"product  {p.question}".encode()).digest()[0] < 26]
    assert [p for p in problems if p.is_test] == test
    assert len(test) / len(problems) == pytest.approx(0.1, abs=0.03)


def test_effort_selects_the_length_of_the_analysis() -> None:
    rng = random.Random(3)
    for family in WEIGHTS:
        problem = draw(rng, family)
        lengths = [len(conversation(effort, [problem]).ids) for effort in EFFORTS]
        assert lengths[0] < lengths[1] <= lengths[2], family


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("effort", EFFORTS)
def test_training_and_prompting_render_alike(family: str, effort: str, tokenizer: harmony.Tokenizer) -> None:
    """What a prompt gives is the start of what training shows, id by id."""
    problem = draw(random.Random(4), family)
    prompt = harmony.render(prompt_messages(problem), effort=effort, tokenizer=tokenizer)
    example = conversation(effort, [problem], called=True)
    assert example.ids[: len(prompt)] == prompt
    assert not any(example.taught[: len(prompt)])
    assert all(example.taught[len(prompt) :])


def test_every_example_is_complete_harmony(tokenizer: harmony.Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(300):
        ids, taught = training_example(rng)
        labels = harmony.label(ids, tokenizer=tokenizer)
        assert not any(m.flags for m in labels.messages)
        assert labels.messages[-1].closed_by == "return"
        assert labels.messages[-1].channel == "final"
        assert taught[-1]
        assert len(ids) == len(taught) < 256


def test_spelling_is_the_tokenizer_s(tokenizer: harmony.Tokenizer) -> None:
    assert spell("functions.calc") == tokenizer.encode("functions.calc")
    for text in ("sort lowly", "(12+3)*4-5", "a user"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == len(text), "a header word inside a content must be spelled"


def test_more_questions_than_a_family_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"^conflict has \d+ test questions, 100 were requested"):
        questions(100)  # the other families have this many
