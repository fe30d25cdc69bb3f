"""Attribution graphs: which embeddings, heads and routed experts, at which tokens, made the model give this logit.

    graph = wb.experiments.graph(model, "24*29=", target="6", against="7")
    graph.nodes.head(), graph.edges.head(), graph.metadata

The target is a logit, less another one or less the mean of all. A node is an embedding, a head or a routed expert at a
position, or the biases of a layer at a position. Its `value` is what it adds to the target along all paths that the
frozen pass has (see `frozen_pass`), in logits; the value of an edge is the part of it that comes from one source. For
every node the edges into it, its `bias` and its `error` (what sources outside the graph feed) sum to its value, and the
edges into the target sum to the target. Embeddings and biases alone add up to the target, as every path begins there.

Nodes and edges are chosen by their indirect influence on the target: absolute edges, divided by the sum of what flows
into each node, multiplied along all paths.

Reference: circuit tracing, Ameisen et al. 2025 (influence and pruning); the flow itself is `frozen_pass`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.frozen_pass import FrozenPass, LayerFlow
from workbench.model.transformer import GptOss
from workbench.version import version

KINDS = ("embedding", "head", "expert", "attention bias", "expert bias", "target")
METHOD = (
    "Attention patterns, the sink's share, scales of norms, experts and gate weights are frozen. Each factor of the "
    "experts' activation gets half of the product; the sigmoid and the clamps count as frozen ratios."
)


@dataclass(frozen=True)
class AttributionGraph:
    """Nodes and edges that explain one logit.

    nodes: kind, layer, index (head or slot), expert, pos, token, value, bias, error (logits), influence (share);
    the last one is the target. edges: source and target (rows of nodes), value (logits), score (share of influence).
    metadata: what was asked, how much is kept, and how far sums are from what they should be.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: list[int]
    texts: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        m = self.metadata
        return (
            f"<AttributionGraph of {m['target']} − {m['against']}: {m['logit']:.2f} logits, {len(self.nodes)} nodes, "
            f"{len(self.edges)} edges, {m['kept_influence']:.0%} of the influence>"
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
) -> AttributionGraph:
    """Return the attribution graph of a logit after the token at position `at`.

    tokens: a text, or the ids of one sequence. target: a token, as text or id; by default the most likely one. against:
    a token whose logit is taken off; by default the mean of all logits. node_share, edge_share: the share of the
    influence on the target to keep. max_nodes: at most so many nodes, the largest by value, are looked at.

    Raises:
        InputError: the tokens are not one sequence, the target is not one token, or an option is out of range.
    """
    ids = _sequence(model, tokens)
    _check_options(len(ids), at, node_share, edge_share, max_nodes)
    end = at % len(ids)
    frozen = FrozenPass(model, ids[: end + 1])
    wanted = int(frozen.logits[-1].argmax()) if target is None else _token(model, target)
    other = None if against is None else _token(model, against)
    direction = logit_direction(frozen, wanted, other)
    flows, start = frozen.backward(at_the_end(frozen, direction))
    candidates = _candidates(frozen, flows, start)
    chosen = candidates.loc[candidates["value"].abs().nlargest(max_nodes - 1).index].sort_values(["order", "pos"])
    chosen = pd.concat([chosen, _target_node(frozen, direction)], ignore_index=True)
    weights = _edges(frozen, flows, chosen, direction)
    influence = _influence(weights, chosen)
    keep = _smallest_set(influence, node_share)
    keep[-1] = True
    nodes = chosen[keep].assign(influence=influence[keep]).reset_index(drop=True)
    kept_weights = weights[np.ix_(keep, keep)]
    nodes["error"] = nodes["value"] - nodes["bias"] - kept_weights.sum(1)
    sources = nodes["kind"].isin(("embedding", "attention bias", "expert bias"))
    nodes.loc[sources, "error"] = 0.0
    edges = _edge_table(kept_weights, nodes, edge_share)
    texts = [model.tokenizer.decode([token]) for token in ids[: end + 1].tolist()]
    metadata = _metadata(model, frozen, flows, candidates, nodes, (wanted, other), influence[keep], weights, chosen)
    metadata |= {"node_share": node_share, "edge_share": edge_share, "max_nodes": max_nodes}
    return AttributionGraph(_described(nodes, texts), edges, ids[: end + 1].tolist(), texts, metadata)


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
    matrix = frozen.model.unembed.weight
    off = matrix.to(frozen.wide).mean(0) if other is None else matrix[other].to(frozen.wide)
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
    kind: str, layer: int, order: int, value: Tensor, bias: Tensor | None = None, **columns: Any
) -> pd.DataFrame:
    """Return nodes of a layer: `value` is [pos] or [pos index]."""
    value = value[:, None] if value.ndim == 1 else value
    pos, index = (axis.ravel() for axis in np.indices(value.shape))
    frame = pd.DataFrame({"kind": kind, "layer": layer, "order": order, "index": index, "pos": pos})
    frame["value"] = value.double().cpu().numpy().ravel()
    frame["bias"] = frame["value"] if bias is None else bias.double().cpu().numpy().ravel()
    return frame.assign(**columns)


