"""Attribution graphs: the embeddings, heads and routed experts, by token, that a logit is the sum of.

    graph = wb.experiments.graph(model, "24*29=", target="6", against="7")
    graph.nodes.head(), graph.edges.head(), graph.metadata

The target is a logit, less another one or less the mean of all. A node is an embedding, a head or a routed expert at a
position, an active feature of an attached autoencoder, or what is constant at a position: the biases of a layer, the
error of an autoencoder. Neurons of experts are nodes on demand (`graph_details.with_neurons`). The `value` of a node is
what it adds to the target along all paths that the frozen pass has (see `frozen_pass`), in logits; the value of an edge
is the part of it that comes from one source. For every node the edges into it, its `bias` and its `error` (what sources
outside the graph feed) sum to its value, and the edges into the target sum to the target. Embeddings, biases and errors
of autoencoders alone add up to the target, as every path begins there.

Nodes and edges are chosen by their indirect influence on the target: absolute edges, divided by the sum of what flows
into each node, multiplied along all paths.

Reference: circuit tracing, Ameisen et al. 2025 (influence and pruning); the flow itself is `frozen_pass`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.experiments.dictionary_features import layer_of
from workbench.experiments.frozen_pass import BackwardFlow, FrozenPass
from workbench.hooks.sae import SAE
from workbench.model.transformer import GptOss
from workbench.version import version

SOURCES = ("embedding", "attention bias", "expert bias", "feature error")  # nothing flows into them
READERS = ("head", "expert", "feature", "neuron", "other neurons", "target")
KINDS = (*SOURCES, *READERS)
COLUMNS = ("kind", "layer", "index", "expert", "neuron", "pos", "token", "value", "bias", "error", "influence", "order")
_VOCABULARY_ROWS = 8192  # of the unembedding at a time
METHOD = (
    "Attention patterns, the sink's share, scales of norms, experts and gate weights are frozen. Each factor of the "
    "experts' activation gets half of the product; the sigmoid and the clamps count as frozen ratios. Of autoencoders "
    "the active features are frozen, and their errors are constant."
)


@dataclass(frozen=True)
class AttributionGraph:
    """Nodes and edges that explain one logit.

    nodes: kind, layer, index (head, slot or feature), expert and neuron (−1: none), pos, token, value, bias, error
    (logits), influence (share), order (of the pass: a node reads what has a smaller one); the last one is the target.
    edges: source and target (rows of nodes), value (logits), score (share of influence).
    metadata: what was asked (`target`, `against`), `logit` and `probability` of the target, `kept_influence` (of the
    `considered_nodes`, the largest of `nodes_in_pass` by value), `kept_of_target` (share of the logit that edges from
    kept nodes add up to), `explained_input` (share of what flows into kept nodes that is not an error, by influence),
    and `completeness_of_paths` (how far the sum of everything that begins a path is from the logit, in logits).
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: list[int]
    texts: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    saes: Mapping[str, SAE] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        m = self.metadata
        return (
            f"<AttributionGraph of {m['target']} − {m['against']}: {m['logit']:.2f} logits, "
            f"{count_of(len(self.nodes), 'node')}, "
            f"{count_of(len(self.edges), 'edge')}, {m['kept_influence']:.0%} of the influence>"
        )


