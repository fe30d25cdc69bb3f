"""Results of studies and experiments for one expert: load with intervals, examples, tokens and measured effects."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

from workbench import registry
from workbench.counting import signed_interval
from workbench.dashboards import content, widgets
from workbench.dashboards.example_lists import example, list_of
from workbench.dashboards.label_field import label_field
from workbench.dashboards.neurons_page import EFFECTS, effects_table
from workbench.dashboards.session import Page, Selectors, Session, missing_record, study
from workbench.errors import InputError
from workbench.studies import expert_labels
from workbench.studies.label_files import cleaned
from workbench.studies.layer_experts import layer_experts
from workbench.studies.quick_look import ALL

_SHOWN = 8  # examples of each kind
_LABEL = ["layer", "expert", "label"]


def load_with_intervals(session: Session, layer: int, expert: int) -> pn.Column:
    """Return the section with the load of an expert by channel and effort, with intervals, when the study is ready."""

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        n_experts = layer_experts(session.run, layer + 1, session.run.model["num_experts"])[layer]
        rows = load_table(results["load"], layer, expert, int(n_experts))
        name = f"{session.name}-layer-{layer}-expert-{expert}-load-intervals"
        note = "Load relative to uniform in all tasks; square brackets: 95 % intervals, from five prompts on"
        return [widgets.table("Load with confidence intervals", rows, name, note=note)]

    return widgets.awaited(session.registry.study("routing", session.name, exclude=session.exclude), show)


def load_table(load: xr.Dataset, layer: int, expert: int, n_experts: int) -> pd.DataFrame:
    """Return the load relative to uniform with its interval as text: rows are channels, columns are efforts."""
    cell = load.sel(layer=layer, expert=expert)
    values = np.stack(
        [cell[name].transpose("channel", "effort").values for name in ("share", "share_low", "share_high")]
    )
    values = values * n_experts
    texts = [
        ["–" if np.isnan(row[0]) else _with_interval(*row) for row in values[:, i].T]
        for i in range(load.sizes["channel"])
    ]
    table = pd.DataFrame(texts, columns=[str(e) for e in load["effort"].values])
    table.insert(0, "channel", [str(c) for c in load["channel"].values])
    return table[(table.drop(columns="channel") != "–").any(axis=1)]


def _with_interval(value: float, low: float, high: float) -> str:
    """Return a load with its interval, or alone where too few prompts give none."""
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def examples(session: Session, chosen: Selectors) -> pn.Column:
    """Return the section with examples of an expert and its over-represented tokens, when the study is ready."""
    layer, expert = chosen.number("layer"), chosen.number("expert")
    try:
        registry.find("expert-examples").check_recorded(session.run)
    except InputError as error:
        return pn.Column(widgets.alert(str(error), "info"))

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        ds = results["examples"].sel(layer=layer, expert=expert)
        parts: list[Any] = [label_editor(session, results["examples"], layer, expert)]
        title = f"Examples in {chosen['channel']}" if chosen["channel"] != ALL else "Examples in all channels"
        note = "All efforts and tasks. An example opens its conversation at the token."
        text = "".join(_list(session, ds, kind, chosen["channel"]) for kind in ("top", "random"))
        parts.append(widgets.card(title, widgets.html(text), note=note))
        parts += forbid_link(session, ds, layer, expert)
        rows, omitted = tokens_table(ds)
        if len(rows) or omitted:
            name = f"{session.name}-layer-{layer}-expert-{expert}-tokens"
            note = "Tokens that this expert processes more often than other tokens; square brackets: 95 % intervals"
            if omitted:
                s = "" if omitted == 1 else "s"
                note += f". Not shown: {omitted} token{s} whose interval includes zero or has no limits"
            title = "Over-represented tokens"
            none = widgets.html("<p class='wb-muted'>No interval excludes zero.</p>")
            parts.append(
                widgets.table(title, rows, name, note=note) if len(rows) else widgets.card(title, none, note=note)
            )
        return parts

    return widgets.awaited(session.registry.study("expert-examples", session.name, exclude=session.exclude), show)


def expert_gallery(session: Session) -> Page:
    """Return the page of all experts: label, load by channel, an example of each, and the study's results."""
    run, record = session.run, registry.find("expert-examples")
    about = [widgets.html(content.about(run)), widgets.html(f"<p class='wb-lead'>{escape(record.question)}</p>")]
    if (missing := missing_record(record, run)) is not None:
        return Page([], [*about, missing])

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        rows = gallery_table(results["examples"], expert_labels.read(run))
        links = [
            session.link("experts", layer=str(layer), expert=str(expert), channel="all")
            for layer, expert in zip(rows["layer"], rows["expert"], strict=True)
        ]
        return [widgets.table("All experts", rows, f"{session.name}-experts", {"label": links, "example": links})]

    ask = session.registry.study("expert-examples", session.name, exclude=session.exclude)
    return Page([], [*about, widgets.awaited(ask, show), *study(session, "expert-examples", heading="Results")])


