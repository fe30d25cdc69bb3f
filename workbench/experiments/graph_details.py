"""Details of an attribution graph on demand: neurons of experts, and the parts of attention scores and router logits.

    found = graph_details.neurons(model, graph, node)       # a row of graph.nodes that is an expert
    divided = graph_details.with_neurons(model, graph)      # a graph in which neurons are nodes
    graph_details.router_edges(model, graph, node)
    graph_details.attention_edges(model, graph, head)

`neurons` divides an expert's node: values, biases and edges of its neurons add up to those of the expert. The other two
divide what a graph holds fixed: the expert's router logit less that of the best expert not chosen, and the attention
score of a head at a key, by what the query reads and by what the key reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.attribution_graph import (
    AttributionGraph,
    assembled,
    at_the_end,
    direct,
    edge_values,
    influence_of,
    logit_direction,
    reads_of,
    take_shown_neurons,
    writes_of,
)
from workbench.experiments.frozen_pass import FrozenPass, halves
from workbench.model.rope import cos_sin, rotate
from workbench.model.transformer import GptOss

_CHOICES = ("mlp.router.hook_out", "attn.hook_rot_q", "attn.hook_rot_k")


@dataclass(frozen=True)
class ExpertNeurons:
    """The neurons of an expert's node in a graph.

    nodes: neuron (−1 is the sum of all that are not shown), activation (after SwiGLU; NaN for the sum), value, bias and
    error (logits), as those of a graph's nodes. edges: source (a row of the graph's nodes), neuron, value.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame


@dataclass(frozen=True)
class _Inside:
    """All neurons of an expert at a token: value and bias in logits, activation, and the direction each reads."""

    values: Float[Tensor, " neuron"]
    biases: Float[Tensor, " neuron"]
    activations: Float[Tensor, " neuron"]
    reads: Float[Tensor, "neuron d_model"]


def frozen_pass(model: GptOss, graph: AttributionGraph, also: Sequence[str] = ()) -> FrozenPass:
    """Return the pass that a graph explains. also: further hook points of the blocks to record."""
    return FrozenPass(model, torch.tensor(graph.tokens, device=model.device), graph.saes, also=also)


def _direction(frozen: FrozenPass, graph: AttributionGraph) -> Float[Tensor, " d_model"]:
    return logit_direction(frozen, graph.metadata["target_id"], graph.metadata["against_id"])


@torch.no_grad()
def neurons(model: GptOss, graph: AttributionGraph, node: int, *, top: int = 20) -> ExpertNeurons:
    """Return the neurons of an expert's node with the largest values, and the edges into each from the graph's nodes.

    Raises:
        InputError: the node is not an expert, or `top` is below 1.
    """
    layer, pos, slot, expert = _place(graph, node)
    _check_top(top)
    frozen = frozen_pass(model, graph)
    after = frozen.direction_after(layer, at_the_end(frozen, _direction(frozen, graph)))[pos]
    inside = _inside(frozen, layer, pos, slot, expert, after)
    into = _from_sources(frozen, graph, inside.reads, 2 * layer + 1, pos)
    values = torch.stack([inside.values, inside.biases], dim=1).double().cpu().numpy()
    return _shown(values, inside.activations.double().cpu().numpy(), into, top)


@torch.no_grad()
def with_neurons(
    model: GptOss, graph: AttributionGraph, nodes: Sequence[int] | None = None, *, top: int = 5
) -> AttributionGraph:
    """Return the graph with experts divided: their neurons of the largest values, and the others as one node.

    nodes: rows of graph.nodes that are experts; by default all. Values, edges from and to the neurons and the other
    ones of an expert add up to what the expert had. Influences are computed again, among the nodes of the new graph.

    Raises:
        InputError: a node is not an expert, or `top` is below 1.
    """
    _check_top(top)
    if nodes is None:
        nodes = graph.nodes.index[graph.nodes["kind"] == "expert"].tolist()
    chosen = [(node, *_place(graph, node)) for node in dict.fromkeys(nodes)]
    frozen = frozen_pass(model, graph)
    direction = _direction(frozen, graph)
    tables, reads = [graph.nodes.drop(index=[place[0] for place in chosen])], []
    for node, layer, pos, slot, expert in chosen:
        after = frozen.direction_after(layer, at_the_end(frozen, direction))[pos]
        inside = _inside(frozen, layer, pos, slot, expert, after)
        largest = inside.values.abs().topk(min(top, len(inside.values))).indices
        tables.append(_neuron_rows(graph.nodes.loc[[node]], inside, largest))
        reads.append(inside.reads[largest])
    table = pd.concat(tables).assign(read=-1)
    own = (table["kind"] == "neuron").to_numpy()
    table.loc[own, "read"] = np.arange(own.sum())
    table = table.sort_values(["order", "pos"], kind="stable", ignore_index=True)  # the target stays the last
    vectors = reads_of(frozen, frozen.backward(at_the_end(frozen, direction)), table, direction)
    own = (table["kind"] == "neuron").to_numpy()
    if own.any():
        vectors[torch.tensor(own)] = torch.cat(reads)[torch.tensor(table.loc[own, "read"].tolist())]
    take_shown_neurons(table, vectors)
    weights = edge_values(frozen, table, writes_of(frozen, table), vectors)
    influence = influence_of(weights, table)
    # nodes outside the graph count as the same share as before
    total = float(influence[:-1].sum()) / graph.metadata["kept_influence"]
    metadata = graph.metadata | {"neurons": top, "total_influence": total}
    return assembled(table.assign(influence=influence), weights, graph.tokens, graph.texts, metadata, graph.saes)


