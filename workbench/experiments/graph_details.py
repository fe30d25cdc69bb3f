"""Details of an attribution graph on demand: the neurons of an expert, and why the router chose it.

    found = graph_details.neurons(model, graph, node)       # a row of graph.nodes that is an expert
    found.nodes.head(), found.edges.head()
    graph_details.router_edges(model, graph, node)

`neurons` divides an expert's node: values, biases and edges of its neurons add up to those of the expert.
`router_edges` divides what a graph holds fixed: the expert's router logit less that of the best expert not chosen.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph, at_the_end, logit_direction, writes_of
from workbench.experiments.frozen_pass import FrozenPass, halves
from workbench.model.transformer import GptOss


@dataclass(frozen=True)
class ExpertNeurons:
    """The neurons of an expert's node in a graph.

    nodes: neuron (−1 is the sum of all that are not shown), activation (after SwiGLU; NaN for the sum), value, bias and
    error (logits), as those of a graph's nodes. edges: source (a row of the graph's nodes), neuron, value.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame


@torch.no_grad()
def neurons(model: GptOss, graph: AttributionGraph, node: int, *, top: int = 20) -> ExpertNeurons:
    """Return the neurons of an expert's node with the largest values, and the edges into each from the graph's nodes.

    Raises:
        InputError: the node is no expert, or `top` is below 1.
    """
    layer, pos, slot, expert = _place(graph, node)
    if top < 1:
        raise InputError(f"top={top}: show at least one neuron")
    frozen = FrozenPass(model, torch.tensor(graph.tokens, device=model.device))
    direction = logit_direction(frozen, graph.metadata["target_id"], graph.metadata["against_id"])
    after = frozen.direction_after(layer, at_the_end(frozen, direction))[pos]
    cfg, experts, block = model.cfg, model.blocks[layer].mlp.experts, model.blocks[layer]
    weight = frozen.seen("mlp.hook_expert_weights", layer)[pos, slot]
    down = weight * (experts.W_out(expert).to(frozen.wide) @ after)
    gate, up = (frozen.seen(f"mlp.experts.hook_{name}", layer)[pos, slot] for name in ("gate", "pre"))
    by_gate, by_up, post, constant = halves(
        gate[:, None], up[:, None], down[:, None], cfg.swiglu_limit, cfg.swiglu_alpha
    )
    gain = block.ln2.weight.to(frozen.wide) / frozen.seen("ln2.hook_scale", layer)[pos]
    reads = by_gate * experts.W_gate(expert).to(frozen.wide).mT + by_up * experts.W_in(expert).to(frozen.wide).mT
    bias = by_gate[:, 0] * experts.b_gate(expert).to(frozen.wide) + by_up[:, 0] * experts.b_in(expert).to(frozen.wide)
    into = _from_sources(frozen, graph, reads * gain, layer, pos)
    values = np.stack([x.double().cpu().numpy() for x in (down * post[:, 0], bias + constant)], axis=1)
    return _shown(values, post[:, 0].double().cpu().numpy(), into, top)


def _place(graph: AttributionGraph, node: int) -> tuple[int, int, int, int]:
    """Return layer, position, slot and expert of a node.

    Raises:
        InputError: the node is no expert.
    """
    if node not in graph.nodes.index or graph.nodes.loc[node, "kind"] != "expert":
        experts = graph.nodes.index[graph.nodes["kind"] == "expert"].tolist()
        raise InputError(f"node {node} is no expert; the experts of this graph are the nodes {experts[:10]}")
    row = graph.nodes.loc[node].to_dict()
    return int(row["layer"]), int(row["pos"]), int(row["index"]), int(row["expert"])