def graph(
    model: GptOss,
    tokens: Any,
    target: str | int | None = None,
    against: str | int | None = None,
    *,
    at: int = -1,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    max_nodes: int = 500,
    saes: Mapping[str, SAE] | None = None,
) -> AttributionGraph:
    """Return the attribution graph of a logit after the token at position `at`.

    tokens: a text, or the ids of one sequence. target: a token, as text or id; by default the most likely one. against:
    a token whose logit is taken off; by default the mean of all logits. node_share, edge_share: the share of the
    influence on the target to keep. max_nodes: at most this many nodes, the largest by value, are considered. saes:
    autoencoders by the hook point of the residual stream that each reads, at most one in a layer; their active features
    become nodes, and all that passes them goes through a feature or its error.

    Raises:
        InputError: the tokens are not one sequence, the target is not one token, an option is out of range, or an
            autoencoder cannot be attached.
    """
    ids = _sequence(model, tokens)
    _check_options(len(ids), at, node_share, edge_share, max_nodes)
    end = at % len(ids)
    wanted = None if target is None else _token(model, target)
    other = None if against is None else _token(model, against)
    frozen = FrozenPass(model, ids[: end + 1], saes)
    wanted = int(frozen.logits.argmax()) if wanted is None else wanted
    if wanted == other:
        raise InputError(
            f"target and against are the same token, {model.tokenizer.decode([wanted])!r}: name another one against it"
        )
    direction = logit_direction(frozen, wanted, other)
    flow = frozen.backward(at_the_end(frozen, direction))
    candidates = _candidates(frozen, flow)
    chosen = candidates.loc[candidates["value"].abs().nlargest(max_nodes - 1).index].sort_values(["order", "pos"])
    chosen = pd.concat([chosen, _target_node(frozen, direction)], ignore_index=True)
    weights = edge_values(frozen, chosen, writes_of(frozen, chosen), reads_of(frozen, flow, chosen, direction))
    influence = influence_of(weights, chosen)
    keep = _smallest_set(influence, node_share)
    keep[-1] = True
    nodes = chosen[keep].assign(influence=influence[keep]).reset_index(drop=True)
    texts = [model.tokenizer.decode([token]) for token in ids[: end + 1].tolist()]
    metadata = _metadata(model, frozen, candidates, (wanted, other))
    total = max(float(influence[:-1].sum()), 1e-30)
    metadata |= {"considered_nodes": len(chosen) - 1, "total_influence": total}
    metadata |= {"kept_influence": float(influence[keep][:-1].sum()) / total}
    metadata |= {"node_share": node_share, "edge_share": edge_share, "max_nodes": max_nodes, "saes": list(saes or {})}
    return assembled(nodes, weights[np.ix_(keep, keep)], ids[: end + 1].tolist(), texts, metadata, dict(saes or {}))


def assembled(
    nodes: pd.DataFrame,
    weights: Float[np.ndarray, "target source"],
    tokens: list[int],
    texts: list[str],
    metadata: Mapping[str, Any],
    saes: Mapping[str, SAE],
) -> AttributionGraph:
    """Return the graph of these nodes, with their errors and the edges between them that carry `edge_share`."""
    nodes = nodes.assign(error=nodes["value"] - nodes["bias"] - weights.sum(1))
    nodes.loc[nodes["kind"].isin(SOURCES), "error"] = 0.0
    edges = _edge_table(weights, nodes, float(metadata["edge_share"]))
    logit = abs(metadata["logit"])
    explained = 1 - abs(float(nodes["error"].iloc[-1])) / max(logit, 1e-30)
    shares = {"kept_of_target": explained, "explained_input": _explained_input(nodes, weights)}
    table = nodes.assign(token=[texts[pos] for pos in nodes["pos"]])[list(COLUMNS)]
    return AttributionGraph(table, edges, tokens, texts, {**metadata, **shares}, saes)


def _explained_input(nodes: pd.DataFrame, weights: Float[np.ndarray, "target source"]) -> float:
    """Return the share of what flows into nodes that comes from nodes of the graph or a bias, not from errors.

    The mean over the nodes that read, weighted by their influence: the completeness score of circuit tracing.
    """
    readers = nodes["kind"].isin(READERS).to_numpy()
    error = nodes["error"].abs().to_numpy()[readers]
    total = np.abs(weights).sum(1)[readers] + nodes["bias"].abs().to_numpy()[readers] + error
    influence = nodes["influence"].to_numpy()[readers]
    return float((influence * (1 - error / np.maximum(total, 1e-30))).sum() / influence.sum())


def _sequence(model: GptOss, tokens: Any) -> Int[Tensor, " pos"]:
    if isinstance(tokens, str):
        tokens = model.to_tokens(tokens)
    ids = torch.as_tensor(tokens)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise InputError(f"an attribution graph explains one sequence, got ids of shape {list(ids.shape)}")
    if not bool(((ids >= 0) & (ids < model.cfg.d_vocab)).all()):
        raise InputError(
            f"token ids {int(ids.min())} to {int(ids.max())}: the vocabulary has 0 to {model.cfg.d_vocab - 1}"
        )
    return ids.long().to(model.device)


