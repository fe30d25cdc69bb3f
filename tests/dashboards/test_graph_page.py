"""The page Why this token: nodes are ablated in the model, and both effects are shown and in the link.

`test_pages` explores a graph without a model.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from tests.dashboards.browsing import Session, serve, stop
from tests.dashboards.test_attribution_graph import graph as file_without_ids
from tests.dashboards.test_pages import graph_frame, node
from workbench.dashboards import attribution_graph, graph_page
from workbench.dashboards.attribution_graph import ablated_nodes, graph_data, heads_by_node
from workbench.dashboards.session import Session as PageSession
from workbench.dashboards.state import RunRegistry, Selection
from workbench.experiments import graph_ablation, graph_export
from workbench.experiments.dictionary_features import load_autoencoders

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_run: Path) -> Path:
    """A run with a graph of nano, and a graph without the ids of its tokens."""
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(demo_run, folder / "demo.zarr")
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    graph_export.write_json(model, wb.experiments.graph(model, "12+34=", against="7"), folder / "a.json")
    (folder / "older.json").write_text(json.dumps(file_without_ids()))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    server, url = serve(str(folder / "demo.zarr"))
    yield url
    stop(server)


def test_nodes_that_can_be_ablated_are_those_of_the_graph() -> None:
    drawn = graph_data(file_without_ids())
    assert ablated_nodes(drawn, "1_2_1 0_9_1 1_2_1 E_1_0") == ["1_2_1", "0_9_1", "E_1_0"]
    assert ablated_nodes(drawn, "3_7_1 2_-1_1 --node ../x") == [], "negative control: a logit, an error, and no nodes"
    assert heads_by_node(drawn) == {"1_2_1": (1, 2)}


def test_a_head_is_ablated_by_a_click_and_the_link_shows_it_again(
    folder: Path, served: str, browser: playwright.Browser
) -> None:
    content = json.loads((folder / "a.json").read_text())
    drawn = graph_data(content)
    head = next(n for n in drawn["nodes"] if n["kind"] == "head")
    effects = graph_ablation.measure(wb.load("nano", dtype=torch.float32, device="cpu"), content, [head["id"]])
    fall = float(effects.nodes["measured"].iloc[0])
    change = f"{'falls' if fall >= 0 else 'rises'} by {abs(fall):.2f} logits"
    session = Session(browser, f"{served}/graph?graph=a")
    frame = graph_frame(session)
    frame.locator(f".node[data-i='{node(frame, head['id'])}']").click()
    expect(session.page.get_by_role("link", name=re.compile("Sink attention of layer"))).to_be_visible()
    expect(frame.get_by_text("Measured: without it")).to_have_count(0)  # before it is asked for
    frame.get_by_role("button", name="Ablate and measure").click()
    expect(frame.get_by_text(f"Measured: without it at this token, the target {change}.")).to_be_visible()
    expect(session.page.get_by_text(f"the target {change}, measured in the model.")).to_be_visible()
    session.page.wait_for_url(re.compile(f"ablated={head['id']}"))
    again = Session(browser, session.page.url)
    expect(graph_frame(again).get_by_text(f"Measured: without it at this token, the target {change}.")).to_be_visible()
    assert session.errors == session.foreign == again.errors == []


def test_a_feature_is_ablated_with_the_autoencoder_that_the_dashboard_was_given(tmp_path: Path) -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    sae = write_sae(tmp_path / "sae", model.cfg.d_model)
    messages = [{"role": "user", "content": "2+3"}, {"role": "assistant", "channel": "final", "content": "5"}]
    row = {"id": "a", "prompt_id": "a", "effort": "low", "messages": messages}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    record = ["routing", f"features:{sae}"]
    run = wb.capture(model, tmp_path / "answers.jsonl", tmp_path / "run.zarr", record=record)
    saes = load_autoencoders([sae], model.device)
    graph_export.write_json(model, wb.experiments.graph(model, "12+34=", against="7", saes=saes), tmp_path / "a.json")
    drawn = attribution_graph.load(tmp_path / "a.json")
    feature = next(n["id"] for n in drawn["nodes"] if n["kind"] == "feature")
    errors = [n["label"] for n in drawn["nodes"] if n["kind"] == "error"]
    assert "layer 2 feature error" in errors, "it is not offered for ablation"
    digest = run.spec.features[0].digest
    registry = RunRegistry([tmp_path / "run.zarr"], cache=tmp_path / "cache", autoencoders={digest: sae})
    session = PageSession(registry, Selection({}), lambda: None)
    kinds = graph_page._ablated_kinds(session, drawn)
    assert ablated_nodes(drawn, feature, kinds) == [feature]
    ask = registry.graph_ablation("run", tmp_path / "a.json", [feature], features=True)
    for _ in range(1200):
        if (answer := ask()).datasets is not None or answer.reason:
            break
        time.sleep(0.1)
    assert answer.datasets is not None, answer.reason
    content = json.loads((tmp_path / "a.json").read_text())
    wanted = graph_ablation.measure(model, content, [feature], saes=saes).nodes["measured"]
    assert answer.datasets["ablation"]["measured"].values == pytest.approx(wanted.to_numpy(), abs=1e-4)
    layer, number = attribution_graph.features_by_node(drawn)[feature]
    shown = graph_page._about_graph(session, drawn, feature)
    assert f"feature={number}" in shown
    assert f"Examples and effects of feature {number} in layer {layer}" in shown
    registry.jobs.close()
    without = RunRegistry([tmp_path / "run.zarr"], cache=tmp_path / "cache")
    session = PageSession(without, Selection({}), lambda: None)
    assert "feature" not in graph_page._ablated_kinds(session, drawn), "negative control: no autoencoder was given"
    shown = graph_page._about_graph(session, drawn, feature)
    assert "<code>--sae NAME=FOLDER</code>" in shown
    assert "Examples and effects" not in shown
    without.jobs.close()


def test_a_graph_of_an_older_version_states_what_is_missing(served: str, browser: playwright.Browser) -> None:
    session = Session(browser, f"{served}/graph?graph=older&node=1_2_1")
    expect(session.page.get_by_text("make the graph again with workbench graph")).to_be_visible()
    expect(graph_frame(session).get_by_role("heading", name="layer 1 head 2")).to_be_visible()
    expect(graph_frame(session).get_by_role("button", name="Ablate and measure")).to_have_count(0)
