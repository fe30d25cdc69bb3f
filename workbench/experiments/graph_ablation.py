"""Ablate nodes of a stored attribution graph in the model, and store the measured effects beside the predicted ones.

    content = graph_ablation.read_file("graph.json")
    effects = graph_ablation.measure(model, content, ["1_2_17", "2_21_17"])
    effects.nodes                                        # value (predicted) and measured, in logits
    graph_ablation.with_effects(content, effects)        # the file's content with the measured effects

The file is that of `workbench graph`. A head, expert, neuron or feature is ablated at its own token: it writes nothing
there (zero ablation of `attn.hook_z`, or of an expert's output without its bias), and nothing is held fixed.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.experiments import graph_checks
from workbench.experiments.attribution_graph import AttributionGraph
from workbench.hooks.sae import SAE
from workbench.inputs import regular_file
from workbench.model.transformer import GptOss
from workbench.studies.feature_pages import numbers_of

MOST = 200  # nodes that are ablated at once
_TOLERANCE = 0.05  # of the logit, which another dtype or device changes by less


@dataclass(frozen=True)
class AblationEffects:
    """Effects of ablations: `nodes` has the columns id, label, value and measured; `together` is that of all at once.

    `value` is what the graph predicts (what the node adds to the target), `measured` and `together` are by how much the
    target falls, in logits.
    """

    nodes: pd.DataFrame
    together: float


def measure(
    model: GptOss, content: Any, ids: Sequence[str] = (), *, top: int = 5, saes: Mapping[str, SAE] | None = None
) -> AblationEffects:
    """Return the measured effects of ablating nodes of a stored graph, each by itself and all of them together.

    content: of a file that `workbench graph` wrote. ids: of the nodes; without them the `top` most influential heads,
    experts, neurons and features. saes: autoencoders of nodes that are features, by hook point.

    Raises:
        InputError: the file is of another form, an older version or another model, or a node cannot be ablated.
    """
    graph = read_graph(model, content, saes)
    chosen = _chosen(graph, ids, top)
    rows = graph.nodes.loc[chosen]
    if (rows["kind"] == "feature").any() and not graph.saes:
        raise InputError("a feature is ablated with its autoencoder: give the folder with --sae")
    plain = graph_checks.logit(model, graph)
    stated = float(graph.metadata["logit"])
    if abs(plain - stated) > _TOLERANCE * max(1.0, abs(stated)):
        raise InputError(
            f"the graph states a logit of {stated:.2f} and this model gives {plain:.2f}: expected the model, adapter "
            "and autoencoders that the graph was made with"
        )
    measured = graph_checks.ablate(model, graph, chosen)
    hooks = graph_checks.ablation_hooks(model, rows, graph.saes)
    together = plain - graph_checks.logit(model, graph, hooks)
    return AblationEffects(measured[["id", "label", "value", "measured"]].reset_index(drop=True), together)


def with_effects(content: Mapping[str, Any], effects: AblationEffects) -> dict[str, Any]:
    """Return a copy of the file's content with the measured effects added, by node, and the effect of all at once."""
    changed = copy.deepcopy(dict(content))
    info = changed["metadata"]["info"]
    own = dict(zip(effects.nodes["id"], effects.nodes["measured"].astype(float), strict=True))
    info["measured"] = {**(info.get("measured") or {}), **own}
    info["measured_together"] = {"nodes": list(own), "value": effects.together}
    return changed


