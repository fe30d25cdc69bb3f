"""The section of the features page that ablates a feature in the model on request, and shows what that changes.

It runs `workbench feature-ablation` in a process of its own, whose results are kept in the user's cache. The model and
the folder of the autoencoder are those that the dashboard was started with.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr
from jaxtyping import Float

from workbench.dashboards import widgets
from workbench.dashboards.session import Session, box

_HINT = (
    "<p class='wb-muted'>The model reads the examples of this feature again, as it is and with the feature set to "
    "zero. Measured are the predictions of the next token, beside those without a random direction of the same size."
    "</p>"
)
_KINDS = {"top": "Without the feature, at its largest activations", "random": "Without the feature, at a random sample"}
_NOTE = "Changes of the log-probability of the next token and divergences of the predictions, in nats"
_RANKED = "Mean change of the logit, less that of all tokens"


def section(session: Session, name: str, feature: int) -> pn.Column:
    """Return the button that ablates a feature with the results below it, or what is needed for it.

    name: the hook point of an autoencoder with lists of examples.
    """
    folder, model = session.registry.autoencoder(session.name, name), session.registry.model(session.name)
    if folder is None or not model:
        return pn.Column(widgets.html(_what_is_needed(session, feature, model)), sizing_mode="stretch_width")
    below = box()
    button = pn.widgets.Button(label="Ablate and measure", width=170, variant="outline")

    def start(*_: Any) -> None:
        session.put(ablated=str(feature))
        ask = session.registry.feature_ablation(session.name, folder, feature)
        texts = {"work": "Ablating in the model", "failed": "The ablation cannot be measured"}
        below[:] = [widgets.awaited(ask, lambda results: _results(session, results), **texts)]

    button.on_click(start)
    if session.choice.text("ablated") == str(feature):  # a link to results opens them again
        start()
    return pn.Column(pn.FlexBox(button, widgets.html(_HINT)), below, sizing_mode="stretch_width")


def _what_is_needed(session: Session, feature: int, model: str) -> str:
    """Return HTML of how to measure the ablation of a feature here, and in the terminal."""
    options = f"--model {model or 'MODEL'} --sae NAME=FOLDER"
    command = f"workbench feature-ablation {session.run.path} {feature} --model {model or 'MODEL'} --sae FOLDER"
    return (
        "<p class='wb-muted'>To measure here what the model predicts without this feature, start the dashboard with "
        f"<code>{escape(options)}</code>, where FOLDER is the one that the capture was given; in the terminal: "
        f"<code>{escape(command)}</code></p>"
    )


def _results(session: Session, results: Mapping[str, xr.Dataset]) -> list[Any]:
    """Return the sentences and tables of an ablation."""
    (ds,) = results.values()
    sentences = "".join(f"<p>{escape(line)}</p>" for line in str(ds.attrs["summary"]).splitlines())
    label = f"{session.name}-{ds.attrs['hook']}-{ds.attrs['feature']}-ablation"
    tables = []
    for kind in ds["kind"].values.tolist():
        rows, links = _examples(session, ds, kind)
        folded = kind == "random" and "top" in ds["kind"]
        table = widgets.table(_KINDS[kind], rows, f"{label}-{kind}", {"token": links}, note=_NOTE, collapsed=folded)
        tables.append(table)
    ranked = [
        widgets.table(title, changed_logits(ds.sel(kind=kind)), f"{label}-{kind}-logits", note=_RANKED)
        for kind, title in (("top", "Logits at the largest activations"), ("random", "Logits at the random sample"))
        if kind in ds["kind"]
    ]
    method = widgets.html(f"<p class='wb-muted'>{escape(ds.attrs['method'])} {escape(ds.attrs['not_controlled'])}</p>")
    return [widgets.html(sentences), *tables, widgets.beside(*ranked), method]


def _examples(session: Session, ds: xr.Dataset, kind: str) -> tuple[pd.DataFrame, list[str]]:
    """Return a table of the examples of a kind, and the address of each in its conversation."""
    own = ds.sel(example=ds["example_kind"] == kind)
    texts = {name: [repr(str(text)) for text in own[name].values] for name in ("token", "next_token")}
    rows = pd.DataFrame(
        {
            "token": texts["token"],
            "next token": texts["next_token"],
            "channel": own["channel"].values.astype(str),
            "activation": _rounded(own["activation"], 2),
            "log-probability": _rounded(own["logprob"], 2),
            "change": _rounded(own["change"], 3),
            "change, random": _rounded(own["control_change"], 3),
            "divergence": _rounded(own["kl"], 3),
            "divergence, random": _rounded(own["control_kl"], 3),
        }
    )
    places = zip(own["sequence"].values.tolist(), own["position"].values.tolist(), strict=True)
    links = [session.link("transcript", sequence=str(n), pin=str(at), position="", colour="expert") for n, at in places]
    return rows, links


def changed_logits(ds: xr.Dataset) -> pd.DataFrame:
    """Return the tokens whose logits fall and rise most without the feature. ds: of one kind of examples [rank]."""
    columns = {
        "falls": [repr(str(text)) for text in ds["lowered_text"].values],
        "by (logits)": _rounded(ds["lowered_logit"], 3),
        "rises": [repr(str(text)) for text in ds["raised_text"].values],
        "by (logits) ": _rounded(ds["raised_logit"], 3),
    }
    return pd.DataFrame(columns)


def _rounded(values: xr.DataArray, decimals: int) -> Float[np.ndarray, " row"]:
    """Return rounded numbers, of which no zero has a sign."""
    return np.asarray(values.values.astype(np.float64).round(decimals) + 0.0)
