"""Edges into every node add up to it, graphs are small and faithful, and what cannot be explained is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.model.pruned import pruned_nano
from workbench.errors import InputError
from workbench.experiments import attribution_graph, graph_checks, graph_details, graph_export
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.experiments.frozen_pass import FrozenPass
from workbench.hooks.sae import SAE, SAEConfig
from workbench.model import memory
from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.formats.gguf_writer import write_gguf
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
    np.testing.assert_allclose((into + nodes["bias"])[inner], nodes["value"][inner], rtol=1e-5, atol=1e-5)
    assert nodes["error"].abs().max() < 1e-5
    with torch.no_grad():
        logits = model(TEXT)[0, -1].double()
    logit = float(logits.max() - logits.mean())
    assert nodes["value"].iloc[-1] == pytest.approx(logit, rel=1e-5)
    assert complete.metadata["completeness_of_paths"] < 1e-3
    wrong = into.to_numpy() + np.roll(nodes["bias"].to_numpy(), 1)  # negative control: other nodes' biases
    assert np.abs(wrong - nodes["value"])[inner].max() > 1e-2


def test_the_updates_of_an_adapter_are_in_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the unembedding, attention and the experts: nodes add up to the logit of the adapted model."""
    cfg, rng = wb.load("nano", device="meta").cfg, torch.Generator().manual_seed(0)
    heads = cfg.n_heads * cfg.d_head
    sizes = {"lm_head": (cfg.d_model, cfg.d_vocab, 1)}
    for layer in range(cfg.n_layers):
        sizes[f"model.layers.{layer}.self_attn.o_proj"] = heads, cfg.d_model, 1
        sizes[f"model.layers.{layer}.mlp.experts.down_proj"] = cfg.d_mlp, cfg.d_model, cfg.num_experts
    factors = {}
    for module, (inputs, outputs, experts) in sizes.items():
        for name, shape in {"A": (2 * experts, inputs), "B": (outputs, 2 * experts)}.items():
            factors[f"base_model.model.{module}.lora_{name}.weight"] = torch.randn(shape, generator=rng) * 0.05
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    adapted = wb.load("nano", dtype=torch.float32, device="cpu", adapter=tmp_path)
    attributed = graph(adapted, TEXT, target="5", node_share=1.0, edge_share=1.0, max_nodes=10**6)
    assert attributed.nodes["error"].abs().max() < 1e-4
    assert attributed.metadata["completeness_of_paths"] < 1e-2
    with torch.no_grad():
        logits = adapted(TEXT)[0, -1].double()
    logit = float(logits[adapted.to_single_token("5")] - logits.mean())
    assert attributed.nodes["value"].iloc[-1] == pytest.approx(logit, rel=1e-4)
    monkeypatch.setattr(type(adapted.unembed), "W_U", property(lambda self: self.weight.mT))  # negative control
    without = graph(adapted, TEXT, target="5", node_share=1.0, edge_share=1.0, max_nodes=10**6)
    assert without.nodes["value"].iloc[-1] != pytest.approx(logit, rel=1e-2)


def _without_sink(frozen: FrozenPass) -> None:
    for layer in range(4):
        pattern = frozen._cache[f"blocks.{layer}.attn.hook_pattern"]
        frozen._cache[f"blocks.{layer}.attn.hook_pattern"] = pattern / pattern.sum(-1, keepdim=True)


def _without_gate(frozen: FrozenPass) -> None:
    for layer in range(4):
        gates = frozen._cache[f"blocks.{layer}.mlp.hook_expert_weights"]
        frozen._cache[f"blocks.{layer}.mlp.hook_expert_weights"] = torch.full_like(gates, 1 / gates.shape[-1])


def _wrong_expert(frozen: FrozenPass) -> None:
    for layer in range(4):
        chosen = frozen._cache[f"blocks.{layer}.mlp.hook_expert_indices"]
        frozen._cache[f"blocks.{layer}.mlp.hook_expert_indices"] = (chosen + 1) % 16


