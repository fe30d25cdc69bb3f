"""The neurons page: the neurons of an expert, and one of them by its largest activations and a random sample.

Both are those that a capture recorded in bounded memory (`--record neurons`), put into their context by the study
`neuron-examples`.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

from workbench import registry
from workbench.counting import signed
from workbench.dashboards import content, widgets
from workbench.dashboards.example_lists import example, list_of
from workbench.dashboards.session import Page, Session, box, missing_record
from workbench.runs import Run
from workbench.studies.layer_experts import layer_experts

_SHOWN = 8  # examples of each channel
_ON_EXPERT_PAGE = 8  # neurons
EFFECTS = {"top_text", "bottom_text", "top_logit", "bottom_logit"}  # variables that `effects_table` reads


def neurons(session: Session) -> Page:
    """Return the page of an expert's neurons. At first it shows the expert with the largest load."""
    run, record = session.run, registry.find("neuron-examples")
    about = [widgets.html(content.about(run)), widgets.html(f"<p class='wb-lead'>{escape(record.question)}</p>")]
    if (missing := missing_record(record, run)) is not None:
        return Page([], [*about, missing])
    layers = [str(layer) for layer in run.spec.neuron_layers]
    layer = widgets.select("Layer", layers, session.choice.get("layer", layers))
    numbers = experts_of(run, int(layer.value))
    expert = widgets.select("Expert", numbers, session.choice.get("expert", numbers, most_used(run, int(layer.value))))
    shown = box()

    def show(*_: Any) -> None:
        session.put(layer=str(layer.value), expert=str(expert.value))
        shown[:] = [examples(session, int(layer.value), int(expert.value))]

    def other_layer(event: Any) -> None:
        before = expert.value
        expert.param.update(options=experts_of(run, int(layer.value)), value=most_used(run, int(layer.value)))
        if expert.value == before:  # otherwise its own change shows the examples
            other_expert(event)

    def other_expert(event: Any) -> None:
        session.put(neuron="")
        show()

    show()
    layer.param.watch(other_layer, "value")
    expert.param.watch(other_expert, "value")
    return Page([layer, expert], [*about, shown])


def experts_of(run: Run, layer: int) -> list[str]:
    """Return the numbers of a layer's experts as text."""
    return [str(i) for i in range(int(layer_experts(run, layer + 1, run.model["num_experts"])[layer]))]


def most_used(run: Run, layer: int) -> str:
    """Return the number of the layer's expert with the largest load."""
    return str(int(run.total("expert_count").sum(("group", "channel")).values[layer].argmax()))


def _asked(session: Session, layer: int, expert: int) -> Any:
    options = {"layer": layer, "expert": expert}
    return session.registry.study("neuron-examples", session.name, exclude=session.exclude, options=options)


def examples(session: Session, layer: int, expert: int) -> pn.Column:
    """Return one neuron by example, and the table of all neurons of the expert, when the study is ready."""

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        ds = results["neurons"]
        rows = table(ds)
        if rows.empty:
            text = f"No token was routed to expert {expert} of layer {layer}. Choose another one in the sidebar."
            return [widgets.empty_state("This expert has no token", text)]
        known = [str(n) for n in rows["neuron"]]
        neuron = int(session.choice.get("neuron", known))
        links = [session.link("neuron-examples", neuron=str(n)) for n in rows["neuron"]]
        note = f"Layer {layer}, expert {expert}; sorted by the largest activation"
        back = session.link("experts", layer=str(layer), expert=str(expert))
        heading = f"<h2>Neuron {neuron} of layer {layer}, expert {expert}</h2>"
        heading += f"<a href='{escape(back)}'>Load, examples and effects of the expert</a>"
        return [
            widgets.html(heading),
            widgets.beside(
                widgets.card("Largest activations", widgets.html(lists(session, ds, neuron, ""))),
                widgets.card("Random sample", widgets.html(lists(session, ds, neuron, "random_"))),
                *logit_effects(session, layer, expert, neuron),
            ),
            widgets.table(
                "Neurons of the expert", rows, f"{session.name}-{layer}-{expert}-neurons", {"neuron": links}, note=note
            ),
            widgets.card("Methods", widgets.html(content.method(results)), collapsed=True),
        ]

    return widgets.awaited(_asked(session, layer, expert), show)