def gallery_table(examples: xr.Dataset, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Return a row for each expert that has a token: label, strongest example, and load in analysis and final."""
    known = expert_labels.automatic(examples) if labels is None else labels
    text = {(int(layer), int(expert)): str(label) for layer, expert, label in known[_LABEL].itertuples(index=False)}
    content_channels = [name for name in examples["channel"].values.tolist() if name != "frame"]
    own = examples.sel(channel=content_channels)
    first = own.isel(example=0)  # the largest gate weight of each channel
    gate = np.where(first["top_sequence"].values >= 0, first["top_gate"].values, -1)
    parts = {name: first[f"top_{name}"].values for name in ("before", "token", "after")}
    lift = {c: own["channel_lift"].sel(channel=c).values for c in ("analysis", "final") if c in content_channels}
    rows = []
    for layer, expert in np.argwhere((gate >= 0).any(0)).tolist():
        best = int(gate[:, layer, expert].argmax())
        before, token, after = (str(parts[name][best, layer, expert]) for name in ("before", "token", "after"))
        number = int(own["layer"].values[layer]), int(own["expert"].values[expert])
        rows.append(
            {"layer": number[0], "expert": number[1], "label": text.get(number, "")}
            | {"example": f"{before[-24:]}[{token}]{after}"}
            | {f"{c} (× mean load)": round(float(values[layer, expert]), 2) for c, values in lift.items()}
        )
    return pd.DataFrame(rows)


def label_editor(session: Session, examples: xr.Dataset, layer: int, expert: int) -> pn.Column:
    """Return the label of an expert with a field that changes it in the run's file of labels.

    A dashboard that others can reach shows the label only. Labels proposed by a model have their detection score.
    """
    run = session.run
    labels = expert_labels.read(run)
    rows = expert_labels.automatic(examples) if labels is None else labels
    own = rows[(rows["layer"] == layer) & (rows["expert"] == expert)]
    label = str(own["label"].iloc[0]) if len(own) else ""
    text = ""
    if len(own) and label == own["proposed"].iloc[0] and np.isfinite(own["score"].iloc[0]):
        score, low, high = (100 * float(own[name].iloc[0]) for name in ("score", "score_low", "score_high"))
        text += f"<p class='wb-muted'>Proposed by {escape(str(own['proposed_by'].iloc[0]))}; "
        text += f"held-out detection {score:.0f} % [{low:.0f}, {high:.0f}]</p>"
    if not session.registry.editable or "://" in str(run.path):
        return pn.Column(widgets.html(f"<p><b>Label</b> {escape(label) or '–'}</p>{text}"))
    title = "Label of this expert" if labels is not None else "Label of this expert (automatic, until you save one)"

    def store(new: str) -> Path:
        return session.registry.put_label(session.name, examples, layer, expert, cleaned(new))

    field = label_field(title, label, store)
    return pn.Column(*([widgets.html(text)] if text else []), field, sizing_mode="stretch_width")


def logit_effects(session: Session, layer: int, expert: int) -> list[Any]:
    """Return a table of the tokens whose logits the expert raises and lowers; none if expert-logits is not stored."""
    sets = session.registry.stored(session.name).experiments.get("expert-logits", {})
    ds = sets.get("logits")
    if ds is None or not set(ds) >= EFFECTS:
        return []
    cell = ds.isel(layer=layer, expert=expert)
    if int(cell["tokens"]) == 0:
        return []
    note = "Mean over the expert's tokens of what its output adds to each logit directly"
    name = f"{session.name}-{layer}-{expert}-logits"
    return [widgets.table("Direct effects on logits", effects_table(cell), name, note=note)]


def forbid_link(session: Session, ds: xr.Dataset, layer: int, expert: int) -> list[Any]:
    """Return a link to the page Live that asks the question of the strongest example with the expert forbidden.

    It is empty if the dashboard has no model, or the expert no example.
    """
    rows = example_rows(ds, "top", ALL)
    model = session.registry.served_model
    if not rows or not model:
        return []
    number = int(rows[0]["sequence"])
    row = session.run.sequences.loc[number]
    try:
        asked = [m["text"] for m in session.run.conversation(number) if m["role"] == "user"]
    except InputError:
        return []
    if not asked:
        return []
    recipe: dict[str, Any] = {"recipe": 1, "user": asked[-1], "model": model}
    recipe |= {"effort": str(row["effort"])} if row["effort"] else {}
    recipe["interventions"] = [{"kind": "forbid", "cells": [[layer, expert]]}]
    values = {"theme": "dark"} if session.theme == "dark" else {}
    query = urlencode(values | {"recipe": json.dumps(recipe, ensure_ascii=False)})
    text = f"<a href='{escape(session.address('live', query))}'>Forbid this expert on the page Live</a>"
    return [widgets.html(f"<p>{text} <span class='wb-muted'>with the question of its strongest example</span></p>")]


def _list(session: Session, ds: xr.Dataset, kind: str, channel: str) -> str:
    """Return HTML of the examples of a kind, the largest gate weight first; each opens its conversation."""
    title = {"top": "Largest gate weights", "random": "Random sample"}[kind]
    rows = example_rows(ds, kind, channel)
    if not rows:
        return f"<h3>{title}</h3><p class='wb-muted'>No token of this channel was routed to the expert.</p>"
    items = [example(session, row, f"{row['channel']}, gate {row['gate']:.2f}") for row in rows[:_SHOWN]]
    return f"<h3>{title}</h3>{list_of(items)}"


def example_rows(ds: xr.Dataset, kind: str, channel: str) -> list[dict[str, Any]]:
    """Return the examples of one expert as rows, those of all channels or of one, by gate weight."""
    rows = []
    for name in map(str, ds["channel"].values):
        if channel not in (ALL, name) or (channel == ALL and name == "frame"):
            continue
        cell = ds.sel(channel=name)
        for i in range(ds.sizes["example"]):
            values = {part: cell[f"{kind}_{part}"].values[i] for part in ("sequence", "position", "gate")}
            if int(values["sequence"]) < 0:
                continue
            texts = {part: str(cell[f"{kind}_{part}"].values[i]) for part in ("before", "token", "after")}
            rows.append(
                {"channel": name, "sequence": int(values["sequence"]), "position": int(values["position"])}
                | {"gate": float(values["gate"])}
                | texts
            )
    return sorted(rows, key=lambda row: -row["gate"])


def tokens_table(ds: xr.Dataset) -> tuple[pd.DataFrame, int]:
    """Return the over-represented tokens of one expert with log-odds and intervals, and how many were left out.

    Those whose interval includes zero are left out. The largest lower limit comes first.
    """
    rows, omitted = [], 0
    for i in np.argsort(-ds["token_log_odds_low"].values, kind="stable"):
        if int(ds["token_id"].values[i]) < 0:
            continue
        odds, low, high = (float(ds[f"token_log_odds{end}"].values[i]) for end in ("", "_low", "_high"))
        if not low > 0:  # NaN: too few prompts for an interval
            omitted += 1
            continue
        rows.append(
            {
                "token": str(ds["token_text"].values[i]),
                "log-odds (nat)": signed_interval(odds, low, high, 2),
                "occurrences": int(ds["token_count"].values[i]),
                "prompts": int(ds["token_prompts"].values[i]),
            }
        )
    columns = ["token", "log-odds (nat)", "occurrences", "prompts"]
    return pd.DataFrame(rows, columns=columns), omitted


def measured_effects(session: Session, layer: int, expert: int) -> list[Any]:
    """Return a table of what experiments that are stored beside the run measured of an expert; none without."""
    rows, links = [], []
    for name, sets in session.registry.stored(session.name).experiments.items():
        for ds in sets.values():
            if (
                "change" in ds
                and set(map(str, ds["change"].dims)) == {"layer", "expert"}
                and {"low", "high"} <= set(ds)
            ):
                change, low, high = (
                    float(ds[part].isel(layer=layer, expert=expert)) for part in ("change", "low", "high")
                )
                if not np.isfinite(low * high):
                    continue  # the experiment measured nothing of this expert
                effect = f"{signed_interval(change, low, high, 3)} {ds.attrs.get('units', '')}"
                rows.append({"experiment": registry.find(name).title, "effect [95 % interval]": effect})
                links.append(session.link("causal", experiment=name))
    if not rows:
        return []
    name = f"{session.name}-{layer}-{expert}-effects"
    return [widgets.table("Measured effects", pd.DataFrame(rows), name, {"experiment": links})]
