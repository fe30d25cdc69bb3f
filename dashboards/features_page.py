"""The features page: activation by channel of features that a run recorded, and examples.

Features, as of a sparse autoencoder, are recorded as lists of examples (`--record features:FOLDER`), or at every token
as a quantity of the user's own (`wb.Recorder`) whose values have the one dimension `feature`. A token has a feature if
its value is above zero.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr
from jaxtyping import Float

from workbench import registry
from workbench.counting import count_of
from workbench.dashboards import content, feature_ablation, feature_details, search, widgets
from workbench.dashboards.example_lists import coloured_example, example, list_of
from workbench.dashboards.session import Page, Session, box, not_recorded
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run, feature_examples
from workbench.runs.examples import sample_keys
from workbench.studies import feature_examples as examples_study
from workbench.studies import feature_labels, token_labels
from workbench.studies.expert_examples import AFTER, BEFORE

MOST_ROWS = 500  # features in the table
_EXAMPLES = 12


def names(run: Run) -> list[str]:
    """Return the autoencoders with lists of examples, and the recorded quantities of the run that are features."""
    of_tokens = [
        about.name
        for about in run.spec.selected
        if getattr(about, "reduce", "") == "own" and tuple(about.dims) == ("feature",)
    ]
    return [*(lists.hook for lists in run.spec.features), *of_tokens]


def layers_of(run: Run, name: str) -> list[str]:
    """Return the layers of recorded features as text."""
    lists = {lists.hook: lists for lists in run.spec.features}
    return [str(layer) for layer in ([lists[name].layer] if name in lists else token_labels.recorded(run, name).layers)]


def features(session: Session) -> Page:
    """Return the page: a table of features by channel, and the strongest tokens of one of them in context."""
    run = session.run
    known = names(run)
    if not known:
        about = widgets.html(content.about(run))
        return Page([], [about, not_recorded(run, "features of a sparse autoencoder", "--record features:FOLDER")])
    name = widgets.select("Recorded features", known, session.choice.get("quantity", known))
    layers = {n: layers_of(run, n) for n in known}
    layer = widgets.select("Layer", layers[str(name.value)], session.choice.get("layer", layers[str(name.value)]))
    find = pn.widgets.TextInput(
        label="Find features", value=session.choice.text("words"), placeholder="label or token", width=widgets.WIDTH
    )
    shown = box()
    sections: list[_Section] = []  # the one that is shown

    def show(*_: Any) -> None:
        session.put(quantity=str(name.value), layer=str(layer.value), words=str(find.value))
        index = layers[str(name.value)].index(str(layer.value))
        section = widgets.guarded(lambda: _Section(session, str(name.value), index))
        sections[:] = [section] if isinstance(section, _Section) else []
        shown[:] = [section.view if isinstance(section, _Section) else section]

    def other(*_: Any) -> None:
        layer.options = layers[str(name.value)]
        show()

    def search_again(*_: Any) -> None:
        session.put(words=str(find.value))
        for section in sections:
            section.search()

    show()
    name.param.watch(other, "value")
    layer.param.watch(show, "value")
    find.param.watch(search_again, "value")
    question = f"<p class='wb-lead'>{escape(registry.find('feature-examples').question)}</p>"
    return Page([name, layer, find], [widgets.html(content.about(run) + question), shown])


class _Section:
    """One feature of a recorded quantity, and the table of all features that match the search."""

    def __init__(self, session: Session, name: str, index: int) -> None:
        self._session, self._name, self._index = session, name, index
        self._table, self._layer = by_channel(session.run, name, index), layers_of(session.run, name)[index]
        self._label, self._n_features = f"{session.name}-{name}", int(self._table.attrs["features"])
        self._effects = feature_details.stored_effects(session, name, self._layer, self._n_features)
        self._automatic = session.registry.automatic_feature_labels(session.name, name, index, session.exclude)
        self._above, self._below = box(), box()  # the table is in one of them: above if it answers a search
        every = self._described()
        matches = feature_details.matching(every, session.choice.text("words"))
        known = [str(feature) for feature in self._table["feature"]]
        chosen = session.choice.get("feature", known, next((str(n) for n in matches["feature"]), None))
        number = int(chosen) if chosen else None
        ds = feature_details.shares(self._table, self._n_features)
        density = widgets.deferred(lambda: feature_details.density_figure(session, ds, self._label, number))
        parts = [] if number is None else self._feature(every[every["feature"] == number].iloc[0])
        self.search()
        parts = [self._above, *parts, self._below, density, widgets.html(self._method())]
        self.view = pn.Column(*parts, sizing_mode="stretch_width")

    def _described(self) -> pd.DataFrame:
        """Return the table of all features with their labels as they are now."""
        own, place = feature_labels.read(self._session.run), (self._name, int(self._layer))
        labels = {feature: text for (name, layer, feature), text in own.items() if (name, layer) == place}
        return feature_details.described(self._table, labels, self._automatic, self._effects)

    def _feature(self, row: "pd.Series[Any]") -> list[Any]:
        """Return what is shown of the feature in a row of the table."""
        session, name, index, feature = self._session, self._name, self._index, int(row["feature"])
        about = {"Autoencoder": f"{name}, layer {self._layer}", "Largest activation": f"{row['largest value']:.2f}"}
        densities = {c.removesuffix(" (%)"): f"{row[c]:.3g} %" for c in self._table.columns if c.endswith("(%)")}
        about["Density (tokens above zero)"] = ", ".join(f"{channel} {share}" for channel, share in densities.items())
        heading = f"Feature {feature}" + (f": {row['label']}" if row["label"] else "")
        text = self._automatic[feature] if feature < len(self._automatic) else ""
        return [
            widgets.html(f"<h2>{escape(heading)}</h2>{content.facts(about)}"),
            feature_details.label_editor(session, name, self._layer, feature, text),
            *([feature_ablation.section(session, name, feature)] if _has_lists(session.run, name) else []),
            widgets.beside(
                feature_details.logit_effects(session, self._effects, feature),
                widgets.deferred(
                    lambda: feature_details.activations_figure(session, name, index, feature, search.MOST_TOKENS)
                ),
            ),
            _examples(session, name, index, feature),
        ]

    def search(self) -> None:
        """Show the features that match the search: above everything else if there is one."""
        words = self._session.choice.text("words")
        matches = feature_details.matching(self._described(), words)
        table = _features_table(self._session, matches, len(self._table), self._n_features, self._label)
        self._above[:], self._below[:] = ([table], []) if words else ([], [table])

    def _method(self) -> str:
        pooled = (
            "all tokens" if _has_lists(self._session.run, self._name) else f"the first {search.MOST_TOKENS:,} tokens"
        )
        method = (
            f"A feature is active at a token if its activation is above zero. Densities are pooled over {pooled} and "
            "not tested. An automatic label is made of the tokens of a feature's largest activations. To compare "
            "labels of tokens with controls: "
        )
        return f"<p class='wb-muted'>{escape(method)}<code>workbench study label-probes</code></p>"


def _features_table(session: Session, matches: pd.DataFrame, n_active: int, n_features: int, label: str) -> Any:
    """Return the table of the features that match the search, each with a link to its examples."""
    words, rows = session.choice.text("words"), matches.head(MOST_ROWS).round(3)
    if rows.empty:
        text = f"No label or token of the {count_of(n_active, 'active feature')} contains {words!r}. Find another one."
        return widgets.empty_state("No matching features", text)
    links = [session.link("features", feature=str(feature)) for feature in rows["feature"]]
    among = f" with a label or token that contains {words!r}" if words else ""
    note = (
        f"Density: tokens with an activation above zero, in % of the tokens of a channel; {len(rows):,} of "
        f"{count_of(len(matches), 'feature')}{among}, sorted by the difference between analysis and final; "
        f"{n_features - n_active:,} of {n_features:,} features are never active"
    )
    return widgets.table("Features by channel", rows, f"{label}-features", {"feature": links}, note=note)


def by_channel(run: Run, name: str, index: int) -> pd.DataFrame:
    """Return a row for each active feature: tokens that have it (%), in all content and by channel, and largest value.

    index: of the layer among those recorded. The attribute `features` has the number of all. The largest difference
    between analysis and final comes first.
    """
    if _has_lists(run, name):
        lists = feature_examples.of_run(run, name)
        counted, all_tokens = (dict(zip(CHANNELS, lists[part], strict=True)) for part in ("count", "tokens"))
        return _table(counted, all_tokens, lists["top_activation"].max((0, 2)))
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
        if (seen := seen + len(labels)) >= search.MOST_TOKENS:
            break
    return _table(counts, totals, largest)


def _has_lists(run: Run, name: str) -> bool:
    return name in {lists.hook for lists in run.spec.features}


def _table(counts: Mapping[str, Any], totals: Mapping[str, int], largest: Any) -> pd.DataFrame:
    shown = [c for c in CHANNELS if c != "frame" and totals[c]]
    of = {c: 100 * counts[c] / totals[c] for c in shown}
    content_tokens = max(1, sum(totals[c] for c in shown))
    columns = {
        "feature": np.arange(len(largest)),
        "all content (%)": 100 * sum(counts[c] for c in shown) / content_tokens,
    }
    columns |= {f"{c} (%)": values for c, values in of.items()} | {
        "largest value": np.asarray(largest, dtype=np.float64)
    }
    table = pd.DataFrame(columns)
    order = np.abs(of["analysis"] - of["final"]) if {"analysis", "final"} <= set(of) else table["all content (%)"]
    table = table.iloc[np.argsort(-np.asarray(order), kind="stable")]
    table = table[table["largest value"] > 0].reset_index(drop=True)
    table.attrs["features"] = len(largest)
    return table


def examples(
    run: Run, name: str, index: int, feature: int, kind: str = "top", most: int = _EXAMPLES
) -> list[dict[str, Any]]:
    """Return tokens that have a feature, at most one of a sequence, with the values of the tokens around each.

    kind: "top" for the largest values, "random" for a random sample of the tokens with a value above zero. A row has
    `value`, `sequence`, `position`, `channel`, `ids` and `values` [token of the context], and `start`, the context's
    first position.
    """
    about = token_labels.recorded(run, name)
    best, seen = list[tuple[float, dict[str, Any]]](), 0
    for labels, values in token_labels.blocks(run, about, index):
        own = np.nan_to_num(values[:, feature])
        rows = np.flatnonzero(own > 0)
        key = -own[rows] if kind == "top" else _random_keys(labels.iloc[rows], about.layers[index], feature)
        order = rows[np.argsort(key, kind="stable")][: most * 8]
        ranks = np.sort(key, kind="stable")[: most * 8]
        best += [(float(rank), _context(labels, own, int(row))) for rank, row in zip(ranks, order, strict=True)]
        best = _one_of_each_sequence(best)[:most]
        if (seen := seen + len(labels)) >= search.MOST_TOKENS:
            break
    return [row for _, row in best]


def _random_keys(labels: pd.DataFrame, layer: int, feature: int) -> Float[np.ndarray, " token"]:
    """Return the places of tokens in the random order of a layer's feature."""
    sequence, position = labels["sequence"].to_numpy(), labels["position"].to_numpy()
    return sample_keys(sequence, position, layer, feature).astype(np.float64)