def logit_effects(session: Session, layer: int, expert: int, neuron: int) -> list[Any]:
    """Return a table of the tokens whose logits a neuron raises and lowers directly, or the command that computes them.

    They are those of the experiment expert-logits that is stored beside the run, with its option neuron_layer.
    """
    for name, ds in session.registry.stored(session.name).experiments.get("expert-logits", {}).items():
        known = set(ds) >= EFFECTS and "neuron" in ds.dims
        if name == "neurons" and known and ds.attrs.get("layer") == layer and expert in ds["expert"].values:
            rows = effects_table(ds.sel(expert=expert, neuron=neuron))
            return [widgets.table("Direct effects on logits", rows, f"{session.name}-{layer}-{expert}-{neuron}-logits")]
    command = f"workbench study expert-logits {session.run.path} --model MODEL --option neuron_layer={layer} --out "
    command += f"{Path(str(session.run.path)).stem}-logits"
    text = "The tokens whose logits each neuron raises and lowers are computed from the model, beside the run:"
    return [widgets.empty_state("Direct effects on logits are not computed", text, command)]


def effects_table(cell: xr.Dataset) -> pd.DataFrame:
    """Return the tokens that one neuron or expert raises and lowers directly, the largest effects first."""
    columns = {
        "raises": [repr(str(text)) for text in cell["top_text"].values],
        "by (logits)": cell["top_logit"].values.astype(float).round(3),
        "lowers": [repr(str(text)) for text in cell["bottom_text"].values],
        "by (logits) ": cell["bottom_logit"].values.astype(float).round(3),
    }
    return pd.DataFrame(columns)


def strongest(session: Session, layer: int, expert: int) -> list[Any]:
    """Return the section of the expert page with its most active neurons; nothing if none is recorded."""
    if layer not in getattr(session.run.spec, "neuron_layers", ()):
        return []

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        rows = table(results["neurons"]).head(_ON_EXPERT_PAGE)
        links = [session.link("neuron-examples", neuron=str(n)) for n in rows["neuron"]]
        name = f"{session.name}-{layer}-{expert}-strongest"
        return [widgets.table("Neurons with largest activations", rows, name, {"neuron": links})]

    return [widgets.awaited(_asked(session, layer, expert), show)]


def table(ds: xr.Dataset) -> pd.DataFrame:
    """Return a row for each neuron with an example in content: its largest activation, and where that is."""
    own = ds.sel(channel=[name for name in ds["channel"].values.tolist() if name != "frame"])
    columns = ["neuron", "activation", "channel", "at token"]
    if not own.sizes["channel"]:
        return pd.DataFrame(columns=columns)
    parts = ["sequence", "activation", "before", "token", "after", "largest"]
    first = own[parts].isel(neuron_example=0).transpose("channel", "neuron")
    best = np.where(first["sequence"].values >= 0, first["largest"].values, -1).argmax(0)
    number = np.arange(len(best))
    activation, before, token, after = (
        first[name].values[best, number].tolist() for name in ("activation", "before", "token", "after")
    )
    channels = own["channel"].values[best].tolist()
    rows = [
        [neuron, round(float(activation[i]), 2), str(channels[i]), f"{before[i][-24:]}[{token[i]}]{after[i]}"]
        for i, neuron in enumerate(own["neuron"].values.tolist())
        if token[i]
    ]
    rows_table = pd.DataFrame(rows, columns=columns)
    order = np.argsort(-rows_table["activation"].abs().to_numpy(), kind="stable")
    return rows_table.iloc[order].reset_index(drop=True)


def lists(session: Session, ds: xr.Dataset, neuron: int, kind: str) -> str:
    """Return HTML of a neuron's examples by channel, each with its activation; each opens its conversation.

    The larger its activation, the darker the token. kind: "" for the largest activations, "random_" for the random
    sample.
    """
    parts = []
    largest = max(float(ds["largest"].sel(neuron=neuron).max()), 1e-9)
    for channel in [name for name in ds["channel"].values.tolist() if name != "frame"]:
        rows = example_rows(ds, neuron, kind, channel)[:_SHOWN]
        values = [float(row["activation"]) for row in rows]
        items = [
            example(session, row, signed(value, 2), strength=abs(value) / largest)
            for row, value in zip(rows, values, strict=True)
        ]
        if items:
            parts.append(f"<h3>{escape(channel)}</h3>{list_of(items)}")
    return "".join(parts) or "<p class='wb-muted'>No content tokens.</p>"


def example_rows(ds: xr.Dataset, neuron: int, kind: str, channel: str) -> list[dict[str, Any]]:
    """Return the examples of a neuron in a channel: activation, sequence, position, before, token and after."""
    cell = ds.sel(channel=channel)
    names = ("activation", "sequence", "position", "before", "token", "after")
    columns = {}
    for name in names:
        values = cell[f"{kind}{name}"]
        columns[name] = (values.sel(neuron=neuron) if "neuron" in values.dims else values).values.tolist()
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row for row in rows if int(row["sequence"]) >= 0]
