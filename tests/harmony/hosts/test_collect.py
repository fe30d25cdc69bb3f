"""Every dialect, and every way a host can fail, against a mock server; then a third party's server running nano.

Also tests `workbench.harmony.hosts.answers`, `workbench.harmony.hosts.asker` and `workbench.harmony.hosts.settings`.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harmony.hosts.mock_server import FakeHost, Reply, chat, rows_of, settings, write
from tests.serving import free_port, wait_for
from workbench import harmony
from workbench.errors import InputError, JobError
from workbench.harmony.hosts.collect import collect
from workbench.harmony.marked_text import read_output

NANO = Path(__file__).parents[3] / "data/nano"


def said_by(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["channel"], m["content"]) for m in row["messages"] if m["role"] == "assistant"]


REASONED = [("analysis", "think"), ("final", "0")]


@pytest.mark.parametrize(
    ("message", "wanted", "reasoning"),
    [
        ({"content": "0", "reasoning_content": "think"}, REASONED, "verbatim"),
        ({"content": "0", "reasoning": "think"}, REASONED, "verbatim"),
        ({"content": [{"type": "text", "text": "0"}], "reasoning": [{"text": "think"}]}, REASONED, "verbatim"),
        ({"content": "<think>think</think>\n0"}, REASONED, "verbatim"),
        ({"content": "analysisthinkassistantfinal0"}, REASONED, "verbatim"),
        (
            {
                "content": "<|channel|>analysis<|message|>think<|end|>"
                "<|start|>assistant<|channel|>final<|message|>0<|return|>"
            },
            REASONED,
            "verbatim",
        ),
        ({"content": "0"}, [("final", "0")], "absent"),
        ({"content": "final0"}, [("final", "0")], "absent"),
    ],
)
def test_chat_in_every_dialect(
    host: FakeHost, tmp_path: Path, message: dict[str, Any], wanted: list[tuple[str, str]], reasoning: str
) -> None:
    host.reply = lambda path, body, n: (200, chat(**message), {})
    out = tmp_path / "out.jsonl"
    collect(host.url, write(tmp_path, 1), out, settings())
    (row,) = rows_of(out)
    assert said_by(row) == wanted
    assert row["meta"]["reasoning"] == reasoning
    assert row["meta"] | {"task": "t", "api": "chat", "served_model": "served", "completion_tokens": 5} == row["meta"]
    assert row["correct"] is True
    assert host.requests[0]["reasoning_effort"] == "low"
    (transcript,), rejects = harmony.read_transcripts(out, tokenizer=harmony.tokenizer())
    assert not rejects
    assert transcript.effort == "low"
    channels = {m.channel for m in harmony.label(transcript.tokens, tokenizer=harmony.tokenizer()).messages}
    assert channels >= {channel for channel, _ in wanted}


def test_tool_calls_become_commentary(host: FakeHost, prompts: Path, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
    host.reply = lambda path, body, n: (200, chat(None, reasoning="think", tool_calls=[call]), {})
    collect(host.url, prompts, tmp_path / "o", settings())
    message = rows_of(tmp_path / "o")[0]["messages"][-1]
    assert (message["channel"], message["recipient"]) == ("commentary", "functions.search")


def test_responses_say_whether_reasoning_is_a_summary(host: FakeHost, tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        if not path.endswith("/responses"):
            return 404, {}, {}
        kind = "content" if body["input"][0]["content"].startswith("2*0") else "summary"
        output = [
            {"type": "reasoning", kind: [{"type": "reasoning_text", "text": "think"}]},
            {"type": "message", "content": [{"type": "output_text", "text": "0"}]},
        ]
        return 200, {"output": output, "status": "completed", "usage": {"output_tokens": 7}}, {}

    host.reply = reply
    collect(host.url, write(tmp_path, 2), tmp_path / "o", settings())
    rows = {row["id"]: row for row in rows_of(tmp_path / "o")}
    assert rows["p0/low/0"]["meta"]["reasoning"] == "verbatim"
    assert rows["p1/low/0"]["meta"]["reasoning"] == "summary"
    assert said_by(rows["p0/low/0"]) == REASONED
    assert host.requests[-1]["reasoning"] == {"effort": "low"}
    assert host.paths.count("/v1/chat/completions") == 1, "what is absent is asked once"


def test_completions_are_ids_and_the_prompt_is_our_own(host: FakeHost, tmp_path: Path) -> None:
    text = "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>final<|message|>0<|return|>"

    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        if "skip_special_tokens" not in body:
            return 200, {"choices": [{"text": "analysisthinkassistantfinal0", "finish_reason": "stop"}]}, {}
        return 200, {"choices": [{"text": text, "finish_reason": "stop"}]}, {}

    host.reply = reply
    tokenizer = harmony.tokenizer()
    collect(host.url, write(tmp_path, 1), tmp_path / "o", settings(api="completions"))
    (row,) = rows_of(tmp_path / "o")
    assert tokenizer.decode(row["tokens"]) == host.requests[0]["prompt"] + text
    assert tokenizer.decode(row["tokens"][: row["n_prompt"]]) == host.requests[0]["prompt"]
    assert row["correct"] is True
    marks = [tokenizer.mark("channel"), tokenizer.mark("return")]
    assert set(marks) <= set(row["tokens"])

    def refuses(path: str, body: dict[str, Any], n: int) -> Reply:
        return (
            (422, {"detail": "Unexpected: skip_special_tokens"}, {})
            if "skip_special_tokens" in body
            else reply(path, body, n)
        )

    host.reply = refuses
    collect(host.url, write(tmp_path, 1), tmp_path / "stripped", settings(api="completions"))
    (row,) = rows_of(tmp_path / "stripped")
    assert said_by(row) == REASONED


def test_refused_parameters_are_left_out_and_recorded(
    host: FakeHost, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        if "temperature" in body:
            return 400, {"error": {"message": "Unsupported parameter: 'temperature'"}}, {}
        return 200, chat("0", reasoning="think"), {}

    host.reply = reply
    collect(host.url, prompts, tmp_path / "o", settings(temperature=0.7))
    assert all(row["meta"]["dropped"] == ["temperature"] for row in rows_of(tmp_path / "o"))
    assert capsys.readouterr().err.count("does not take temperature") == 1


def test_a_host_without_effort_is_refused_unless_the_body_states_how(
    host: FakeHost, prompts: Path, tmp_path: Path
) -> None:
    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        if "reasoning_effort" in body:
            return 400, {"error": "unknown field reasoning_effort"}, {}
        return 200, chat("0", reasoning=str(body.get("chat_template_kwargs"))), {}

    host.reply = reply
    with pytest.raises(InputError, match="has no option for the reasoning effort: state how"):
        collect(host.url, prompts, tmp_path / "o", settings())
    body = {"chat_template_kwargs": {"reasoning_effort": "{effort}"}}
    collect(host.url, prompts, tmp_path / "o", settings(body=body, efforts=("low", "high")))
    told = {row["effort"]: row["messages"][1]["content"] for row in rows_of(tmp_path / "o")}
    assert told == {e: f"{{'reasoning_effort': '{e}'}}" for e in ("low", "high")}


def test_failures_that_pass_are_retried_and_the_wait_is_the_host_s(host: FakeHost, tmp_path: Path) -> None:
    times: list[float] = []

    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        times.append(time.monotonic())
        replies = [
            (429, {}, {"retry-after": "0.7"}),
            (503, {}, {"retry-after": "0"}),
            (200, b"{half", {"retry-after": "0"}),
        ]
        return replies[n] if n < 3 else (200, chat("0", reasoning="think"), {})

    host.reply = reply
    collect(host.url, write(tmp_path, 1), tmp_path / "o", settings(retries=3))
    assert len(rows_of(tmp_path / "o")) == 1
    assert times[1] - times[0] >= 0.7


def test_five_percent_that_fail_for_good_are_named_and_the_rest_kept_and_asked_again(
    host: FakeHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(body: dict[str, Any]) -> bool:
        return int(body["messages"][0]["content"].split()[0][2:]) % 20 == 7

    host.reply = lambda path, body, n: (
        (400, {"error": "content policy"}, {}) if bad(body) else (200, chat("0", reasoning="r"), {})
    )
    prompts, out = write(tmp_path, 100), tmp_path / "o"
    with pytest.raises(JobError, match="5 of 100 were not answered"):
        collect(host.url, prompts, out, settings())
    assert "p27/low/0: 400" in capsys.readouterr().err
    assert len(rows_of(out)) == 95
    host.reply = lambda path, body, n: (200, chat("0", reasoning="r"), {})
    before = len(host.requests)
    collect(host.url, prompts, out, settings())
    assert len(host.requests) - before == 5
    assert len({row["id"] for row in rows_of(out)}) == 100


def test_a_half_written_line_is_cut_off_and_asked_again(host: FakeHost, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    collect(host.url, prompts, out, settings())
    content = out.read_bytes()
    out.write_bytes(content[:-20])
    before = len(host.requests)
    collect(host.url, prompts, out, settings())
    assert len(host.requests) - before == 1
    assert len(rows_of(out)) == 2
    with pytest.raises(InputError, match="of another request"):
        collect(host.url, prompts, out, settings(temperature=0.5))
    collect(host.url, prompts, out, settings(temperature=0.5), overwrite=True)


def test_another_tokenizer_or_template_does_not_resume_a_file(host: FakeHost, prompts: Path, tmp_path: Path) -> None:
    """With --tokenizer prompts are rendered and ids are read here, so both belong to the request."""
    folder, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "o"
    for copy in (folder, other):
        copy.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
            if (NANO / name).exists():
                shutil.copy(NANO / name, copy)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    collect(host.url, prompts, out, settings(vocabulary=str(folder)))
    before = len(host.requests)
    for vocabulary in (str(other), None):
        with pytest.raises(InputError, match=r"of another request \(tokenizer '\w+', now "):
            collect(host.url, prompts, out, settings(vocabulary=vocabulary))
    collect(host.url, prompts, out, settings(vocabulary=str(folder)))  # a negative control: nothing is missing
    assert len(host.requests) == before
    collect(host.url, prompts, tmp_path / "default", settings())
    with pytest.raises(InputError, match=r"tokenizer None, now '"):
        collect(host.url, prompts, tmp_path / "default", settings(vocabulary=str(folder)))


def test_a_file_of_something_else_is_left_alone(host: FakeHost, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="line 1: not a transcript that this command wrote"):
        collect(host.url, prompts, out, settings())
    assert out.read_text() == '{"mine": 1}\n'


def test_no_faster_than_allowed(host: FakeHost, tmp_path: Path) -> None:
    begun = time.monotonic()
    collect(host.url, write(tmp_path, 6), tmp_path / "o", settings(per_minute=600))
    assert time.monotonic() - begun >= 0.5


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "has no choices"),
        ({"choices": []}, "choices are empty"),
        ([1], "has no choices"),
        (chat(""), "holds no text"),
    ],
)
def test_answers_that_are_none_are_named(
    host: FakeHost, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Any, message: str
) -> None:
    host.reply = lambda path, body, n: (200, reply, {})
    with pytest.raises(JobError, match="2 of 2"):
        collect(host.url, prompts, tmp_path / "o", settings())
    assert message in capsys.readouterr().err


def test_what_hosts_say_of_missing_reasoning_is_told(
    host: FakeHost, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(host.url, prompts, tmp_path / "o", settings())
    assert "2 of 2 answers came without the model's own reasoning" in capsys.readouterr().err


def test_a_host_that_dies_midway_costs_nothing_that_was_answered(host: FakeHost, tmp_path: Path) -> None:
    prompts, out = write(tmp_path, 8), tmp_path / "o"

    def reply(path: str, body: dict[str, Any], n: int) -> Reply:
        if n >= 4:
            raise ConnectionResetError
        return 200, chat("0", reasoning="r"), {}

    host.reply = reply
    host.server.handle_error = lambda *args: None  # type: ignore[method-assign]
    with pytest.raises(JobError, match="4 of 8"):
        collect(host.url, prompts, out, settings(concurrency=1, retries=0))
    host.reply = lambda path, body, n: (200, chat("0", reasoning="r"), {})
    collect(host.url, prompts, out, settings())
    assert len(rows_of(out)) == 8


@pytest.mark.slow
def test_a_third_party_s_server_running_nano(tmp_path: Path) -> None:
    """transformers serve: prompts → server → transcripts → the same answers as our own generation → a run."""
    import torch

    from workbench.capture.generation import generate_transcripts
    from workbench.capture.job import capture
    from workbench.model import load

    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", NANO, "--device", "cpu", "--dtype", "float32"]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [*map(str, command), "--port", str(port)], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        wait_for(port, server)
        asked_of_both = (NANO.parent / "prompts.jsonl").read_text().splitlines()
        chosen = [line for line in asked_of_both if '"arithmetic"' in line][::16]
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(chosen))
        asked = settings(
            model=str(NANO),
            efforts=("low", "high"),
            temperature=0,
            max_tokens=400,
            concurrency=2,
            body={"chat_template_kwargs": {"reasoning_effort": "{effort}"}},
        )
        collect(f"http://127.0.0.1:{port}", prompts, tmp_path / "theirs.jsonl", asked)
    finally:
        server.terminate()
        server.wait()
        log.close()
    nano = load(NANO, dtype=torch.float32)
    theirs, rejects = harmony.read_transcripts(tmp_path / "theirs.jsonl", tokenizer=nano.tokenizer)
    assert not rejects
    ours = {
        t.id: t
        for t in generate_transcripts(
            nano, prompts, tmp_path / "ours.jsonl", efforts=("low", "high"), max_new_tokens=400
        )
    }
    assert len(theirs) == len(ours) == 2 * len(chosen)
    equal = [t.tokens.tolist() == ours[t.id].tokens.tolist() for t in theirs]
    assert sum(equal) >= 0.9 * len(equal), [t.id for t, e in zip(theirs, equal, strict=True) if not e]
    assert any(t.correct for t in theirs)
    run = capture(nano, tmp_path / "theirs.jsonl", tmp_path / "run.zarr")
    assert len(run.sequences) == len(theirs)


def test_answers_are_parsed_in_linear_time() -> None:
    def seconds(text: str) -> float:
        begun = time.process_time()
        read_output(text)
        return time.process_time() - begun

    for part in ("<think></think>", "<think>", "assistantfinal ", "analysis assistantfinal1 "):
        few, many = (seconds(("analysis" if part[0] == "a" else "") + part * n) for n in (5_000, 40_000))
        assert many < 30 * few + 0.5, part  # quadratic would be 64 times
