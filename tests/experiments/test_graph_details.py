"""Neurons add up to their expert, and router edges to the logit difference that decided the choice."""

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.experiments import graph_checks, graph_details
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.model.transformer import GptOss

TEXT = "<|start|>user<|message|>24*29<|end|><|start|>assistant<|channel|>analysis<|message|>4*9="


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def complete(model: GptOss) -> AttributionGraph:
    return graph(model, TEXT, node_share=1.0, edge_share=1.0, max_nodes=10**6)


@pytest.fixture(scope="module")
def experts(complete: AttributionGraph) -> list[int]:
    return complete.nodes[complete.nodes["kind"] == "expert"].nlargest(6, "influence").index.tolist()


def test_neurons_add_up_to_their_expert(model: GptOss, complete: AttributionGraph, experts: list[int]) -> None:
    wrong = []
    for node, other in zip(experts, experts[1:] + experts[:1], strict=True):
        row = complete.nodes.loc[node]
        expanded = graph_details.neurons(model, complete, node, top=5)
        assert expanded.nodes["neuron"].tolist()[-1] == -1
        assert len(expanded.nodes) == 6
        assert expanded.nodes["value"].sum() == pytest.approx(row["value"], rel=1e-4, abs=1e-5)
        assert expanded.nodes["bias"].sum() == pytest.approx(row["bias"], rel=1e-4, abs=1e-4)
        assert expanded.nodes["error"].abs().max() < 1e-4, "edges and bias add up to every neuron"
        ours = expanded.edges.groupby("source")["value"].sum()
        theirs = complete.edges[complete.edges["target"] == node].set_index("source")["value"]
        np.testing.assert_allclose(ours.reindex(theirs.index), theirs, rtol=1e-3, atol=1e-4)
        wrong.append(abs(expanded.nodes["value"].sum() - complete.nodes.loc[other, "value"]))
    assert max(wrong) > 0.1, "the negative control: neurons of one expert are not those of another"


def test_all_neurons_are_shown_on_demand(model: GptOss, complete: AttributionGraph, experts: list[int]) -> None:
    expanded = graph_details.neurons(model, complete, experts[0], top=10**6)
    assert sorted(expanded.nodes["neuron"]) == list(range(model.cfg.d_mlp))
    assert expanded.nodes["value"].abs().is_monotonic_decreasing


def test_neurons_as_nodes_keep_every_sum(model: GptOss, complete: AttributionGraph, experts: list[int]) -> None:
    """Edges into and out of an expert's neurons add up to its own; with other neurons' writes they do not."""
    divided = graph_details.with_neurons(model, complete, experts[:3], top=4)
    assert divided.nodes["error"].abs().max() < 2e-5
    assert divided.nodes["kind"].value_counts()[["neuron", "other neurons"]].tolist() == [12, 3]
    place = ["layer", "pos", "index"]
    for node in experts[:3]:
        row = complete.nodes.loc[node]
        inner = divided.nodes[divided.nodes["kind"].isin(("neuron", "other neurons"))]
        inner = inner[(inner[place] == row[place].tolist()).all(axis=1)]
        assert inner["value"].sum() == pytest.approx(row["value"], rel=1e-4, abs=1e-5)
        for end in ("source", "target"):
            own = divided.edges[divided.edges[end].isin(inner.index)]["value"].sum()
            assert own == pytest.approx(complete.edges[complete.edges[end] == node]["value"].sum(), rel=1e-3, abs=1e-4)
    shuffled = graph_details.with_neurons(model, complete, experts[:1], top=4)
    target = len(shuffled.nodes) - 1
    into = shuffled.edges[shuffled.edges["target"] == target].set_index("source")["value"]
    neurons = shuffled.nodes.index[shuffled.nodes["kind"] == "neuron"]
    assert into.sum() == pytest.approx(shuffled.nodes["value"].iloc[-1], rel=1e-4)
    assert abs(into.drop(neurons, errors="ignore").sum() - shuffled.nodes["value"].iloc[-1]) > 1e-2, "negative control"