@pytest.mark.parametrize("damage", [None, _without_sink, _without_gate, _wrong_expert])
def test_paths_add_up_only_with_the_sink_the_gates_and_the_right_experts(
    model: GptOss, monkeypatch: pytest.MonkeyPatch, damage: Callable[[FrozenPass], None] | None
) -> None:
    """What the sink takes, the gate weights and the experts are needed: without each the sum of paths is another."""

    class Damaged(FrozenPass):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            if damage is not None:
                damage(self)

    monkeypatch.setattr(attribution_graph, "FrozenPass", Damaged)
    attributed = graph(model, TEXT, node_share=1.0, edge_share=1.0, max_nodes=10**6)
    error = max(attributed.metadata["completeness_of_paths"], attributed.nodes["error"].abs().max())
    assert (error < 2e-5) if damage is None else (error > 0.1)


def _autoencoder(architecture: str, *, rescaled: bool = False, width: int = 128) -> SAE:
    """A random autoencoder with features that are active about half of the time."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    weights = {"W_enc": random(width, 256, size=0.1), "W_dec": random(256, width, size=0.1), "b_dec": random(width)}
    vectors = {"b_enc": random(256), "threshold": torch.full((256,), 0.5), "r_mag": random(256, size=0.1)}
    vectors |= {"b_gate": random(256), "b_mag": random(256)}
    names = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}.get(architecture, ("b_enc",))
    cfg = SAEConfig(architecture, width, 256, torch.float32, True, "none", "none", 20, rescaled, None)
    return SAE(cfg, weights | {name: vectors[name] for name in names})


@pytest.mark.parametrize(
    ("architecture", "at"),
    [
        ("standard", "blocks.1.hook_resid_post"),
        ("topk", "blocks.2.hook_resid_mid"),
        ("jumprelu", "blocks.0.hook_resid_pre"),
        ("gated", "blocks.3.hook_resid_post"),
    ],
)
@pytest.mark.parametrize("rescaled", [False, True])
def test_features_of_an_autoencoder_are_complete_nodes(
    model: GptOss, complete: AttributionGraph, architecture: str, at: str, rescaled: bool
) -> None:
    sae = _autoencoder(architecture, rescaled=rescaled)
    attributed = graph(model, TEXT, node_share=1.0, edge_share=1.0, max_nodes=10**6, saes={at: sae})
    assert attributed.metadata["completeness_of_paths"] < 2e-5
    assert attributed.nodes["error"].abs().max() < 2e-5
    assert attributed.metadata["logit"] == complete.metadata["logit"]
    features = attributed.nodes[attributed.nodes["kind"] == "feature"]
    with torch.no_grad():
        acts = sae.encode(model.run_with_cache(torch.tensor([attributed.tokens]))[1][at][0])
    assert all(acts[row["pos"], row["index"]] > 0 for row in features.to_dict("records"))
    order = features["order"].iloc[0]
    kinds = attributed.nodes["order"]
    crossing = (kinds[attributed.edges["source"]].to_numpy() < order) & (
        kinds[attributed.edges["target"]].to_numpy() > order
    )
    assert not crossing.any(), "nothing passes the autoencoder but its features and its error"


def test_an_autoencoder_that_cannot_be_attached_is_refused(model: GptOss) -> None:
    sae = _autoencoder("standard")
    for at, message in [
        ("blocks.1.hook_mlp_out", "residual stream"),
        ("blocks.4.hook_resid_post", "layers 0 to 3"),
    ]:
        with pytest.raises(InputError, match=message):
            graph(model, TEXT, saes={at: sae})
    same = {"blocks.0.hook_resid_post": sae, "blocks.1.hook_resid_pre": sae}
    with pytest.raises(InputError, match="one in a layer"):
        graph(model, TEXT, saes=same)
    with pytest.raises(InputError, match="reads width 64"):
        graph(model, TEXT, saes={"blocks.1.hook_resid_post": _autoencoder("standard", width=64)})


@pytest.mark.parametrize("kind", ["unequal expert counts", "gguf"])
def test_graphs_of_other_checkpoints_are_complete(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        path = write_gguf(open_checkpoint(BUNDLED["nano"]), tmp_path / "nano.gguf")
    else:
        path = pruned_nano(tmp_path / "pruned", (16, 5, 9, 12))
    other = wb.load(path, dtype=torch.float32, device="cpu")
    attributed = graph(other, TEXT)
    assert attributed.metadata["completeness_of_paths"] < 1e-3
    experts = attributed.nodes[attributed.nodes["kind"] == "expert"]
    assert (experts["expert"] < np.array([other.cfg.experts_of(layer) for layer in experts["layer"]])).all()
    divided = graph_details.with_neurons(other, attributed, top=2)
    assert divided.nodes["value"].iloc[-1] == pytest.approx(attributed.nodes["value"].iloc[-1])
    node = int(experts["influence"].idxmax())
    measured = graph_checks.ablate(other, attributed, [node])["measured"].iloc[0]
    assert np.isfinite(measured)
    assert measured != pytest.approx(
        graph_checks.ablate(other, attributed, [int(attributed.nodes.index[0])])["measured"].iloc[0]
    )
    assert len(graph_details.router_edges(other, attributed, node))
    written = json.loads(graph_export.write_json(other, divided, tmp_path / "graph.json").read_text())
    assert len({one["node_id"] for one in written["nodes"]}) == len(written["nodes"])


def test_the_first_token_alone_is_explained(model: GptOss) -> None:
    attributed = graph(model, "2", node_share=1.0, edge_share=1.0)
    assert len(attributed.tokens) == 1
    assert set(attributed.nodes["pos"]) == {0}
    assert attributed.metadata["completeness_of_paths"] < 1e-3


def test_edges_go_forward_to_tokens_that_can_be_seen(complete: AttributionGraph) -> None:
    ends = [complete.nodes.loc[complete.edges[end]].reset_index(drop=True) for end in ("source", "target")]
    source, target = ends
    assert (source["pos"] <= target["pos"]).all()
    moved = source["pos"] < target["pos"]
    assert set(target["kind"][moved]) == {"head"}
    assert (source["layer"] <= target["layer"]).all()


def test_a_small_graph_keeps_the_stated_influence(
    model: GptOss, small: AttributionGraph, complete: AttributionGraph
) -> None:
    assert len(small.nodes) < 0.1 * len(complete.nodes)
    assert small.metadata["kept_influence"] >= 0.8
    assert small.nodes["influence"].is_monotonic_increasing is False
    into = small.edges.groupby("target")["value"].sum().reindex(small.nodes.index, fill_value=0.0)
    row = small.nodes.iloc[-1]
    assert into.iloc[-1] + row["error"] == pytest.approx(row["value"], abs=0.5)  # edges are pruned as well
    assert small.metadata["logit"] == pytest.approx(complete.metadata["logit"])
    assert "nodes" in repr(small)
    m = small.metadata
    assert m["considered_nodes"] == 499 < m["nodes_in_pass"]
    assert m["model"] == "nano"
    assert complete.metadata["explained_input"] == pytest.approx(1, abs=1e-4)
    assert 0.5 < m["explained_input"] < 0.999, "the negative control: pruned nodes are errors"
    with torch.no_grad():
        probabilities = model(TEXT)[0, -1].double().softmax(-1)
    assert m["probability"] == pytest.approx(float(probabilities[m["target_id"]]), abs=1e-6)


def test_a_target_against_another_token(model: GptOss) -> None:
    attributed = graph(model, TEXT, target="6", against="7", at=-1)
    with torch.no_grad():
        logits = model(TEXT)[0, -1]
    wanted = float(logits[model.to_single_token("6")] - logits[model.to_single_token("7")])
    assert attributed.metadata["logit"] == pytest.approx(wanted, rel=1e-4)
    assert attributed.nodes["value"].iloc[-1] == pytest.approx(wanted, rel=1e-4)
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
        ({"target": 5, "against": 5}, "the same token"),
        ({"tokens": [5] * 20_000}, "explain a token within the first"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    model: GptOss, asked: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda _: 10**9)
    with pytest.raises((InputError, ValueError), match=message):
        graph(model, **({"tokens": TEXT} | asked))
