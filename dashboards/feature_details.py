"""Parts of the features page: histograms, direct effects on logits, labels, and the search among all features."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr
from jaxtyping import Float

from workbench.dashboards import widgets
from workbench.dashboards.label_field import label_field
from workbench.dashboards.neurons_page import EFFECTS, effects_table
from workbench.dashboards.session import Session
from workbench.figures.feature_examples import activation_histogram, density_histogram
from workbench.harmony.labels import CHANNELS, FRAME
from workbench.runs import Run, feature_examples
from workbench.studies import feature_labels, token_labels

_SHOWN_TOKENS = 3  # that a feature raises, in the table
_SHARE = " (%)"


def shares(table: pd.DataFrame, n_features: int) -> xr.Dataset:
    """Return the share of tokens of each feature by channel [channel feature] of a table of `features_page`.

    n_features: of all; those that the table lacks are active at no token.
    """
    names = [
        name.removesuffix(_SHARE) for name in table.columns if name.endswith(_SHARE) and name in _by_channel(table)
    ]
    share = np.zeros((len(names), n_features))
    for row, name in enumerate(names):
        share[row, table["feature"].to_numpy()] = table[f"{name}{_SHARE}"].to_numpy() / 100
    coords = {"channel": names, "feature": np.arange(n_features)}
    return xr.Dataset({"share": (("channel", "feature"), share)}, coords)


def _by_channel(table: pd.DataFrame) -> list[str]:
    return [f"{name}{_SHARE}" for name in CHANNELS if f"{name}{_SHARE}" in table.columns]


def density_figure(session: Session, ds: xr.Dataset, label: str, feature: int | None) -> pn.Column:
    """Return the histogram of the densities of all features. ds: of `shares`. feature: that is marked."""
    drawn = density_histogram(ds, chosen=feature, theme=session.theme)
    return widgets.figure(drawn, f"{label}-density", lambda: ds.to_dataframe().reset_index())


def activations_figure(session: Session, name: str, index: int, feature: int, most: int) -> pn.Column:
    """Return the histogram of the activations of one feature; for the arguments see `activations`."""
    values, weights, sampled = activations(session.run, name, index, feature, most)
    drawn = activation_histogram(values, weights, feature=feature, sampled=sampled, theme=session.theme)
    rows = pd.DataFrame({"activation": values, "tokens": weights})
    return widgets.figure(drawn, f"{session.name}-{name}-{feature}-activations", lambda: rows)


def activations(
    run: Run, name: str, index: int, feature: int, most: int
) -> tuple[Float[np.ndarray, " token"], Float[np.ndarray, " token"], bool]:
    """Return activations above 0 of a feature in content, how many tokens each stands for, and if they are sampled.

    Lists of examples hold a random sample of each channel, whose tokens stand for all of the channel that have the
    feature. most: tokens that are read of features that are recorded at every token.
    """
    values, weights = [np.empty(0)], [np.empty(0)]
    if name in {lists.hook for lists in run.spec.features}:
        lists = feature_examples.of_run(run, name, [feature])
        for channel in [c for c in range(len(CHANNELS)) if c != FRAME]:
            own = lists["random_activation"][channel, 0][lists["random_sequence"][channel, 0] >= 0]
            values.append(own.astype(np.float64))
            weights.append(np.full(len(own), lists["count"][channel, 0] / max(1, len(own)), dtype=np.float64))
        return np.concatenate(values), np.concatenate(weights), True
    seen = 0
    for labels, block in token_labels.blocks(run, token_labels.recorded(run, name), index):
        own = np.nan_to_num(block[:, feature])[labels["channel"].to_numpy() != FRAME]
        values.append(own[own > 0].astype(np.float64))
        if (seen := seen + len(labels)) >= most:
            break
    every = np.concatenate(values)
    return every, np.ones(len(every)), False


def stored_effects(session: Session, name: str, layer: str, n_features: int) -> xr.Dataset | None:
    """Return the direct effects of features that `workbench study expert-logits … --option sae=FOLDER` stored.

    Those of an autoencoder whose examples were recorded are of that autoencoder; those of a recorded quantity are of
    one at its layer with as many features.
    """
    lists = {lists.hook: lists for lists in session.run.spec.features}
    for ds in session.registry.stored(session.name).experiments.get("expert-logits", {}).values():
        if not set(ds) >= EFFECTS or "feature" not in ds.dims or ds.sizes["feature"] != n_features:
            continue
        if name in lists and ds.attrs.get("sae_digest") == lists[name].digest:
            return ds
        if name not in lists and f"blocks.{layer}." in str(ds.attrs.get("hook", "")):
            return ds
    return None


def logit_effects(session: Session, effects: xr.Dataset | None, feature: int) -> Any:
    """Return a table of the tokens whose logits a feature raises and lowers, or the command that computes them."""
    if effects is not None:
        note = f"Decoder row at {effects.attrs['hook']}, final norm and unembedding; for an activation of 1"
        rows = effects_table(effects.sel(feature=feature))
        return widgets.table("Direct effects on logits", rows, f"{session.name}-{feature}-logits", note=note)
    command = f"workbench study expert-logits {session.run.path} --model MODEL --option sae=FOLDER --out "
    command += f"{session.name}-logits"
    text = (
        "The tokens whose logits the decoder row of a feature raises and lowers are computed from the model and the "
        "folder of the autoencoder, which a run does not hold. Run this beside the run and open the page again:"
    )
    return widgets.empty_state("Direct effects on logits are not computed", text, command)


def label_editor(session: Session, name: str, layer: str, feature: int, automatic: str) -> pn.Column:
    """Return the label of a feature with a field that changes it in the file beside the run."""
    run = session.run
    own = feature_labels.read(run).get((name, int(layer), feature), "")
    if not session.registry.editable or "://" in str(run.path):
        return pn.Column(widgets.html(f"<p><b>Label</b> {escape(own or automatic) or '–'}</p>"))

    def store(new: str) -> Path:
        return session.registry.put_feature_label(session.name, name, int(layer), feature, new)

    return label_field("Label of this feature", own, store, placeholder=automatic or "none yet")


def described(
    table: pd.DataFrame, labels: Mapping[int, str], automatic: Sequence[str], effects: xr.Dataset | None
) -> pd.DataFrame:
    """Return the table with each feature's label and, where they are known, the tokens that it raises.

    labels: of people, by feature; a feature without one has its automatic label.
    """
    features = table["feature"].tolist()
    texts = [labels.get(n) or (automatic[n] if n < len(automatic) else "") for n in features]
    table = table.copy()
    table.insert(1, "label", texts)
    if effects is not None:
        words = effects["top_text"].values[features, :_SHOWN_TOKENS]
        table.insert(2, "raises", [" ".join(repr(str(word)) for word in row) for row in words])
    return table


def matching(table: pd.DataFrame, words: str) -> pd.DataFrame:
    """Return the rows whose label or tokens contain these words, in any case; a number is that of a feature, too."""
    asked = words.strip().casefold()
    if not asked:
        return table
    texts = [name for name in ("label", "raises") if name in table.columns]
    contains = [table[name].str.casefold().str.contains(asked, regex=False) for name in texts]
    rows = np.logical_or.reduce([*contains, table["feature"].astype(str) == asked])
    return table[rows]