def _from_sources(
    frozen: FrozenPass, graph: AttributionGraph, reads: Float[Tensor, "read d_model"], layer: int, pos: int
) -> Float[np.ndarray, "read node"]:
    """Return what each node of the graph writes along directions at the stream before the experts of a layer."""
    nodes = graph.nodes
    attention = nodes["kind"].isin(("embedding", "head", "attention bias"))
    earlier = (nodes["layer"] < layer) | (attention & (nodes["layer"] == layer))
    seen = torch.tensor((earlier & (nodes["pos"] == pos)).to_numpy(), device=reads.device)
    return ((reads @ writes_of(frozen, nodes).mT) * seen).double().cpu().numpy()


def _shown(
    values: Float[np.ndarray, "neuron 2"],
    activation: Float[np.ndarray, " neuron"],
    into: Float[np.ndarray, "neuron node"],
    top: int,
) -> ExpertNeurons:
    """Return the neurons with the largest values, and the sum of the others."""
    order = np.argsort(-np.abs(values[:, 0]), kind="stable")
    shown, others = order[:top], order[top:]
    names, rows, weights, activations = shown.tolist(), values[shown], into[shown], activation[shown]
    if len(others):
        names, activations = [*names, -1], np.append(activations, np.nan)
        rows, weights = np.vstack([rows, values[others].sum(0)]), np.vstack([weights, into[others].sum(0)])
    nodes = pd.DataFrame({"neuron": names, "activation": activations, "value": rows[:, 0], "bias": rows[:, 1]})
    nodes["error"] = nodes["value"] - nodes["bias"] - weights.sum(1)
    at, source = np.nonzero(weights)
    edges = pd.DataFrame({"source": source, "neuron": np.array(names)[at], "value": weights[at, source]})
    strongest = edges["value"].abs().sort_values(ascending=False, kind="stable").index
    return ExpertNeurons(nodes, edges.loc[strongest].reset_index(drop=True))


@torch.no_grad()
def router_edges(model: GptOss, graph: AttributionGraph, node: int) -> pd.DataFrame:
    """Return what each node of the graph adds to an expert's router logit above that of the runner-up.

    The runner-up is the best expert that was not chosen. Columns: source (a row of the graph's nodes; −1 is the
    router's bias, −2 what no node of the graph explains) and value (router logits); the values add up to the
    difference. attrs: `runner_up` and `difference`.

    Raises:
        InputError: the node is no expert, or every expert is chosen.
    """
    layer, pos, _, expert = _place(graph, node)
    if model.cfg.experts_per_token == model.cfg.num_experts:
        raise InputError("every expert is chosen for every token: there is no runner-up")
    frozen = FrozenPass(model, torch.tensor(graph.tokens, device=model.device))
    block = model.blocks[layer]
    name = f"blocks.{layer}.mlp.router.hook_out"
    ids = torch.tensor([graph.tokens], device=model.device)
    _, cache = model.run_with_cache(ids, names_filter=[name], return_cache_object=False)
    logits = cache[name][0, pos].to(frozen.wide)
    rest = logits.clone()
    rest[frozen.seen("mlp.hook_expert_indices", layer)[pos].long()] = -torch.inf
    runner_up = int(rest.argmax())
    weight, offset = block.mlp.router.weight.to(frozen.wide), block.mlp.router.bias.to(frozen.wide)
    gain = block.ln2.weight.to(frozen.wide) / frozen.seen("ln2.hook_scale", layer)[pos]
    reads = ((weight[expert] - weight[runner_up]) * gain)[None]
    values = _from_sources(frozen, graph, reads, layer, pos)[0]
    difference, bias = float(logits[expert] - logits[runner_up]), float(offset[expert] - offset[runner_up])
    source = np.flatnonzero(values)
    found = pd.DataFrame({"source": source, "value": values[source]})
    ends = pd.DataFrame({"source": [-1, -2], "value": [bias, difference - bias - values.sum()]})
    found = pd.concat([found, ends], ignore_index=True)
    found = found.loc[found["value"].abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)
    found.attrs = {"runner_up": runner_up, "difference": difference}
    return found
