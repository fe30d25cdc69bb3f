"""Asking a host, patiently: retries where that helps, no faster than allowed, without the parameters it refuses.

The key comes from the environment, goes into one header, and is struck out of whatever a host says.
"""

import email.utils
import os
import random
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

from workbench.errors import InputError
from workbench.harmony.messages import shown

OPTIONAL = (
    "seed", "temperature", "skip_special_tokens", "return_token_ids", "return_routed_experts", "include_reasoning", "max_tokens",
    "max_completion_tokens", "max_output_tokens", "reasoning_effort", "reasoning",
)  # fmt: skip
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_ABSENT = {404, 405, 501}
_LONGEST_WAIT_S = 60.0


class HostError(Exception):
    """What a host refused for good; one line."""


class AbsentError(HostError):
    """The host has no such path."""


class Host:
    """Sends requests to one host; several threads may."""

    def __init__(
        self, url: str, *, key_env: str, timeout: float, retries: int, per_minute: float | None, threads: int = 1
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{shown(url)} is no address of a host: wanted one as in http://localhost:8000/v1")
        if parts.username or parts.password:
            raise InputError(f"a key in the address would be stored: put it into the variable {key_env}")
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self._query = f"?{parts.query}" if parts.query else ""
        self._key = os.environ.get(key_env, "")
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        azure = parts.hostname.endswith(".azure.com")
        if self._key and parts.scheme == "http" and not local:
            raise InputError(f"{self.name}: {key_env} would travel unencrypted: use https, or unset it")
        headers = {"api-key": self._key} if azure else {"authorization": f"Bearer {self._key}"}
        self._http = httpx.Client(
            timeout=timeout, headers=headers if self._key else {}, trust_env=not local,
            limits=httpx.Limits(max_connections=threads),
        )  # fmt: skip
        self._retries, self._pause = retries, 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0
        self.stop = threading.Event()
        self.dropped: set[str] = set()

    def stop_retrying(self) -> None:
        """Let requests under way end, but wait for no others."""
        self.stop.set()

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any], *, root: bool = False) -> Any:
        """The reply of a request, however often it takes; HostError where it never comes.

        root: the path begins where the host does, not behind its /v1.
        """
        base = self.name.removesuffix("/v1") if root else self.name
        attempt = 0
        while True:
            sent = {name: value for name, value in body.items() if name not in self.dropped}
            self._wait_for_turn()
            said, wait = "", None
            try:
                response = self._http.post(f"{base}{path}{self._query}", json=sent)
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    try:
                        return response.json()
                    except ValueError:
                        said = f"what came back is not JSON: {response.text[:80]}"
                else:
                    said = f"{response.status_code}: {' '.join(response.text.split())[:200]}"
                    if response.status_code in _ABSENT:
                        raise AbsentError(self._clean(said))
                    if self._drop(response, sent):
                        continue
                    if response.status_code not in _AGAIN:
                        raise HostError(self._clean(said))
                    wait = _retry_after(response)
            attempt += 1
            if attempt > self._retries:
                raise HostError(self._clean(f"given up after {attempt} tries; the last: {said}"))
            backoff = min(_LONGEST_WAIT_S, 0.5 * 2**attempt) * random.uniform(0.5, 1)
            if self.stop.wait(backoff if wait is None else wait):
                raise HostError("stopped")

    def _wait_for_turn(self) -> None:
        """Requests start at least a pause apart, over all threads."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._pause
        if self.stop.wait(max(0.0, start - time.monotonic())) or self.stop.is_set():
            raise HostError("stopped")

    def _drop(self, response: httpx.Response, sent: dict[str, Any]) -> bool:
        """Whether the host named a parameter that can be left out; it then is, from now on."""
        if response.status_code not in (400, 422):
            return False
        named = [name for name in OPTIONAL if name in sent and name in response.text]
        if not named:
            return False
        with self._lock:
            new = named[0] not in self.dropped
            self.dropped.add(named[0])
        if new:
            print(f"{self.name} does not take {named[0]}: going on without", file=sys.stderr)
        return True

    def _clean(self, text: str) -> str:
        return shown(text.replace(self._key, "***") if self._key else text).strip("'\"")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the host asks to wait: a number, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
