"""Answers and comparisons show texts as text; cards read and write the same interventions."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.live.cards import TITLES, InterventionCard, cells_of, cells_text, layers_of
from workbench.live.experiment import Answer, Comparison, SampleSummary
from workbench.live.rendering import answer_html, comparison_html, samples_html
from workbench.research.recipe import KINDS, Intervention, Recipe, Scope

HOSTILE = "<script>alert('x')</script>&"


@dataclass
class Finished:
    """What of an experiment the rendering reads."""

    prompt: list[int]
    model: Any
    recipe: Recipe = field(default_factory=lambda: Recipe(interventions=(EXAMPLES["patch"],)))
    n_begin: int = 0
    unmatched: list[int] = field(default_factory=lambda: [0])


def finished(answer: str) -> tuple[Any, Answer]:
    tokenizer = harmony.tokenizer()
    prompt = harmony.render([{"role": "user", "content": "hi"}], effort="low", tokenizer=tokenizer)
    new = marked_ids(answer, tokenizer)
    model = type("Model", (), {"tokenizer": tokenizer})()
    return Finished(prompt, model), Answer([new], logprobs=[-0.5] * len(new))


def test_an_answer_is_shown_by_message_and_as_text() -> None:
    experiment, answer = finished(
        f"<|channel|>analysis<|message|>one {HOSTILE}<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>"
    )
    change = [0.0] * len(answer.tokens)
    at = answer.tokens.index(harmony.tokenizer().encode("one")[0])
    change[at] = -1.0
    text = answer_html(experiment, answer, "light", change=change, first_difference=at)
    assert "<script>" not in text
    assert "script" in text
    assert text.index("assistant · analysis") < text.index("assistant · final")
    assert text.count('class="lv-message"') == 2
    (first,) = [span for span in text.split("<span")[1:] if "lv-first" in span]
    assert ">one</span>" in first
    assert "change -1.000 nats" in first
    assert "--wb-bad) 22%" in first
    assert text.count("color-mix") == 1, "tokens without a change have no colour"
    assert "lv-first" not in answer_html(experiment, answer, "dark")


def test_what_an_answer_begins_with_is_grey() -> None:
    experiment, answer = finished("<|channel|>analysis<|message|>one two three<|end|>")
    begin = answer.tokens[:4]
    experiment.prompt, experiment.n_begin = [*experiment.prompt, *begin], len(begin)
    answer.rows[0] = answer.tokens[4:]
    text = answer_html(experiment, answer, "light")
    assert text.count("lv-given") == 1, "of the beginning, one token is text"
    assert text.index("lv-given") < text.index('title="token 0')
    experiment.n_begin = 0
    assert "lv-given" not in answer_html(experiment, answer, "light"), "negative control"


def test_characters_of_several_tokens_are_complete() -> None:
    experiment, answer = finished("<|channel|>final<|message|>𓂀 naïve<|return|>")
    shown = "".join(
        piece.split(">")[1].split("<")[0] for piece in answer_html(experiment, answer, "light").split("<span")[1:]
    )
    assert shown == "𓂀 naïve"


def test_comparison_and_samples_are_shown_as_text() -> None:
    experiment, _ = finished("<|channel|>final<|message|>two<|return|>")
    comparison = Comparison(3, [-1.0, -0.5], [0.0], [0.0, 0.25])
    text = comparison_html(experiment, comparison)
    assert "differ from new token 3 on" in text
    assert "-1.50 nats" in text
    assert "width:25.0%" in text
    answer = answer_html(*finished("<|channel|>final<|message|>two<|return|>"), "light", change=[9.0] * 4)
    for colour, meaning in (("accent", "more probable"), ("bad", "less probable")):
        style = f"background:color-mix(in srgb,var(--wb-{colour}) 45%,transparent)"
        assert f"{style}'>{meaning}</span>" in text, "the legend has the colours of the answers"
        assert (style in answer) == (colour == "accent"), "negative control: all changes are positive"
    assert "<script>" not in text
    same = comparison_html(experiment, Comparison(None, [], [], []))
    assert "Both answers are equal." in same
    table = samples_html(
        {"original": SampleSummary([(HOSTILE, 2), ("8", 1)], 3, 7.5), "edited": SampleSummary([], 0, 9.0)}, 3
    )
    assert "<script>" not in table
    assert table.count("<tr>") == 5
    assert "correct" not in table
    known = {"original": SampleSummary([("8", 6)], 8, 7.5, 6), "edited": SampleSummary([("9", 8)], 8, 9.0, 0)}
    assert "<td>correct</td><td>6 of 8 (39% to 93%)</td><td>0 of 8 (0% to 32%)</td>" in samples_html(known, 8)
    assert "<td>0 of 4</td>" in samples_html({"original": SampleSummary([("9", 4)], 4, 9.0, 0)}, 4)
    assert {row.count("<td>") for row in table.split("<tr>")[2:]} == {3}


EXAMPLES = {
    "forbid": Intervention("forbid", cells=((1, 5), (2, 0)), scope=Scope(("analysis",), ("user",), 3, 9)),
    "force": Intervention("force", cells=((0, 3),)),
    "reweight": Intervention("reweight", cells=((1, 2),), strength=0.25),
    "scale_sinks": Intervention("scale_sinks", layers=(0, 1), heads=(1, 3), strength=2.0, scope=Scope(start=4)),
    "scale_heads": Intervention("scale_heads", layers=(1,), heads=(0, 2), strength=0.0, scope=Scope(stop=7)),
    "steer": Intervention("steer", layers=(2,), strength=-3.0, toward="analysis", away="final"),
    "vector": Intervention("vector", layers=(1,), strength=4.0, source="happy", scope=Scope(role=("assistant",))),
    "feature": Intervention("feature", strength=2.5, source="resid", feature=3),
    "patch": Intervention("patch", layers=(0, 2), source=f"3+4 {HOSTILE}", source_effort="low"),
    "knockout": Intervention("knockout", layers=(3,), heads=(0, 2), keys=Scope(("analysis",), ("user",), 2, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_gives_back_its_intervention(kind: str) -> None:
    one = EXAMPLES[kind]
    removed: list[InterventionCard] = []
    card = InterventionCard(one, removed.append)
    assert card.intervention() == one
    assert card.view.title == TITLES[kind]
    card.scope._channels.value = ["final"]
    assert card.intervention().scope.channel == ("final",) != one.scope.channel  # a negative control: widgets count
    card._remove.clicks += 1
    assert removed == [card]


def test_efforts_make_a_direction_and_a_source_alone_another_prompt() -> None:
    for one in (
        Intervention("steer", layers=(1,), toward="high", away="low"),
        Intervention("patch", layers=(1,), source_effort="high"),
        Intervention("patch", layers=(1,), source="3+4"),
    ):
        assert InterventionCard(one, lambda _: None).intervention() == one
    offered = InterventionCard(EXAMPLES["vector"], lambda _: None, ["calm", "happy"])._source
    assert (list(offered.options), offered.value) == (["calm", "happy"], "happy")


def test_numbers_in_cards_are_read_or_refused() -> None:
    assert cells_of("1:5, 2:0  1:5") == ((1, 5), (2, 0)) == cells_of(cells_text(((1, 5), (2, 0))))
    assert layers_of("0-2, 5") == (0, 1, 2, 5)
    for text in ("1", "1:", "a:b", "1:5:6", "-1:2"):
        with pytest.raises(InputError, match="expected LAYER:EXPERT"):
            cells_of(text)
    for text in ("x", "3-1", "0-99999", "-1"):
        with pytest.raises(InputError, match="expected numbers or ranges"):
            layers_of(text)
    card = InterventionCard(EXAMPLES["forbid"], lambda _: None)
    card.scope._stop.widget.value = "last"
    with pytest.raises(InputError, match="To position 'last'"):
        card.intervention()