def _candidates(frozen: FrozenPass, flows: list[LayerFlow], start: Float[Tensor, "pos d_model"]) -> pd.DataFrame:
    """Return every node of the pass but the target; sources have their value as bias."""
    embedding = (start * frozen.seen("hook_embed")).sum(-1)
    tables = [_table("embedding", -1, -1, embedding, expert=-1)]
    for layer, flow in enumerate(flows):
        chosen = frozen.seen("mlp.hook_expert_indices", layer).cpu().numpy().ravel()
        tables += [
            _table("head", layer, 2 * layer, flow.heads, flow.head_bias, expert=-1),
            _table("attention bias", layer, 2 * layer, flow.attention_bias, expert=-1),
            _table("expert", layer, 2 * layer + 1, flow.experts, flow.expert_constants, expert=chosen),
            _table("expert bias", layer, 2 * layer + 1, flow.expert_bias, expert=-1),
        ]
    every = pd.concat(tables, ignore_index=True)
    return every[every["value"] != 0]


def _target_node(frozen: FrozenPass, direction: Tensor) -> pd.DataFrame:
    last = frozen.model.cfg.n_layers - 1
    value = (direction * frozen.seen("hook_resid_post", last)[-1]).sum()[None]
    node = _table("target", last + 1, 2 * last + 2, value, torch.zeros_like(value), expert=-1)
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
    """Return what each node writes into the stream; the target writes nothing."""
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
    return out


@torch.no_grad()
def _edges(
    frozen: FrozenPass, flows: list[LayerFlow], nodes: pd.DataFrame, direction: Tensor
) -> Float[np.ndarray, "target source"]:
    """Return what flows from every node directly into every other, in logits."""
    writes = writes_of(frozen, nodes)
    order, pos = (torch.tensor(nodes[name].to_numpy(), device=writes.device) for name in ("order", "pos"))
    out = np.zeros((len(nodes), len(nodes)))
    for kind, layer, rows in by_layer(nodes):
        if kind not in ("head", "expert", "target"):
            continue
        at, index = _columns(rows, writes.device)
        same = (pos[None] == at[:, None]).to(writes.dtype)
        if kind == "head":
            reads = frozen.head_reads(layer, at, index, flows[layer].head_outputs[at, index])
            scale = frozen.seen("ln1.hook_scale", layer)[:, 0]
            share = frozen.pattern(layer)[index, at][:, pos] / scale[pos]
        else:
            reads = flows[layer].expert_reads[at, index] if kind == "expert" else direction[None]
            share = same
        earlier = order < int(rows["order"].iloc[0])
        out[rows.index.to_numpy()] = ((reads @ writes.mT) * share * earlier).double().cpu().numpy()
    return out


def _influence(weights: Float[np.ndarray, "target source"], nodes: pd.DataFrame) -> Float[np.ndarray, " node"]:
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
    kept = int(np.searchsorted(carried, share * carried[-1] * (1 - 1e-12)) + 1) if len(table) else 0
    return table.iloc[:kept]


def _described(nodes: pd.DataFrame, texts: Sequence[str]) -> pd.DataFrame:
    columns = ["kind", "layer", "index", "expert", "pos", "token", "value", "bias", "error", "influence"]
    return nodes.assign(token=[texts[pos] for pos in nodes["pos"]])[columns]


def _metadata(
    model: GptOss,
    frozen: FrozenPass,
    flows: list[LayerFlow],
    candidates: pd.DataFrame,
    nodes: pd.DataFrame,
    asked: tuple[int, int | None],
    influence: Float[np.ndarray, " kept"],
    weights: Float[np.ndarray, "target source"],
    chosen: pd.DataFrame,
) -> dict[str, Any]:
    wanted, other = asked
    last = frozen.logits[-1].double()
    logit = float(last[wanted] - (last.mean() if other is None else last[other]))
    sources = candidates["kind"].isin(("embedding", "attention bias", "expert bias"))
    inner = float(candidates.loc[~sources, "bias"].sum())
    begins = float(candidates.loc[sources, "value"].sum()) + inner
    return {
        "model": str(getattr(model.checkpoint, "name", "")),
        "target": model.tokenizer.decode([wanted]),
        "target_id": wanted,
        "against": "mean" if other is None else model.tokenizer.decode([other]),
        "against_id": other,
        "logit": logit,
        "nodes_in_pass": len(candidates),
        "kept_influence": float(influence[:-1].sum() / max(_influence(weights, chosen)[:-1].sum(), 1e-30)),
        "kept_of_target": 1 - abs(float(nodes["error"].iloc[-1])) / max(abs(logit), 1e-30),
        "completeness_of_paths": abs(begins - logit),
        "method": METHOD,
        "workbench_version": version(),
    }
