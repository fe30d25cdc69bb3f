"""What pages show where the run lacks their quantity: a command that records it and what the run has already."""

from collections.abc import Iterator
from html import unescape

import pytest

from tests.conftest import DATA
from workbench.dashboards.pages import made
from workbench.dashboards.session import Page, Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.runs import Run


@pytest.fixture
def session() -> Iterator[Session]:
    registry = RunRegistry([DATA / "demo.zarr"])
    yield Session(registry, Selection({}), lambda: None)
    registry.jobs.close()


def text_of(page: Page) -> str:
    return unescape("".join(str(getattr(part, "object", "")) for part in page.main))


def record(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(Run, "recorded", property(lambda _: list(names)))


@pytest.mark.parametrize(
    ("page", "has", "needed", "options"),
    [
        ("sinks", ("routing", "logprobs"), "sink attention", "--record routing --record logprobs --record sinks"),
        ("experts", ("sinks", "features"), "routing", "--record sinks --record routing"),
        ("neuron-examples", ("routing",), "neurons", "--record routing --record neurons"),
        ("label-probes", ("routing",), "activations", "--record routing --record resid_post"),
        ("features", ("routing",), "features of a sparse", "--record routing --record features:FOLDER"),
    ],
)
def test_a_page_without_its_quantity_has_a_command_that_records_it_too(
    session: Session, monkeypatch: pytest.MonkeyPatch, page: str, has: tuple[str, ...], needed: str, options: str
) -> None:
    record(monkeypatch, *has)
    text = text_of(made(page, session))
    assert f"This run has no recorded {needed}" in text
    assert f"The run has {', '.join(has)}." in text
    assert text.endswith(f"workbench capture nano TRANSCRIPTS.jsonl RUN.zarr {options}</pre></div>")


def test_the_page_of_a_recorded_quantity_shows_no_such_command(session: Session) -> None:
    """A negative control."""
    assert "This run has no recorded" not in text_of(made("sinks", session))


def test_a_page_names_each_value_of_the_address_that_the_run_does_not_have(session: Session) -> None:
    def notes(page: str, **asked: str) -> list[str]:
        asked_for = Session(session.registry, Selection(asked), lambda: None)
        made(page, asked_for)
        return asked_for.unknown

    assert notes("experts", layer="3", channel="final", task="sum") == [], "negative control: they exist"
    (layer,) = notes("experts", layer="99", channel="final")
    assert layer == "The run has no layer '99', which the address names: the page shows 0. Choose among 0, 1, 2, 3."
    assert [text.split(",")[0] for text in notes("experts", run="other", expert="x")] == [
        "This dashboard has no run 'other'",
        "The run has no expert 'x'",
    ]
    (conversation,) = notes("transcript", sequence="999")
    assert "no conversation '999'" in conversation
    assert "numbers 0 to 599" in conversation


def test_the_page_of_effort_states_how_to_generate_other_efforts(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for efforts, stated in ((["low"], "all transcripts of demo have the effort low"), ([], "demo names none")):
        monkeypatch.setattr(RunRegistry, "efforts", lambda *_, known=efforts: known)
        text = text_of(made("effort", session))
        assert stated in text
        assert "--effort low --effort medium --effort high" in text
