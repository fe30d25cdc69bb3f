"""Every readable format by its shape, in every container; what is none of them is refused with the list.

Tests `workbench.harmony.formats.shapes`.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.hosts.files import convert, counts
from workbench.harmony.transcripts import read_transcripts, write_rows

ASK = {"role": "user", "content": "6*7"}
THINK = [("analysis", "six sevens"), ("final", "42")]
MESSAGE = {"role": "assistant", "content": "42", "reasoning_content": "six sevens"}
CHAT = {"choices": [{"message": MESSAGE, "finish_reason": "stop"}]}
ITEMS = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "six sevens"}], "summary": []},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]},
]
HARMONY = {
    "messages": [
        {
            "role": "system",
            "content": [
                {"type": "system_content", "reasoning_effort": "High", "conversation_start_date": "2025-06-28"}
            ],
        },
        {"role": "user", "content": [{"type": "text", "text": "6*7"}]},
        {"role": "assistant", "channel": "analysis", "content": [{"type": "text", "text": "six sevens"}]},
        {"role": "assistant", "channel": "final", "content": [{"type": "text", "text": "42"}]},
    ]
}
SHAPES: dict[str, Any] = {
    "requests with responses": {"request": {"messages": [ASK], "reasoning_effort": "high"}, "response": CHAT},
    "responses of a chat API": {"messages": [ASK], **CHAT},
    "responses of a chat API, Responses": {"input": "6*7", "output": ITEMS, "status": "completed"},
    "responses of a chat API, Ollama": {
        "messages": [ASK],
        "message": {"role": "assistant", "content": "42", "thinking": "six sevens"},
        "done": True,
        "done_reason": "stop",
    },
    "ShareGPT conversations": {
        "conversations": [{"from": "human", "value": "6*7"}, {"from": "gpt", "value": "<think>six sevens</think>42"}]
    },
    "TRL prompts with completions": {"prompt": [ASK], "completion": [MESSAGE]},
    "simple-evals results": {"convos": [[ASK, MESSAGE]], "metadata": {"example_level_metadata": [{"score": 1.0}]}},
    "lm-eval samples": {
        "doc_id": 3,
        "arguments": [["6*7", {}]],
        "resps": [["analysissix sevensassistantfinal42"]],
        "exact_match": 1.0,
    },
    "openai_harmony conversations": HARMONY,
    "chat messages": {"messages": [ASK, {"role": "assistant", "content": "42", "thinking": "six sevens"}]},
    "prompts with answers": {"prompt": "6*7", "response": "42", "reasoning": "six sevens"},
}


def channel_texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["channel"], m["content"]) for m in row["messages"] if m["role"] == "assistant"]


@pytest.mark.parametrize(("name", "row"), SHAPES.items(), ids=SHAPES.keys())
def test_every_shape_is_recognized_and_read(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps(row))
    kind, rows, left_out = convert(path, effort="low")
    assert (kind, left_out) == (name.partition(",")[0], [])
    assert channel_texts(rows[0]) == THINK
    assert rows[0]["messages"][0]["content"] == "6*7"
    write_rows(tmp_path / "out.jsonl", rows)
    (transcript,), rejects = read_transcripts(tmp_path / "out.jsonl", tokenizer=harmony.tokenizer())
    assert not rejects
    assert transcript.effort == ("high" if name.startswith(("requests", "openai_harmony")) else "low")
    if name.startswith("openai_harmony"):
        assert "Current date: 2025-06-28" in harmony.tokenizer().decode(transcript.tokens.tolist())


@pytest.mark.parametrize("cut", ["length", "content_filter"])
def test_ids_of_vllm_are_exact(cut: str, tmp_path: Path) -> None:
    offline = {
        "request_id": "a",
        "prompt_token_ids": [1, 2],
        "outputs": [{"token_ids": [3], "finish_reason": cut}],
    }
    online = {
        "prompt_token_ids": [1, 2],
        "choices": [{"token_ids": [3, 4], "message": MESSAGE, "finish_reason": "stop"}],
    }
    path = tmp_path / "x"
    path.write_text(json.dumps(offline) + "\n" + json.dumps(online))
    _, rows, left_out = convert(path)
    assert left_out == []
    assert [(row["tokens"], row["n_prompt"], row["complete"]) for row in rows] == [
        ([1, 2, 3], 2, False),
        ([1, 2, 3, 4], 2, True),
    ]


def test_a_batch_needs_its_requests(tmp_path: Path) -> None:
    out, asked = tmp_path / "out", tmp_path / "in"
    out.write_text(json.dumps({"id": "r", "custom_id": "q1", "response": {"status_code": 200, "body": CHAT}}))
    asked.write_text(json.dumps({"custom_id": "q1", "method": "POST", "body": {"messages": [ASK]}}))
    _, rows, left_out = convert(out, effort="low", requests=asked)
    assert (channel_texts(rows[0]), rows[0]["id"], left_out) == (THINK, "q1", [])
    assert "--requests" in convert(out, effort="low")[2][0]


def contained(how: str, folder: Path) -> Path:
    rows = [SHAPES["chat messages"]] * 2
    path, lines = folder / "x", "\n".join(map(json.dumps, rows)).encode()
    if how == "array":
        path.write_text(json.dumps(rows))
    elif how == "documents":
        path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    elif how == "gzip":
        path.write_bytes(gzip.compress(lines))
    elif how == "zstd":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    elif how == "Parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("how", ["array", "documents", "gzip", "zstd", "Parquet", "dataset"])
def test_every_container_is_opened(how: str, tmp_path: Path) -> None:
    kind, rows, left_out = convert(contained(how, tmp_path), effort="low")
    assert kind.startswith("chat messages")
    assert [channel_texts(row) for row in rows] == [THINK, THINK]
    assert left_out == []


def test_a_dataset_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    with pytest.raises(InputError, match="not a file in its folder"):
        convert(tmp_path)


def test_what_is_no_conversation_is_refused_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"rows": [1, 2]}')
    with pytest.raises(InputError, match=r"--field prompt=.*an Inspect log.*ShareGPT.*lm-eval.*Parquet"):
        convert(path)


IRREGULAR = "I refuse.<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>"
OUTPUTS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str]] = {
    "text before the header": ({"content": IRREGULAR}, [("", "I refuse."), ("final", "42")], "1 irregular, 1 without"),
    "a call with a type": (
        {"content": "<|channel|>analysis to=python code<|message|>6*7<|call|>"},
        [("analysis", "6*7")],
        "1 with tools not rendered",
    ),
    "an unclosed tag": ({"content": "<think>six se"}, [("analysis", "six se")], "1 truncated"),
    "only the closing tag": ({"content": "six sevens</think>42"}, THINK, "1 re-rendered"),
    "an ordinary word": ({"content": "final results: 42"}, [("final", "final results: 42")], "1 without reasoning"),
    "marks that are quoted": (
        {"content": "Write `<|start|>user<|message|>`."},
        [("final", "Write `<|start|>user<|message|>`.")],
        "1 without reasoning",
    ),
    "encrypted reasoning": (
        {"content": "42", "reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]},
        [("final", "42")],
        "1 without",
    ),
    "a preamble": (
        {
            "content": [
                {"type": "text", "text": "First."},
                {"type": "thinking", "thinking": "six sevens"},
                {"type": "text", "text": "42"},
            ]
        },
        [("commentary", "First."), *THINK],
        "1 re-rendered",
    ),
}


@pytest.mark.parametrize(("message", "wanted", "counted"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_of_every_kind(
    message: dict[str, Any], wanted: list[tuple[str, str]], counted: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps({"messages": [ASK, {"role": "assistant", **message}]}))
    _, (row,), left_out = convert(path, effort="low")
    assert left_out == []
    assert [(m.get("channel", ""), m["content"]) for m in row["messages"] if m["role"] == "assistant"] == wanted
    assert counted in counts([row])


def test_a_prompt_that_was_rendered_already_is_kept(tmp_path: Path) -> None:
    words = harmony.tokenizer()
    prompt = words.decode(harmony.render([ASK], effort="high", date="2025-06-28", tokenizer=words))
    path = tmp_path / "x"
    path.write_text(
        json.dumps({"prompt": prompt, "choices": [{"text": "<|channel|>final<|message|>42", "finish_reason": "stop"}]})
    )
    _, rows, left_out = convert(path)
    assert (left_out, rows[0]["effort"]) == ([], "high")
    write_rows(tmp_path / "out.jsonl", rows)
    (transcript,), _ = read_transcripts(tmp_path / "out.jsonl", tokenizer=words)
    assert words.decode(transcript.tokens.tolist()) == f"{prompt}<|channel|>final<|message|>42<|return|>"
    assert words.decode(transcript.tokens[: transcript.n_prompt].tolist()) == prompt
