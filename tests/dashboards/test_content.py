"""What pages say is what the run holds; no widget, no browser."""

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import panel as pn
import pytest
import xarray as xr

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from tests.runs.forging import write_hostile_run
from workbench.dashboards import content
from workbench.dashboards.app import notebook
from workbench.dashboards.pages import made, page_titles
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.runs import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


@pytest.fixture(scope="module")
def registry() -> RunRegistry:
    return RunRegistry([DATA / "demo.zarr"])


def test_tokens_by_role_are_those_of_the_labels(run: Run) -> None:
    data = run.dataset[["role", "channel", "sequence"]].compute()
    effort = run.sequences["effort"].loc[data["sequence"].values].to_numpy()
    inside = data["channel"].values != CHANNELS.index("frame")
    table = content.tokens_by_role(run)
    for role, rows in table.groupby("role"):
        for e in ("low", "medium", "high"):
            here = inside & (data["role"].values == ROLES.index(str(role))) & (effort == e)
            assert rows[e].sum() == here.sum()
    final = inside & (data["channel"].values == CHANNELS.index("final"))
    assert table.query("role == 'assistant' and channel == 'final'")["all"].item() == final.sum()
    assert table["all"].sum() == inside.sum()


def test_content_of_truncated_messages_is_counted_to_their_end() -> None:
    """Such a message has no stop token (−1), and one without content has none to count."""
    rows = {"role": ["assistant", "assistant", "user"], "channel": ["analysis", "final", ""], "sequence": [0, 0, 0]}
    messages = pd.DataFrame(rows | {"content": [5, -1, 2], "stop": [-1, -1, 4], "end": [12, 12, 5]})
    run = cast(Run, SimpleNamespace(messages=messages, sequences=pd.DataFrame({"effort": ["low"]})))
    table = content.tokens_by_role(run).set_index(["role", "channel"])["all"]
    assert table.to_dict() == {("assistant", "analysis"): 7, ("assistant", "final"): 0, ("user", ""): 2}
    assert (messages["stop"] - messages["content"]).clip(lower=0).tolist() == [0, 0, 2], "negative control"


def test_whom_an_expert_works_with(registry: RunRegistry) -> None:
    pairs = registry.pairs("demo")
    assert pairs is not None
    partners = content.partners(pairs, "final", 2, 3)
    assert 3 not in set(partners["with expert"])
    assert (np.diff(partners["lift"]) <= 0).all()


def findings_of(summary: str) -> str:
    return content.findings({"a": xr.Dataset(attrs={"title": "T", "summary": summary})})


def test_a_summary_has_a_lead_and_what_is_indented_is_below_its_own_line() -> None:
    text = findings_of(
        "Within prompts: 2 of 4 cells differ.\n  layer 0: <b>\n  layer 3\nAt equal position: 1 differs.\n  layer 1"
    )
    assert "<p class='wb-first'>Within prompts: 2 of 4 cells differ.</p>" in text
    assert "<li>At equal position: 1 differs.<ul><li>layer 1</li></ul></li>" in text
    assert "<li>layer 0: &lt;b&gt;</li><li>layer 3</li><li>At equal position" in text, "below the lead, not each other"


def test_lines_below_a_warning_are_as_prominent_as_others() -> None:
    text = findings_of("13 prompts.\nWarning: few prompts.\n  layer 0\n  layer 1")
    assert "<li class='wb-muted'>Warning: few prompts.</li><li>layer 0</li><li>layer 1</li>" in text
    assert "<li>few prompts.<ul><li>layer 0</li>" in findings_of("13 prompts.\nfew prompts.\n  layer 0"), "control"


def test_models_and_activations_come_after_what_they_explain() -> None:
    titles = ("A model of accuracy", "hook_resid_post: analysis against final", "Expert load: analysis against final")
    text = content.findings({t: xr.Dataset(attrs={"title": t, "summary": "s"}) for t in titles})
    assert min(titles, key=text.index) == titles[2], "negative control: in the order of the names it is last"


