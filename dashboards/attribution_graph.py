"""An attribution graph as a page of its own: tokens along x, layers along y, drawn as SVG by the script of graph.html.

Graphs are files in circuit-tracer's format (`workbench graph … --out FILE.json`). The page is a document in a sandboxed
frame; texts go into it as JSON whose `<` are escaped, and onto the screen as text nodes.

Reference: the schema in safety-research/circuit-tracer, circuit_tracer/frontend/graph_models.py (schema version 1).
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import harmony
from workbench.bounded_json import read_json
from workbench.dashboards.theme import BORDER
from workbench.errors import InputError
from workbench.figures.template import ThemeName

_PAGE = Path(__file__).with_name("graph.html")
HEIGHT = 760
VIEW = (
    "threshold",
    "edges",
    "pins",
    "groups",
    "labels",
    "subgraph",
    "node",
    "ablated",
)  # what can be chosen in the frame
ABLATED = ("embedding", "head", "expert", "neuron")  # kinds of nodes that the page can ablate in the model
FEATURE = "feature"  # another one, where the autoencoders are at hand
MOST_ABLATED = 20  # nodes at once
MOST_NODES, MOST_EDGES = 3_000, 12_000  # that are drawn; of more, those with the largest influence or weight
OURS = "gpt-oss"  # the scan of files that `workbench graph` wrote before it marked its influences as cumulative
# of a node in the format, as they are written to the JSON that the page saves
_FIELDS = (
    *("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "influence", "activation"),
    *("token_prob", "is_target_logit", "run_idx", "reverse_ctx_idx"),
)
_LAYER = re.compile(r"-?[0-9]{1,4}")
_FEATURE_ERROR = re.compile(r"layer [0-9]{1,4} feature error")
# as `workbench graph --prompt` writes it: a system message with the effort, one user message, and the answer
_PROMPT = re.compile(
    r"(?P<prompt><\|start\|>system<\|message\|>.*?Reasoning: (?P<effort>low|medium|high)\b.*?"
    r"<\|start\|>user<\|message\|>(?P<user>.*?)<\|end\|><\|start\|>assistant)(?P<begin>.*)",
    re.DOTALL,
)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")  # the system message may name the day, which takes as many tokens on every day
_PREDICTED = 8  # tokens from the target on
_NODE = r"layer ([0-9]{1,4}) KIND ([0-9]{1,4})(?:: .*)?"  # after the colon is the label of a run's expert


def load(path: Path) -> dict[str, Any]:
    """Return what the page draws of the graph in a file, see `graph_data`.

    Raises:
        InputError: the file is not an attribution graph.
    """
    return graph_data(read_json(path))


def experts_by_node(graph: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (layer, expert) of each node that is an expert, by the id of the node."""
    return _by_node(graph, "expert")