def _token(model: GptOss, token: str | int) -> int:
    if isinstance(token, str):
        return int(model.to_single_token(token))
    if not 0 <= token < model.cfg.d_vocab:
        raise InputError(f"token id {token}: the vocabulary has 0 to {model.cfg.d_vocab - 1}")
    return token


def _check_options(n: int, at: int, node_share: float, edge_share: float, max_nodes: int) -> None:
    if not -n <= at < n:
        raise InputError(f"at={at}: the sequence has {n} tokens")
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 < share <= 1:
            raise InputError(f"{name}={share}: expected a share above 0, at most 1")
    if max_nodes < 2:
        raise InputError(f"max_nodes={max_nodes}: expected at least 2")


def logit_direction(frozen: FrozenPass, wanted: int, other: int | None) -> Float[Tensor, " d_model"]:
    """Return the direction at the last stream whose product with it is the logit difference."""
    matrix = frozen.model.unembed.W_U.mT  # with the update of an adapter
    if other is None:  # summed in float32 without a copy of the vocabulary in float32, which is 2.3 GB
        sums = [part.sum(0, dtype=frozen.wide) for part in matrix.split(_VOCABULARY_ROWS)]
        off = torch.stack(sums).sum(0) / len(matrix)
    else:
        off = matrix[other].to(frozen.wide)
    return (
        (matrix[wanted].to(frozen.wide) - off)
        * frozen.model.ln_final.weight.to(frozen.wide)
        / frozen.seen("ln_final.hook_scale")[-1]
    )


def at_the_end(frozen: FrozenPass, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "pos d_model"]:
    """Return a direction at the last token, and nothing at the others."""
    end = direction.new_zeros(len(frozen.tokens), len(direction))
    end[-1] = direction
    return end


def _table(
    kind: str, layer: int, order: float, value: Tensor, bias: Tensor | None = None, **columns: Any
) -> pd.DataFrame:
    """Return nodes of a layer: `value` is [pos] or [pos index]."""
    value = value[:, None] if value.ndim == 1 else value
    pos, index = (axis.ravel() for axis in np.indices(value.shape))
    frame = pd.DataFrame({"kind": kind, "layer": layer, "order": float(order), "index": index, "pos": pos})
    frame["value"] = value.double().cpu().numpy().ravel()
    frame["bias"] = frame["value"] if bias is None else bias.double().cpu().numpy().ravel()
    return frame.assign(**{"expert": -1, "neuron": -1} | columns)


def _candidates(frozen: FrozenPass, flow: BackwardFlow) -> pd.DataFrame:
    """Return every node of the pass but the target; sources have their value as bias."""
    embedding = (flow.start * frozen.seen("hook_embed")).sum(-1)
    tables = [_table("embedding", -1, -1, embedding)]
    for layer, own in enumerate(flow.layers):
        chosen = frozen.seen("mlp.hook_expert_indices", layer).cpu().numpy().ravel()
        tables += [
            _table("head", layer, 2 * layer, own.heads, own.head_bias),
            _table("attention bias", layer, 2 * layer, own.attention_bias),
            _table("expert", layer, 2 * layer + 1, own.experts, own.expert_constants, expert=chosen),
            _table("expert bias", layer, 2 * layer + 1, own.expert_bias),
        ]
    for order, features in flow.features.items():
        active = frozen.features[order]
        numbers = {"pos": active.pos.cpu().numpy(), "index": active.feature.cpu().numpy()}
        layer = layer_of(active.name)
        tables += [
            _table("feature", layer, order, features.values, features.constants).assign(**numbers),
            _table("feature error", layer, order, features.errors),
        ]
    every = pd.concat(tables, ignore_index=True)
    return every[every["value"] != 0]


def _target_node(frozen: FrozenPass, direction: Tensor) -> pd.DataFrame:
    last = frozen.model.cfg.n_layers - 1
    value = (direction * frozen.seen("hook_resid_post", last)[-1]).sum()[None]
    node = _table("target", last + 1, 2 * last + 2, value, torch.zeros_like(value))
    return node.assign(pos=len(frozen.tokens) - 1)


