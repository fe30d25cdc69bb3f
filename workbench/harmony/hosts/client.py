"""Send requests to a host: with retries, within a rate limit, and without the parameters that it refuses.

The key comes from the environment, goes into one header, and is struck out of whatever a host replies.
"""

import email.utils
import math
import os
import random
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.messages import shown

OPTIONAL = (
    "seed",
    "temperature",
    "skip_special_tokens",
    "return_token_ids",
    "return_routed_experts",
    "include_reasoning",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "reasoning_effort",
    "reasoning",
)
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_ABSENT = {404, 405, 501}
_LONGEST_WAIT_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0
_LONGEST_REASON = 1000  # characters
_SHORTEST_SECRET = 8  # characters
_CHUNK_BYTES = 64 * 2**10
MAX_REPLY_BYTES = 64 * 2**20
# of these a chunk unpacks to at most a thousand times its size; of zstd and brotli to gigabytes
_ENCODINGS = ("", "identity", "gzip", "deflate")


class HostError(Exception):
    """What a host refused for good; one line."""


class TransferError(Exception):
    """The reason why no reply came; the request is sent again."""


class AbsentError(HostError):
    """The host has no such path."""


class Host:
    """A client that sends requests to one host; it can be shared by threads.

    Raises:
        InputError: the URL is not the address of a host, holds a key, or would send a key unencrypted.
    """

    def __init__(
        self, url: str, *, key_env: str, timeout: float, retries: int, per_minute: float | None, threads: int = 1
    ) -> None:
        parts = _address(url)
        if parts.username or parts.password:
            raise InputError(f"the address has a key, which would be stored: put the key into the variable {key_env}")
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self._query = f"?{parts.query}" if parts.query else ""
        self._key = os.environ.get(key_env, "")
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        azure = (parts.hostname or "").endswith(".azure.com")
        if self._key and parts.scheme == "http" and not local:
            raise InputError(f"{self.name}: {key_env} would be sent unencrypted: use https, or unset the variable")
        key = {"api-key": self._key} if azure else {"authorization": f"Bearer {self._key}"}
        self._http = httpx.Client(
            timeout=timeout,
            # closed by the thread that reads the reply, also where `close` was called before the connection was made
            headers={"accept-encoding": "gzip, deflate", "connection": "close"} | (key if self._key else {}),
            trust_env=not local,
            limits=httpx.Limits(max_connections=threads, max_keepalive_connections=0),  # see _exchange
        )
        self._timeout, self._retries, self._pause = timeout, retries, 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0
        self.stop = threading.Event()
        self.dropped: set[str] = set()

    def stop_retrying(self) -> None:
        """Wait for running requests, and send no others."""
        self.stop.set()

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any], *, root: bool = False) -> Any:
        """Return the reply of a request, however often it takes; HostError where it never comes.

        root: the path starts at the host's root, not at its /v1.
        """
        base = self.name.removesuffix("/v1") if root else self.name
        attempt = 0
        while True:
            sent = {name: value for name, value in body.items() if name not in self.dropped}
            self._wait_for_turn()
            reason, wait = "", None
            try:
                status, headers, content = self._exchange(f"{base}{path}{self._query}", sent)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TransferError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if 200 <= status < 300:
                    try:
                        return self.struck(parse_json(content.decode("utf-8")))
                    except (UnicodeDecodeError, InputError) as error:
                        reason = f"what came back is not JSON in UTF-8 ({error}): {content[:80]!r}"
                else:
                    text = content.decode("utf-8", "replace")
                    reason = f"{status}: {' '.join(text[: 4 * _LONGEST_REASON].split())}"
                    if status in _ABSENT:
                        raise AbsentError(self._clean(reason))
                    if self._drop(status, text, sent):
                        continue
                    if status not in _AGAIN:
                        raise HostError(self._clean(reason))
                    wait = _retry_after(headers)
            attempt += 1
            if attempt > self._retries:
                raise HostError(self._clean(f"given up after {attempt} tries; the last: {reason}"))
            backoff = min(_LONGEST_WAIT_S, 0.5 * 2**attempt) * random.uniform(0.5, 1)
            if self.stop.wait(backoff if wait is None else wait):
                raise HostError("stopped")

    def _exchange(self, url: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Return status, headers and content of a reply, within the timeout from the first byte sent to the last read.

        httpx limits the wait for each read only, so a timer shuts the connection of a host that sends byte by byte.

        Raises:
            TransferError: the reply takes longer, is larger, or is packed in another way than asked for.
        """
        connection = _Connection()
        timer = threading.Timer(self._timeout, connection.shut)
        timer.daemon = True
        timer.start()
        try:
            with self._http.stream("POST", url, json=body, extensions={"trace": connection.trace}) as response:
                if (encoding := response.headers.get("content-encoding", "").strip().lower()) not in _ENCODINGS:
                    raise TransferError(f"the reply is packed by {shown(encoding)}, expected gzip or deflate, once")
                content = bytearray()
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    content += chunk
                    if len(content) > MAX_REPLY_BYTES:
                        raise TransferError(f"the reply is larger than {MAX_REPLY_BYTES:,} bytes")
            if connection.is_shut:
                raise TransferError(f"no complete reply within {self._timeout:g} s")
            return response.status_code, response.headers, bytes(content)
        except httpx.HTTPError as error:
            if connection.is_shut:
                raise TransferError(f"no complete reply within {self._timeout:g} s") from error
            raise
        finally:
            timer.cancel()

    def struck(self, value: Any) -> Any:
        """Return a value of JSON with the key struck out of every text in it, names of fields included.

        A key of fewer than eight characters, as the placeholders that local hosts take, is not a secret and might be
        part of an answer.
        """
        if len(self._key) < _SHORTEST_SECRET:
            return value
        if isinstance(value, str):
            return value.replace(self._key, "***")
        if isinstance(value, list):
            return [self.struck(item) for item in value]
        if isinstance(value, dict):
            return {self.struck(name): self.struck(item) for name, item in value.items()}
        return value

    @property
    def has_key(self) -> bool:
        """Return whether there is a key to strike out."""
        return len(self._key) >= _SHORTEST_SECRET

    def holds_key(self, text: str) -> bool:
        """Return whether a text repeats the key."""
        return len(self._key) >= _SHORTEST_SECRET and self._key in text

    def _wait_for_turn(self) -> None:
        """Requests start at least a pause apart, over all threads."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._pause
        if self.stop.wait(max(0.0, start - time.monotonic())) or self.stop.is_set():
            raise HostError("stopped")

    def _drop(self, status: int, text: str, sent: dict[str, Any]) -> bool:
        """Return whether the host named a parameter that can be left out; it then is, from now on."""
        if status not in (400, 422):
            return False
        refused = [name for name in OPTIONAL if name in sent and name in text]
        if not refused:
            return False
        with self._lock:
            new = refused[0] not in self.dropped
            self.dropped.add(refused[0])
        if new:
            print(f"{self.name} does not take {refused[0]}: going on without", file=sys.stderr)
        return True

    def _clean(self, text: str) -> str:
        """Return one printable line without the key, long enough to hold a host's reason."""
        text = text.replace(self._key, "***") if self._key else text
        line = ascii(" ".join(text.split()))[1:-1].replace("\\'", "'")
        return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


def _address(url: str) -> SplitResult:
    """Return the parts of the address of a host.

    Raises:
        InputError: it has no scheme, host or port that could be one.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises if it is none
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"{shown(url)} is not the address of a host ({error}): expected one as in http://localhost:8000/v1"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{shown(url)} is not the address of a host: expected one as in http://localhost:8000/v1")
    return parts


class _Connection:
    """The connection of one request, which a timer may shut while another thread reads from it."""

    def __init__(self) -> None:
        self.is_shut = False
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember the socket when httpcore has connected it; TLS wraps it in another."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")

    def shut(self) -> None:
        """Wake the thread that reads or writes."""
        self.is_shut = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that the host asks to wait, a number or a date, but no more than ten minutes."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S)