def test_a_neuron_is_ablated(model: GptOss, complete: AttributionGraph, experts: list[int]) -> None:
    divided = graph_details.with_neurons(model, complete, experts[:1], top=2)
    node = divided.nodes.index[divided.nodes["kind"] == "neuron"][0]
    row = divided.nodes.loc[node]

    def zero(x: torch.Tensor, hook: object) -> torch.Tensor:
        x[0, int(row["pos"]), int(row["index"]), int(row["neuron"])] = 0
        return x

    name = f"blocks.{row['layer']}.mlp.experts.hook_post"
    plain, without = (graph_checks.logit(model, divided, hooks) for hooks in ([], [(name, zero)]))
    measured = graph_checks.ablate(model, divided, [node])["measured"].iloc[0]
    assert measured == pytest.approx(plain - without, abs=1e-5)
    assert abs(measured) > 1e-3


def test_scores_are_the_sum_of_what_queries_and_keys_read(model: GptOss, complete: AttributionGraph) -> None:
    heads = complete.nodes[(complete.nodes["kind"] == "head") & (complete.nodes["layer"] > 0)]
    with torch.no_grad():
        cache = model.run_with_cache(torch.tensor([complete.tokens]))[1]
    scores = []
    for node in heads.nlargest(3, "influence").index:
        row = complete.nodes.loc[node]
        result = graph_details.attention_edges(model, complete, node)
        score = float(cache["attn_scores", row["layer"]][0, row["index"], row["pos"], result.attrs["key"]])
        for _, side in result.groupby("side"):
            assert side["value"].sum() == pytest.approx(score, rel=1e-4)
            assert side.loc[side["source"] == -2, "value"].abs().item() < 1e-3, "a complete graph explains it all"
        scores.append(score)
        sources = complete.nodes.loc[result.loc[(result["side"] == "key") & (result["source"] >= 0), "source"]]
        assert set(sources["pos"]) == {result.attrs["key"]}
    assert np.ptp(scores) > 0.1, "the negative control: another head's score is another sum"
    with pytest.raises(InputError, match="is not of kind head"):
        graph_details.attention_edges(model, complete, len(complete.nodes) - 1)
    with pytest.raises(InputError, match=r"sees \d+ to \d+"):
        graph_details.attention_edges(model, complete, heads.index[0], key=10**6)


def test_a_neurons_activation_is_that_of_the_pass(
    model: GptOss, complete: AttributionGraph, experts: list[int]
) -> None:
    expanded = graph_details.neurons(model, complete, experts[0], top=3)
    row = complete.nodes.loc[experts[0]]
    with torch.no_grad():
        post = model.run_with_cache(torch.tensor([complete.tokens]))[1]["post", int(row["layer"])]
    own = post[0, int(row["pos"]), int(row["index"]), expanded.nodes["neuron"].tolist()[:3]]
    np.testing.assert_allclose(expanded.nodes["activation"][:3], own, rtol=1e-4, atol=1e-6)


def test_router_edges_add_up_to_the_lead_over_the_runner_up(
    model: GptOss, complete: AttributionGraph, experts: list[int]
) -> None:
    leads = []
    for node in experts:
        row = complete.nodes.loc[node]
        result = graph_details.router_edges(model, complete, node)
        with torch.no_grad():
            logits = model.run_with_cache(torch.tensor([complete.tokens]))[1]["router", int(row["layer"])][
                0, int(row["pos"])
            ]
        best = logits.topk(model.cfg.experts_per_token + 1)
        assert result.attrs["runner_up"] == int(best.indices[-1])
        lead = float(logits[int(row["expert"])] - best.values[-1])
        assert result.attrs["difference"] == pytest.approx(lead, abs=1e-4)
        assert lead > 0
        assert result["value"].sum() == pytest.approx(lead, abs=1e-4)
        assert result.set_index("source")["value"][-2] == pytest.approx(0, abs=1e-3), "the complete graph explains all"
        leads.append((result, lead))
    one, lead = leads[0]
    assert abs(one[one["source"] >= 0]["value"].abs().sum() - lead) > 1e-2  # negative control: signs matter


def test_nodes_that_are_no_experts_are_refused(model: GptOss, complete: AttributionGraph, experts: list[int]) -> None:
    target = len(complete.nodes) - 1
    for call in (graph_details.neurons, graph_details.router_edges):
        with pytest.raises(InputError, match=f"node {target} is not of kind expert"):
            call(model, complete, target)
    with pytest.raises(InputError, match="top=0"):
        graph_details.neurons(model, complete, experts[0], top=0)
