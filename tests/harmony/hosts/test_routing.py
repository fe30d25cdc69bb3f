"""Routed experts in each host's encoding, checked and stored; ids asked for; the history in the host's own form."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harmony.hosts.mock_server import FakeHost, chat, rows_of, settings
from workbench import harmony
from workbench.errors import InputError, JobError
from workbench.harmony.hosts import requests
from workbench.harmony.hosts.collect import collect
from workbench.harmony.hosts.routing import RoutingError, read_experts, routed_experts

LAYERS, K = 3, 4


def planted(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, LAYERS, 32)).argsort(-1)[..., :K].astype(np.int16)


def npy(experts: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, experts)
    return base64.b64encode(file.getvalue()).decode()


def vllm_21(experts: np.ndarray, n_prompt: int) -> dict[str, Any]:
    choice = {"routed_experts": experts[n_prompt:].tolist()}
    return {"prompt_routed_experts": experts[:n_prompt].tolist(), "choices": [choice]}


def vllm_22(experts: np.ndarray, n_prompt: int) -> dict[str, Any]:
    return {"choices": [{"routed_experts": npy(experts)}]}


def sglang(experts: np.ndarray, n_prompt: int) -> dict[str, Any]:
    text = base64.b64encode(experts.astype("<i4").tobytes()).decode()
    return {"choices": [{}], "sgl_ext": {"routed_experts": text}}


DIALECTS = [vllm_21, vllm_22, sglang]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("missing", [0, 1])
def test_every_encoding_gives_the_planted_experts(dialect: Any, missing: int) -> None:
    experts = planted(12 - missing)
    decoded = routed_experts(dialect(experts, 5), n_tokens=12)
    assert decoded is not None
    assert (decoded == experts).all()
    assert routed_experts({"choices": [{}]}, n_tokens=12) is None


def broken(how: str) -> np.ndarray:
    experts = planted(12)
    if how == "zero":
        experts[:] = 0
    elif how == "constant":
        experts[:] = experts[:1]
    elif how == "cached":
        experts[:6] = -1
    elif how == "zero row":
        experts[3] = 0
    return experts


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("how", "option"),
    [
        ("zero", "--moe-backend marlin"),
        ("constant", "--moe-backend marlin"),
        ("zero row", "--moe-backend marlin"),
        ("cached", "--no-enable-prefix-caching"),
    ],
)
def test_experts_that_were_not_recorded_are_refused(dialect: Any, how: str, option: str) -> None:
    with pytest.raises(RoutingError, match=option) as raised:
        routed_experts(dialect(broken(how), 5), n_tokens=12)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": [{"routed_experts": "no base64!"}]},
        {"choices": [{"routed_experts": npy(np.array([{"a": 1}], dtype=object))}]},
        {"choices": [{"routed_experts": [[[1, 2], [3]]]}]},
        {"choices": [{"routed_experts": [1, 2, 3]}]},
        {"choices": [{"routed_experts": planted(3).tolist()}]},
        {"choices": [{}], "sgl_ext": {"routed_experts": "AAAA"}},
    ],
)
def test_what_is_no_array_of_experts_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(RoutingError):
        routed_experts(reply, n_tokens=12)


def prompts(folder: Path, **fields: Any) -> Path:
    path = folder / "prompts.jsonl"
    row = {"id": "p/0", "messages": [{"role": "user", "content": "2*3"}]} | fields
    path.write_text(json.dumps(row))
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ids_and_experts_are_stored_and_nothing_is_rendered_again(dialect: Any, host: FakeHost, tmp_path: Path) -> None:
    words = harmony.tokenizer()
    prompt = harmony.render([{"role": "user", "content": "2*3"}], effort="low", tokenizer=words)
    output = "<|channel|>final<|message|>" + "6"
    ids = [
        words.special["<|channel|>"],
        *words.encode("final"),
        words.mark("message"),
        *words.encode("6"),
        words.mark("return"),
    ]
    experts = planted(len(prompt) + len(ids) - 1)

    def reply(path: str, body: dict[str, Any], n: int) -> Any:
        assert body["return_token_ids"] is True
        assert body["return_routed_experts"] is True
        routes = dialect(experts, len(prompt))
        answer = chat(output) | {k: v for k, v in routes.items() if k != "choices"} | {"prompt_token_ids": prompt}
        answer["choices"][0] |= routes["choices"][0] | {"token_ids": ids}
        return 200, answer, {}

    host.reply = reply
    out = tmp_path / "out.jsonl"
    collect(host.url, prompts(tmp_path), out, settings(routing=True))
    (row,) = rows_of(out)
    assert (row["tokens"], row["n_prompt"], row["complete"]) == ([*prompt, *ids], len(prompt), True)
    assert (read_experts(out, row["id"]) == experts).all()
    (transcript,), rejects = harmony.read_transcripts(out, tokenizer=words)
    assert not rejects
    assert transcript.notes == ()
    with pytest.raises(InputError, match="--routing"):
        read_experts(out, "../../etc/passwd")


def test_a_host_without_experts_is_named(host: FakeHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError):
        collect(host.url, prompts(tmp_path), tmp_path / "out.jsonl", settings(routing=True, retries=0))
    assert "--enable-return-routed-experts" in capsys.readouterr().err


def test_vllms_generate_takes_and_gives_ids(host: FakeHost, tmp_path: Path) -> None:
    words = harmony.tokenizer()
    ids = [
        words.mark("channel"),
        *words.encode("final"),
        words.mark("message"),
        *words.encode("6"),
        words.mark("return"),
    ]

    def reply(path: str, body: dict[str, Any], n: int) -> Any:
        assert path == "/inference/v1/generate"
        experts = planted(len(body["token_ids"]) + len(ids) - 1)
        return 200, {"choices": [{"token_ids": ids, "finish_reason": "stop", "routed_experts": npy(experts)}]}, {}

    host.reply = reply
    collect(host.url, prompts(tmp_path, answer="6"), tmp_path / "out.jsonl", settings(api="generate", routing=True))
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert row["tokens"] == [*host.requests[0]["token_ids"], *ids]
    assert row["correct"] is True


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "2*3"},
    {"role": "assistant", "channel": "analysis", "content": "use calc"},
    {"role": "assistant", "channel": "commentary", "content": "One moment."},
    {
        "role": "assistant",
        "channel": "commentary",
        "recipient": "functions.calc",
        "content_type": "json",
        "content": "{}",
    },
    {"role": "tool", "name": "functions.calc", "recipient": "assistant", "channel": "commentary", "content": "6"},
]


def test_the_history_goes_in_the_hosts_own_form(host: FakeHost, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "calc", "description": "Sums."}}]
    collect(host.url, prompts(tmp_path, messages=HISTORY, tools=tools), tmp_path / "o", settings(api="chat"))
    user, turn, result = host.requests[0]["messages"]
    assert user == {"role": "user", "content": "2*3"}
    assert (turn["content"], turn["reasoning"]) == ("One moment.", "use calc")
    (call,) = turn["tool_calls"]
    assert call["function"] == {"name": "calc", "arguments": "{}"}
    assert result == {"role": "tool", "tool_call_id": call["id"], "content": "6"}
    assert host.requests[0]["tools"] == tools
    items = requests.responses_input(HISTORY)
    assert [item.get("type", item.get("role")) for item in items] == [
        "user",
        "reasoning",
        "assistant",
        "function_call",
        "function_call_output",
    ]
    assert items[3]["call_id"] == items[4]["call_id"]
    again = [*HISTORY, {"role": "assistant", "channel": "final", "content": "6"}, {"role": "user", "content": "2*4"}]
    assert "use calc" not in json.dumps(requests.chat_messages(again))
