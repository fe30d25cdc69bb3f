"""The page Why this token: an attribution graph that is stored beside a run, whose nodes are ablated on request.

`workbench graph … --out FILE.json` writes the graph. Ablations run in a process of their own (`workbench
graph-ablation`), and their results are kept in the user's cache.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

import panel as pn
import xarray as xr

from workbench.counting import count_of
from workbench.dashboards import attribution_graph, search, widgets
from workbench.dashboards.frame_view import view_input
from workbench.dashboards.results_pages import unreadable_notes
from workbench.dashboards.session import Page, Session, box

_OF_ONE_GRAPH = ("pins", "groups", "labels", "subgraph", "node", "ablated")  # another graph has other nodes
_HINT = (
    "<p class='wb-muted'>Choose an embedding, head, expert, neuron or feature and press <i>Ablate and measure</i>: the "
    "model is run without it.</p>"
)
# the frame may not be there yet when the results are, so it is sent them for some seconds; it shows each once
_SEND = """
let times = 0;
const send = () => {
  const walk = root => { for (const e of root.querySelectorAll("*")) {
    if (e.tagName === "IFRAME" && e.title === "attribution graph")
      e.contentWindow.postMessage({workbenchMeasured: JSON.parse(cb_obj.value)}, "*");
    if (e.shadowRoot) walk(e.shadowRoot); } };
  walk(document);
  if (++times < 20) setTimeout(send, 500);
};
send();
"""


def graph(session: Session) -> Page:
    """Return the page of attribution graphs that are stored beside the run."""
    stored = session.registry.stored(session.name)
    if not stored.graphs:
        model = session.registry.model(session.name) or "MODEL"
        command = f'workbench graph {model} --prompt "TEXT" --out {session.name}-graph.json'
        text = (
            "An attribution graph shows which tokens, heads and experts made the model give a token. Make one in the "
            "folder that holds the run, and open this page again:"
        )
        none = widgets.empty_state("No attribution graph beside this run", text, command)
        return Page([], [none, *unreadable_notes(stored)])
    names = list(stored.graphs)
    pick = widgets.select("Graph", names, session.choice.get("graph", names))
    shown, linked = box(), box()
    ablations = _Ablations(session)
    drawn: dict[str, Any] = {}  # the graph that is shown

    def describe(chosen: Mapping[str, str]) -> None:
        linked[:] = [widgets.html(_about_graph(session, drawn, chosen.get("node", "")))]
        kinds = _ablated_kinds(session, drawn) if drawn else ()
        ablations.state.visible = bool(kinds)
        if kinds:
            nodes = attribution_graph.ablated_nodes(drawn, chosen.get("ablated", ""), kinds)
            ablations.ask(stored.graphs[str(pick.value)], drawn, nodes)

    view = view_input(session, attribution_graph.VIEW, describe)

    def show(*_: Any) -> None:
        before = session.choice.text("graph")
        if before != str(pick.value):
            session.put(graph=str(pick.value), **(dict.fromkeys(_OF_ONE_GRAPH, "") if before else {}))
        chosen = {name: session.choice.text(name) for name in attribution_graph.VIEW if session.choice.text(name)}

        def body() -> Any:
            path = stored.graphs[str(pick.value)]
            loaded = attribution_graph.load(path)
            drawn.update(loaded)
            ablates = _ablated_kinds(session, loaded)
            text = attribution_graph.frame(loaded, path.stem, session.theme, chosen, ablates=ablates)
            return pn.pane.HTML(text, height=attribution_graph.HEIGHT + 10, sizing_mode="stretch_width")

        drawn.clear()
        shown[:] = [widgets.guarded(body)]
        describe(chosen)

    show()
    pick.param.watch(show, "value")
    return Page([pick], [linked, ablations.state, shown, view, ablations.field, *unreadable_notes(stored)])


class _Ablations:
    """The ablations of the nodes that were chosen last: their state as text, and what the frame is sent of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._asked: tuple[str, ...] = ()
        self.state = box()
        self.state[:] = [widgets.html(_HINT)]
        self.field = pn.widgets.TextInput(visible=False)
        self.field.jscallback(value=_SEND)

    def ask(self, path: Any, graph: Mapping[str, Any], nodes: Sequence[str]) -> None:
        """Ablate nodes of the graph in a file, unless they are those that were asked for last."""
        asked = (str(path), *nodes)
        if asked == self._asked:
            return
        self._asked = asked
        if not nodes:
            self.state[:] = [widgets.html(_HINT)]
            return
        labels = {node["id"]: f"{node['label']} at token {node['position']}" for node in graph["nodes"]}

        def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
            ds = results["ablation"]
            values = dict(zip(ds["node"].values.tolist(), ds["measured"].values.tolist(), strict=True))
            message = json.dumps({"nodes": values, "together": ds.attrs["together"]})
            widgets.when_shown(lambda: setattr(self.field, "value", message))
            what = labels[nodes[0]] if len(nodes) == 1 else f"{count_of(len(nodes), 'node')} together"
            fall = ds.attrs["together"]
            change = f"{'falls' if fall >= 0 else 'rises'} by {abs(fall):.2f} logits"
            return [widgets.html(f"<p>Without {escape(what)}, the target {change}, measured in the model.</p>")]

        features = any(node["kind"] == attribution_graph.FEATURE for node in graph["nodes"] if node["id"] in nodes)
        ask = self._session.registry.graph_ablation(self._session.name, path, nodes, features=features)
        texts = {"work": "Ablating in the model", "failed": "The ablation cannot be measured"}
        self.state[:] = [widgets.awaited(ask, show, **texts)]