def _neuron_rows(row: pd.DataFrame, inside: _Inside, largest: Tensor) -> pd.DataFrame:
    """Return the rows of an expert's largest neurons, and of the others together if there are any."""
    numbers = largest.tolist()
    value, bias = (x[largest].double().cpu().numpy() for x in (inside.values, inside.biases))
    own = pd.concat([row] * len(numbers)).assign(kind="neuron", neuron=numbers, value=value, bias=bias)
    if len(numbers) == len(inside.values):
        return own
    rest = {"value": row["value"] - value.sum(), "bias": row["bias"] - bias.sum()}
    return pd.concat([own, row.assign(kind="other neurons", **rest)])


def _check_top(top: int) -> None:
    if top < 1:
        raise InputError(f"top={top}: show at least one neuron")


def _inside(
    frozen: FrozenPass, layer: int, pos: int, slot: int, expert: int, after: Float[Tensor, " d_model"]
) -> _Inside:
    """Return the neurons of an expert at a token. after: the direction at the stream after the experts."""
    cfg, block = frozen.model.cfg, frozen.model.blocks[layer]
    experts, wide = block.mlp.experts, frozen.wide
    weight = frozen.seen("mlp.hook_expert_weights", layer)[pos, slot]
    down = weight * (experts.W_out(expert).to(wide) @ after)
    gate, up = (frozen.seen(f"mlp.experts.hook_{name}", layer)[pos, slot] for name in ("gate", "pre"))
    by_gate, by_up, post, constant = halves(
        gate[:, None], up[:, None], down[:, None], cfg.swiglu_limit, cfg.swiglu_alpha
    )
    gain = block.ln2.weight.to(wide) / frozen.seen("ln2.hook_scale", layer)[pos]
    reads = by_gate * experts.W_gate(expert).to(wide).mT + by_up * experts.W_in(expert).to(wide).mT
    bias = by_gate[:, 0] * experts.b_gate(expert).to(wide) + by_up[:, 0] * experts.b_in(expert).to(wide)
    return _Inside(down * post[:, 0], bias + constant, post[:, 0], reads * gain)


def _place(graph: AttributionGraph, node: int, kind: str = "expert") -> tuple[int, int, int, int]:
    """Return layer, position, index and expert of a node.

    Raises:
        InputError: the node is not of this kind.
    """
    if node not in graph.nodes.index or graph.nodes.loc[node, "kind"] != kind:
        known = graph.nodes.index[graph.nodes["kind"] == kind].tolist()
        raise InputError(f"node {node} is not of kind {kind}; nodes of this kind are {known[:10]}")
    row = graph.nodes.loc[node].to_dict()
    return int(row["layer"]), int(row["pos"]), int(row["index"]), int(row["expert"])