def read_file(path: str | Path) -> Any:
    """Return the content of a file of `workbench graph`, which `measure` checks.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    with regular_file(path) as file:
        try:
            return read_json(file)
        except InputError as error:
            raise InputError(f"{path}: {error}; expected a file of `workbench graph`") from error


def read_graph(model: GptOss, content: Any, saes: Mapping[str, SAE] | None = None) -> AttributionGraph:
    """Return the nodes of a stored graph as an `AttributionGraph` without edges; `id` and `label` are added columns.

    Raises:
        InputError: the file is of another form, an older version or another model.
    """
    try:
        info = content["metadata"]["info"]
        tokens, digest = info.get("tokens"), info.get("checkpoint_digest")
        names = ("target_id", "against_id", "logit")
        metadata = {name: info[name] for name in names}
        table = pd.DataFrame([_row(model, node) for node in content["nodes"] if node["feature_type"] in _TYPES])
        texts = [str(text) for text in content["metadata"]["prompt_tokens"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the file is no attribution graph of the workbench ({type(error).__name__}: {error}): make one with "
            "`workbench graph MODEL --prompt TEXT --out FILE`"
        ) from error
    if tokens is None:
        raise InputError("the graph has no token ids, as in files of older versions: make it again: `workbench graph`")
    if digest != model.checkpoint.digest:
        raise InputError("the graph was made with another checkpoint: give the model of the graph")
    _check(model, tokens, metadata, table)
    return AttributionGraph(
        _with_slots(model, tokens, table), pd.DataFrame(), tokens, texts, metadata, dict(saes or {})
    )


_TYPES = ("cross layer transcoder", "embedding")


def _row(model: GptOss, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node of the file as a row of the graph's nodes; the slot of an expert is not known yet."""
    layer, number, pos = str(node["node_id"]).split("_")
    row: dict[str, Any] = {"kind": "embedding", "layer": -1, "index": 0, "expert": -1, "neuron": -1, "pos": int(pos)}
    row |= {"id": str(node["node_id"]), "label": str(node.get("clerp") or node["node_id"])}
    influence = node.get("influence")  # the share that is reached with the node: the strongest has the smallest one
    row |= {"value": float(node["activation"]), "reached": 2.0 if influence is None else float(influence)}
    if layer == "E":
        return row
    sizes = {"n_heads": model.cfg.n_heads, "num_experts": model.cfg.num_experts, "d_mlp": model.cfg.d_mlp}
    first, own = numbers_of(sizes), int(number)
    kind = max((name for name in first if first[name] <= own), key=lambda name: first[name])
    row |= {"kind": kind, "layer": int(layer), "index": own - first[kind]}
    if kind == "expert":
        row |= {"expert": row["index"]}
    if kind == "neuron":
        expert, neuron = divmod(row["index"], model.cfg.d_mlp + 1)
        row |= {"expert": expert, "neuron": neuron}
        if neuron == model.cfg.d_mlp:  # the number of those neurons of the expert that are not shown
            row |= {"kind": "other neurons", "neuron": -1}
    return row


def _check(model: GptOss, tokens: Any, metadata: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Refuse numbers that the model does not have.

    Raises:
        InputError: a token, layer or position is out of range.
    """
    ids = [metadata["target_id"], *([metadata["against_id"]] if metadata["against_id"] is not None else [])]
    listed = isinstance(tokens, list) and tokens and all(type(token) is int for token in [*tokens, *ids])
    if not listed or not all(0 <= token < model.cfg.d_vocab for token in [*tokens, *ids]):
        raise InputError(f"the graph's token ids are not numbers from 0 to {model.cfg.d_vocab - 1}")
    if type(metadata["logit"]) not in (int, float):
        raise InputError(f"the graph's logit is {metadata['logit']!r}: expected a number")
    inside = table["pos"].between(0, len(tokens) - 1) & table["layer"].between(-1, model.cfg.n_layers - 1)
    if table.empty or not inside.all():
        raise InputError("the graph has no node, or one at a layer or token that the model or the prompt lacks")


@torch.no_grad()
def _with_slots(model: GptOss, tokens: Sequence[int], table: pd.DataFrame) -> pd.DataFrame:
    """Return the nodes with the slot of each expert and neuron as its index.

    Raises:
        InputError: the model does not choose the expert at the token.
    """
    layers = sorted(set(table.loc[table["expert"] >= 0, "layer"]))
    if not layers:
        return table
    names = [f"blocks.{layer}.mlp.hook_expert_indices" for layer in layers]
    _, cache = model.run_with_cache(torch.tensor([list(tokens)], device=model.device), names_filter=names)
    for number, row in table[table["expert"] >= 0].iterrows():
        chosen = cache[f"blocks.{row['layer']}.mlp.hook_expert_indices"][0, row["pos"]].tolist()
        if row["expert"] not in chosen:
            raise InputError(
                f"the graph has {row['label']!r} at token {row['pos']}, where this model does not choose the expert: "
                "give the model of the graph"
            )
        table.loc[number, "index"] = chosen.index(row["expert"])
    return table


def _chosen(graph: AttributionGraph, ids: Sequence[str], top: int) -> list[int]:
    """Return the rows of the nodes with these ids, or of the most influential ones.

    Raises:
        InputError: there is no such node, or too many are named.
    """
    nodes = graph.nodes
    if not ids:
        kinds = ("head", "expert", "neuron", *(("feature",) if graph.saes else ()))
        chosen = nodes[nodes["kind"].isin(kinds)].nsmallest(top, "reached").index.tolist()
        if not chosen:
            raise InputError("the graph has no head, expert or neuron to ablate")
        return [int(row) for row in chosen]
    known = dict(zip(nodes["id"].tolist(), nodes.index.tolist(), strict=True))
    if len(set(ids)) > MOST:
        raise InputError(f"{len(set(ids))} nodes: at most {MOST} are ablated at once")
    if missing := [name for name in ids if name not in known]:
        some = ", ".join(list(known)[:3])
        raise InputError(f"node {missing[0]!r} is not in the graph, or is no node that writes: its ids are as {some}")
    return list(dict.fromkeys(known[name] for name in ids))
