"""An attribution graph as circuit-tracer's and Neuronpedia's JSON, and as a networkx graph.

Heads, routed experts, neurons and features of autoencoders appear as "cross layer transcoder" features, the only inner
kind that the format has: heads have the features 0 … n_heads − 1 and experts n_heads + expert; the others follow
(`workbench.studies.feature_pages`). Each has its name as label, and neurons are collapsed into their expert. What no
node of the graph explains of a node is its layer's "mlp reconstruction error" at the position. The format has no
edges of other kinds than direct ones: query, key and router edges are in `metadata.info.choices`, and in GraphML.

What the viewers need beyond their schemas: `influence` is the share that is reached with a node when nodes are added
from the most influential on (they hide nodes above `node_threshold`), the label of a logit has its probability in the
form (p=0.5), and Neuronpedia loads pages from an address only if the file names no schema version.

Reference: safety-research/circuit-tracer, circuit_tracer/frontend/graph_models.py (schema version 1); hijohnnylin/
neuronpedia at commit ebb8426, apps/webapp/app/api/graph/graph-schema.json, app/[modelId]/graph/utils.ts and
components/provider/graph-provider.tsx.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import networkx as nx
import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.experiments.attribution_graph import AttributionGraph
from workbench.model.config import PUBLISHED
from workbench.model.transformer import GptOss
from workbench.studies.feature_pages import cantor, numbers_of

_SLUG = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SCAN = re.compile(r"(?:\./)?[A-Za-z0-9_.-][A-Za-z0-9_./-]{0,200}")
CUMULATIVE = "cumulative"  # metadata.info.influence: what the influence of a node in the file is


def to_json(
    model: GptOss,
    graph: AttributionGraph,
    slug: str = "graph",
    *,
    scan: str | None = None,
    features_url: str | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    choices: pd.DataFrame | None = None,
    measured: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the graph in the form of circuit-tracer's files.

    scan: the model's id at Neuronpedia, or for circuit-tracer's viewer the path of pages, as ./data/pages; by default
    gpt-oss-20b or gpt-oss-120b for models of their shape, else gpt-oss.
    features_url: where the pages of experts are served that `workbench export RUN neuronpedia` writes. labels: of
    experts (layer, expert), shown after their names. choices: of `graph_details.choice_edges`. measured: by how much
    the target falls when a node is ablated, by the id of the node (`node_id`); nodes that the graph lacks are left out.

    Raises:
        InputError: the slug or scan has other characters than letters, digits, - and _, or the URL is none.
    """
    if features_url is not None and not features_url.startswith(("https://", "http://")):
        raise InputError(f"features_url {features_url!r}: expected an address that begins with https:// or http://")
    if not _SLUG.fullmatch(slug):
        raise InputError(f"slug {slug!r}: use letters, digits, - and _")
    scan = scan_of(model) if scan is None else scan
    if not _SCAN.fullmatch(scan):
        raise InputError(
            f"scan {scan!r}: use letters, digits, '.', - and _, as in gpt-oss-20b, or a path as ./data/pages"
        )
    reached = _reached(graph)
    nodes = [_node(model, graph, row, share) for (_, row), share in zip(graph.nodes.iterrows(), reached, strict=True)]
    for node, kind, layer, expert in zip(nodes, *(graph.nodes[c] for c in ("kind", "layer", "expert")), strict=True):
        if kind == "expert" and (text := (labels or {}).get((layer, expert))):
            node["clerp"] += f": {text}"
    links = [
        {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": float(v)}
        for s, t, v in graph.edges[["source", "target", "value"]].itertuples(index=False)
    ]
    errors: dict[str, dict[str, Any]] = {}
    for number, row in graph.nodes.iterrows():
        if row["error"]:
            error = _error_node(row)
            errors.setdefault(error["node_id"], error)
            links.append(
                {
                    "source": error["node_id"],
                    "target": nodes[int(str(number))]["node_id"],
                    "weight": float(row["error"]),
                }
            )
    generator = {"name": "gpt-oss workbench", "version": graph.metadata["workbench_version"]}
    info = graph.metadata | {"influence": CUMULATIVE, "generator": generator, "tokens": graph.tokens}
    known = {node["node_id"] for node in nodes}
    if effects := {name: float(value) for name, value in (measured or {}).items() if name in known}:
        info["measured"] = effects
    metadata: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.texts,
        "prompt": "".join(graph.texts),
        "node_threshold": max((share for share in reached if share is not None), default=1.0),  # every node is shown
        "schema_version": 1 if features_url is None else None,
        "info": info | ({} if choices is None else {"choices": _choices(nodes, choices)}),
        "pruning_settings": {
            "node_threshold": graph.metadata["node_share"],
            "edge_threshold": graph.metadata["edge_share"],
        },
    }
    if features_url is not None:
        metadata["feature_details"] = {"feature_json_base_url": features_url.rstrip("/")}
    q_params = {
        "pinnedIds": [],
        "supernodes": _supernodes(graph, nodes),
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    return {"metadata": metadata, "qParams": q_params, "nodes": [*nodes, *errors.values()], "links": links}


def scan_of(model: GptOss) -> str:
    """Return the id that Neuronpedia has for models of this shape, or gpt-oss if it has none."""
    shapes = ("n_layers", "d_model", "d_mlp", "num_experts", "d_vocab")
    for size, cfg in PUBLISHED.items():
        if all(getattr(model.cfg, name) == getattr(cfg, name) for name in shapes):
            return f"gpt-oss-{size}"
    return "gpt-oss"


def _reached(graph: AttributionGraph) -> list[float | None]:
    """Return the share of all influence that is reached with each node, the strongest first; the target has none.

    The influence of nodes outside the graph is in the whole.
    """
    influence = graph.nodes["influence"].to_numpy()[:-1]
    order = np.argsort(-influence, kind="stable")
    shares = np.empty(len(influence))
    shares[order] = np.minimum(np.cumsum(influence[order]) / graph.metadata["total_influence"], 1.0)
    return [*shares.tolist(), None]


def _node(model: GptOss, graph: AttributionGraph, row: "pd.Series[Any]", reached: float | None) -> dict[str, Any]:
    kind, layer, pos, name = str(row["kind"]), int(row["layer"]), int(row["pos"]), node_id(model, graph, row)
    shared = {
        "ctx_idx": pos,
        "influence": reached,
        "activation": float(row["value"]),
        "token_prob": graph.metadata["probability"] if kind == "target" else 0.0,
        "is_target_logit": kind == "target",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": label(row),
    }
    if kind == "target":
        feature, shown = graph.metadata["target_id"], str(model.cfg.n_layers + 1)
        shared["clerp"] = _logit_label(graph.metadata)
        return {"node_id": name, "feature": feature, "layer": shown, "feature_type": "logit", "jsNodeId": name} | shared
    if kind == "embedding":
        return {"node_id": name, "feature": pos, "layer": "E", "feature_type": "embedding", "jsNodeId": name} | shared
    number = _feature(model, row)
    kind_of = {"feature_type": "cross layer transcoder", "jsNodeId": f"{layer}_{number}-{pos}"}
    return {"node_id": name, "feature": cantor(layer, number), "layer": str(layer)} | kind_of | shared


def node_id(model: GptOss, graph: AttributionGraph, row: "pd.Series[Any]") -> str:
    """Return the id that a row of the graph's nodes has in the file."""
    kind, pos = str(row["kind"]), int(row["pos"])
    if kind == "target":
        return f"{model.cfg.n_layers + 1}_{graph.metadata['target_id']}_{pos}"
    if kind == "embedding":
        return f"E_{graph.tokens[pos]}_{pos}"
    return f"{int(row['layer'])}_{_feature(model, row)}_{pos}"


def _logit_label(metadata: Mapping[str, Any]) -> str:
    """Return the label of the logit in the form from which the viewers read token and probability."""
    against = "the mean of all" if metadata["against_id"] is None else f'that of "{metadata["against"]}"'
    return f'Output "{metadata["target"]}" (p={metadata["probability"]:.3f}): its logit less {against}'


def _feature(model: GptOss, row: "pd.Series[Any]") -> int:
    """Return the number of a node among the features of its layer."""
    kind, index = str(row["kind"]), int(row["index"])
    sizes = {"n_heads": model.cfg.n_heads, "num_experts": model.cfg.num_experts, "d_mlp": model.cfg.d_mlp}
    if kind == "head":
        return index
    if kind == "expert":
        return numbers_of(sizes)["expert"] + int(row["expert"])
    if kind in ("neuron", "other neurons"):
        place = int(row["neuron"]) if kind == "neuron" else model.cfg.d_mlp
        return numbers_of(sizes)["neuron"] + int(row["expert"]) * (model.cfg.d_mlp + 1) + place
    return numbers_of(sizes)[kind] + (index if kind == "feature" else 0)


def _supernodes(graph: AttributionGraph, nodes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the neurons of each expert as a group: its name, then its nodes."""
    inner = graph.nodes[graph.nodes["kind"].isin(("neuron", "other neurons"))]
    groups: list[list[str]] = []
    for place, rows in inner.groupby(["layer", "expert", "pos"], sort=False):
        layer, expert, pos = cast(tuple[int, int, int], place)
        groups.append([f"layer {layer} expert {expert} at {pos}", *(nodes[i]["node_id"] for i in rows.index)])
    return groups


def _choices(nodes: Sequence[Mapping[str, Any]], choices: pd.DataFrame) -> list[dict[str, Any]]:
    columns = choices[["source", "target", "kind", "value"]].itertuples(index=False)
    return [
        {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "kind": str(kind), "weight": float(value)}
        for s, t, kind, value in columns
    ]


def _error_node(row: "pd.Series[Any]") -> dict[str, Any]:
    layer, pos = int(row["layer"]), int(row["pos"])
    return {
        "node_id": f"{layer}_-1_{pos}",
        "feature": -1,
        "layer": str(layer),
        "ctx_idx": pos,
        "feature_type": "mlp reconstruction error",
        "jsNodeId": f"{layer}_-1-{pos}",
        "clerp": "not explained by the nodes of the graph",
        "influence": None,
        "activation": None,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def label(row: "pd.Series[Any]") -> str:
    """Return the name of a node, as "layer 2 expert 5"."""
    kind = str(row["kind"])
    if kind == "embedding":
        return f"embedding of {row['token']!r}"
    if kind in ("head", "expert"):
        return f"layer {row['layer']} {kind} {row['index' if kind == 'head' else 'expert']}"
    if kind == "feature":
        return f"layer {row['layer']} feature {row['index']}"
    if kind in ("neuron", "other neurons"):
        inner = f" neuron {row['neuron']}" if kind == "neuron" else ", other neurons"
        return f"layer {row['layer']} expert {row['expert']}{inner}"
    return f"layer {row['layer']} {kind}" if kind != "target" else "target"


def write_json(model: GptOss, graph: AttributionGraph, path: str | Path, **options: Any) -> Path:
    """Write the graph as JSON; the file appears complete or not at all. options: as of `to_json`."""
    path = Path(path)
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:100] or "graph"
    part = path.with_name(f".{path.name}.part")
    text = json.dumps(to_json(model, graph, slug, **options), allow_nan=False) + "\n"
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def to_networkx(graph: AttributionGraph, choices: pd.DataFrame | None = None) -> "nx.MultiDiGraph[int]":
    """Return a directed graph with the columns of nodes and edges as attributes, for GraphML and network analysis.

    The texts and numbers of the graph's metadata are attributes of the graph.

    Edges have a `kind`: "direct", or of `choices` (see `graph_details.choice_edges`) "query", "key" or "router", whose
    values are in other units than logits.
    """
    about = {name: value for name, value in graph.metadata.items() if isinstance(value, str | int | float)}
    out: nx.MultiDiGraph[int] = nx.MultiDiGraph(**about, prompt="".join(graph.texts))
    for number, row in graph.nodes.iterrows():
        values = {str(k): v.item() if hasattr(v, "item") else v for k, v in row.items()}
        out.add_node(int(str(number)), label=label(row), **values)
    columns = (graph.edges[name].tolist() for name in ("source", "target", "value", "score"))
    for source, target, value, score in zip(*columns, strict=True):
        out.add_edge(int(source), int(target), kind="direct", value=float(value), score=float(score))
    for edge in [] if choices is None else choices.to_dict("records"):
        out.add_edge(int(edge["source"]), int(edge["target"]), kind=str(edge["kind"]), value=float(edge["value"]))
    return out


def recurring_edges(graphs: list[AttributionGraph]) -> pd.DataFrame:
    """Return the edges of several graphs by the names of their ends, with the share of graphs that have each.

    A name is kind, layer and head or expert, without the position. `share` has a 95 % Wilson interval over graphs, and
    `value` is the mean over the graphs that have the edge, in logits; make one graph for each prompt.

    Raises:
        InputError: there is no graph.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not graphs:
        raise InputError("recurring edges need at least one graph")
    rows = []
    for number, graph in enumerate(graphs):
        names = [label(row) if row["kind"] != "embedding" else "embedding" for _, row in graph.nodes.iterrows()]
        columns = (graph.edges[name].tolist() for name in ("source", "target", "value"))
        for source, target, value in zip(*columns, strict=True):
            ends = {"source": names[int(source)], "target": names[int(target)]}
            rows.append({"graph": number, "value": float(value), **ends})
    sums = pd.DataFrame(rows).groupby(["source", "target", "graph"], as_index=False)["value"].sum()
    edges = sums.groupby(["source", "target"], as_index=False).agg(graphs=("graph", "count"), value=("value", "mean"))
    low, high = proportion_confint(edges["graphs"].to_numpy(), len(graphs), method="wilson")
    edges = edges.assign(share=edges["graphs"] / len(graphs), low=low, high=high)
    return edges.sort_values(["share", "value"], ascending=False, ignore_index=True)