def _one_of_each_sequence(rows: list[tuple[float, dict[str, Any]]]) -> list[tuple[float, dict[str, Any]]]:
    first: dict[int, tuple[float, dict[str, Any]]] = {}
    for rank, row in sorted(rows, key=lambda pair: pair[0]):
        first.setdefault(int(row["sequence"]), (rank, row))
    return list(first.values())


def _context(labels: pd.DataFrame, values: Float[np.ndarray, " token"], at: int) -> dict[str, Any]:
    """Return a token of a block, and the ids and values of those around it in its sequence."""
    sequence, position = labels["sequence"].to_numpy(), labels["position"].to_numpy()
    around = np.arange(max(0, at - BEFORE), min(len(labels), at + AFTER + 1))
    around = around[sequence[around] == sequence[at]]
    return {
        "value": float(values[at]),
        "sequence": int(sequence[at]),
        "position": int(position[at]),
        "channel": CHANNELS[int(labels["channel"].to_numpy()[at])],
        "ids": labels["id"].to_numpy()[around].tolist(),
        "values": values[around].tolist(),
        "start": int(position[around[0]]),
    }


def _examples(session: Session, name: str, index: int, feature: int) -> pn.FlexBox:
    """Return two cards with the feature's largest values and a random sample, each token coloured by its value."""
    if _has_lists(session.run, name):
        return _listed_examples(session, examples_study.load(session.run, [feature], hook=name))
    words = search.vocabulary(session.run)
    cards, largest = [], 0.0
    for kind, title in (("top", "Largest values"), ("random", "Random sample")):
        items = []
        for row in examples(session.run, name, index, feature, kind):
            largest = largest or row["value"]  # the first of the largest values
            texts = search.texts(row["ids"], words)
            strengths = [value / largest for value in row["values"]]
            items.append(coloured_example(session, row, texts, strengths, f"{row['channel']}, {row['value']:.2f}"))
        cards.append(widgets.card(title, widgets.html(list_of(items))))
    return widgets.beside(*cards)


