"""Whether an answer was cut off, wherever a program states it; no stop token is added to one that was."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.chat_messages import from_chat_messages
from workbench.harmony.completion import is_complete
from workbench.harmony.hosts.files import convert, counts
from workbench.harmony.transcripts import read_transcripts

ASK = {"role": "user", "content": "6*7"}
CUT: list[dict[str, Any]] = [
    {"finish_reason": "length"},
    {"finish_reason": "MAX_TOKENS"},
    {"finish_reason": "FinishReason.LENGTH"},
    {"finish_reason": "abort"},
    {"finish_reason": "a reason of tomorrow"},
    {"finish_reason": ["stop"]},
    {"finish_reason": {"type": "length", "length": 64}},
    {"stop_reason": "max_tokens"},
    {"done_reason": "length"},
    {"status": "incomplete"},
    {"stop_type": "limit"},
    {"stopReason": "maxPredictedTokensReached"},
    {"finish_reason": "stop", "native_finish_reason": "length"},
    {"finish_reason": "stop", "stop_reason": "\n"},
    {"finish_reason": {"type": "stop", "matched": "Q:"}},
    {"stop_reason": "stop_sequence"},
]
ENDED: list[dict[str, Any]] = [
    {"finish_reason": "stop"},
    {"finish_reason": "COMPLETE"},
    {"finish_reason": {"type": "stop", "matched": 200002}},
    {"finish_reason": "stop", "stop_reason": 200002},
    {"stop_reason": "end_turn"},
    {"status": "completed"},
    {"stop_type": "eos"},
    {"stopReason": "eosFound"},
    {"finish_reason": "stop", "stop_reason": "<|return|>"},
    {"meta_info": {"finish_reason": {"type": "stop", "matched": 200002}}},
]


@pytest.mark.parametrize("fields", CUT, ids=str)
@pytest.mark.parametrize("where", ["row", "message", "metadata of the message"])
def test_an_answer_that_was_cut_off_has_no_stop_token(fields: dict[str, Any], where: str, tmp_path: Path) -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "4"}
    row: dict[str, Any] = {"messages": [ASK, answer], "id": "a", "prompt_id": "a", "effort": "low"}
    (row if where == "row" else answer if where == "message" else answer.setdefault("response_metadata", {})).update(
        fields
    )
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    (converted,) = convert(path)[1]
    assert converted["complete"] is False
    assert "1 truncated" in counts([converted])
    words = harmony.tokenizer()
    (transcript,), _ = read_transcripts(path, tokenizer=words)  # `capture` reads the same file
    assert transcript.tokens[-1] not in (words.mark("return"), words.mark("end"))


@pytest.mark.parametrize("fields", ENDED, ids=str)
def test_an_answer_that_ended_has_one(fields: dict[str, Any]) -> None:
    """Negative controls."""
    assert is_complete(fields) is True
    assert from_chat_messages([ASK, {"role": "assistant", "content": "42", **fields}]).complete is True


@pytest.mark.parametrize("name", ["meta_info", "details", "stats", "generation_info"])
def test_the_reason_may_be_in_an_object_of_the_program(name: str) -> None:
    assert is_complete({name: {"finish_reason": "length"}}) is False
    assert is_complete({name: {"finish_reason": "stop"}}) is True
    assert is_complete({name: {"seconds": 3}}) is None


def test_only_the_last_message_counts() -> None:
    earlier = {"role": "assistant", "content": "4", "finish_reason": "length"}
    assert from_chat_messages([ASK, earlier, ASK, {"role": "assistant", "content": "42"}]).complete is None


def test_what_states_nothing_is_unknown_and_a_stream_that_goes_on_was_cut() -> None:
    assert is_complete({}) is None
    assert is_complete({"stop_reason": "\n\n", "status": "reviewed"}) is None
    assert is_complete({"done": False}) is False
    assert is_complete({"complete": True, "finish_reason": "length"}) is True
    with pytest.raises(InputError, match="complete is 1; expected true, false or null"):
        is_complete({"complete": 1})
