"""What pages say is what the run holds; no widget, no browser."""

import base64
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pandas as pd
import panel as pn
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from tests.runs.conftest import LENGTHS, job, write_unit
from workbench import harmony
from workbench.capture.plan import plan_units
from workbench.dashboards import app, content, search
from workbench.dashboards.access import login_options as _access
from workbench.dashboards.app import notebook
from workbench.dashboards.conversation import data_of, frame
from workbench.dashboards.pages import made, page_titles
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.dashboards.study_jobs import Answer, Desk
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.runs import Run
from workbench.runs.writer import open_writer
from workbench.studies import run_study


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


@pytest.fixture(scope="module")
def registry() -> RunRegistry:
    return RunRegistry([DATA / "demo.zarr"])


def test_an_expert_s_tokens_are_those_that_went_to_it(run: Run) -> None:
    table = search.expert_tokens(run, 1, 5, str, rows=1000)
    data = run.dataset[["id", "experts"]].compute()
    hit = (data["experts"].values[1] == 5).any(-1)
    every, chosen = Counter(data["id"].values.tolist()), Counter(data["id"].values[hit].tolist())
    assert len(table) == sum(n >= 5 for n in chosen.values())
    for row in table.head(10).to_dict("records"):
        token = int(row["token"])
        assert row["times"] == chosen[token]
        assert row["lift"] == pytest.approx(chosen[token] / every[token] / hit.mean(), abs=1e-3)
        assert f"[{token}]" in row["for example"]


def test_tokens_of_a_selection_are_counted_in_it_alone(run: Run) -> None:
    within = search.TokenSelection(channel="final", effort="high", task="product")
    table = search.expert_tokens(run, 1, 5, str, rows=1000, within=within)
    data = run.dataset[["id", "experts", "channel", "sequence"]].compute()
    of = run.sequences.loc[data["sequence"].values]
    inside = (data["channel"].values == CHANNELS.index("final")) & (of["effort"] == "high") & (of["task"] == "product")
    hit = (data["experts"].values[1] == 5).any(-1) & inside.to_numpy()
    chosen = Counter(data["id"].values[hit].tolist())
    assert {int(row["token"]): row["times"] for row in table.to_dict("records")} == {
        token: n for token, n in chosen.items() if n >= 5
    }
    for row in table.to_dict("records"):
        there = (data["sequence"].values == row["sequence"]) & hit
        assert row["position"] in run.sequence(row["sequence"])["position"].values
        assert int(row["token"]) in data["id"].values[there]


def test_a_head_s_tokens_and_its_curve_are_those_of_its_sinks(run: Run) -> None:
    data = run.dataset[["id", "sink", "channel", "position"]].compute()
    mass = data["sink"].values[2][:, 3].astype(np.float64)
    curve = search.head_by_position(run, 2, 3)
    final, where = data["channel"].values == CHANNELS.index("final"), data["position"].values
    for low, high in ((16, 32), (32, 64)):
        inside = final & (where >= low) & (where < high)
        assert curve.loc[low, "final"] == pytest.approx(mass[inside].mean(), rel=1e-5)
    table = search.head_tokens(run, 2, 3, str)
    assert (np.diff(table["lift"]) <= 0).all()
    best = data["id"].values == int(table["token"].iloc[0])
    assert mass[best].mean() > np.quantile(mass, 0.8)


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


def test_whom_an_expert_works_with(registry: RunRegistry) -> None:
    pairs = registry.pairs("demo")
    assert pairs is not None
    partners = content.partners(pairs, "final", 2, 3)
    assert 3 not in set(partners["with expert"])
    assert (np.diff(partners["lift"]) <= 0).all()


def test_conversations_are_found_by_task_effort_and_text(run: Run) -> None:
    found = search.conversations(run, task="product", effort="high")
    assert len(found) == 20
    assert all(run.sequences.loc[i, "task"] == "product" for i in found.values())
    assert len(search.conversations(run, text="product-07/")) == 3
    assert search.conversations(run, text="no such text anywhere") == {}
    said = search.conversations(run, text="REASONING: HIGH")
    assert set(said.values()) == set(run.sequences.index[run.sequences["effort"] == "high"])
    assert search.conversations(run, text="reasoning: high", channel="final") == {}


def test_conversations_are_ordered_by_an_expert_s_share(run: Run) -> None:
    found = list(search.conversations(run, channel="analysis", expert=(1, 5)).values())
    data = run.dataset[["sequence", "channel", "experts"]].compute()
    inside = data["channel"].values == CHANNELS.index("analysis")
    hit = (data["experts"].values[1] == 5).any(-1)[inside]
    share = pd.Series(hit).groupby(data["sequence"].values[inside]).mean()
    assert found == [i for i in found if share[i] > 0]
    assert len(found) == (share > 0).sum()
    np.testing.assert_allclose(share[found].to_numpy(), np.sort(share)[::-1][: len(found)])