def _listed_examples(session: Session, ds: xr.Dataset) -> pn.FlexBox:
    """Return two cards with the examples of one feature by channel, as a capture recorded them."""
    cell, cards = ds.isel(feature=0), []
    largest = max(float(cell["top_activation"].max()), 1e-9) if cell["top_activation"].size else 1.0
    for kind, title in (("top", "Largest values"), ("random", "Random sample")):
        parts = []
        for channel in [channel for channel in cell["channel"].values.tolist() if channel != "frame"]:
            rows = listed_rows(ds, kind, channel)
            items = [
                example(session, row, f"{row['activation']:.2f}", strength=row["activation"] / largest) for row in rows
            ]
            parts += [f"<h3>{escape(channel)}</h3>{list_of(items)}"] if items else []
        none = "<p class='wb-muted'>No token of content.</p>"
        cards.append(widgets.card(title, widgets.html("".join(parts) or none)))
    return widgets.beside(*cards)


def listed_rows(ds: xr.Dataset, kind: str, channel: str) -> list[dict[str, Any]]:
    """Return the examples of the first feature in a channel: activation, sequence, position, before, token, after."""
    parts = ("activation", "sequence", "position", "before", "token", "after")
    columns = [ds[f"{kind}_{part}"].sel(channel=channel).isel(feature=0).values.tolist() for part in parts]
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)]
    return [row for row in rows if int(row["sequence"]) >= 0]
