"""Text of a model as messages, whatever other programs did to its marks; ordinary words are never taken for marks."""

from typing import Any

import pytest

from workbench.harmony.marked_text import is_marked, read_output


def pairs(text: str, **options: Any) -> list[tuple[str, str]]:
    return [(m["channel"], m["content"]) for m in read_output(text, **options).messages]


DETAILS = '<details type="reasoning" done="true" duration="1">\n<summary>One second</summary>\n'
BOTH = [("analysis", "It is 4."), ("final", "4")]


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>It is 4.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "<|start|>assistant<|channel|>analysis<|message|>It is 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>",
        "analysisIt is 4.assistantfinal4",
        "<think>It is 4.</think>4",
        "It is 4.</think>\n4",
        DETAILS + "> It is 4.\n</details>\n4",
        DETAILS + "&gt; It is 4.\n</details>\n4",
    ],
)
def test_every_form_gives_the_same_messages(text: str) -> None:
    assert pairs(text) == BOTH


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "analysis of the problem: it is 4",
        "final remarks follow",
        "Harmony ends a message with <|end|> and starts one with <|start|>.",
        "",
    ],
)
def test_an_ordinary_text_is_one_final_answer(text: str) -> None:
    assert not is_marked(text)
    assert pairs(text) == [("final", text)]


def test_the_end_of_a_text_states_whether_it_is_complete() -> None:
    marked = "<|channel|>final<|message|>4"
    assert read_output(marked + "<|return|>").complete is True
    assert read_output(marked).complete is None
    assert read_output("<think>It is").complete is False


def test_a_cut_analysis_without_marks_is_read_only_where_it_was_cut() -> None:
    assert pairs("analysisWe need", truncated=True) == [("analysis", "We need")]
    assert pairs("analysisWe need") == [("final", "analysisWe need")]


def test_a_call_without_marks_has_its_recipient_and_type() -> None:
    text = 'analysisLook it up.assistantcommentary to=functions.search json{"q": 1}'
    (_, call) = read_output(text).messages
    assert (call["recipient"], call["content_type"], call["content"]) == ("functions.search", "json", '{"q": 1}')


@pytest.mark.parametrize("channel", ["commentary", "analysis"])
def test_a_call_alone_without_marks_is_no_answer(channel: str) -> None:
    (call,) = read_output(channel + ' to=functions.calc json{"e": 1}').messages
    assert (call["channel"], call["recipient"], call["content"]) == (channel, "functions.calc", '{"e": 1}')
    text = f"{channel} to the paper: see above"  # a negative control
    assert pairs(text) == [("final", text)]


def test_many_tags_are_read_in_linear_time() -> None:
    assert len(pairs("<think>a</think>" * 20_000 + "b")) == 20_001


NESTED = {
    "<think>a<think>b</think>c</think>d": [("analysis", "a<think>b</think>c"), ("final", "d")],
    "<think>the tag <think> opens</think>d": [("analysis", "the tag <think> opens"), ("final", "d")],
    "<think>a</think>b</think>c": [("analysis", "a"), ("final", "b</think>c")],
    "a</think>b</think>c": [("analysis", "a"), ("final", "b</think>c")],
    "First. <think>a</think>b": [("final", "First. <think>a</think>b")],
}


@pytest.mark.parametrize("text", list(NESTED))
def test_tags_that_can_be_read_in_two_ways_are_irregular(text: str) -> None:
    assert (pairs(text), read_output(text).irregular) == (NESTED[text], True)


@pytest.mark.parametrize("text", ["<think>a</think>b<think>c</think>d", "a</think>b", "<think>a", "Write </thinking."])
def test_tags_that_follow_each_other_are_regular(text: str) -> None:
    assert not read_output(text).irregular


def test_many_tags_that_are_never_closed_are_read_in_linear_time() -> None:
    assert read_output("<think><think></think>" * 20_000).irregular


@pytest.mark.parametrize(
    "text",
    [
        "<THINK>a</THINK>b",
        "<thought>a</thought>b",
        "<think >a</think >b",
        "a</reasoning>b",
        "AnalysisWe need.AssistantFinal144",
        "analysis\nWe need.\nassistant\nfinal\n144",
        "144<|return|>",
        "144<|end|>\n",
    ],
)
def test_what_may_be_tags_or_marks_stays_text_and_is_irregular(text: str) -> None:
    assert (pairs(text), read_output(text).irregular) == ([("final", text)], True)


