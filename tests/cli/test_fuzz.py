"""Random replies of hosts and random addresses of pages: each is read or refused, and nothing else leaves.

`--long` runs thirty times as many cases.
"""

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import panel as pn
import pytest
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from tests.cli.checks import Checked, limits
from tests.cli.damaged_files import damaged_bytes
from tests.cli.fuzzing import cases
from tests.cli.hostile_values import HOSTILE_TEXT, changes
from tests.cli.random_commands import without_long_work
from tests.dashboards.test_attribution_graph import graph
from tests.dashboards.test_stored_results import effects
from workbench.dashboards.pages import made, page_titles
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.dashboards.study_jobs import Answer, StudyJobs
from workbench.errors import InputError
from workbench.harmony.hosts import answers
from workbench.harmony.hosts.answers import NoAnswerError
from workbench.live.app import address_of_recipe, recipe_of_address
from workbench.live.model_server import Limits, ModelServer
from workbench.live.page import LivePage
from workbench.research.intervention import Intervention, Scope
from workbench.research.recipe import Recipe
from workbench.studies import expert_labels
from workbench.studies.result import save

QUICK = 40  # cases of each kind

CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
MESSAGE = {"role": "assistant", "content": "6", "reasoning_content": "2*3=6;", "tool_calls": [CALL]}
MARKED = "<|channel|>analysis<|message|>2*3=6;<|end|><|start|>assistant<|channel|>final<|message|>6<|return|>"
CHOICE = {"index": 0, "finish_reason": "stop", "message": MESSAGE, "text": MARKED}
OUTPUT = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "2*3=6;"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "6"}]},
]
# a reply that every reader accepts: of chat, completions and responses
REPLY = {
    "model": "m",
    "choices": [CHOICE],
    "output": OUTPUT,
    "status": "completed",
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "output_tokens": 5},
}
HEADERS = [
    b"",
    b"content-encoding: gzip\r\n",
    b"content-encoding: zstd\r\n",
    b"content-encoding: gzip, gzip\r\n",
    b"content-type: text/html; charset=utf-7\r\n",
    b"content-type: \xff\xfe\r\n",
    b"transfer-encoding: chunked\r\n",
    b"retry-after: -1\r\n",
    b"retry-after: 9999999999999999999999\r\n",
    b"location: http://127.0.0.1:9/\r\n",
    b"set-cookie: a=\x00\r\n",
    b"x: " + b"y" * 100_000 + b"\r\n",
    b"no colon\r\n",
]


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda body: body,
    "gzip": lambda body: gzip.compress(body, mtime=0),
    "cut": lambda body: body[: len(body) // 2],
    "latin": lambda body: body.decode("unicode-escape").encode("utf-16", "replace"),
    "deep": lambda body: b"[" * 100_000,
    "none": lambda body: b"",
}
STATUSES = ["204 x", "302 x", "400 x", "404 x", "429 x", "500 x", "x", "999 x", "200 \udcff"]


def raw_reply(body: bytes, *, status: str = "200 OK", header: bytes = b"", length: int | None = None) -> bytes:
    """Return all bytes of a reply."""
    first = f"HTTP/1.1 {status}\r\ncontent-length: {len(body) if length is None else length}\r\n"
    return first.encode("utf-8", "surrogateescape") + header + b"\r\n" + body