def test_the_command_of_a_graph_asks_the_conversations_own_question(demo_run: Path) -> None:
    """Only a conversation that is one message of a user can be asked again by a command."""
    run = wb.open_run(demo_run)
    questions = run.messages[run.messages["role"] == "user"].groupby("sequence").size().reindex(run.sequences.index)
    several = questions.index[questions > 1].tolist()[::10]
    assert several, "negative control: some have several questions"
    assert not [n for n in several if content.graph_command(run, n, "nano")]
    known = [n for n in questions.index[questions == 1][::25] if content.graph_command(run, n, "nano")]
    number = known[0]
    row, question = run.sequences.loc[number], [m for m in run.conversation(number) if m["role"] == "user"]
    words = shlex.split(content.graph_command(run, number, "nano"))
    assert words[:3] == ["workbench", "graph", "nano"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--prompt"] == question[0]["text"]
    assert options["--effort"] == row["effort"]
    assert Path(options["--out"]).parent == demo_run.parent


def test_a_folded_summary_shows_its_first_line_that_is_no_warning() -> None:
    text = findings_of("Warning: few prompts.\nWithin prompts: 2 of <4> cells differ by 5%.\n  layer 0")
    preview = text.partition("class='wb-preview'>")[2].partition("</span>")[0]
    assert preview == "Within prompts: 2 of &lt;4&gt; cells differ by 5\u202f%."


def test_lines_that_are_alike_have_no_lead() -> None:
    text = findings_of("low: 0 tokens.\nmedium: 12 tokens.\n\nSkipped: sinks, as they are not recorded.")
    assert "wb-first" not in text
    listed, _, folded = text.partition("<summary>Not tested (1)</summary>")
    assert listed.count("<li>") == 2
    assert "<li>Sinks, as they are not recorded.</li>" in folded
    assert "not recorded" not in listed
    assert "wb-first" in findings_of("low: 0 tokens.\nSkipped: sinks, as they are not recorded."), "negative control"


@pytest.mark.parametrize("page", page_titles())
def test_what_is_damaged_is_said_on_every_page_and_the_rest_is_shown(page: str, tmp_path: Path) -> None:
    """Tables, sums and tokens are cut or gone; no page fails, and what could not be read is named."""
    damaged = shutil.copytree(DATA / "demo.zarr", tmp_path / "r.zarr")
    registry = RunRegistry([damaged], cache=tmp_path / "cache")
    complete = made(page, Session(registry, Selection({}), lambda: None))
    assert page == "compare" or not any(isinstance(part, pn.pane.Alert) for part in complete.main)
    for part in ("totals", "tokens", "routing", "sequences"):
        for file in sorted(p for p in (damaged / part).rglob("*") if p.is_file() and p.name != "zarr.json"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        registry._runs.clear()
        registry._made.clear()
        shown = made(page, Session(registry, Selection({}), lambda: None))
        assert shown.main
    alerts = " ".join(str(alert.object) for part in shown.main for alert in [part] if isinstance(alert, pn.pane.Alert))
    # results beside the run need its digest alone, and this run has no features that could be damaged
    assert "verify" in alerts or "two runs" in alerts or page in ("causal", "graph", "features")
    (damaged / "zarr.json").unlink()
    gone = made(page, Session(registry, Selection({}), lambda: None)) if page != "compare" else None
    assert gone is None or "is not" in str(gone.main[0].object)
    registry.jobs.close()


EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which every text is hostile: of sequences, messages, checkpoint and provenance, and its name."""
    path = tmp_path_factory.mktemp("evil") / "<img src=x onerror=alert(1)>.zarr"
    write_hostile_run(path, EVIL)
    return path


def markup(page: pn.viewable.Viewable | object) -> str:
    """What a browser gets as HTML or Markdown of a part of a page."""
    if not hasattr(page, "select"):
        return ""
    panes = page.select(lambda part: isinstance(part, pn.pane.markup.HTMLBasePane | pn.pane.Alert))
    return "\n".join(str(pane.object) for pane in panes)


@pytest.mark.parametrize("page", page_titles())
def test_texts_of_a_run_are_only_text_on_every_page(page: str, evil_run: Path, tmp_path: Path) -> None:
    registry = RunRegistry([evil_run], cache=tmp_path / "cache")
    try:
        shown = made(page, Session(registry, Selection({}), lambda: None))
        text = "\n".join(markup(part) for part in [*shown.main, *getattr(shown, "sidebar", [])])
    finally:
        registry.jobs.close()
    assert "<img src=x" not in text
    if page == "overview":
        assert "&lt;img src=x" in text, "the texts do reach the page"


@pytest.mark.parametrize("command", ["report {run} --out out.html", "conversation {run} 0 --out out.html", "publish"])
def test_texts_of_a_run_are_only_text_in_every_file(
    command: str, evil_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "publish {run} --out out --conversations 0" if command == "publish" else command
    done = run_command(*(word.replace("{run}", str(evil_run)) for word in command.split()))
    assert done.code == 0, done.err
    written = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".html", ".md", ".svg")]
    assert written
    assert not [text for text in written if "<img src=x" in text]
    assert any("img src=x" in text for text in written), "the texts do reach the files"


def test_a_text_that_is_not_escaped_is_noticed(evil_run: Path) -> None:
    """The negative control: a pane of the name of a run as it is."""
    assert "<img src=x" in markup(pn.Column(pn.pane.HTML(f"<p>{evil_run.name}</p>")))


def test_a_notebook_shows_every_page() -> None:
    for page in page_titles():
        assert len(notebook(DATA / "demo.zarr", page=page)) == 2
    with pytest.raises(InputError, match="does not exist; the pages are"):
        notebook(DATA / "demo.zarr", page="none")