@pytest.mark.parametrize("text", ["a < thinking > b", "The tag <|end|> ends it.", "analysis by the assistant", "a>b"])
def test_ordinary_texts_with_these_words_are_regular(text: str) -> None:
    """Negative controls."""
    assert (pairs(text), read_output(text).irregular) == ([("final", text)], False)


def test_tags_of_two_kinds_and_windows_line_ends() -> None:
    assert read_output("<think>a</thinking>b").irregular
    assert pairs("<think>\r\na\r\n</think>\r\n\r\nb") == [("analysis", "a"), ("final", "b")]


def test_an_analysis_with_marks_that_nothing_follows_was_cut_off() -> None:
    assert read_output("<|channel|>analysis<|message|>We ne").complete is False
    assert read_output("<|channel|>analysis<|message|>We need.<|end|>").complete is None
    assert read_output("<|channel|>analysis to=python code<|message|>1").complete is None


def test_a_message_that_the_model_makes_up_for_the_user_is_its_own() -> None:
    text = "<|channel|>final<|message|>4<|end|><|start|>user<|message|>And 5?<|end|>"
    assert [m["role"] for m in read_output(text).messages] == ["assistant", "assistant"]


@pytest.mark.parametrize(
    "text",
    [
        "analysisIt is 4.<|end|>assistantfinal4<|return|>",
        "<|channel|> analysis <|message|> It is 4. <|end|> "
        "<|start|> assistant <|channel|> final <|message|> 4 <|return|>",
        "<|channel|> analysis<|message|>It is 4.<|end|><|start|>assistant<|channel|> final<|message|>4<|return|>",
    ],
)
def test_remains_of_marks_and_spaces_around_them_are_no_text(text: str) -> None:
    assert pairs(text) == BOTH
    assert read_output(text).complete is True


def test_a_call_whose_recipient_stood_before_the_channel_is_a_call() -> None:
    call = {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content_type": "json"}
    for text in ('assistant to=functions.fcommentary json{"q": 1}', ' to=functions.fcommentary json{"q": 1}'):
        assert read_output(text).messages == [{**call, "content": '{"q": 1}'}]
    text = 'analysisLook.assistant to=functions.fcommentary json{"q": 1}'
    assert [m["channel"] for m in read_output(text).messages] == ["analysis", "commentary"]
    text = "The assistant to=functions.f is a header."  # negative control
    assert pairs(text) == [("final", text)]


@pytest.mark.parametrize(
    "text",
    [
        'analysisThe word "assistantfinal" is there.assistantfinal4',
        "analysisWe need",
        "analysiswe need",
        "4<|endoftext|>",
        "<analysis>It is 4.</analysis>4",
        "<seed:think>It is 4.</seed:think>4",
        "[THINK]It is 4.[/THINK]4",
        "<|begin_of_thought|>It is 4.<|end_of_thought|>4",
        '<think time="3">It is 4.</think>4',
        "<|start|>system<|message|>s<|end|><|start|>user<|message|>q<|end|><|start|>assistant<|channel|>final<|message|>4",
    ],
)
def test_a_text_that_may_be_more_than_it_is_read_as_is_irregular(text: str) -> None:
    assert read_output(text).irregular


@pytest.mark.parametrize("text", ["analysis of it: 4", "[1, 2]", "<b>4</b>", "analysisIt is 4.assistantfinal4"])
def test_a_text_that_is_read_in_one_way_is_regular(text: str) -> None:
    """Negative controls."""
    assert not read_output(text).irregular


def test_marks_within_a_text_are_not_written_again_as_text() -> None:
    text = "<|channel|>analysis<|message|>It is 4.<|channel|>final<|message|>4<|return|>"
    (message,) = read_output(text).messages
    assert message["raw"] == f"<|start|>assistant{text}"
    assert "raw" not in read_output(text.replace("<|channel|>final<|message|>", "")).messages[0]  # negative control
    assert read_output("<|message|>4<|return|>").messages[0]["raw"].endswith("<|message|>4<|return|>")  # no channel
