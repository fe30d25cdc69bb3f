"""The features page: activation by channel of features that a run recorded, and examples.

Features, as of a sparse autoencoder, are a recorded quantity of the user's own (`wb.Recorder`) whose values have the
one dimension `feature`. A token has a feature if its value is above zero.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from jaxtyping import Float

from workbench.dashboards import content, search, widgets
from workbench.dashboards.session import Page, Session, box
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run
from workbench.studies import token_labels

MOST_TOKENS = 300_000  # that are read
MOST_ROWS = 500  # features in the table
_EXAMPLES = 12
_HOW = """record = wb.Recorder(
    "sae_features",
    hook="hook_resid_post",
    reduce=sae.encode,       # sae = workbench.hooks.sae.load_sae(folder)
    dims=("feature",),
    layers="2",              # the layer that the autoencoder was trained on
    dtype="float16",
)
wb.capture(model, "answers.jsonl", "run.zarr", record=["routing", record])"""


def names(run: Run) -> list[str]:
    """Return the recorded quantities of the run that are features."""
    return [
        about.name
        for about in run.spec.selected
        if getattr(about, "reduce", "") == "own" and tuple(about.dims) == ("feature",)
    ]


def features(session: Session) -> Page:
    """Return the page: a table of features by channel, and the strongest tokens of one of them in context."""
    run = session.run
    known = names(run)
    if not known:
        text = "Record the features of a sparse autoencoder as a quantity of your own, with the dimension feature:"
        about = widgets.html(content.about(run))
        return Page([], [about, widgets.empty_state("This run has no recorded features", text, _HOW)])
    name = widgets.select("Features", known, session.choice.get("quantity", known))
    layers = {n: [str(layer) for layer in token_labels.recorded(run, n).layers] for n in known}
    layer = widgets.select("Layer", layers[str(name.value)], session.choice.get("layer", layers[str(name.value)]))
    shown = box()

    def show(*_: Any) -> None:
        session.put(quantity=str(name.value), layer=str(layer.value))
        index = layers[str(name.value)].index(str(layer.value))
        shown[:] = [widgets.guarded(lambda: _section(session, str(name.value), index))]

    def other(*_: Any) -> None:
        layer.options = layers[str(name.value)]
        show()

    show()
    name.param.watch(other, "value")
    layer.param.watch(show, "value")
    return Page([name, layer], [widgets.html(content.about(run)), shown])


def _section(session: Session, name: str, index: int) -> pn.Column:
    table = by_channel(session.run, name, index)
    label = f"{session.name}-{name}"
    parts: list[Any] = []
    chosen = session.choice.text("feature")
    if chosen.isdecimal() and int(chosen) in set(table["feature"]):
        parts += [widgets.html(f"<h2>Feature {escape(chosen)}</h2>"), _examples(session, name, index, int(chosen))]
    rows = table.head(MOST_ROWS)
    links = [session.link("features", feature=str(feature)) for feature in rows["feature"]]
    title = f"{len(rows):,} of {len(table):,} features, the largest difference between analysis and final first"
    parts.append(widgets.table(title, rows, f"{label}-features", {"feature": links}))
    note = (
        f"Tokens with a value above zero, of the first {MOST_TOKENS:,} tokens, pooled and not tested: `workbench study "
    )
    note += "label-probes` compares labels with controls."
    return pn.Column(*parts, widgets.html(f"<p class='wb-muted'>{escape(note)}</p>"), sizing_mode="stretch_width")


def by_channel(run: Run, name: str, index: int) -> pd.DataFrame:
    """Return a row for each feature: tokens that have it (%), in all content and by channel, and its largest value.

    index: of the layer among those recorded. The largest difference between analysis and final comes first.
    """
    about = token_labels.recorded(run, name)
    counts: dict[str, Any] = {}
    totals, largest, seen = dict.fromkeys(CHANNELS, 0), None, 0
    for labels, values in token_labels.blocks(run, about, index):
        active = values > 0  # a token that was not recorded has NaN, which is not above zero
        known, channel = ~np.isnan(values[:, 0]), labels["channel"].to_numpy()
        counts = counts or {c: np.zeros(values.shape[1], dtype=np.int64) for c in CHANNELS}
        for number, c in enumerate(CHANNELS):
            counts[c] += active[channel == number].sum(0)
            totals[c] += int(known[channel == number].sum())
        top = np.nan_to_num(values).max(0, initial=0)
        largest = top if largest is None else np.maximum(largest, top)
        if (seen := seen + len(labels)) >= MOST_TOKENS:
            break
    return _table(counts, totals, largest)


def _table(counts: Mapping[str, Any], totals: Mapping[str, int], largest: Any) -> pd.DataFrame:
    shown = [c for c in CHANNELS if c != "frame" and totals[c]]
    of = {c: 100 * counts[c] / totals[c] for c in shown}
    content_tokens = max(1, sum(totals[c] for c in shown))
    columns = {
        "feature": np.arange(len(largest)),
        "all content (%)": 100 * sum(counts[c] for c in shown) / content_tokens,
    }
    columns |= {f"{c} (%)": values for c, values in of.items()} | {"largest value": largest}
    table = pd.DataFrame(columns)
    order = np.abs(of["analysis"] - of["final"]) if {"analysis", "final"} <= set(of) else table["all content (%)"]
    table = table.iloc[np.argsort(-np.asarray(order), kind="stable")].round(2)
    return table[table["largest value"] > 0].reset_index(drop=True)


def strongest(
    run: Run, name: str, index: int, feature: int, most: int = _EXAMPLES
) -> Float[pd.DataFrame, "example column"]:
    """Return the tokens with the largest values of a feature, at most one of a sequence: value, sequence, position."""
    about = token_labels.recorded(run, name)
    best, seen = pd.DataFrame(columns=["value", "sequence", "position", "channel"]), 0
    for labels, values in token_labels.blocks(run, about, index):
        own = labels[["sequence", "position", "channel"]].assign(value=values[:, feature])
        own = own[own["value"] > 0].nlargest(most * 8, "value")
        best = pd.concat([best, own]) if len(best) else own
        best = best.sort_values("value", ascending=False, kind="stable").drop_duplicates("sequence").head(most)
        if (seen := seen + len(labels)) >= MOST_TOKENS:
            break
    return best.reset_index(drop=True)


def _examples(session: Session, name: str, index: int, feature: int) -> Any:
    run, words = session.run, search.vocabulary(session.run)
    items = []
    for row in strongest(run, name, index, feature).to_dict("records"):
        sequence, at = int(row["sequence"]), int(row["position"])
        ids = run.sequence(sequence)["id"].values.tolist()
        texts = search.texts(ids, words)
        before, after = "".join(texts[max(0, at - 12) : at]), "".join(texts[at + 1 : at + 6])
        link = session.link("transcript", sequence=str(sequence), pin=str(at), position="")
        items.append(
            f"<li><a href='{escape(link)}'>{escape(before)}<mark>{escape(texts[at]) or '▫'}</mark>{escape(after)}</a> "
            f"<span class='wb-muted'>{escape(CHANNELS[int(row['channel'])])}, {float(row['value']):.2f}</span></li>"
        )
    return widgets.card("Largest values", widgets.html(f"<ul class='wb-examples'>{''.join(items)}</ul>"))