@st.composite
def raw_replies(draw: st.DrawFn) -> bytes:
    """Return a reply of which the JSON, its packing, the status, a header, the length, or any byte is wrong."""
    kind = draw(st.sampled_from(["json"] * 5 + ["packing", "status", "header", "length", "bytes"]))
    body = json.dumps(draw(changes())(REPLY) if kind == "json" or draw(st.booleans()) else REPLY).encode()
    if kind == "packing":
        return raw_reply(draw(st.sampled_from(list(PACKINGS.values())))(body))
    if kind == "status":
        return raw_reply(body, status=draw(st.sampled_from(STATUSES)))
    if kind == "header":
        return raw_reply(body, header=draw(st.sampled_from(HEADERS)))
    if kind == "length":
        return raw_reply(body, length=draw(st.sampled_from([len(body) + 9, len(body) // 2, 0, -1, 2**70])))
    return draw(damaged_bytes())(raw_reply(body)) if kind == "bytes" else raw_reply(body)


def test_replies_of_hosts_are_read_or_refused(long: bool) -> None:
    """The readers alone: what they raise is one failed row, see `test_host_answers`."""

    @cases(2 * QUICK, long=long)
    @given(changes(), changes())
    def check(first: Callable[[Any], Any], second: Callable[[Any], Any]) -> None:
        reply = json.loads(json.dumps(second(first(REPLY))))
        for read in (answers.from_chat, answers.from_responses, answers.from_completion):
            with contextlib.suppress(NoAnswerError, TypeError, AttributeError, KeyError, ValueError):
                read(reply)

    check()


class RawHost:
    """A host that answers each request with the same bytes, and then closes the connection."""

    def __init__(self) -> None:
        self.reply = b""
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(65536)
            connection.sendall(self.reply)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def host() -> Iterator[RawHost]:
    host = RawHost()
    yield host
    host.close()


def ask(folder: Path, host: RawHost, api: str, reply: bytes, check: Callable[[list[Any]], None]) -> None:
    """Ask the host for two responses and check what is stored of them; the job never ends by one of them."""
    host.reply = reply

    @contextlib.contextmanager
    def stored() -> Iterator[None]:
        yield
        out = folder / "out.jsonl"
        check([json.loads(line) for line in out.read_text().splitlines()] if out.exists() else [])

    words = ["transcripts", host.url, "prompts.jsonl", "out.jsonl", "--model", "m", "--api", api, "--effort", "low"]
    Checked(folder).run(*words, "--retries", "0", "--timeout", "5", within=stored(), codes=(0, 1))


def are_transcripts(rows: list[Any]) -> None:
    for row in rows:
        assert isinstance(row["id"], str)
        assert row["effort"] == "low"
        assert "messages" in row or "tokens" in row


def test_host_answers(workplace: Path, host: RawHost, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """A reply is a row of the output, or a failed row with one line of reason."""
    without_long_work(monkeypatch)
    accepted = 0

    def counted(rows: list[Any]) -> None:
        nonlocal accepted
        accepted += bool(rows)
        are_transcripts(rows)

    @cases(QUICK, long=long)
    @given(st.sampled_from(["chat", "responses", "completions"]), raw_replies())
    def check(api: str, reply: bytes) -> None:
        ask(workplace, host, api, reply, counted)

    check()
    assert accepted > QUICK / 10, "nearly all replies were not replies at all"


@pytest.mark.parametrize("api", ["chat", "responses", "completions"])
def test_an_answer_that_ends_the_job_is_noticed(
    workplace: Path, host: RawHost, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    """The negative control: a reader whose refusal is taken for that of an option."""
    without_long_work(monkeypatch)
    stored: list[Any] = []
    ask(workplace, host, api, raw_reply(json.dumps(REPLY).encode()), stored.extend)
    are_transcripts(stored)
    assert len(stored) == 2

    def refuse(reply: Any) -> Any:
        raise InputError("no such option")

    name = {"chat": "from_chat", "responses": "from_responses", "completions": "from_completion"}[api]
    monkeypatch.setattr(f"workbench.harmony.hosts.answers.{name}", refuse)
    with pytest.raises(AssertionError, match="exit code 2"):
        ask(workplace, host, api, raw_reply(json.dumps(REPLY).encode()), are_transcripts)


MARK = "<b id=mark>"
NUMERIC = ("layer", "expert", "head", "sequence", "position", "token", "neuron", "feature", "threshold", "pins")


@st.composite
def addresses(draw: st.DrawFn) -> dict[str, str]:
    """Return the values of an address by name: known ones, hostile ones, and bytes that are not an UTF-8."""
    known = st.sampled_from(["analysis", "final", "low", "high", "work", "all", "dark", "0", "1", "3"])
    hostile = HOSTILE_TEXT | st.just(MARK) | st.binary(max_size=12).map(lambda value: value.decode("utf-8", "replace"))
    names = draw(st.lists(st.sampled_from(Selection.NAMES), max_size=6, unique=True))
    return {name: draw(known | hostile) for name in names}


def test_selections(long: bool) -> None:
    """A selection is one of the known values, and its link holds no markup."""

    @cases(2 * QUICK, long=long)
    @given(addresses())
    def check(query: dict[str, str]) -> None:
        choice = Selection(query)
        for name in Selection.NAMES:
            assert choice.get(name, ["a", "b"]) in ("a", "b")
        assert "<" not in choice.query()

    check()


def problems(parts: list[Any]) -> list[str]:
    """Return alerts of errors that no page expects, and texts of the address that are markup."""
    panes = [pane for part in parts if hasattr(part, "select") for pane in part.select()]
    texts = [str(pane.object) for pane in panes if isinstance(pane, pn.pane.markup.HTMLBasePane)]
    alerts = [pane.object for pane in panes if isinstance(pane, pn.pane.Alert) and pane.alert_type == "danger"]
    return [*map(str, alerts), *(text for text in texts if MARK in text)]


def test_addresses_of_pages(workplace: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """A page shows the valid parts of an address; the others are neither an error nor markup."""
    nothing = Answer(reason="studies are not computed here")
    monkeypatch.setattr(StudyJobs, "_state", lambda *_: nothing)
    registry = RunRegistry([workplace / "run.zarr"], cache=workplace / "cache")

    @cases(QUICK, long=long)
    @given(st.sampled_from(sorted(page_titles())), addresses())
    def check(page: str, query: dict[str, str]) -> None:
        with limits():
            shown = made(page, Session(registry, Selection(query), lambda: None))
        assert not problems([*shown.main, *shown.sidebar]), (page, query)

    try:
        check()
    finally:
        registry.jobs.close()


SCOPE = Scope(channel=("analysis",), stop=9)
RECIPE = Recipe(
    user="2+2=",
    history=(("1+1=", "2"),),
    max_new_tokens=2,
    interventions=(
        Intervention("forbid", cells=((1, 2), (1, 3)), scope=SCOPE),
        Intervention("steer", layers=(1,), strength=2.0),
        Intervention("patch", layers=(0,), source="3+3=", source_effort="high"),
        Intervention("scale_heads", layers=(1,), heads=(1,), strength=0.0, scope=SCOPE),
        Intervention("knockout", layers=(0, 1), heads=(0,), keys=SCOPE),
    ),
)


def page_of_address(text: str, server: ModelServer) -> bool:
    """Show the live page of a recipe in an address and check it; returns whether the recipe was accepted."""
    recipe, problem = recipe_of_address(text, server)
    assert "\n" not in problem
    shown = LivePage(server, recipe, "light", lambda recipe: None, problem)
    try:
        texts = [
            pane for part in shown.main() for pane in part.select() if isinstance(pane, pn.pane.markup.HTMLBasePane)
        ]
        assert not [pane.object for pane in texts if MARK in str(pane.object)], text
        address = parse_qs(address_of_recipe(recipe, "dark"), keep_blank_values=True)
        assert problem or recipe_of_address(address.get("recipe", [""])[0], server) == (recipe, "")
        with contextlib.suppress(InputError):  # a field that the model lacks, named when it is run
            shown.recipe()
    finally:
        shown.viewer.leave()
    return not problem


def test_recipes_in_an_address(long: bool) -> None:
    """The live page shows the recipe of its address, or what is wrong with it, and never ends by it."""
    server = ModelServer(wb.load("nano"), "nano", Limits())
    document = json.loads(RECIPE.to_json())
    assert page_of_address(RECIPE.to_json(), server)
    accepted = 0

    @cases(QUICK, long=long)
    @given(changes(), changes(), st.sampled_from(range(4)), damaged_bytes())
    def check(
        first: Callable[[Any], Any], second: Callable[[Any], Any], kind: int, damage: Callable[[bytes], bytes]
    ) -> None:
        nonlocal accepted
        content = json.dumps(second(first(document)) if kind == 1 else first(document)).encode()
        text = (damage(content) if kind == 2 else content).decode("utf-8", "replace")
        with limits():
            accepted += page_of_address(text, server)

    try:
        check()
    finally:
        server.close()
    assert accepted, "no recipe was one"


def test_a_recipe_that_ends_the_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: half a surrogate pair, which a reader accepted and no address can hold."""
    server = ModelServer(wb.load("nano"), "nano", Limits())
    try:
        assert not page_of_address('{"recipe": 1, "user": "\\ud800"}', server)
        monkeypatch.setattr("workbench.live.app.Recipe.from_json", lambda text: Recipe(user="\ud800"))
        with pytest.raises(UnicodeEncodeError):
            page_of_address("{}", server)
    finally:
        server.close()


LABELS = [{"layer": 0, "expert": n, "label": "digits", "automatic": "0 1 2", "score": 0.5} for n in range(3)]


def test_files_beside_a_run(workplace: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Results of experiments, attribution graphs and labels that are not as the workbench writes them."""
    nothing = Answer(reason="studies are not computed here")
    monkeypatch.setattr(StudyJobs, "_state", lambda *_: nothing)
    registry = RunRegistry([workplace / "run.zarr"], cache=workplace / "cache")
    save({"sinks": effects(registry.run("run").digest)}, workplace / "results")
    files: dict[str, tuple[Path, Any]] = {
        "causal": (workplace / "results" / "sink-ablation_sinks.json", None),
        "graph": (workplace / "graph.json", graph()),
        "labels": (workplace / "run.zarr.labels.jsonl", LABELS),
    }
    right = files["causal"][0].read_bytes()
    files["causal"] = (files["causal"][0], json.loads(right))

    @cases(QUICK, long=long)
    @given(st.sampled_from(sorted(files)), changes(), changes(), st.booleans())
    def check(page: str, first: Callable[[Any], Any], second: Callable[[Any], Any], twice: bool) -> None:
        path, content = files[page]
        content = second(first(content)) if twice else first(content)
        text = json.dumps(content)
        if page == "labels" and isinstance(content, list):
            text = "\n".join(map(json.dumps, content))
        path.write_text(text)
        with limits():
            if page == "labels":
                with contextlib.suppress(InputError):
                    expert_labels.read(registry.run("run"))
                return
            shown = made(page, Session(registry, Selection({}), lambda: None))
        assert not problems([*shown.main, *shown.sidebar]), (page, text[:500])

    try:
        check()
    finally:
        registry.jobs.close()
