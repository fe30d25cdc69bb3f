"""Graphs in circuit-tracer's format: what is drawn, what is left out and said so, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from workbench import harmony
from workbench.dashboards import attribution_graph
from workbench.dashboards.search import texts
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.research.recipe import Intervention, Recipe, Scope


def graph(scan: str = "gpt-oss") -> dict[str, Any]:
    """An embedding that feeds an expert and a head, which feed a logit."""

    def node(id: str, layer: str, position: int, kind: str, label: str, influence: float | None) -> dict[str, Any]:
        return {"node_id": id, "layer": layer, "ctx_idx": position, "feature_type": kind, "clerp": label} | {
            "influence": influence,
            "activation": 1.5,
        }

    inner = "cross layer transcoder"
    nodes = [
        node("E_1_0", "E", 0, "embedding", "embedding of 'a'", 0.2),
        node("0_9_1", "0", 1, inner, "layer 0 expert 5", 0.5),
        node("1_2_1", "1", 1, inner, "layer 1 head 2", 0.3),
        node("2_-1_1", "2", 1, "mlp reconstruction error", "not explained", None),
        node("3_7_1", "3", 1, "logit", 'logit of "</script><b>"', 0.0),
    ]
    pairs = [("E_1_0", "0_9_1", 0.5), ("0_9_1", "1_2_1", -2.0), ("1_2_1", "3_7_1", 1.0), ("2_-1_1", "3_7_1", 0.1)]
    links = [{"source": s, "target": t, "weight": w} for s, t, w in pairs]
    return {
        "metadata": {"scan": scan, "prompt_tokens": ["a", "<b>"], "info": {"logit": 2.0}},
        "nodes": nodes,
        "links": links,
    }


def test_nodes_come_by_influence_and_edges_by_weight() -> None:
    drawn = attribution_graph.graph_data(graph())
    assert [node["id"] for node in drawn["nodes"]] == ["3_7_1", "0_9_1", "1_2_1", "E_1_0", "2_-1_1"]
    assert [node["kind"] for node in drawn["nodes"]] == ["logit", "expert", "head", "embedding", "error"]
    assert [node["layer"] for node in drawn["nodes"]] == [2, 0, 1, -1, 2], "the logit above the last layer"
    ids = [node["id"] for node in drawn["nodes"]]
    source, target, weight, _ = drawn["edges"][0]
    assert (ids[source], ids[target], weight) == ("0_9_1", "1_2_1", -2.0)
    assert drawn["left_out"] == [0, 0]


def test_an_edge_carries_its_share_of_the_influence_of_its_target() -> None:
    """The logit has the influence 1, of which 1.0 / 1.1 comes from the head and the rest from the error."""
    drawn = attribution_graph.graph_data(graph())
    ids = [node["id"] for node in drawn["nodes"]]
    carried = {(ids[s], ids[t]): influence for s, t, _, influence in drawn["edges"]}
    wanted = {("E_1_0", "0_9_1"): 0.5, ("0_9_1", "1_2_1"): 0.3}
    wanted |= {("1_2_1", "3_7_1"): 1 / 1.1, ("2_-1_1", "3_7_1"): 0.1 / 1.1}
    assert carried == pytest.approx(wanted)
    content = graph()
    for node in content["nodes"]:
        node["influence"] = None
    without = attribution_graph.graph_data(content)["edges"]
    assert [edge[3] for edge in without] == [abs(edge[2]) for edge in without], "negative control: the size alone"


def test_the_influence_in_the_format_is_cumulative() -> None:
    """There a node's number is the share that is reached with it: the strongest node has the smallest."""
    content = graph(scan="gemma-2-2b")
    for node, reached in zip(content["nodes"], (0.5, 0.9, 0.8, None, None), strict=True):
        node["influence"] = reached
    own = {node["id"]: node["influence"] for node in attribution_graph.graph_data(content)["nodes"]}
    assert own == pytest.approx({"E_1_0": 0.5, "1_2_1": 0.3, "0_9_1": 0.1, "3_7_1": 0, "2_-1_1": 0})
    marked = content | {"metadata": content["metadata"] | {"scan": "gpt-oss"}}
    marked["metadata"]["info"] = {"influence": "cumulative", "total_influence": 2.0}
    doubled = {node["id"]: node["influence"] for node in attribution_graph.graph_data(marked)["nodes"]}
    assert doubled == pytest.approx({name: 2 * share for name, share in own.items()})
    del marked["metadata"]["info"]["influence"]  # the negative control: a file of earlier versions has the node's own
    earlier = {node["id"]: node["influence"] for node in attribution_graph.graph_data(marked)["nodes"]}
    assert earlier["0_9_1"] == 0.9


def test_what_is_left_out_of_a_large_graph_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution_graph, "MOST_NODES", 3)
    monkeypatch.setattr(attribution_graph, "MOST_EDGES", 1)
    drawn = attribution_graph.graph_data(graph())
    assert [node["id"] for node in drawn["nodes"]] == ["3_7_1", "0_9_1", "1_2_1"]
    assert drawn["left_out"] == [2, 3]


