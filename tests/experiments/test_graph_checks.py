"""Graphs are faithful: their nodes matter more than others that write as much, and alone they keep the answer."""

import json
import random

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import graph_checks
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.hooks.sae import SAE, SAEConfig
from workbench.kernels.moe import swiglu
from workbench.model.transformer import GptOss

FEW = pytest.mark.filterwarnings("ignore:only .* prompts")  # --long has 50


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def sequences(model: GptOss, long: bool) -> list[list[int]]:
    """The start of an analysis, up to the first product's result, of several prompts."""
    prompts = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    bundled = [p["messages"] for p in prompts if p["meta"]["task"] == "product" and p["meta"]["turns"] == 1]
    numbers = random.Random(0).sample(range(11, 100), 80)
    others = [[{"role": "user", "content": f"{a}*{b}"}] for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    chosen = [*bundled, *others][: 50 if long else 6]
    assert len(chosen) == (50 if long else 6)
    rendered = [wb.harmony.render(messages, effort="high", tokenizer=model.tokenizer) for messages in chosen]
    return [
        [*ids, *answer[:7]] for ids, answer in zip(rendered, model.generate(rendered, max_new_tokens=7), strict=True)
    ]


@pytest.fixture(scope="module")
def graphs(model: GptOss, sequences: list[list[int]]) -> list[AttributionGraph]:
    return [graph(model, ids) for ids in sequences]


@FEW
def test_influential_nodes_matter_more_than_random_ones_that_write_as_much(
    model: GptOss, graphs: list[AttributionGraph], long: bool
) -> None:
    """For each number of nodes, with intervals over prompts; random nodes in place of the top ones fail."""
    sizes = (1, 2, 4, 8, 16) if long else (8,)
    tables = [graph_checks.faithfulness(model, one, sizes=sizes, draws=2) for one in graphs]
    curve = graph_checks.over_prompts(tables)
    print(
        f"The logit without the most influential nodes, {len(graphs)} prompts:\n{curve.round(2).to_string(index=False)}"
    )
    row = curve.set_index("nodes").loc[8]
    assert row["prompts"] == len(graphs)
    assert row["kept_high"] < 0.6
    assert row["random_low"] > 0.6
    assert (curve["difference_low"] > 0).all()
    others = [graph_checks.faithfulness(model, one, sizes=(8,), draws=2, seed=1)["random"] for one in graphs]
    own = [table[table["nodes"] == 8].reset_index(drop=True) for table in tables]
    control = graph_checks.over_prompts(
        [table.assign(**{"kept": shares}) for table, shares in zip(own, others, strict=True)]
    )
    assert (control["difference_low"] <= 0).all(), "the negative control: random nodes matter no more than random ones"
    with pytest.raises(InputError, match="at least 5 tables"):
        graph_checks.over_prompts(tables[:4])


@FEW
def test_the_graph_alone_keeps_the_answer(
    model: GptOss, graphs: list[AttributionGraph], sequences: list[list[int]], long: bool
) -> None:
    means = graph_checks.mean_activations(model, sequences)
    alone = [graph_checks.kept_alone(model, one, means) for one in graphs]
    sizes = [len(one.nodes) / one.metadata["nodes_in_pass"] for one in graphs]
    print(f"{np.mean([a['on_top'] for a in alone]):.0%} keep the answer with {np.mean(sizes):.0%} of the nodes")
    assert np.mean([a["on_top"] for a in alone]) >= 0.8
    assert np.mean(sizes) < 0.1
    curves = [graph_checks.kept_curve(model, one, means, (2, 4, 8, 16, 32) if long else (2, 16)) for one in graphs]
    curve = graph_checks.over_prompts(curves)
    print(f"The logit with the most influential nodes alone:\n{curve.round(2).to_string(index=False)}")
    assert curve["kept"].iloc[-1] > curve["kept"].iloc[0], "more nodes keep more"
    assert (curve["on_top_low"] >= 0).all()
    assert curve["on_top_high"].between(curve["on_top"], 1).all()
    least = graphs[0].nodes.nsmallest(len(graphs[0].nodes) - 2, "influence")
    without = AttributionGraph(least, graphs[0].edges, graphs[0].tokens, graphs[0].texts, graphs[0].metadata)
    assert graph_checks.kept_alone(model, without, means)["kept"] < 0.7  # negative control: without the top nodes


def test_ablation_measures_what_a_pass_with_the_node_removed_gives(
    model: GptOss, graphs: list[AttributionGraph]
) -> None:
    one = graphs[0]
    top = one.nodes[one.nodes["kind"] == "expert"].nlargest(1, "influence")
    (row,) = top.to_dict("records")
    table = graph_checks.ablate(model, one, list(top.index))

    def remove(out: torch.Tensor, hook: object) -> torch.Tensor:
        out = out.clone()
        out[0, row["pos"], row["index"]] = model.blocks[row["layer"]].mlp.experts.down.bias[row["expert"]]
        return out

    ids = torch.tensor([one.tokens])
    name = f"blocks.{row['layer']}.mlp.experts.hook_out"
    with torch.no_grad():
        with_it, without = (
            model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1].double() for hooks in ([], [(name, remove)])
        )
    target = one.metadata["target_id"]
    wanted = (with_it[target] - with_it.mean()) - (without[target] - without.mean())
    assert table["measured"].iloc[0] == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(InputError, match="cannot be ablated"):
        graph_checks.ablate(model, one, [len(one.nodes) - 1])
    with pytest.raises(InputError, match=f"rows 0 to {len(one.nodes) - 1}"):
        graph_checks.ablate(model, one, [0, 9999])


