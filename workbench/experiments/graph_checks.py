"""Checks of an attribution graph on the model itself, where nothing is frozen.

`ablate` removes what single nodes write and measures the logit; `ablate_edge` removes what one node gives another one;
`faithfulness` removes the most influential nodes together, beside random nodes of their layers that write as much;
`kept_alone` replaces everything outside the graph by its mean over other tokens, `kept_curve` all but its strongest
nodes;
`over_prompts` has the means of their tables over prompts, with intervals. The graph's values are of a frozen pass that
gives each factor of an expert's activation half of the product, so a measured effect has another size: it states
whether the node or edge is needed, and the value states what it contributes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph, by_layer, writes_of
from workbench.experiments.dictionary_features import active_features, layer_of
from workbench.experiments.frozen_pass import FrozenPass
from workbench.hooks.sae import SAE
from workbench.model.transformer import GptOss
from workbench.studies.intervals import MIN_PROMPTS, mean_effect

Hooks = list[tuple[str, Callable[..., Any]]]
_POINTS = {
    "embedding": "hook_embed",
    "head": "attn.hook_z",
    "expert": "mlp.experts.hook_out",
    "neuron": "mlp.experts.hook_post",
}
ABLATED = (*_POINTS, "feature")  # kinds of nodes that can be ablated


@torch.no_grad()
def logit(model: GptOss, graph: AttributionGraph, hooks: Hooks | None = None) -> float:
    """Return the graph's target, measured in a pass with these hooks."""
    ids = torch.tensor([graph.tokens], device=model.device)
    last = model.run_with_hooks(ids, fwd_hooks=hooks or [])[0, -1].double()
    other = graph.metadata["against_id"]
    return float(last[graph.metadata["target_id"]] - (last.mean() if other is None else last[other]))


def ablate(model: GptOss, graph: AttributionGraph, nodes: Sequence[int]) -> pd.DataFrame:
    """Return these rows of the graph's nodes with `measured`: how much the target falls when the node writes nothing.

    Raises:
        InputError: a node is not in the graph, or cannot be ablated, as a bias.
    """
    _check_nodes(graph, nodes)
    plain = logit(model, graph)
    rows = graph.nodes.loc[list(nodes)]
    measured = [plain - logit(model, graph, ablation_hooks(model, rows.loc[[node]], graph.saes)) for node in rows.index]
    return rows.assign(measured=measured)


def _check_nodes(graph: AttributionGraph, nodes: Sequence[int]) -> None:
    """Refuse numbers that are no rows of the graph's nodes."""
    if unknown := [node for node in nodes if node not in graph.nodes.index]:
        raise InputError(f"node {unknown[0]} is not in the graph: its nodes are rows 0 to {graph.nodes.index.max()}")


def ablation_hooks(model: GptOss, nodes: pd.DataFrame, saes: Mapping[str, SAE] | None = None) -> Hooks:
    """Return hooks that make these nodes write nothing; the bias of an expert's output stays.

    saes: autoencoders whose features are among the nodes, by hook point.

    Raises:
        InputError: a node of this kind cannot be ablated.
    """
    hooks: Hooks = []
    for kind, layer, rows in by_layer(nodes):
        if kind not in ABLATED:
            raise InputError(f"a node of kind {kind!r} cannot be ablated: choose one of {', '.join(ABLATED)}")
        pos, index, expert = (torch.tensor(rows[name].to_numpy()) for name in ("pos", "index", "expert"))
        if kind == "feature":
            hooks.append(_feature_remover(layer, pos, index, saes or {}))
            continue
        name = _POINTS[kind] if kind == "embedding" else f"blocks.{layer}.{_POINTS[kind]}"
        value = model.blocks[layer].mlp.experts.down.bias[expert] if kind == "expert" else 0.0
        cells = (pos,) if kind == "embedding" else (pos, index)
        if kind == "neuron":
            cells = (*cells, torch.tensor(rows["neuron"].to_numpy()))
        hooks.append((name, _writer(cells, value)))
    return hooks