def test_measured_effects_of_a_file_are_those_of_its_nodes() -> None:
    content = graph()
    together = {"nodes": ["0_9_1", "1_2_1"], "value": 0.7}
    content["metadata"]["info"] |= {"tokens": [3, 4], "measured": {"1_2_1": 0.25, "gone": 1.0}}
    content["metadata"]["info"]["measured_together"] = together
    drawn = attribution_graph.graph_data(content)
    assert drawn["measured"] == {"1_2_1": 0.25}
    assert drawn["stored"] == {"tokens": [3, 4], "measured_together": together}
    assert attribution_graph.graph_data(graph())["stored"] == {}, "negative control: a file without them"
    for damage in ({"measured": {"1_2_1": float("nan")}}, {"tokens": 3}, {"measured_together": {"nodes": []}}):
        damaged = graph()
        damaged["metadata"]["info"] |= damage
        with pytest.raises(InputError, match="not an attribution graph"):
            attribution_graph.graph_data(damaged)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("nodes",), 3),
        (("nodes", 0, "layer"), "../../x"),
        (("nodes", 0, "ctx_idx"), "one"),
        (("nodes", 0, "influence"), float("nan")),
        (("links", 0, "weight"), float("inf")),
        (("links", 0), 7),
        (("metadata",), None),
        (("metadata", "prompt_tokens"), None),
    ],
)
def test_another_form_is_refused(where: tuple[Any, ...], value: Any) -> None:
    content = copy.deepcopy(graph())
    assert attribution_graph.graph_data(content)["nodes"], "the unchanged one is read"
    inner: Any = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError, match="not an attribution graph"):
        attribution_graph.graph_data(content)


def test_texts_of_a_graph_end_no_script(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(graph()))
    text = attribution_graph.document(attribution_graph.graph_data(graph()), "g")
    assert text.count("</script>") == 2, "those of the page itself"
    assert "<b>" not in text
    assert 'sandbox="allow-scripts allow-downloads"' in attribution_graph.frame(attribution_graph.load(path), path.stem)


def test_pins_and_supernodes_of_a_file_are_shown_first() -> None:
    chosen = {"pinnedIds": ["E_1_0"], "supernodes": [["adds", "0_9_1", "1_2_1"], ["empty"]]}
    drawn = attribution_graph.graph_data(graph() | {"qParams": chosen})
    assert drawn["pinned"] == ["E_1_0"]
    assert drawn["supernodes"] == [["adds", "0_9_1", "1_2_1"]]
    assert attribution_graph.graph_data(graph())["supernodes"] == []


def test_the_expert_of_a_node_is_that_of_its_label() -> None:
    content = graph()
    content["nodes"].append(content["nodes"][1] | {"node_id": "other", "clerp": "my expert of 5 things"})
    drawn = attribution_graph.graph_data(content)
    assert attribution_graph.experts_by_node(drawn) == {"0_9_1": (0, 5)}
    assert {node["id"] for node in drawn["nodes"] if node["kind"] == "expert"} == {"0_9_1", "other"}, "negative control"


def test_an_expert_of_a_graph_is_forbidden_at_its_token_by_a_recipe_of_the_live_page() -> None:
    """The recipe's prompt and beginning are the tokens of the graph, so that positions are the same."""
    model = wb.load("nano", dtype=torch.float32)
    answer = "<|channel|>analysis<|message|>1+2=3<|end|><|start|>assistant<|channel|>final<|message|>"
    prompt = harmony.render([{"role": "user", "content": "1+2"}], effort="high", tokenizer=model.tokenizer)
    ids = [*prompt, *marked_ids(answer, model.tokenizer)]
    content = graph()
    content["metadata"]["prompt_tokens"] = texts(ids, model.tokenizer)
    drawn = attribution_graph.graph_data(content)
    asked = attribution_graph.ablation_recipe(drawn, "0_9_1", model.tokenizer)
    assert asked is not None
    recipe = Recipe.from_json(json.dumps(asked))
    assert recipe.prompt_ids(model) == ids
    assert recipe.interventions == (Intervention("forbid", cells=((0, 5),), scope=Scope(start=1, stop=2)),)
    tokens = drawn["tokens"]
    low = drawn | {"tokens": ["low" if token == "high" else token for token in tokens]}
    other = attribution_graph.ablation_recipe(low, "0_9_1", model.tokenizer)
    assert other is not None
    assert other["effort"] == "low", "negative control: another effort is another recipe"
    head = attribution_graph.ablation_recipe(drawn, "1_2_1", model.tokenizer)
    assert head is not None
    one = Intervention("scale_heads", layers=(1,), heads=(2,), strength=0.0, scope=Scope(start=1, stop=2))
    assert Recipe.from_json(json.dumps(head)).interventions == (one,)
    embedding = next(node["id"] for node in drawn["nodes"] if node["kind"] == "embedding")
    assert attribution_graph.ablation_recipe(drawn, embedding, model.tokenizer) is None
    assert attribution_graph.ablation_recipe(drawn, "0_9_1", None) is None
    for old, new in (("system", "developer"), ("1", "<|end|><|start|>user<|message|>1"), ("high", "high and more")):
        changed = drawn | {"tokens": [new if token == old else token for token in tokens]}
        assert changed["tokens"] != tokens
        assert attribution_graph.ablation_recipe(changed, "0_9_1", model.tokenizer) is None, f"{new!r} is not written"