def test_an_edge_is_removed_from_what_its_target_reads(model: GptOss, graphs: list[AttributionGraph]) -> None:
    """The expert computed again without the source's write gives the same logit; with another write it does not."""
    one = graphs[0]
    nodes = one.nodes
    experts = nodes.index[nodes["kind"] == "expert"]
    inner = nodes.index[nodes["kind"].isin(("embedding", "head"))]
    edges = one.edges[one.edges["target"].isin(experts) & one.edges["source"].isin(inner)]
    edge = edges.loc[edges["value"].abs().idxmax()]
    source, target = nodes.loc[edge["source"]].to_dict(), nodes.loc[edge["target"]].to_dict()
    layer, pos, slot = target["layer"], target["pos"], target["index"]
    block, ids = model.blocks[layer], torch.tensor([one.tokens])
    with torch.no_grad():
        cache = model.run_with_cache(ids)[1]
        if source["kind"] == "embedding":
            write = cache["embed"][0, pos]
        else:
            z = cache["z", source["layer"]][0, pos, source["index"]]
            write = z @ model.W_O[source["layer"], source["index"]]

        def logit_without(write: torch.Tensor) -> float:
            x = block.ln2.normalize(cache["resid_mid", layer])[0, pos]
            x = x - write * block.ln2.weight / cache["scale", layer, "ln2"][0, pos]
            own = block.mlp.experts
            gate = x @ own.W_gate(target["expert"]).float() + own.b_gate(target["expert"])
            up = x @ own.W_in(target["expert"]).float() + own.b_in(target["expert"])
            post = swiglu(gate, up, model.cfg.swiglu_limit, model.cfg.swiglu_alpha)
            out = post @ own.W_out(target["expert"]).float() + own.b_out(target["expert"])

            def put(value: torch.Tensor, hook: object) -> torch.Tensor:
                value = value.clone()
                value[0, pos, slot] = out
                return value

            return graph_checks.logit(model, one, [(f"blocks.{layer}.mlp.experts.hook_out", put)])

        plain = graph_checks.logit(model, one)
        result = graph_checks.ablate_edge(model, one, int(edge["source"]), int(edge["target"]))
        assert result["measured"] == pytest.approx(plain - logit_without(write), abs=1e-3)
        assert abs(result["measured"] - (plain - logit_without(-write))) > 1e-2  # negative control
    assert result["value"] == pytest.approx(edge["value"])
    with pytest.raises(InputError, match="an edge goes from"):
        graph_checks.ablate_edge(model, one, int(edge["source"]), len(nodes) - 1)


def test_a_feature_is_ablated_in_what_the_stream_carries(model: GptOss, sequences: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(128, 64, generator=generator),
        "W_dec": torch.randn(64, 128, generator=generator) / 9,
    }
    cfg = SAEConfig("standard", 128, 64, torch.float32, True, "none", "none", 0, False, None)
    sae = SAE(cfg, weights | {"b_enc": torch.zeros(64), "b_dec": torch.zeros(128)})
    at = "blocks.2.hook_resid_mid"
    attributed = graph(model, sequences[0], saes={at: sae})
    node = attributed.nodes[attributed.nodes["kind"] == "feature"]["influence"].idxmax()
    row = attributed.nodes.loc[node]

    def without(x: torch.Tensor, hook: object) -> torch.Tensor:
        acts = sae.encode(x)
        x[0, row["pos"]] -= acts[0, row["pos"], row["index"]] * sae.W_dec[row["index"]]
        return x

    plain, left = (graph_checks.logit(model, attributed, hooks) for hooks in ([], [(at, without)]))
    measured = graph_checks.ablate(model, attributed, [node])["measured"].iloc[0]
    assert measured == pytest.approx(plain - left, abs=1e-4)
    assert abs(measured) > 1e-2
    assert len(graph_checks.faithfulness(model, attributed, sizes=(2,), draws=1)) == 1
