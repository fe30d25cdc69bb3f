"""What the features of an attached autoencoder respond to: largest activations and a random sample, by channel.

    ds = wb.studies.feature_examples.load(run, features=[12, 77])
    ds[["top_activation", "top_before", "top_token"]].sel(channel="analysis", feature=77).to_dataframe()
    wb.studies.feature_examples.table(run)           # every feature: the share of each channel's tokens that have it

The lists are those that a capture recorded (`--record features:FOLDER`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.runs import conversations, feature_examples
from workbench.runs.schema import EXAMPLE_KINDS, FEATURE_FIELDS
from workbench.studies.expert_examples import AFTER, BEFORE, contexts
from workbench.studies.result import Definition, dataset, provenance

STUDY = Study(
    name="feature-examples",
    title="Features by example",
    question="Which tokens activate the features of an attached autoencoder, by channel?",
    requires=("features",),
    compute="one pass over the run's tokens",
    options={
        "hook": "Hook point of the autoencoder, if several were recorded, as blocks.2.hook_resid_post.",
        "features": "Numbers of the features that are shown by example, as 12,77 (default: the 20 whose shares of "
        "tokens differ most between analysis and final).",
    },
    figures="workbench.figures.feature_examples",
    page="features",
    order=17,
)
_NONE = "; −1: fewer tokens than places"
_EXAMPLE = {
    "activation": Definition("activation", "1", "of the feature, above 0"),
    "sequence": Definition("sequence", "1", f"number of the sequence in the run{_NONE}"),
    "position": Definition("position", "tokens", f"position of the token in its sequence{_NONE}"),
    "token": Definition("token", "text", "the token at which the feature had this activation"),
    "before": Definition("text before", "text", f"up to {BEFORE} tokens before it, of the same sequence"),
    "after": Definition("text after", "text", f"up to {AFTER} tokens after it, of the same sequence"),
}
DEFINITIONS = {f"{kind}_{name}": about for kind in EXAMPLE_KINDS for name, about in _EXAMPLE.items()} | {
    "share": Definition("share of tokens", "1", "tokens of the channel that have the feature / tokens of the channel"),
    "largest": Definition("largest activation", "1", "largest activation of the feature in the channel"),
}
METHOD = (
    "A token has a feature if its activation is above 0. By channel: the share of tokens that have the feature, the "
    "tokens with its largest activations, and a random sample of the tokens that have it."
)
NOT_CONTROLLED = (
    "Largest activations show the extreme; the random sample shows what the feature does at most of its tokens. Shares "
    "are pooled over tokens and have no interval: `workbench study label-probes` compares labels with controls."
)
_DEFAULT = 20  # features that are shown by example


def study(run: Any, *, hook: str = "", features: str = "", seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the shares of all features, and some of them by example."""
    features_table = table(run, hook=hook, seed=seed)
    return {"features": features_table, "examples": load(run, numbers_of(features) or None, hook=hook, seed=seed)}