def heads_by_node(graph: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (layer, head) of each node that is a head, by the id of the node."""
    return _by_node(graph, "head")


def features_by_node(graph: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (layer, feature) of each node that is a feature, by the id of the node."""
    return _by_node(graph, FEATURE)


def _by_node(graph: Mapping[str, Any], kind: str) -> dict[str, tuple[int, int]]:
    pattern = re.compile(_NODE.replace("KIND", kind), re.DOTALL)
    matches = {node["id"]: pattern.fullmatch(node["label"]) for node in graph["nodes"] if node["kind"] == kind}
    return {id: (int(match[1]), int(match[2])) for id, match in matches.items() if match}


def ablated_nodes(graph: Mapping[str, Any], text: str, kinds: Sequence[str] = ABLATED) -> list[str]:
    """Return the ids in a text, separated by spaces, of nodes that the page can ablate; others are left out.

    kinds: of the nodes that can be ablated.
    """
    known = {node["id"] for node in graph["nodes"] if node["kind"] in kinds}
    return [id for id in dict.fromkeys(text.split()) if id in known][:MOST_ABLATED]


def ablation_recipe(graph: Mapping[str, Any], id: str, tokenizer: harmony.Tokenizer | None) -> dict[str, Any] | None:
    """Return a recipe of the live page without a node: it forbids the expert, or ablates the head, at its token.

    None if the node is neither, or if the live page would write another prompt, in which the token may be elsewhere:
    it writes the usual system message, one user message, and the beginning of the answer as it is.
    """
    expert, head = experts_by_node(graph).get(id), heads_by_node(graph).get(id)
    match = _PROMPT.fullmatch("".join(graph["tokens"]))
    if (expert is None and head is None) or match is None or tokenizer is None:
        return None
    try:
        question = [{"role": "user", "content": match["user"]}]
        ids = harmony.render(question, effort=match["effort"], tokenizer=tokenizer)
    except InputError:
        return None
    if _DATE.sub("", tokenizer.decode(ids)) != _DATE.sub("", match["prompt"]):
        return None
    position = next(node["position"] for node in graph["nodes"] if node["id"] == id)
    scope = {"start": position, "stop": position + 1}
    if head is not None:
        intervention = {"kind": "scale_heads", "layers": [head[0]], "heads": [head[1]], "strength": 0.0}
    else:
        intervention = {"kind": "forbid", "cells": [list(expert or ())]}
    return {
        "recipe": 1,
        "user": match["user"],
        "effort": match["effort"],
        "begin": match["begin"],
        "max_new_tokens": _PREDICTED,
        "interventions": [intervention | {"scope": scope}],
    }


def frame(
    graph: Mapping[str, Any],
    name: str,
    theme: ThemeName = "light",
    view: Mapping[str, str] | None = None,
    *,
    ablates: Sequence[str] = (),
) -> str:
    """Return HTML of the frame with what `load` returned in it.

    view: what is chosen in it at first, see `VIEW`. ablates: kinds of nodes that the page that shows it can ablate.
    """
    text = html.escape(document(graph, name, theme, view, ablates=ablates), quote=True)
    return (
        '<iframe title="attribution graph" sandbox="allow-scripts allow-downloads" allow="fullscreen" '
        f'style="width:100%;height:{HEIGHT}px;{BORDER}" srcdoc="{text}"></iframe>'
    )


def document(
    graph: Mapping[str, Any],
    name: str,
    theme: ThemeName = "light",
    view: Mapping[str, str] | None = None,
    *,
    ablates: Sequence[str] = (),
) -> str:
    """Return an HTML document that draws what `graph_data` returned and fetches nothing; for options see `frame`."""
    kinds = list(ablates)
    more = {"name": name, "theme": theme, "view": dict(view or {}), "ablates": kinds, "most_ablated": MOST_ABLATED}
    data = json.dumps({**graph, **more}, separators=(",", ":"))
    return _PAGE.read_text(encoding="utf-8").replace("__DATA__", data.replace("<", "\\u003c"))


def graph_data(content: Any) -> dict[str, Any]:
    """Return what the page draws of a graph in circuit-tracer's format: tokens, nodes, edges and how it was made.

    Pinned nodes and supernodes of the file are the first choice of the page. An edge is (source, target, weight, the
    influence that it carries).

    Nodes and edges beyond `MOST_NODES` and `MOST_EDGES` are left out, the weakest first; `left_out` states how many.

    Raises:
        InputError: it has another form.
    """
    try:
        info = content["metadata"].get("info") or {}
        nodes = [_node(node) for node in content["nodes"]]
        if info.get("influence") == "cumulative" or content["metadata"].get("scan") != OURS:
            _divide(nodes, _number(info.get("total_influence", 1.0)))
        edges = [(str(link["source"]), str(link["target"]), _number(link["weight"])) for link in content["links"]]
        tokens = [str(token) for token in content["metadata"]["prompt_tokens"]]
        chosen = content.get("qParams") or {}
        pinned = [str(id) for id in chosen.get("pinnedIds") or ()]
        supernodes = [[str(part) for part in group] for group in chosen.get("supernodes") or () if len(group) > 1]
        measured = {str(id): _number(value) for id, value in (info.get("measured") or {}).items()}
        stored = _stored(info)
        about = {str(k): v for k, v in info.items() if isinstance(v, str | int | float) and not isinstance(v, bool)}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the file is not an attribution graph ({type(error).__name__}: {error}): expected circuit-tracer's JSON "
            "with metadata.prompt_tokens, nodes and links; make one with `workbench graph MODEL --prompt TEXT --out "
            "FILE`"
        ) from error
    shown = sorted(nodes, key=lambda node: (node["kind"] != "logit", -node["influence"]))[:MOST_NODES]
    known = {node["id"]: number for number, node in enumerate(shown)}
    carried = _edge_influences(nodes, edges)
    inside = [
        (known[s], known[t], w, share)
        for (s, t, w), share in zip(edges, carried, strict=True)
        if {s, t} <= known.keys()
    ]
    drawn = sorted(inside, key=lambda edge: -abs(edge[2]))[:MOST_EDGES]
    names = {node["id"] for node in shown}
    measured = {id: value for id, value in measured.items() if id in names}
    top = max((node["layer"] for node in shown if node["kind"] not in ("logit", "error")), default=0)
    for node in shown:
        node["layer"] = top + 1 if node["kind"] == "logit" else min(node["layer"], top + 1)
    return {
        "tokens": tokens,
        "nodes": shown,
        "edges": drawn,
        "n_layers": top + 1,
        "about": {k: v for k, v in about.items() if not isinstance(v, float) or math.isfinite(v)},
        "scan": str(content["metadata"].get("scan") or ""),
        "pinned": pinned,
        "supernodes": supernodes,
        "measured": measured,
        "stored": stored,
        "left_out": [len(nodes) - len(shown), len(edges) - len(drawn)],
    }


