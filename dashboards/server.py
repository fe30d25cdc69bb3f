"""A server of pages until it is interrupted: where it listens, who may connect, and what it logs.

    at = checked_address("localhost", 5006)
    listen({"/": page}, at, show=True)

The dashboard and the page Live are served by it.
"""

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import panel as pn
from tornado.websocket import WebSocketClosedError

from workbench.dashboards.access import answer_unknown, checked_origins, guard, login_options
from workbench.dashboards.layout import PageTemplate
from workbench.errors import InputError

LOCAL = ("localhost", "127.0.0.1")  # addresses that only this machine reaches
_UNUSED_MS = 60_000  # how long a page waits for the connection of its browser, which first loads 5 MB over ssh, say
# loggers that report connections which are closed
_OF_CONNECTIONS = ("bokeh.server.views.ws", "bokeh.server.protocol_handler", "tornado.application", "asyncio")


class Address(NamedTuple):
    """Where a server listens, the origins (HOST:PORT) that may connect, and Panel's options for logins."""

    host: str
    port: int
    origins: list[str]
    logins: dict[str, Any]


def checked_address(host: str, port: int, allow_origin: Sequence[str] = (), basic_auth: Path | None = None) -> Address:
    """Return the address of a server that can be started.

    allow_origin: other origins, HOST or HOST:PORT. basic_auth: a JSON file of user names and passwords.

    Raises:
        InputError: the port cannot be used, an origin is not one, or the file of passwords cannot be used.
    """
    logins = login_options(basic_auth)
    origins = [*local_origins(host, port), *checked_origins(allow_origin)]
    check_free(host, port)
    return Address(host, port, origins, logins)


def listen(
    pages: Mapping[str, Callable[[], PageTemplate]], at: Address, *, show: bool = False, missing_page: str = ""
) -> None:
    """Serve pages, path → page, until interrupted.

    show: open a browser. missing_page: HTML that answers an address which is not a page; Tornado's own by default.
    """
    expect_closed_connections()
    print(f"http://{at.host}:{at.port}/  (Ctrl-C ends)", flush=True)
    server = pn.serve(
        dict(pages),
        address=at.host,
        port=at.port,
        show=show,
        verbose=False,
        title="gpt-oss workbench",
        start=False,
        websocket_origin=at.origins,
        num_threads=4,
        unused_session_lifetime_milliseconds=_UNUSED_MS,
        **at.logins,
    )
    guard(server._tornado, at.origins)
    if missing_page:
        answer_unknown(server._tornado, missing_page)
    server.start()
    server.io_loop.start()


class _ClosedConnections(logging.Filter):
    """Drops the messages of Bokeh and Tornado that a browser left while something was sent to it, which is no fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        closed = isinstance(error, WebSocketClosedError) or (
            isinstance(error, AssertionError) and _raised_in(error) == "bokeh.server.connection"
        )
        return "connection was closed" not in record.getMessage() and not closed


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error; bokeh.server.connection does it where it has been closed."""
    frames = list(walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def expect_closed_connections() -> None:
    """Log nothing when a browser leaves while something is sent to it, or before what it sent is read."""
    for logger in map(logging.getLogger, _OF_CONNECTIONS):
        if not any(isinstance(known, _ClosedConnections) for known in logger.filters):
            logger.addFilter(_ClosedConnections())


def local_origins(address: str, port: int) -> list[str]:
    """Return the origins (HOST:PORT) under which a server at this address is reached."""
    names = {address, *LOCAL} if address in (*LOCAL, "0.0.0.0", "::", "") else {address}
    return [f"{name}:{port}" for name in sorted(names)]


def check_free(address: str, port: int) -> None:
    """Check that a server can listen there.

    Raises:
        InputError: the port or the address cannot be used.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address or None, port, socket.AF_INET, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"port {port} of {address!r} cannot be used ({reason}): choose another with --port or --address"
        ) from error
