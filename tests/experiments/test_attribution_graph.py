"""Edges into every node add up to it, graphs are small and faithful, and what cannot be explained is refused."""

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.model.transformer import GptOss

TEXT = "<|start|>user<|message|>24*29<|end|><|start|>assistant<|channel|>analysis<|message|>4*9="


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def complete(model: GptOss) -> AttributionGraph:
    return wb.experiments.graph(model, TEXT, node_share=1.0, edge_share=1.0, max_nodes=10**6)


@pytest.fixture(scope="module")
def small(model: GptOss) -> AttributionGraph:
    return graph(model, TEXT)


def test_edges_and_bias_add_up_to_every_node(complete: AttributionGraph, model: GptOss) -> None:
    nodes, edges = complete.nodes, complete.edges
    into = edges.groupby("target")["value"].sum().reindex(nodes.index, fill_value=0.0)
    inner = nodes["kind"].isin(("head", "expert", "target"))
    np.testing.assert_allclose((into + nodes["bias"])[inner], nodes["value"][inner], rtol=1e-4, atol=2e-5)
    assert nodes["error"].abs().max() < 2e-5
    with torch.no_grad():
        logits = model(TEXT)[0, -1].double()
    logit = float(logits.max() - logits.mean())
    assert nodes["value"].iloc[-1] == pytest.approx(logit, rel=1e-5)
    assert complete.metadata["completeness_of_paths"] < 1e-3
    wrong = into.to_numpy() + np.roll(nodes["bias"].to_numpy(), 1)  # negative control: other nodes' biases
    assert np.abs(wrong - nodes["value"])[inner].max() > 1e-2


def test_edges_go_forward_to_tokens_that_can_be_seen(complete: AttributionGraph) -> None:
    ends = [complete.nodes.loc[complete.edges[end]].reset_index(drop=True) for end in ("source", "target")]
    source, target = ends
    assert (source["pos"] <= target["pos"]).all()
    moved = source["pos"] < target["pos"]
    assert set(target["kind"][moved]) == {"head"}
    assert (source["layer"] <= target["layer"]).all()


def test_a_small_graph_keeps_the_stated_influence(small: AttributionGraph, complete: AttributionGraph) -> None:
    assert len(small.nodes) < 0.1 * len(complete.nodes)
    assert small.metadata["kept_influence"] >= 0.8
    assert small.nodes["influence"].is_monotonic_increasing is False
    into = small.edges.groupby("target")["value"].sum().reindex(small.nodes.index, fill_value=0.0)
    row = small.nodes.iloc[-1]
    assert into.iloc[-1] + row["error"] == pytest.approx(row["value"], abs=0.5)  # edges are pruned as well
    assert small.metadata["logit"] == pytest.approx(complete.metadata["logit"])
    kept = small.edges["score"].sum() / small.edges["score"].sum()
    assert kept == 1
    assert "nodes" in repr(small)


def test_a_target_against_another_token(model: GptOss) -> None:
    found = graph(model, TEXT, target="6", against="7", at=-1)
    with torch.no_grad():
        logits = model(TEXT)[0, -1]
    wanted = float(logits[model.to_single_token("6")] - logits[model.to_single_token("7")])
    assert found.metadata["logit"] == pytest.approx(wanted, rel=1e-4)
    assert found.nodes["value"].iloc[-1] == pytest.approx(wanted, rel=1e-4)
    earlier = graph(model, TEXT, at=5)
    assert len(earlier.tokens) == 6


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": [[1, 2], [3, 4]]}, "one sequence"),
        ({"tokens": [1, 999]}, "the vocabulary has 0 to 71"),
        ({"at": 99}, "the sequence has"),
        ({"node_share": 0}, "above 0"),
        ({"max_nodes": 1}, "at least 2"),
        ({"target": 999}, "the vocabulary has"),
        ({"target": "12"}, "12"),
    ],
)
def test_what_cannot_be_explained_is_refused(model: GptOss, asked: dict, message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        graph(model, **({"tokens": TEXT} | asked))