def _ablated_kinds(session: Session, graph: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of nodes that can be ablated here; none without the model or the tokens of the graph."""
    if not session.registry.model(session.name) or "tokens" not in graph["stored"]:
        return ()
    features = (attribution_graph.FEATURE,) if session.registry.autoencoders else ()
    return (*attribution_graph.ABLATED, *features)


def _why_not_ablated(session: Session, graph: Mapping[str, Any]) -> str:
    """Return what is needed to ablate nodes on this page, or "" if they can be ablated."""
    if "tokens" not in graph["stored"]:
        return "To ablate nodes here, make the graph again with <code>workbench graph</code>: it has no token ids."
    if not session.registry.model(session.name):
        return "To ablate nodes here, start the dashboard with <code>--model MODEL</code>."
    if not session.registry.autoencoders and any(node["kind"] == "feature" for node in graph["nodes"]):
        return (
            "To ablate features here, start the dashboard with <code>--sae NAME=FOLDER</code> of their autoencoder "
            "and <code>--model MODEL</code>."
        )
    return ""


def _live_link(session: Session, graph: Mapping[str, Any], node: str, verb: str) -> str:
    """Return a link to the page Live without the head or expert of a node, or "" where there is none."""
    words, model = search.vocabulary(session.run), session.registry.served_model
    recipe = attribution_graph.ablation_recipe(graph, node, words)
    if recipe is None or not model:
        return ""
    values = {"theme": "dark"} if session.theme == "dark" else {}
    query = urlencode(values | {"recipe": json.dumps(recipe | {"model": model}, ensure_ascii=False)})
    return f"<a href='{escape(session.address('live', query))}'>{verb} it at this token on the page Live</a>"


def _feature_link(session: Session, layer: int, feature: int, view: Mapping[str, str]) -> str:
    """Return a link to the page of a feature, or "" where the run recorded another autoencoder than the one given."""
    hooks = [lists.hook for lists in session.run.spec.features if lists.layer == layer]
    given = [hook for hook in hooks if session.registry.autoencoder(session.name, hook) is not None]
    if len(given) != 1:
        return ""
    address = session.link("features", quantity=given[0], layer=str(layer), feature=str(feature), **view)
    return f"<a href='{escape(address)}'>Examples and effects of feature {feature} in layer {layer}</a>"


def _about_graph(session: Session, graph: Mapping[str, Any], node: str) -> str:
    """Return HTML of the page's question and, where the node is a head, an expert or a feature, links to its page.

    graph: what `attribution_graph.load` returned; empty if it could not be read.
    """
    expert = attribution_graph.experts_by_node(graph).get(node) if graph else None
    target = graph["about"].get("target") if graph else None
    token = f"the token <b>{escape(repr(str(target)))}</b>" if target is not None else "this token"
    features = attribution_graph.features_by_node(graph) if graph else {}
    kinds, pages = "an embedding, a head or a routed expert", "a head or an expert"
    if features:
        kinds, pages = "an embedding, a head, a routed expert or a feature", "a head, an expert or a feature"
    text = f"Why did the model predict {token}? Each node is {kinds} at a token."
    hint = f"Choose the node of {pages} to open its page."
    head = attribution_graph.heads_by_node(graph).get(node) if graph else None
    view = dict.fromkeys(attribution_graph.VIEW, "")
    if head is not None and {"sinks", "sink_sums"} & set(session.run.recorded):
        layer, number = map(str, head)
        address = escape(session.link("sinks", layer=layer, head=number, **view))
        hint = f"<a href='{address}'>Sink attention of layer {layer}, head {number}</a>"
    if node in features:
        hint = _feature_link(session, *features[node], view) or hint
    if expert is not None:
        layer, number = map(str, expert)
        address = escape(session.link("experts", layer=layer, expert=number, **view))
        hint = f"<a href='{address}'>Load, examples and effects of layer {layer}, expert {number}</a>"
    live = _live_link(session, graph, node, "Ablate" if head is not None else "Forbid") if graph else ""
    hint = " · ".join(filter(None, [hint, live, _why_not_ablated(session, graph) if graph else ""]))
    return f"<p>{text} <span class='wb-muted'>{hint}</span></p>"
