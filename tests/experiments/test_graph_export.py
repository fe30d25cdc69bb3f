"""Exported graphs have the published schema, and state what the graph has.

Also tests `workbench.cli.graphs`.
"""

import gzip
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from pydantic import BaseModel, ConfigDict
from typer.testing import CliRunner

import workbench as wb
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import graph_details, graph_export
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.model.transformer import GptOss


class Metadata(BaseModel):
    """As circuit-tracer's graph_models.py has it, at commit 196e2ce."""

    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: int | None


class QParams(BaseModel):
    pinnedIds: list[str]  # noqa: N815
    supernodes: list[list[str]]
    linkType: str  # noqa: N815
    clickedId: str  # noqa: N815
    sg_pos: str


class Node(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    jsNodeId: str  # noqa: N815
    clerp: str
    influence: float | None
    activation: float | None


class Link(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    source: str
    target: str
    weight: float


class File(BaseModel):
    metadata: Metadata
    qParams: QParams  # noqa: N815
    nodes: list[Node]
    links: list[Link]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def attributed(model: GptOss) -> AttributionGraph:
    return graph(model, "12+34=")


def test_the_file_has_the_published_schema(model: GptOss, attributed: AttributionGraph, tmp_path: Path) -> None:
    data: dict[str, Any] = json.loads(
        graph_export.write_json(model, attributed, tmp_path / "my graph.json").read_text()
    )
    file = File.model_validate_json(json.dumps(data))
    assert file.metadata.slug == "my-graph"
    names = [node.node_id for node in file.nodes]
    assert len(set(names)) == len(names)
    assert {end for link in file.links for end in (link.source, link.target)} <= set(names)
    assert [node.is_target_logit for node in file.nodes].count(True) == 1
    kinds = {node.feature_type for node in file.nodes}
    assert kinds <= {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    assert all(0 <= node.ctx_idx < len(file.metadata.prompt_tokens) for node in file.nodes)
    target = next(node for node in file.nodes if node.is_target_logit)
    into = sum(link.weight for link in file.links if link.target == target.node_id)
    assert into == pytest.approx(attributed.metadata["logit"], abs=0.5)
    with pytest.raises(InputError, match="letters, digits"):
        graph_export.to_json(model, attributed, "../x")


def test_neurons_and_choices_are_exported(model: GptOss, attributed: AttributionGraph, tmp_path: Path) -> None:
    divided = graph_details.with_neurons(model, attributed, top=2)
    choices = graph_details.choice_edges(model, divided)
    assert set(choices["kind"]) == {"query", "key", "router"}
    data = graph_export.to_json(model, divided, choices=choices)
    file = File.model_validate_json(json.dumps(data))
    names = [node.node_id for node in file.nodes]
    assert len(set(names)) == len(names)
    features = [node.feature for node in file.nodes if node.feature_type == "cross layer transcoder"]
    places = {(node.layer, node.feature) for node in file.nodes if node.feature_type == "cross layer transcoder"}
    assert len({feature for _, feature in places}) == len(places) <= len(features), "a number is of one layer"
    groups = file.qParams.supernodes
    assert len(groups) == (attributed.nodes["kind"] == "expert").sum()
    assert all(len(group) == 4 and set(group[1:]) <= set(names) for group in groups), "2 neurons and the others"
    links = data["metadata"]["info"]["choices"]
    assert {end for link in links for end in (link["source"], link["target"])} <= set(names)
    network = graph_export.to_networkx(divided, choices)
    nx.write_graphml(network, tmp_path / "g.graphml")
    kinds = [kind for *_, kind in nx.read_graphml(tmp_path / "g.graphml", force_multigraph=True).edges(data="kind")]
    assert kinds.count("direct") == len(divided.edges)
    assert kinds.count("router") == (choices["kind"] == "router").sum()


@pytest.mark.long
def test_circuit_tracer_reads_the_file(model: GptOss, attributed: AttributionGraph, tmp_path: Path) -> None:
    """Its own models and server, where it is installed: pip install --no-deps circuit-tracer."""
    models = pytest.importorskip("circuit_tracer.frontend.graph_models")
    frontend = pytest.importorskip("circuit_tracer.frontend")
    divided = graph_details.with_neurons(model, attributed, top=2)
    path = graph_export.write_json(model, divided, tmp_path / "g.json")
    read = models.Model.model_validate_json(path.read_text())
    assert len(read.nodes) >= len(divided.nodes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = frontend.serve(str(tmp_path), port=port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/graph_data/g.json", timeout=300) as answer:
            content = answer.read()
    finally:
        server.stop()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert json.loads(content) == json.loads(path.read_text())
    with pytest.raises(ValueError, match="ctx_idx"):
        models.Node.model_validate({"node_id": "x", "feature": 1, "layer": "1", "feature_type": "logit"})


def test_networkx_and_graphml(attributed: AttributionGraph, tmp_path: Path) -> None:
    out = graph_export.to_networkx(attributed)
    assert nx.is_directed_acyclic_graph(out)
    assert (len(out.nodes), len(out.edges)) == (len(attributed.nodes), len(attributed.edges))
    nx.write_graphml(out, tmp_path / "g.graphml")
    again = nx.read_graphml(tmp_path / "g.graphml", node_type=int, force_multigraph=True)

    def contents(network: Any) -> tuple[list[str], list[str]]:  # as text, in which NaN equals itself
        nodes = [f"{name} {sorted(data.items())}" for name, data in network.nodes(data=True)]
        edges = [f"{a} {b} {sorted(data.items())}" for a, b, data in network.edges(data=True)]
        return sorted(nodes), sorted(edges)

    assert contents(again) == contents(out)
    source, target, key = next(iter(again.edges(keys=True)))
    again.edges[source, target, key]["value"] += 1
    assert contents(again) != contents(out), "negative control: another weight"


def test_edges_that_recur(model: GptOss, attributed: AttributionGraph) -> None:
    other = graph(model, "45+12=")
    table = graph_export.recurring_edges([attributed, attributed, other])
    assert table["share"].max() == 1
    assert ((table["low"] >= 0) & (table["high"] <= 1) & (table["low"] < table["high"])).all()
    once = graph_export.recurring_edges([attributed])
    assert (once["graphs"] == 1).all()
    with pytest.raises(InputError, match="at least one graph"):
        graph_export.recurring_edges([])


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    arguments = ["graph", "nano", "--prompt", "24*29", "--effort", "high", "--out", str(out), "--at", "6"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "logits" in done.output
    File.model_validate_json(out.read_text())
    assert "by ablation" not in done.output
    checked = CliRunner().invoke(app, [*arguments, "--overwrite", "--ablate", "2"])
    assert checked.exit_code == 0, checked.output
    lines = [line for line in checked.output.splitlines() if "by ablation" in line]
    assert [line.partition(", measured by")[0] in done.output for line in lines] == [True, True]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, InputError)
    assert "exists" in str(again.exception)
    far = CliRunner().invoke(app, [*arguments[:-1], "999", "--overwrite"])
    assert "the model generated" in str(far.exception)
