"""Access to the dashboard: the host names at which it answers, logins, and the limit of attempts.

A page of another site can make a browser resolve its own name to this machine (DNS rebinding). Its requests then carry
that name as host and as origin, so both are compared with the names under which the dashboard is served.
"""

import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bokeh.server.util import check_allowlist, create_hosts_allowlist
from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher, Rule
from tornado.web import Application, RequestHandler

from workbench.bounded_json import read_json
from workbench.errors import InputError

LOGINS_PER_MINUTE = 6  # of one address; of all addresses together ten times as many
_LOGIN = "/login"


def guard(application: Application, origins: Sequence[str]) -> None:
    """Refuse requests with another host or origin than these (HOST:PORT), and logins beyond the limit."""
    refused = Rule(Refused(origins), Refusal)
    application.default_router.rules.insert(0, refused)


def answer_unknown(application: Application, page: str) -> None:
    """Answer addresses that are not a page with a page of their own. page: its HTML."""
    application.settings["default_handler_class"] = Unknown
    application.settings["default_handler_args"] = {"page": page}


class Unknown(RequestHandler):
    """Answers an address that is not a page."""

    def initialize(self, page: str) -> None:
        self._page = page

    def prepare(self) -> None:
        """Answer, whatever the method is."""
        self.set_status(404)
        self.finish(self._page)


class Refused(Matcher):
    """Matches the requests that are refused, with the status and the reason."""

    def __init__(self, origins: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._origins = [origin.lower() for origin in origins]
        self._clock = clock
        self._logins: dict[str, deque[float]] = {}

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        """Return the arguments of the handler that refuses a request, or None."""
        refusal = self.refusal(request)
        return None if refusal is None else {"target_kwargs": {"status": refusal[0], "reason": refusal[1]}}

    def refusal(self, request: HTTPServerRequest) -> tuple[int, str] | None:
        """Return status and reason if a request is refused."""
        if not self._allows(request.host):
            return 403, "this host name is not one of the dashboard; see --allow-origin"
        origin = request.headers.get("Origin")
        if origin is not None and not self._allows(_netloc(origin)):
            return 403, "this origin may not connect; see --allow-origin"
        if request.method == "POST" and request.path.rstrip("/").endswith(_LOGIN):
            return self._too_many(str(request.remote_ip))
        return None

    def _allows(self, host: str) -> bool:
        names = [host.lower()]
        if ":" not in host.rpartition("]")[2]:  # a proxy on the port of its scheme names none
            names = [f"{host.lower()}:80", f"{host.lower()}:443"]
        return bool(host) and any(check_allowlist(name, self._origins) for name in names)

    def _too_many(self, address: str) -> tuple[int, str] | None:
        now = self._clock()
        for key, limit in ((address, LOGINS_PER_MINUTE), ("", 10 * LOGINS_PER_MINUTE)):
            tried = self._logins.setdefault(key, deque(maxlen=limit))
            if len(tried) == limit and now - tried[0] < 60:
                return 429, "too many logins: wait a minute"
            tried.append(now)
        if len(self._logins) > 10_000:
            self._logins.clear()
        return None


class Refusal(RequestHandler):
    """Answers every method with the status of a refusal."""

    def initialize(self, status: int, reason: str) -> None:
        self._refused = (status, reason)

    def prepare(self) -> None:
        """Answer, whatever the method is."""
        self.set_status(self._refused[0])
        self.finish(self._refused[1])


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def checked_origins(origins: Sequence[str]) -> Sequence[str]:
    """Return the values of `--allow-origin`.

    Raises:
        InputError: one is not HOST or HOST:PORT, or allows every host.
    """
    for origin in origins:
        try:
            (allowed,) = create_hosts_allowlist([origin], 80)
        except ValueError as error:
            raise InputError(f"--allow-origin {origin!r}: {error}; give HOST or HOST:PORT, without https://") from error
        if not allowed.rpartition(":")[0].strip("*."):
            raise InputError(f"--allow-origin {origin!r} allows every page of every host: give HOST or HOST:PORT")
    return origins


def login_options(basic_auth: Path | None) -> dict[str, Any]:
    """Return the options of Panel's server for logins. The key of the cookies exists in this process alone.

    Raises:
        InputError: the file of passwords is not a JSON object of texts, or other users of the machine can read it.
    """
    if basic_auth is None:
        return {}
    try:
        mode = basic_auth.stat().st_mode
        known = read_json(basic_auth)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--basic-auth {basic_auth}: expected a JSON object of names and passwords ({error})"
        ) from error
    if not isinstance(known, dict) or not known or not all(isinstance(v, str) and v for v in known.values()):
        raise InputError(f"--basic-auth {basic_auth}: expected a JSON object of names and passwords")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(
            f"--basic-auth {basic_auth}: other users of this machine can read it (mode {stat.S_IMODE(mode):o}): "
            f"chmod 600 {basic_auth}"
        )
    return {"basic_auth": str(basic_auth), "cookie_secret": secrets.token_hex(32)}