def _from_sources(
    frozen: FrozenPass, graph: AttributionGraph, reads: Float[Tensor, "read d_model"], order: float, pos: int
) -> Float[np.ndarray, "read node"]:
    """Return what each node of the graph writes at a position along directions that are read at this place."""
    at_position = torch.tensor((graph.nodes["pos"] == pos).tolist())
    seen = (direct(frozen, graph.nodes, order) & at_position).to(reads.device)
    return ((reads @ writes_of(frozen, graph.nodes).mT) * seen).double().cpu().numpy()


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
        InputError: the node is not an expert, or every expert is chosen.
    """
    _place(graph, node)
    return _router_edges(frozen_pass(model, graph, _CHOICES), graph, node)


def _router_edges(frozen: FrozenPass, graph: AttributionGraph, node: int) -> pd.DataFrame:
    layer, pos, _, expert = _place(graph, node, str(graph.nodes.loc[node, "kind"]))
    cfg, block = frozen.model.cfg, frozen.model.blocks[layer]
    logits = frozen.seen("mlp.router.hook_out", layer)[pos]
    if cfg.experts_per_token >= len(logits):
        raise InputError("every expert is selected for every token, so there is no runner-up to compare with")
    rest = logits.clone()
    rest[frozen.seen("mlp.hook_expert_indices", layer)[pos].long()] = -torch.inf
    runner_up = int(rest.argmax())
    weight, offset = block.mlp.router.weight.to(frozen.wide), block.mlp.router.bias.to(frozen.wide)
    gain = block.ln2.weight.to(frozen.wide) / frozen.seen("ln2.hook_scale", layer)[pos]
    reads = ((weight[expert] - weight[runner_up]) * gain)[None]
    values = _from_sources(frozen, graph, reads, 2 * layer + 1, pos)[0]
    difference, bias = float(logits[expert] - logits[runner_up]), float(offset[expert] - offset[runner_up])
    table = _summed(values, bias, difference)
    table.attrs = {"runner_up": runner_up, "difference": difference}
    return table


def _summed(values: Float[np.ndarray, " node"], bias: float, total: float) -> pd.DataFrame:
    """Return the sources with what each adds, the bias (−1) and the rest (−2), the largest first."""
    source = np.flatnonzero(values)
    rows = pd.DataFrame({"source": source, "value": values[source]})
    ends = pd.DataFrame({"source": [-1, -2], "value": [bias, total - bias - values.sum()]})
    table = pd.concat([rows, ends], ignore_index=True)
    return table.loc[table["value"].abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


@torch.no_grad()
def attention_edges(model: GptOss, graph: AttributionGraph, node: int, key: int | None = None) -> pd.DataFrame:
    """Return what each node of the graph adds to a head's attention score at a key.

    A score is a product of a query and a key: rows with `side` "query" divide it by what the query's token reads, the
    key held fixed, and rows with "key" by what the key's token reads. Columns: side, source (a row of the graph's
    nodes; −1 is the bias of queries or keys, −2 what no node of the graph explains) and value (scores before softmax);
    the values of each side add up to the score. attrs: `key`, `score`, and the `attention` paid to it.

    key: a position; by default the one that the head attends to most.

    Raises:
        InputError: the node is not a head, or the head does not see the position.
    """
    _place(graph, node, "head")
    return _attention_edges(frozen_pass(model, graph, _CHOICES), graph, node, key)


def _attention_edges(frozen: FrozenPass, graph: AttributionGraph, node: int, key: int | None) -> pd.DataFrame:
    layer, pos, head, _ = _place(graph, node, "head")
    pattern = frozen.pattern(layer)[head, pos]
    key = int(pattern.argmax()) if key is None else key
    window = frozen.model.cfg.windows[layer]
    if not max(0, pos - window + 1 if window else 0) <= key <= pos:
        raise InputError(f"key={key}: a head at position {pos} of layer {layer} sees {_sees(pos, window)}")
    cfg, attn = frozen.model.cfg, frozen.model.blocks[layer].attn
    q = frozen.seen("attn.hook_rot_q", layer)[pos, head]
    k = frozen.seen("attn.hook_rot_k", layer)[key, head * cfg.n_key_value_heads // cfg.n_heads]
    score = float(q @ k) / cfg.d_head**0.5
    sides = {"query": (pos, k, attn.W_Q, attn.b_Q), "key": (key, q, attn.W_K, attn.b_K)}
    tables = []
    for side, (at, other, weight, bias) in sides.items():
        turned = _turned_back(frozen, other, at) / cfg.d_head**0.5
        gain = frozen.model.blocks[layer].ln1.weight.to(frozen.wide) / frozen.seen("ln1.hook_scale", layer)[at]
        reads = (weight[head].to(frozen.wide) @ turned * gain)[None]
        values = _from_sources(frozen, graph, reads, 2 * layer, at)[0]
        table = _summed(values, float(bias[head].to(frozen.wide) @ turned), score)
        table.insert(0, "side", side)
        tables.append(table)
    both = pd.concat(tables, ignore_index=True)
    both.attrs = {"key": key, "score": score, "attention": float(pattern[key])}
    return both


def _sees(pos: int, window: int | None) -> str:
    return f"{max(0, pos - window + 1 if window else 0)} to {pos}"


def _turned_back(frozen: FrozenPass, vector: Float[Tensor, " d_head"], pos: int) -> Float[Tensor, " d_head"]:
    """Return the vector whose product with an unrotated one is that of `vector` with one rotated to a position."""
    cfg = frozen.model.cfg
    cos, sin = cos_sin(cfg.rope, cfg.d_head, torch.tensor([[pos]], device=vector.device))
    return rotate(vector[None, None, None], cos, -sin)[0, 0, 0]


@torch.no_grad()
def choice_edges(model: GptOss, graph: AttributionGraph) -> pd.DataFrame:
    """Return query, key and router edges between the nodes of a graph.

    Columns: source, target, kind ("query", "key" or "router"), value. Queries and keys are those of the most attended
    key of each head, in attention scores. Router edges are in router logits above the runner-up, and lead to the node
    of an expert, or of its other neurons where it is divided.
    """
    frozen = frozen_pass(model, graph, _CHOICES)
    tables = [pd.DataFrame({"source": [], "target": [], "kind": [], "value": []})]
    for node, kind in graph.nodes["kind"].items():
        if kind == "head":
            rows = _attention_edges(frozen, graph, int(str(node)), None).rename(columns={"side": "kind"})
        elif kind in ("expert", "other neurons") and model.cfg.experts_per_token < model.cfg.num_experts:
            rows = _router_edges(frozen, graph, int(str(node))).assign(kind="router")
        else:
            continue
        tables.append(rows[rows["source"] >= 0].assign(target=int(str(node)))[["source", "target", "kind", "value"]])
    rows = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    return rows.astype({"source": int, "target": int})