def by_layer(nodes: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Yield the nodes of each kind and layer."""
    for key, rows in nodes.groupby(["kind", "layer"], sort=False):
        kind, layer = cast(tuple[Any, Any], key)
        yield str(kind), int(layer), rows


def _columns(rows: pd.DataFrame, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return positions and indices of nodes."""
    return torch.tensor(rows["pos"].to_numpy(), device=device), torch.tensor(rows["index"].to_numpy(), device=device)


def writes_of(frozen: FrozenPass, nodes: pd.DataFrame) -> Float[Tensor, "node d_model"]:
    """Return the vector that each node adds to the residual stream; the target adds none."""
    embedding = frozen.seen("hook_embed")
    out = embedding.new_zeros(len(nodes), embedding.shape[-1])
    for kind, layer, rows in by_layer(nodes):
        pos, index = _columns(rows, out.device)
        at = torch.tensor(rows.index.to_numpy(), device=out.device)
        if kind == "embedding":
            out[at] = embedding[pos]
        elif kind == "head":
            out[at] = frozen.head_write(layer, pos, index)
        elif kind == "expert":
            out[at] = frozen.expert_write(layer, pos, index)
        elif kind == "attention bias":
            out[at] = frozen.model.blocks[layer].attn.b_O.to(out.dtype).expand(len(at), -1)
        elif kind == "expert bias":
            out[at] = frozen.expert_bias_write(layer, pos)
        elif kind in ("feature", "feature error"):
            active = frozen.features[float(rows["order"].iloc[0])]
            out[at] = active.error[pos] if kind == "feature error" else active.writes(active.find(pos, index))
        elif kind == "neuron":
            out[at] = frozen.neuron_write(layer, pos, index, torch.tensor(rows["neuron"].to_numpy(), device=out.device))
        elif kind == "other neurons":
            out[at] = frozen.expert_write(layer, pos, index)
    take_shown_neurons(nodes, out)
    return out


def take_shown_neurons(nodes: pd.DataFrame, vectors: Float[Tensor, "node d_model"]) -> None:
    """Subtract from the rows of other neurons, which hold their expert's vector, those of the neurons shown."""
    places = ["layer", "pos", "index"]
    others = nodes[nodes["kind"] == "other neurons"]
    for node, place in zip(others.index.tolist(), others[places].to_numpy(), strict=True):
        own = (nodes["kind"] == "neuron") & (nodes[places] == place).all(axis=1)
        vectors[node] -= vectors[torch.tensor(own.to_numpy(), device=vectors.device)].sum(0)


@torch.no_grad()
def reads_of(
    frozen: FrozenPass, flow: BackwardFlow, nodes: pd.DataFrame, direction: Tensor
) -> Float[Tensor, "node d_model"]:
    """Return the directions [node d_model] at the stream that nodes read; a head's is before pattern and norm's scale.

    Neurons have none here: `graph_details` has theirs.
    """
    out = direction.new_zeros(len(nodes), len(direction))
    for kind, layer, rows in by_layer(nodes):
        pos, index = _columns(rows, out.device)
        at = torch.tensor(rows.index.to_numpy(), device=out.device)
        if kind == "head":
            out[at] = frozen.head_reads(layer, pos, index, flow.layers[layer].head_outputs[pos, index])
        elif kind in ("expert", "other neurons"):
            out[at] = flow.layers[layer].expert_reads[pos, index]
        elif kind == "feature":
            order = float(rows["order"].iloc[0])
            out[at] = flow.features[order].reads[frozen.features[order].find(pos, index)]
        elif kind == "target":
            out[at] = direction
    return out


@torch.no_grad()
def edge_values(
    frozen: FrozenPass, nodes: pd.DataFrame, writes: Float[Tensor, "node d_model"], reads: Float[Tensor, "node d_model"]
) -> Float[np.ndarray, "target source"]:
    """Return the direct effect of every node on every other, in logits."""
    pos = torch.tensor(nodes["pos"].to_numpy(), device=writes.device)
    out = np.zeros((len(nodes), len(nodes)))
    for kind, layer, rows in by_layer(nodes):
        if kind not in READERS:
            continue
        at, index = _columns(rows, writes.device)
        own = torch.tensor(rows.index.to_numpy(), device=writes.device)
        share = (pos[None] == at[:, None]).to(writes.dtype)
        if kind == "head":
            share = frozen.pattern(layer)[index, at][:, pos] / frozen.seen("ln1.hook_scale", layer)[:, 0][pos]
        seen = direct(frozen, nodes, float(rows["order"].iloc[0])).to(writes.device)
        out[rows.index.to_numpy()] = ((reads[own] @ writes.mT) * share * seen).double().cpu().numpy()
    return out


def direct(frozen: FrozenPass, nodes: pd.DataFrame, order: float) -> Bool[Tensor, " node"]:
    """Return which nodes a node of this place in the order reads directly: earlier ones, no autoencoder between."""
    between = [place for place in frozen.features if place < order]
    return torch.tensor(((nodes["order"] < order) & (nodes["order"] >= max(between, default=-np.inf))).tolist())


def influence_of(weights: Float[np.ndarray, "target source"], nodes: pd.DataFrame) -> Float[np.ndarray, " node"]:
    """Return the share of influence on the target of every node, along all paths.

    What flows into a node from outside the graph and from its own biases takes part in its sum, so it is lost on the
    way: the influence is of what the graph shows.
    """
    unexplained = np.abs(nodes["value"] - nodes["bias"] - weights.sum(1)) + np.abs(nodes["bias"])
    total = np.abs(weights).sum(1) + unexplained.to_numpy()
    shares = np.abs(weights) / np.where(total > 0, total, 1)[:, None]
    influence = np.zeros(len(nodes))
    influence[-1] = 1.0
    for target in np.argsort(-nodes["order"].to_numpy(), kind="stable"):  # every edge goes to an earlier node
        influence += influence[target] * shares[target]
    return influence


def _smallest_set(influence: Float[np.ndarray, " node"], share: float) -> Bool[np.ndarray, " node"]:
    """Return the fewest nodes but the target that carry this share of all influence."""
    order = np.argsort(-influence[:-1], kind="stable")
    carried = np.cumsum(influence[order])
    keep = np.zeros(len(influence), dtype=bool)
    needed = int(np.searchsorted(carried, share * carried[-1] * (1 - 1e-12)) + 1) if len(order) else 0
    keep[order[:needed]] = True
    return keep


def _edge_table(weights: Float[np.ndarray, "target source"], nodes: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return the fewest edges that carry this share of the influence, the largest first."""
    total = np.abs(weights).sum(1) + np.abs(nodes["error"].to_numpy()) + np.abs(nodes["bias"].to_numpy())
    score = np.abs(weights) / np.where(total > 0, total, 1)[:, None] * nodes["influence"].to_numpy()[:, None]
    target, source = np.nonzero(weights)
    table = pd.DataFrame({"source": source, "target": target, "value": weights[target, source]})
    table["score"] = score[target, source]
    table = table.sort_values("score", ascending=False, ignore_index=True)
    carried = table["score"].cumsum().to_numpy()
    n_edges = int(np.searchsorted(carried, share * carried[-1] * (1 - 1e-12)) + 1) if len(table) else 0
    return table.iloc[:n_edges]


def _metadata(
    model: GptOss, frozen: FrozenPass, candidates: pd.DataFrame, asked: tuple[int, int | None]
) -> dict[str, Any]:
    wanted, other = asked
    last = frozen.logits.double()
    logit = float(last[wanted] - (last.mean() if other is None else last[other]))
    probability = float(last.softmax(-1)[wanted])
    begins = float(candidates["bias"].sum())  # every path begins at a source, whose value is its bias, or at a bias
    return {
        "model": str(getattr(getattr(model.checkpoint, "path", None), "name", "")),
        "checkpoint_digest": model.checkpoint.digest,
        "target": model.tokenizer.decode([wanted]),
        "target_id": wanted,
        "against": "mean" if other is None else model.tokenizer.decode([other]),
        "against_id": other,
        "logit": logit,
        "probability": probability,
        "nodes_in_pass": len(candidates),
        "completeness_of_paths": abs(begins - logit),
        "method": METHOD,
        "workbench_version": version(),
    }