def _stored(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token ids and the measured effect of several nodes at once, where the file has them in their form."""
    stored: dict[str, Any] = {}
    if (ids := info.get("tokens")) and all(type(token) is int for token in ids):
        stored["tokens"] = list(ids)
    if several := info.get("measured_together"):
        nodes = [str(id) for id in several["nodes"]]
        stored["measured_together"] = {"nodes": nodes, "value": _number(several["value"])}
    return stored


def _edge_influences(nodes: Sequence[Mapping[str, Any]], edges: Sequence[tuple[str, str, float]]) -> list[float]:
    """Return the influence that each edge carries: of its target, times its share of what flows into the target.

    The influence of a logit is 1. Of a graph whose nodes have no influence, the size of each edge is returned.
    """
    if not any(node["influence"] for node in nodes):
        return [abs(weight) for _, _, weight in edges]
    influence = {node["id"]: 1.0 if node["kind"] == "logit" else node["influence"] for node in nodes}
    total = dict.fromkeys(influence, 0.0)
    for _, target, weight in edges:
        total[target] = total.get(target, 0.0) + abs(weight)
    return [abs(w) / total[t] * influence.get(t, 0.0) if total[t] > 0 else 0.0 for _, t, w in edges]


def _divide(nodes: Sequence[dict[str, Any]], total: float) -> None:
    """Replace the share of influence that is reached with each node, as the format has it, by the node's own.

    The format has the smallest number at the strongest node, and none at a logit. total: what a share of 1 is.
    """
    reached = 0.0
    for node in sorted(nodes, key=lambda node: node["influence"]):
        node["influence"], reached = (node["influence"] - reached) * total, node["influence"]


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    layer, kind = str(node["layer"]), str(node["feature_type"])
    if layer != "E" and not _LAYER.fullmatch(layer):
        raise ValueError(f"layer {layer!r} of node {node['node_id']!r}")
    kinds = {"embedding": "embedding", "logit": "logit", "mlp reconstruction error": "error"}
    label = str(node.get("clerp") or node["node_id"])
    inner = next((kind for kind in ("neuron", "expert", "head") if f" {kind}" in label), FEATURE)
    if _FEATURE_ERROR.fullmatch(label):  # what an autoencoder does not reconstruct
        inner = "error"
    value = node.get("activation")
    return {
        "id": str(node["node_id"]),
        "layer": -1 if layer == "E" else int(layer),
        "position": int(node["ctx_idx"]),
        "kind": kinds.get(kind, inner),
        "label": label,
        "influence": abs(_number(node.get("influence") or 0.0)),
        "value": None if value is None else _number(value),
        "raw": {name: node[name] for name in _FIELDS if isinstance(node.get(name), str | int | float)},
    }


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number