def _writer(cells: tuple[Tensor, ...], value: Tensor | float) -> Callable[..., Tensor]:
    def write(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        first = torch.zeros_like(cells[0])
        out[(first, *cells)] = value.to(out.device, out.dtype) if isinstance(value, Tensor) else value
        return out

    return write


def _feature_remover(
    layer: int, pos: Tensor, feature: Tensor, saes: Mapping[str, SAE]
) -> tuple[str, Callable[..., Tensor]]:
    """Return the hook point of a layer's autoencoder, and a hook that takes what these features write out of it."""
    (name,) = [name for name in saes if layer_of(name) == layer]

    def remove(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        active = active_features(name, saes[name], x[0])
        places = zip(pos.tolist(), feature.tolist(), strict=True)
        for at, number in places:
            own = (active.pos == at) & (active.feature == number)
            out[0, at] -= active.writes(own.nonzero()[:, 0]).sum(0).to(out.dtype)
        return out

    return name, remove


@torch.no_grad()
def ablate_edge(model: GptOss, graph: AttributionGraph, source: int, target: int) -> dict[str, float]:
    """Return the edge's value and how much the target of the graph falls without it, `measured`.

    What the source writes is taken out of what the target node reads, after its norm as it is; other nodes still
    read it.

    Raises:
        InputError: a node is not in the graph, the source cannot be ablated, or the target node reads nothing.
    """
    _check_nodes(graph, (source, target))
    nodes = graph.nodes
    to = nodes.loc[target].to_dict()
    if nodes.loc[source, "kind"] not in ABLATED or to["kind"] not in ("head", "expert"):
        raise InputError(
            f"node {source} is of kind {nodes.loc[source, 'kind']!r} and node {target} of kind {to['kind']!r}: "
            f"an edge goes from one of {', '.join(ABLATED)} to a head or expert"
        )
    frozen = FrozenPass(model, torch.tensor(graph.tokens, device=model.device), graph.saes)
    write = writes_of(frozen, nodes.loc[[source]].reset_index(drop=True))[0]
    layer, pos, index, at = int(to["layer"]), int(to["pos"]), int(to["index"]), int(nodes["pos"].loc[source])
    block = model.blocks[layer]
    if to["kind"] == "expert":
        normed = write * block.ln2.weight.to(write.dtype) / frozen.seen("ln2.hook_scale", layer)[pos]
        experts, expert = block.mlp.experts, int(to["expert"])
        parts = {"hook_gate": normed @ experts.W_gate(expert).to(normed.dtype)}
        parts["hook_pre"] = normed @ experts.W_in(expert).to(normed.dtype)
        hooks = [(f"blocks.{layer}.mlp.experts.{name}", _taker(pos, index, part)) for name, part in parts.items()]
    else:
        normed = write * block.ln1.weight.to(write.dtype) / frozen.seen("ln1.hook_scale", layer)[at]
        value = frozen.pattern(layer)[index, pos, at] * (normed @ block.attn.W_V[index].to(normed.dtype))
        hooks = [(f"blocks.{layer}.attn.hook_z", _taker(pos, index, value))]
    matching = graph.edges.query("source == @source and target == @target")["value"]
    measured = logit(model, graph) - logit(model, graph, hooks)
    return {"value": float(matching.iloc[0]) if len(matching) else 0.0, "measured": measured}


def _taker(pos: int, index: int, part: Tensor) -> Callable[..., Tensor]:
    def take(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        out[0, pos, index] -= part.to(out.device, out.dtype)
        return out

    return take


def faithfulness(
    model: GptOss, graph: AttributionGraph, sizes: Sequence[int] = (1, 2, 4, 8, 16), draws: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Return, for each number of nodes, how much of the target is left without the most influential of them.

    Columns: nodes, kept (the target without them, as a share of it), random (the same without random nodes that write
    as much: for each node one of the nearest in norm, of the same kind and layer, among those not ablated; mean of
    `draws`).
    """
    rng = np.random.default_rng(seed)
    frozen = FrozenPass(model, torch.tensor(graph.tokens, device=model.device))
    inner = graph.nodes[graph.nodes["kind"].isin(("head", "expert"))]
    ranked = inner.sort_values("influence", ascending=False)
    pool = _all_nodes(frozen)
    plain, rows = logit(model, graph), []
    for size in [n for n in sizes if n <= len(ranked)]:
        top = ranked.iloc[:size]
        left = logit(model, graph, ablation_hooks(model, top)) / plain
        others = [logit(model, graph, ablation_hooks(model, _matched(pool, top, rng))) / plain for _ in range(draws)]
        rows.append({"nodes": size, "kept": left, "random": float(np.mean(others))})
    return pd.DataFrame(rows)


def over_prompts(tables: Sequence[pd.DataFrame], *, seed: int = 0) -> pd.DataFrame:
    """Return the means over prompts of tables of `faithfulness` or `kept_curve`, by number of nodes, with intervals.

    tables: one for each prompt, of the same model. Columns: nodes, prompts (with this many nodes), each column
    of the tables with _low and _high (95 %, bootstrap-t over prompts; Wilson for on_top), and where the tables have
    `random`, `difference` (random less kept: by how much more the chosen nodes matter). Numbers of nodes that fewer
    than five graphs have are left out.

    Raises:
        InputError: no number of nodes is in at least five tables.
    """
    every = pd.concat(tables, ignore_index=True)
    if "random" in every:
        every = every.assign(difference=every["random"] - every["kept"])
    rows = []
    for nodes, own in every.groupby("nodes"):
        if len(own) < MIN_PROMPTS:
            continue
        row: dict[str, Any] = {"nodes": nodes, "prompts": len(own)}
        for name in own.columns.drop("nodes"):
            if name == "on_top":  # a share of prompts
                low, high = proportion_confint(int(own[name].sum()), len(own), method="wilson")
                row |= {name: float(own[name].mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
                continue
            effect = mean_effect(own[name].to_numpy(dtype=np.float64), [str(i) for i in range(len(own))], seed=seed)
            row |= {name: float(effect.change), f"{name}_low": float(effect.low), f"{name}_high": float(effect.high)}
        rows.append(row)
    if not rows:
        raise InputError(f"intervals over prompts need the same number of nodes in at least {MIN_PROMPTS} tables")
    return pd.DataFrame(rows)


def _all_nodes(frozen: FrozenPass) -> pd.DataFrame:
    """Return every head and slot of the pass with the norm of what it writes."""
    tables = []
    for layer in range(frozen.model.cfg.n_layers):
        chosen = frozen.seen("mlp.hook_expert_indices", layer).cpu().numpy()
        for kind, n in (("head", frozen.model.cfg.n_heads), ("expert", chosen.shape[1])):
            pos, index = (axis.ravel() for axis in np.indices((len(frozen.tokens), n)))
            write = frozen.head_write if kind == "head" else frozen.expert_write
            size = write(layer, torch.tensor(pos), torch.tensor(index)).norm(dim=-1).double().cpu().numpy()
            table = pd.DataFrame({"kind": kind, "layer": layer, "pos": pos, "index": index, "norm": size})
            tables.append(table.assign(expert=chosen.ravel() if kind == "expert" else -1))
    return pd.concat(tables, ignore_index=True)


def _matched(pool: pd.DataFrame, top: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Return for each node one of the ten nearest in norm, of its kind and layer, none in `top` and none twice.

    Where the layer has none left, those of the kind in other layers are drawn from.
    """
    keys = ["kind", "layer", "pos", "index"]
    marked = pool.merge(top[keys].assign(top=True), on=keys, how="left")
    sizes = marked[marked["top"].notna()].set_index(keys)["norm"]
    free = marked[marked["top"].isna()]
    drawn = []
    for key, size in sizes.items():
        of_kind = free[free["kind"] == key[0]]  # type: ignore[index]
        of_layer = of_kind[of_kind["layer"] == key[1]]  # type: ignore[index]
        near = ((of_kind if of_layer.empty else of_layer)["norm"] - size).abs().nsmallest(10).index
        pick = near[int(rng.integers(len(near)))]
        drawn.append(pick)
        free = free.drop(pick)
    return pool.loc[drawn]


def mean_activations(model: GptOss, sequences: Sequence[Sequence[int]]) -> dict[str, Float[Tensor, "index *d"]]:
    """Return the mean over the tokens of sequences of each head's values and of what each expert puts out.

    By hook point: `attn.hook_z` [head d_head], and `mlp.experts.hook_out` [expert d_model], an expert that no token
    went to has the mean of its layer.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def add(name: str, key: Tensor, values: Tensor, n: int) -> None:
        sums[name] = sums.get(name, values.new_zeros(n, values.shape[-1])).index_add(0, key, values)
        counts[name] = counts.get(name, values.new_zeros(n)).index_add(0, key, values.new_ones(len(key)))

    for sequence in sequences:
        frozen = FrozenPass(model, torch.tensor(sequence, device=model.device))
        for layer in range(model.cfg.n_layers):
            z = frozen.seen("attn.hook_z", layer)
            heads = torch.arange(z.shape[1]).repeat(len(z))
            add(f"blocks.{layer}.attn.hook_z", heads, z.flatten(0, 1), z.shape[1])
            out, chosen = frozen.seen("mlp.experts.hook_out", layer), frozen.seen("mlp.hook_expert_indices", layer)
            add(f"blocks.{layer}.mlp.experts.hook_out", chosen.flatten(), out.flatten(0, 1), model.cfg.num_experts)
    means = {}
    for name, total in sums.items():
        n = counts[name][:, None]
        means[name] = torch.where(n > 0, total / n.clamp(min=1), total.sum(0) / n.sum())
    return means


def kept_alone(model: GptOss, graph: AttributionGraph, means: Mapping[str, Tensor]) -> dict[str, float | bool]:
    """Return the target with nodes outside the graph at their means [d_model], and whether it stays on top.

    The experts that each token goes to and their gate weights stay those of the pass. `kept` is the share of the
    target.
    """
    frozen = FrozenPass(model, torch.tensor(graph.tokens, device=model.device))
    hooks: Hooks = []
    for layer in range(model.cfg.n_layers):
        chosen = frozen.seen("mlp.hook_expert_indices", layer)
        z, out = means[f"blocks.{layer}.attn.hook_z"], means[f"blocks.{layer}.mlp.experts.hook_out"]
        for kind, name, mean in (("head", "attn.hook_z", z[None]), ("expert", "mlp.experts.hook_out", out[chosen])):
            rows = graph.nodes[(graph.nodes["kind"] == kind) & (graph.nodes["layer"] == layer)]
            width = model.cfg.n_heads if kind == "head" else int(chosen.shape[1])
            outside = torch.ones((len(graph.tokens), width), dtype=torch.bool)
            outside[torch.tensor(rows["pos"].tolist()).long(), torch.tensor(rows["index"].tolist()).long()] = False
            hooks.append((f"blocks.{layer}.{name}", _mean_writer(outside[..., None], mean)))
        for name in ("hook_expert_indices", "hook_expert_weights"):
            hooks.append((f"blocks.{layer}.mlp.{name}", _constant(frozen.seen(f"mlp.{name}", layer)[None])))
    ids = torch.tensor([graph.tokens], device=model.device)
    with torch.no_grad():
        best = int(model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1].argmax())
    left = logit(model, graph, hooks)
    return {"logit": left, "kept": left / logit(model, graph), "on_top": best == graph.metadata["target_id"]}


def kept_curve(
    model: GptOss, graph: AttributionGraph, means: Mapping[str, Tensor], sizes: Sequence[int] = (4, 8, 16, 32, 64)
) -> pd.DataFrame:
    """Return how much of the target the most influential heads and experts alone keep, for each number of them.

    Columns: nodes, kept (share of the target), on_top (1 where the target token stays the most likely one). Numbers
    above that of the graph's heads and experts are left out. means: [d_model] by hook point, see `kept_alone`.
    """
    ranked = graph.nodes[graph.nodes["kind"].isin(("head", "expert"))].sort_values("influence", ascending=False)
    rows = []
    for size in [n for n in sizes if n <= len(ranked)]:
        alone = kept_alone(model, replace(graph, nodes=ranked.iloc[:size]), means)
        rows.append({"nodes": size, "kept": float(alone["kept"]), "on_top": float(alone["on_top"])})
    return pd.DataFrame(rows)


def _mean_writer(outside: Tensor, mean: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: torch.where(outside.to(x.device), mean.to(x.device, x.dtype), x)


def _constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: value.to(x.device, x.dtype)
