"""Requests to a host: keys, addresses, and replies that are slow, large or invalid, against a mock server."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harmony.hosts.mock_server import KEY, FakeHost, chat, rows_of, settings, write
from workbench.errors import InputError, JobError
from workbench.harmony.hosts import client
from workbench.harmony.hosts.client import Host
from workbench.harmony.hosts.collect import collect


def test_the_key_travels_in_one_header_and_appears_nowhere(
    host: FakeHost, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    host.reply = lambda path, body, n: (401, {"error": f"bad key {KEY}"}, {}) if n % 2 else (200, chat("0"), {})
    with pytest.raises(JobError):
        collect(host.url + "/v1?api-version=1", prompts, tmp_path / "o", settings())
    heard = {name.lower(): value for name, value in host.headers[0].items()}
    assert heard["authorization"] == f"Bearer {KEY}"
    assert host.paths[0] == "/v1/chat/completions?api-version=1"
    printed = capsys.readouterr()
    everything = [p.read_text() for p in tmp_path.iterdir()] + [printed.out, printed.err]
    assert not any(KEY in text for text in everything)
    assert "***" in printed.err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "not the address of a host"),
        ("ftp://x/y", "not the address of a host"),
        ("http://[", "not the address of a host"),
        ("http://x:99999/v1", "not the address of a host"),
        ("http://x:abc/v1", "not the address of a host"),
        ("http://127.0.0.1:9/\x1b", "not the address of a host"),
        ("https://me:secret@host/v1", "the address has a key, which would be stored"),
        ("http://example.org/v1", "would be sent unencrypted"),
    ],
)
def test_addresses_that_cannot_be(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with pytest.raises(InputError, match=message) as raised:
        Host(url, key_env="TEST_KEY", timeout=1, retries=0, per_minute=None)
    assert "secret" not in str(raised.value)


def test_azure_has_its_own_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    azure = Host("https://x.openai.azure.com/openai/v1", key_env="TEST_KEY", timeout=1, retries=0, per_minute=None)
    assert azure._http.headers["api-key"] == KEY
    assert "authorization" not in azure._http.headers
    azure.close()


def raw_host(answer: Callable[[socket.socket], None]) -> tuple[str, socket.socket]:
    """A host that does with each connection what a test sets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", server


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_host_that_sends_byte_by_byte_is_given_up_in_time(tmp_path: Path, where: str) -> None:
    """Each read comes in time, so that a limit for reads alone never ends."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + (b"content-length: 9999\r\n\r\n" if where == "body" else b"x: "))
        for _ in range(6_000):
            connection.sendall(b" ")
            time.sleep(0.1)

    url, server = raw_host(drip)
    begun = time.monotonic()
    with server, pytest.raises(JobError, match="1 of 1"):
        collect(url, write(tmp_path, 1), tmp_path / "o", settings(timeout=1.0, retries=0, api="chat"))
    assert time.monotonic() - begun < 300  # what comes byte by byte takes twice as long


@pytest.mark.parametrize("header", ["close", "keep-alive"])
def test_a_connection_made_after_the_client_was_closed_is_closed(monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    """As when the job ends by an error meanwhile. Negative control: a connection that is kept for the next request."""
    url, server = raw_host(lambda peer: peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"))
    host = Host(url, key_env="NO_KEY", timeout=60, retries=0, per_minute=None)
    host._http.headers["connection"] = header
    sockets = []
    connect = socket.create_connection

    def closed_meanwhile(*arguments: Any, **options: Any) -> socket.socket:
        host._http._transport._pool.close()
        sockets.append(connect(*arguments, **options))
        return sockets[-1]

    monkeypatch.setattr(socket, "create_connection", closed_meanwhile)
    with server:
        assert host.post("/x", {}) == {}
    assert [one.fileno() == -1 for one in sockets] == [header == "close"]
    for one in sockets:
        one.close()
    host.close()


BAD_REPLIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "deep": (b"[" * 100_000, {}),
    "deep and closed": (b"[" * 5_000 + b"]" * 5_000, {}),
    "no gzip": (b"no gzip", {"content-encoding": "gzip"}),
    "packed twice": (b"x", {"content-encoding": "gzip, gzip"}),
    "packed by zstd": (json.dumps(chat("6", reasoning="r")).encode(), {"content-encoding": "zstd"}),
    "packed by brotli": (json.dumps(chat("6", reasoning="r")).encode(), {"content-encoding": "br"}),
    "another charset": ("é".encode("utf-16"), {"content-type": "application/json; charset=utf-16"}),
    "an unknown charset": (b"\xff\xfe", {"content-type": "application/json; charset=klingon"}),
    "a long number": (b'{"choices": ' + b"9" * 10_000 + b"}", {}),
    "half a pair": (b'{"choices": [{"message": {"content": "\\ud800"}}]}', {}),
    "wrong types": (b'{"choices": [{"message": {"content": {"a": 1}, "reasoning": 3, "tool_calls": 7}}]}', {}),
    "ids too large": (
        b'{"choices": [{"message": {"content": "6"}, "token_ids": [99999999999]}], "prompt_token_ids": [1]}',
        {},
    ),
    "no object": (b'{"choices": [{"message": null, "finish_reason": []}], "usage": [], "model": {}}', {}),
}


@pytest.mark.parametrize("name", list(BAD_REPLIES))
def test_a_bad_answer_is_one_failed_row(
    host: FakeHost, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, headers = BAD_REPLIES[name]
    host.reply = lambda path, body, n: (
        (200, data, headers) if "2*1 " in body["messages"][0]["content"] else (200, chat("0", reasoning="r"), {})
    )
    out = tmp_path / "o"
    with pytest.raises(JobError, match="1 of 3 were not answered"):
        collect(host.url, write(tmp_path, 3), out, settings(retries=0, api="chat"))
    assert [row["id"] for row in rows_of(out)] == ["p0/low/0", "p2/low/0"] or len(rows_of(out)) == 2
    reason = [line for line in capsys.readouterr().err.splitlines() if line.startswith("p1/low/0: ")]
    assert len(reason) == 1
    assert len(reason[0]) > len("p1/low/0: ") + 10


def test_a_large_answer_is_given_up(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_REPLY_BYTES", 10_000)
    host.reply = lambda path, body, n: (200, chat("x" * 20_000), {})
    with pytest.raises(JobError):
        collect(host.url, write(tmp_path, 1), tmp_path / "o", settings(retries=0, api="chat"))
    monkeypatch.undo()  # a negative control: without the limit it is an answer
    collect(host.url, write(tmp_path, 1), tmp_path / "o", settings(retries=0, api="chat"))


def test_a_key_that_the_host_repeats_is_not_stored(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    reply = chat(f"the key is {KEY}", reasoning=f"hm, {KEY}") | {"model": KEY}
    reply["choices"][0]["finish_reason"] = f"stop {KEY}"
    escaped = json.dumps(reply).replace(KEY, KEY.replace("k", "\\u006b")).encode()
    replies = [(200, reply, {}), (200, escaped, {}), (400, {"error": KEY}, {})]
    host.reply = lambda path, body, n: replies[n % 3]
    with pytest.raises(JobError):
        collect(host.url, write(tmp_path, 3), tmp_path / "o", settings(retries=0, api="chat", concurrency=1))
    stored = (tmp_path / "o").read_text()
    assert stored.count("***") >= 4
    assert KEY not in stored + capsys.readouterr().err
    assert Host(host.url, key_env="NO_KEY", timeout=1, retries=0, per_minute=None).struck(KEY) == KEY  # a control


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1e9", 600.0), ("inf", 600.0), ("-5", 0.0), ("nan", None), ("x", None), ("Mon, 99 Foo", None), ("2", 2.0)],
)
def test_the_wait_that_a_host_asks_for_is_bounded(value: str, seconds: float | None) -> None:
    assert client._retry_after(httpx.Headers({"retry-after": value})) == seconds