def test_a_character_of_several_tokens_is_shown_once() -> None:
    words = harmony.tokenizer()
    text = "naïve 🦜🦜 日本語 𓀀 \ufffd ok"
    ids = words.encode(text)
    shown = search.texts(ids, words)
    assert len(shown) == len(ids)
    assert "".join(shown) == text
    assert "" in shown  # some character here takes more than one token
    alone = [words.decode([i]) for i in ids]
    assert "".join(alone) != text  # and one by one they cannot be read
    broken = [ids[i] for i in range(len(ids)) if shown[i] == ""][:1] * 9
    assert len(search.texts(broken, words)) == 9
    assert "".join(search.texts(broken, words))


def test_a_conversation_s_page_holds_its_tokens_and_no_open_tag(run: Run) -> None:
    words = search.vocabulary(run)
    assert words is not None
    number = int(run.sequences.index[17])
    data = data_of(run, number, words)
    tokens = run.sequence(number).compute()
    assert "".join(data["texts"]) == words.decode(tokens["id"].values.tolist())
    experts = np.frombuffer(base64.b64decode(data["experts"]), np.uint8).reshape(tokens["experts"].shape)
    np.testing.assert_array_equal(experts, tokens["experts"].values)
    gates = np.frombuffer(base64.b64decode(data["gates"]), np.uint8).reshape(tokens["gates"].shape) / 255
    np.testing.assert_allclose(gates, tokens["gates"].values, atol=0.002)
    page = frame(run, number, words)
    assert page.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in page
    assert "allow-same-origin" not in page


def test_a_choice_survives_its_link_and_knows_only_its_names() -> None:
    choice = Selection({"channel": "final", "effort": "<script>", "evil": "x", "layer": "3"})
    assert choice.get("channel", ["analysis", "final"]) == "final"
    assert choice.get("effort", ["low", "high"], "high") == "high"
    assert choice.get("expert", ["0", "1"]) == "0"
    assert choice.get("expert", []) == ""
    choice.put(channel="analysis", layer="")
    again = Selection(dict(parse_qsl(choice.query(theme="dark"))))
    assert (again.text("channel"), again.text("layer"), again.text("theme"), again.text("evil")) == (
        "analysis",
        "",
        "dark",
        "",
    )
    assert "<" not in choice.query()


def wait_for(desk: Desk, *asked: Any, **how: Any) -> Answer:
    for _ in range(600):
        answer = desk.ask(*asked, **how)
        if answer.datasets is not None or answer.reason:
            return answer
        time.sleep(0.1)
    pytest.fail("the study was never made")


def test_a_study_is_made_beside_kept_and_read_back(tmp_path: Path, run: Run) -> None:
    desk = Desk(tmp_path)
    assert desk.ask("effort", [run.path], run.digest).datasets is None  # nobody waits
    made = wait_for(desk, "effort", [run.path], run.digest)
    assert made.datasets is not None
    here = run_study("effort", run)
    assert made.datasets.keys() == here.keys()
    for name, ds in here.items():
        xr.testing.assert_allclose(made.datasets[name], ds)
        assert made.datasets[name].attrs == ds.attrs
    desk.close()
    second = Desk(tmp_path)
    second._make = lambda *_: pytest.fail("made again")  # type: ignore[method-assign]
    assert wait_for(second, "effort", [run.path], run.digest).datasets is not None
    second.close()


def test_what_a_run_cannot_carry_is_said_and_half_a_study_is_not_kept(tmp_path: Path, run: Run) -> None:
    desk = Desk(tmp_path)
    answer = wait_for(desk, "routing", [str(tmp_path / "none.zarr")], "digest")
    assert "is not there" in answer.reason
    assert not list(tmp_path.rglob("routing*"))
    desk.ask("routing", [run.path], run.digest)
    for _ in range(100):
        if desk._running:
            break
        time.sleep(0.05)
    desk.close()  # as a server that is ended in the middle
    time.sleep(1)
    assert not [p for p in tmp_path.rglob("routing") if p.is_dir()]


