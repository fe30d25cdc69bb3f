"""Exported graphs have the published schema, and state what the graph has.

Also tests `workbench.cli.graphs`.
"""

import gzip
import json
import shutil
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import networkx as nx
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr
from typer.testing import CliRunner

import workbench as wb
from tests.conftest import DATA
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import graph_details, graph_export
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.model.config import PUBLISHED
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
    pruning_settings: dict[str, float]


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


class NeuronpediaNode(BaseModel):
    """What Neuronpedia's graph-schema.json asks of a node, at commit ebb8426."""

    node_id: StrictStr
    feature: StrictInt | None
    layer: StrictStr | StrictInt
    ctx_idx: StrictInt
    feature_type: StrictStr
    jsNodeId: StrictStr  # noqa: N815
    clerp: StrictStr
    influence: StrictFloat | None = None
    activation: StrictFloat | None = None
    token_prob: StrictFloat = 0.0  # not in the schema; its scores are weighted by that of the logits


class Generator(BaseModel):
    name: StrictStr
    version: StrictStr


class Info(BaseModel):
    generator: Generator
    description: StrictStr = ""
    creator_name: StrictStr = ""
    source_urls: list[str] = []


class PruningSettings(BaseModel):
    node_threshold: StrictFloat
    edge_threshold: StrictFloat


class NeuronpediaMetadata(BaseModel):
    slug: str = Field(strict=True, pattern=r"^[a-zA-Z0-9_.-]+$")  # its upload refuses other characters
    scan: str = Field(strict=True, pattern=r"^[a-zA-Z0-9_.-]+$")
    prompt_tokens: list[StrictStr]
    prompt: StrictStr
    node_threshold: StrictFloat
    info: Info
    pruning_settings: PruningSettings


class NeuronpediaFile(BaseModel):
    metadata: NeuronpediaMetadata
    qParams: QParams  # noqa: N815
    nodes: list[NeuronpediaNode]
    links: list[Link]


def as_viewers_read(data: Mapping[str, Any], threshold: float | None = None) -> set[str]:
    """Return the nodes that the viewers of circuit-tracer and Neuronpedia draw, as their scripts do.

    Both show logits, embeddings and the nodes whose influence is at most the threshold, read the probability of a logit
    from its label, and scale by the probabilities. They end with an error where this fails.
    """
    threshold = data["metadata"]["node_threshold"] if threshold is None else threshold
    assert max(int(node["layer"]) for node in data["nodes"] if node["feature_type"] != "logit" and node["layer"] != "E")
    for node in data["nodes"]:
        if node["feature_type"] == "logit":
            probability = float(node["clerp"].split("(p=")[1].split(")")[0])
            assert probability == pytest.approx(node["token_prob"], abs=1e-3)
            assert probability > 0
    always = ("logit", "embedding")
    shown = [n for n in data["nodes"] if n["feature_type"] in always or (n["influence"] or 0) <= threshold]
    return {node["node_id"] for node in shown}


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
    for asked in ({"slug": "../x"}, {"scan": "gpt oss"}):
        with pytest.raises(InputError, match="letters, digits"):
            graph_export.to_json(model, attributed, **asked)


@pytest.mark.parametrize("damage", [None, ("clerp", 'logit of "6"'), ("feature", "7"), ("influence", "0.5")])
def test_neuronpedia_takes_the_file(
    model: GptOss, attributed: AttributionGraph, damage: tuple[str, str] | None, tmp_path: Path
) -> None:
    path = graph_export.write_json(model, attributed, tmp_path / "g.json")
    data = json.loads(path.read_text())
    if damage is not None:  # the negative controls
        next(node for node in data["nodes"] if node["is_target_logit"])[damage[0]] = damage[1]
        with pytest.raises((ValueError, IndexError)):
            as_viewers_read(NeuronpediaFile.model_validate(data).model_dump())
        return
    assert as_viewers_read(NeuronpediaFile.model_validate(data).model_dump()) == {
        node["node_id"] for node in data["nodes"]
    }, "every node of the graph is drawn"
    assert data["metadata"]["scan"] == "gpt-oss"
    assert graph_export.to_json(model, attributed, scan="./data/pages")["metadata"]["scan"] == "./data/pages"


def test_viewers_hide_the_least_influential_nodes_first(model: GptOss, attributed: AttributionGraph) -> None:
    data = graph_export.to_json(model, attributed)
    own = dict(zip([n["node_id"] for n in data["nodes"]], attributed.nodes["influence"], strict=False))
    inner = attributed.nodes.index[~attributed.nodes["kind"].isin(("embedding", "target"))]
    ids = [data["nodes"][i]["node_id"] for i in inner]
    strongest = sorted(ids, key=lambda name: -own[name])[:3]
    third = next(n["influence"] for n in data["nodes"] if n["node_id"] == strongest[-1])
    assert as_viewers_read(data, third) & set(ids) == set(strongest)
    shares = [node["influence"] for node in data["nodes"] if node["influence"] is not None]
    assert max(shares) == pytest.approx(attributed.metadata["kept_influence"])
    for node in data["nodes"]:  # the negative control: a node's own influence in place of the share reached with it
        node["influence"] = own.get(node["node_id"])
    assert not as_viewers_read(data, own[strongest[-1]] * 0.999) & set(strongest)


def test_the_scan_is_that_of_neuronpedia_for_the_published_shapes(model: GptOss) -> None:
    for size in ("20b", "120b"):
        published = SimpleNamespace(cfg=PUBLISHED[size])
        assert graph_export.scan_of(cast(GptOss, published)) == f"gpt-oss-{size}"
    other = SimpleNamespace(cfg=replace(PUBLISHED["20b"], n_layers=2, windows=(None, 128)))
    assert graph_export.scan_of(cast(GptOss, other)) == graph_export.scan_of(model) == "gpt-oss"


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
    assert again.graph["kept_influence"] == pytest.approx(attributed.metadata["kept_influence"])
    assert again.graph["prompt"] == "12+34="
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
    assert "explained: token 6 of the answer" in done.output
    assert "of what flows into them is no error" in done.output
    checked = CliRunner().invoke(app, [*arguments, "--overwrite", "--ablate", "2", "--ablate-edges", "1"])
    assert checked.exit_code == 0, checked.output
    lines = [line for line in checked.output.splitlines() if "by ablation" in line]
    assert [line.partition(", measured by")[0] in done.output for line in lines] == [True, True, False]
    assert [" → " in line for line in lines] == [False, False, True]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, InputError)
    assert "exists" in str(again.exception)
    far = CliRunner().invoke(app, [*arguments[:-1], "999", "--overwrite"])
    assert "the model generated" in str(far.exception)


def test_labels_of_a_run_name_its_experts(tmp_path: Path) -> None:
    run, out = tmp_path / "r.zarr", tmp_path / "g.json"
    shutil.copytree(DATA / "demo.zarr", run)
    arguments = ["graph", "nano", "--prompt", "24*29", "--effort", "high", "--at", "6", "--labels", str(run)]
    arguments += ["--out", str(out)]
    refused = CliRunner().invoke(app, arguments)
    assert f"workbench label {run}" in str(refused.exception)
    (tmp_path / "r.zarr.labels.jsonl").write_text('{"layer": 3, "expert": 0, "label": "writes ="}\n')
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    names = {node["clerp"] for node in json.loads(out.read_text())["nodes"] if "expert" in node["clerp"]}
    assert "layer 3 expert 0: writes =" in names
    assert sum(": " in name for name in names) == 1, "the negative control: experts without a label"
