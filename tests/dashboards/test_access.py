"""Another site cannot reach the dashboard under its own name, and passwords cannot be tried without end."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from workbench.dashboards.access import LOGINS_PER_MINUTE, Refused, checked_origins, guard, login_options
from workbench.errors import InputError

ORIGINS = ["localhost:5006", "127.0.0.1:5006", "dash.example:443"]


def request(host: str, origin: str | None = None, method: str = "GET", path: str = "/") -> HTTPServerRequest:
    headers = HTTPHeaders({"Host": host} | ({} if origin is None else {"Origin": origin}))
    return HTTPServerRequest(method, path, headers=headers, host=host)


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("localhost:5006", None, True),
        ("LOCALHOST:5006", "http://localhost:5006", True),
        ("127.0.0.1:5006", "http://localhost:5006", True),
        ("dash.example", "https://dash.example", True),
        ("evil.com:5006", None, False),
        ("evil.com:5006", "http://evil.com:5006", False),  # DNS rebinding: both agree with each other
        ("localhost:5006", "http://evil.com", False),
        ("localhost:5006", "null", False),
        ("localhost:5006", "http://[", False),
        ("localhost:5007", None, False),
        ("localhost.evil.com:5006", None, False),
        ("localhost", None, False),
    ],
)
def test_host_and_origin_must_both_be_the_dashboards(host: str, origin: str | None, allowed: bool) -> None:
    assert (Refused(ORIGINS).refusal(request(host, origin)) is None) == allowed


@pytest.mark.parametrize("origin", ["http://[", "https://x.org", "a:b:c", ":80", "", "<script>:x", "*", "*:80", "*.*"])
def test_an_origin_that_is_no_host_or_every_host_is_refused(origin: str) -> None:
    assert checked_origins(["x.org", "x.org:443", "*.x.org"]) == ["x.org", "x.org:443", "*.x.org"]
    with pytest.raises(InputError, match="--allow-origin") as error:
        checked_origins(["x.org", origin])
    assert "\n" not in str(error.value)


def test_logins_are_slowed() -> None:
    now = [0.0]
    refused = Refused(ORIGINS, clock=lambda: now[0])
    login = request("localhost:5006", method="POST", path="/login")
    answers = [refused.refusal(login) for _ in range(LOGINS_PER_MINUTE + 2)]
    assert [answer is None for answer in answers] == [True] * LOGINS_PER_MINUTE + [False] * 2
    assert refused.refusal(request("localhost:5006", path="/login")) is None  # the page itself
    now[0] = 61.0
    assert refused.refusal(login) is None


class _Page(RequestHandler):
    def get(self) -> None:
        self.write("page")


@pytest.fixture
def port() -> Iterator[int]:
    """A server with one page that the guard protects."""
    ready, ports, loops = threading.Event(), [0], list[IOLoop]()

    def serve() -> None:
        loop = IOLoop(make_current=True)
        (socket,) = bind_sockets(0, "127.0.0.1")
        ports[0] = socket.getsockname()[1]
        application = Application([(r"/", _Page)])
        guard(application, [f"localhost:{ports[0]}"])
        server = HTTPServer(application)
        server.add_sockets([socket])
        loops.append(loop)
        loop.add_callback(ready.set)
        loop.start()
        server.stop()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(300)
    yield ports[0]
    loops[0].add_callback(loops[0].stop)
    thread.join(60)


def test_a_guarded_server_answers_its_own_name_only(port: int) -> None:
    def status(host: str, method: str = "GET") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with closing(connection):
            connection.request(method, "/", headers={"Host": host})
            return connection.getresponse().status

    assert status(f"localhost:{port}") == 200
    for method in ("GET", "POST", "OPTIONS"):
        assert status("evil.com", method) == 403


def test_passwords_that_others_can_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    file.write_text(json.dumps({"a": "b"}))
    for mode in (0o644, 0o640, 0o604):
        file.chmod(mode)
        with pytest.raises(InputError, match="chmod 600"):
            login_options(file)
    file.chmod(0o600)
    assert login_options(file)["basic_auth"] == str(file)
    with pytest.raises(InputError, match="JSON object"):
        login_options(Path("/dev/zero"))


def test_who_may_enter_is_read_from_a_file(tmp_path: Path) -> None:
    assert login_options(None) == {}
    file = tmp_path / "users.json"
    for text in ("", "[]", "{}", '{"a": 1}'):
        file.write_text(text)
        with pytest.raises(InputError, match="names and passwords"):
            login_options(file)
    file.write_text(json.dumps({"ada": "secret"}))
    file.chmod(0o600)
    first, second = login_options(file), login_options(file)
    assert first["basic_auth"] == str(file)
    assert first["cookie_secret"] != second["cookie_secret"]