def numbers_of(text: str) -> list[int]:
    """Return the numbers of features in a text such as "12,77".

    Raises:
        InputError: a part of the text is not a number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not (part.isdecimal() and len(part) < 10)]:
        raise InputError(f"features {text!r}: {wrong[0]!r} is not a number of a feature: write them as 12,77")
    return [int(part) for part in dict.fromkeys(parts)]


def table(run: Any, *, hook: str = "", seed: int = 0) -> xr.Dataset:
    """Return the share of tokens that have each feature and its largest activation [channel feature].

    Shares are of all sequences that were captured. Channels without a token are left out.

    Raises:
        InputError: the run recorded no features, or those of several autoencoders and none is named.
    """
    lists, hook = feature_examples.of_run(run, hook), feature_examples.lists_of(run, hook).hook
    channels = np.flatnonzero(lists["tokens"])
    share = lists["count"][channels] / lists["tokens"][channels, None]
    largest = lists["top_activation"][channels].max(-1).astype(np.float64)
    variables = {"share": (("channel", "feature"), share), "largest": (("channel", "feature"), largest)}
    coords = {"channel": [CHANNELS[c] for c in channels], "feature": np.arange(share.shape[1])}
    attrs = provenance("feature-examples", STUDY.title, run.digest, seed, {"hook": hook})
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "hook": hook}
    ds = dataset(variables, coords, {name: DEFINITIONS[name] for name in variables}, attrs)
    return ds.assign_attrs(summary=_summary(ds))


def most_different(ds: xr.Dataset, n: int = _DEFAULT) -> list[int]:
    """Return the features whose shares differ most between analysis and final, or without these the most frequent.

    ds: of `table`. Features that no token of content has are left out.
    """
    own = ds["share"].sel(channel=[name for name in ds["channel"].values.tolist() if name != "frame"])
    if not own.sizes["channel"]:
        return []
    both = {"analysis", "final"} <= set(own["channel"].values.tolist())
    size = abs(own.sel(channel="analysis") - own.sel(channel="final")) if both else own.max("channel")
    order = np.argsort(-size.values, kind="stable")
    return [int(i) for i in order if float(own.isel(feature=int(i)).max()) > 0][:n]


def load(
    run: Any, features: Sequence[int] | None = None, *, hook: str = "", seed: int = 0, tokenizer: Any = None
) -> xr.Dataset:
    """Return the examples of features [channel feature feature_example], the largest activation first.

    features: their numbers; by default those whose shares differ most between analysis and final. seed: of no effect.
    tokenizer: if that of the run is not installed.

    Raises:
        InputError: the run recorded no features, or has no such one.
    """
    about = feature_examples.lists_of(run, hook)
    numbers = most_different(table(run, hook=hook)) if features is None else [int(n) for n in features]
    lists = feature_examples.of_run(run, about.hook, numbers)
    channels = [c for c in range(len(CHANNELS)) if lists["count"][c].any()]
    dims = ("channel", "feature", "feature_example")
    places = {
        kind: np.stack([lists[f"{kind}_{name}"][channels].ravel() for name in ("sequence", "position")], axis=1)
        for kind in EXAMPLE_KINDS
    }
    texts = contexts(run, np.concatenate(list(places.values())), conversations.tokenizer(run, tokenizer))
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for kind in EXAMPLE_KINDS:
        shape = lists[f"{kind}_sequence"][channels].shape
        rows = np.array([texts[s, p] for s, p in places[kind].tolist()], dtype=object).reshape(*shape, 3)
        variables |= {f"{kind}_{n}": (dims, lists[f"{kind}_{n}"][channels]) for n in FEATURE_FIELDS}
        variables |= {f"{kind}_{name}": (dims, rows[..., i]) for i, name in enumerate(("token", "before", "after"))}
    coords = {"channel": [CHANNELS[c] for c in channels], "feature": np.array(numbers, dtype=np.int64)}
    options = {"hook": about.hook, "features": ",".join(map(str, numbers))}
    attrs = provenance("feature-examples", STUDY.title, run.digest, seed, options)
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "hook": about.hook}
    ds = dataset(variables, coords, {name: DEFINITIONS[name] for name in variables}, attrs)
    return ds.assign_attrs(summary=_examples_summary(ds))


def _summary(ds: xr.Dataset) -> str:
    """Return how many features are active, and those with the largest difference between the channels."""
    active = int((ds["share"].max("channel") > 0).sum())
    lines = [f"{active:,} of {ds.sizes['feature']:,} features of {ds.attrs['hook']} are active in this run."]
    for feature in most_different(ds, 5):
        cell = ds["share"].sel(feature=feature)
        shares = [f"{name} {float(v):.1%}" for name, v in zip(cell["channel"].values, cell.values, strict=True)]
        lines.append(f"  feature {feature}: {', '.join(shares)} of tokens")
    return "\n".join(lines)


def _examples_summary(ds: xr.Dataset) -> str:
    """Return the token of the largest activation in content of the first features."""
    lines = [f"Largest activations of features of {ds.attrs['hook']}:"]
    content = ds.sel(channel=[name for name in ds["channel"].values.tolist() if name != "frame"])
    for feature in ds["feature"].values.tolist()[:5] if content.sizes["channel"] else []:
        cell = content.sel(feature=feature).isel(feature_example=0)
        best = cell.isel(channel=int(cell["top_activation"].values.argmax()))
        if int(best["top_sequence"]) >= 0:
            text = f"{str(best['top_before'].item())[-20:]}[{best['top_token'].item()}]"
            value = float(best["top_activation"])
            lines.append(f"  feature {feature}: {value:.2f} at {text!r} ({best['channel'].item()})")
    return "\n".join(lines) if len(lines) > 1 else "No token of content has one of these features."