def test_no_temporary_folder_is_left_behind(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the study of a run that grows needs one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    desk = Desk(tmp_path / "cache")
    wait_for(desk, "effort", [run.path], run.digest)
    assert not list((tmp_path / "scratch").glob("workbench-studies-*"))
    wait_for(desk, "effort", [run.path], run.digest + "grown", lasting=False)
    assert list((tmp_path / "scratch").glob("workbench-studies-*/*/effort"))
    desk.close()
    assert not list((tmp_path / "scratch").glob("workbench-studies-*"))


def test_a_growing_run_is_studied_once_for_each_visit(tmp_path: Path) -> None:
    layout = plan_units(LENGTHS, 1024)
    with open_writer(tmp_path / "r.zarr", **job(layout)) as writer:
        write_unit(writer, 0)
        registry = RunRegistry([tmp_path / "r.zarr"], cache=tmp_path / "cache")
        asked = list[tuple[str, bool]]()
        registry.desk.ask = lambda study, paths, digest, *, exclude, lasting: asked.append((digest, lasting))  # type: ignore[assignment,method-assign]
        session = registry.study("routing", "r")
        first = registry.run("r").digest
        session()
        write_unit(writer, 1)
        assert registry.run("r").digest != first
        session()
        assert asked == [(first, False)] * 2
        registry.study("routing", "r")()
        assert asked[2][0] != first
        registry.desk.close()


@pytest.mark.parametrize("page", page_titles())
def test_what_is_damaged_is_said_on_every_page_and_the_rest_is_shown(page: str, tmp_path: Path) -> None:
    """Tables, sums and tokens are cut or gone; no page fails, and what could not be read is named."""
    damaged = shutil.copytree(DATA / "demo.zarr", tmp_path / "r.zarr")
    registry = RunRegistry([damaged], cache=tmp_path / "cache")
    whole = made(page, Session(registry, Selection({}), lambda: None))
    assert page == "compare" or not any(isinstance(part, pn.pane.Alert) for part in whole.main)
    for part in ("totals", "tokens", "routing", "sequences"):
        for file in sorted(p for p in (damaged / part).rglob("*") if p.is_file() and p.name != "zarr.json"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        registry._runs.clear()
        registry._made.clear()
        shown = made(page, Session(registry, Selection({}), lambda: None))
        assert shown.main
    said = " ".join(str(alert.object) for part in shown.main for alert in [part] if isinstance(alert, pn.pane.Alert))
    # results beside the run need its digest alone
    assert "verify" in said or "two runs" in said or page in ("causal", "graph")
    (damaged / "zarr.json").unlink()
    gone = made(page, Session(registry, Selection({}), lambda: None)) if page != "compare" else None
    assert gone is None or "is not" in str(gone.main[0].object)
    registry.desk.close()


def test_a_notebook_shows_every_page() -> None:
    for page in page_titles():
        assert len(notebook(DATA / "demo.zarr", page=page)) == 2
    with pytest.raises(InputError, match="no page is called"):
        notebook(DATA / "demo.zarr", page="none")


def test_a_vocabulary_that_nobody_has_shows_numbers(run: Run) -> None:
    assert search.tokenizer_of("unknown") is None
    assert search.tokenizer_of(harmony.tokenizer().digest) is not None
    assert data_of(run, int(run.sequences.index[0]), None)["texts"][0].startswith("⟨")


def test_two_sessions_wait_for_one_computation(registry: RunRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    made = []
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: registry._once(("x",), "d", lambda: made.append(1) or object()), range(8)))
    assert len(made) == 1
    assert len({id(f) for f in found}) == 1


def test_who_may_enter_is_read_from_a_file(tmp_path: Path) -> None:
    assert _access(None) == {}
    file = tmp_path / "users.json"
    for text in ("", "[]", "{}", '{"a": 1}'):
        file.write_text(text)
        with pytest.raises(InputError, match="names and passwords"):
            _access(file)
    file.write_text(json.dumps({"ada": "secret"}))
    file.chmod(0o600)
    first, second = _access(file), _access(file)
    assert first["basic_auth"] == str(file)
    assert first["cookie_secret"] != second["cookie_secret"]


def test_a_run_name_is_only_text_in_the_template(tmp_path: Path) -> None:
    """Panel's template puts the title into the page as it is: `<img onerror=…>` once ran there."""
    path = tmp_path / "<img src=x onerror=alert(1)>.zarr"
    shutil.copytree(DATA / "demo.zarr", path)
    registry = RunRegistry([path])
    (name,) = registry.names
    template = app._template(registry, "overview")
    assert "<" in name, "otherwise the test proves nothing"
    assert "<" not in template.title
    assert "&lt;img" in template.title
    assert "<" not in template.texts["run_name"]


def test_irregular_messages_of_a_conversation_are_marked(demo_run: Path) -> None:
    run = wb.open_run(demo_run)
    tokenizer = search.vocabulary(run)
    assert data_of(run, 0, tokenizer)["irregular"] == {}, "nothing is irregular in the demo run"
    messages = run.messages.copy()
    own = messages.index[messages["sequence"] == 0]
    messages.loc[own[1], "flags"] = "no_message extra_text"
    messages.loc[own[2], "closed_by"] = "truncated"
    run.__dict__["messages"] = messages
    assert data_of(run, 0, tokenizer)["irregular"] == {"1": "no message, extra text", "2": "cut off"}
    assert data_of(run, 1, tokenizer)["irregular"] == {}
