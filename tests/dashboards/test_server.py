"""A server refuses addresses that it cannot use, and a browser that leaves is no fault."""

import logging
from types import SimpleNamespace

import pytest
from bokeh.server.connection import ServerConnection
from tornado.websocket import WebSocketClosedError

from workbench.dashboards.server import check_free, expect_closed_connections
from workbench.errors import InputError


@pytest.mark.parametrize("address", ["::1", "\U000561d7\x12", "a" * 300, "a..b", "999.1.1.1"])
def test_an_address_that_no_machine_has_is_refused(address: str) -> None:
    check_free("127.0.0.1", 0)
    with pytest.raises(InputError, match=r"port 0 of .* cannot be used") as error:
        check_free(address, 0)
    assert "\n" not in str(error.value)


def closed_connection() -> AssertionError:
    """Return the error of Bokeh for a message of a browser that has left."""
    try:
        ServerConnection.session.fget(SimpleNamespace(_session=None))
    except AssertionError as error:
        return error
    pytest.fail("Bokeh raises no AssertionError any more")


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("bokeh.server.views.ws", "Failed sending message as connection was closed", None),
        ("asyncio", "Task exception was never retrieved", WebSocketClosedError()),
        ("bokeh.server.protocol_handler", "error handling message", closed_connection()),
        ("tornado.application", "Uncaught exception GET /overview/ws", closed_connection()),
    ],
)
def test_a_browser_that_leaves_is_no_warning(
    name: str, text: str, error: Exception | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bokeh and Tornado warn of every message that a closed tab does not get."""
    logger = logging.getLogger(name)
    # whatever a server that ran before in this process has set
    caplog.set_level(logging.WARNING, logger=name)
    for attribute, value in {"filters": [], "handlers": [caplog.handler], "propagate": False}.items():
        monkeypatch.setattr(logger, attribute, value)
    logger.warning(text, exc_info=error)
    assert len(caplog.records) == 1, "negative control"
    expect_closed_connections()
    logger.warning(text, exc_info=error)
    others = {"another fault": OSError(), "another assertion": AssertionError()}
    for other, fault in others.items():
        logger.warning(other, exc_info=fault)
    assert [record.getMessage() for record in caplog.records[1:]] == list(others)
