"""The page of what is stored beside a run: effects of experiments; attribution graphs have a page of their own."""

import math
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

from workbench import registry
from workbench.counting import signed
from workbench.dashboards import content, theme, widgets
from workbench.dashboards.figure_labels import figure_names
from workbench.dashboards.session import Page, Session, box
from workbench.dashboards.stored_results import StoredResults
from workbench.errors import InputError
from workbench.figures.gallery import Gallery, GalleryItem
from workbench.figures.null_distribution import drawable, null_figure
from workbench.studies.result import tables

# names of the effect in a result, and of the limits of its interval
_EFFECTS = (("change", "low", "high"), ("effect", "low", "high"), ("same", "same_low", "same_high"))
_NO_EFFECT = {"largest effect": "–", "95 % interval": "–", "unit": "", "at": "", "intervals excluding zero": "–"}
_NOT_TESTED = _NO_EFFECT | {"largest effect": "not tested"}
_UNITS = {"same": "share of changed answers", "effect": "probability"}  # where a result names none
_MEASURE_UNITS = {
    **dict.fromkeys(("correct", "complete", "refused", "same answer"), "share of answers"),
    **dict.fromkeys(("new tokens", "analysis tokens"), "tokens"),
    "tokens before divergence": "share of tokens",
    "routing flips": "share of routed slots",
}
_STACKED = 3  # figures of an experiment that are shown below each other


def causal(session: Session) -> Page:
    """Return the page of experiments whose results are stored beside the run: effects, intervals and null."""
    stored = session.registry.stored(session.name)
    notes = unreadable_notes(stored)
    if not stored.experiments:
        return Page([], [*_how_to_store(session), *notes])
    titles = {registry.find(name).title: name for name in stored.experiments}
    linked = session.choice.text("experiment")
    first = session.choice.get("experiment", list(titles.values()))
    pick = widgets.wide_select("Experiment", titles, first)
    shown = box()

    def show(*_: Any) -> None:
        session.put(experiment=str(pick.value))
        name = str(pick.value)
        shown[:] = [widgets.guarded(lambda: _readable(name, lambda: _experiment(session, name, stored)))]

    show()
    pick.param.watch(show, "value")

    def summary() -> Any:
        rows = overview_table(stored.experiments)
        unit = rows.pop("unit")
        rows["quantity"] = rows["quantity"].where(unit == "", rows["quantity"] + " (" + unit + ")")
        links = [session.link("causal", experiment=titles[title]) for title in rows["experiment"]]
        note = "The largest effect of each quantity, where it is, and how many of its effects are shown not to be zero"
        name = f"{session.name}-experiments"
        # a link to one experiment shows it first
        return widgets.table("All experiments", rows, name, {"experiment": links}, note=note, collapsed=bool(linked))

    table = widgets.guarded(lambda: _readable("experiments", summary))
    return Page([], [table, pick, shown, *notes])


def _readable(name: str, body: Callable[[], Any]) -> Any:
    """Return what `body` makes of stored results.

    Raises:
        InputError: they are not as experiments write them.
    """
    try:
        return body()
    except InputError:
        raise
    except Exception as error:  # an attribute, a variable or an axis may be missing or another
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(
            f"the results of {name} beside the run are not as `workbench study` writes them ({reason}): "
            "write them again"
        ) from error


def overview_table(experiments: Mapping[str, Mapping[str, xr.Dataset]]) -> pd.DataFrame:
    """Return a row for each result: the largest effect that has an interval, and how many intervals exclude zero.

    A result with several measures, which have different units, has a row for each of them.
    """
    rows = []
    for name, sets in experiments.items():
        for key, ds in sets.items():
            for label, cell in _by_measure(key.replace("_", " "), ds).items():
                rows.append({"experiment": registry.find(name).title, "quantity": label, **_largest(cell)})
    return pd.DataFrame(rows)


def _by_measure(label: str, ds: xr.Dataset) -> dict[str, xr.Dataset]:
    """Return the effects of each measure by its label, without those of controls (further labels of `which`)."""
    own = ds.isel(which=0) if "which" in ds.dims else ds
    if "measure" not in ds.dims:
        return {label: own}
    return {
        measure: own.isel(measure=i).assign_attrs(units=_MEASURE_UNITS.get(measure, ""))
        for i, measure in enumerate(map(str, ds["measure"].values))
    }


def _largest(ds: xr.Dataset) -> dict[str, Any]:
    names = next((names for names in _EFFECTS if set(names) <= set(ds.data_vars)), None)
    if names is None:
        return _NO_EFFECT
    values, low, high = (ds[name].values.astype(float) for name in names)
    if names[0] == "same":  # a share of equal answers: the effect is that of answers that change
        values, low, high = 1 - values, 1 - high, 1 - low
    tested = np.isfinite(values) & np.isfinite(low) & np.isfinite(high)
    if not tested.any():
        return _NOT_TESTED
    at = np.unravel_index(int(np.where(tested, np.abs(values), -1).argmax()), values.shape)
    sure = int((low * high > 0)[tested].sum())
    effect, *limits = _rounded(values[at], low[at], high[at])
    where = zip(map(str, ds[names[0]].dims), at, strict=True)
    return {
        "largest effect": effect,
        "95 % interval": f"[{', '.join(limits)}]",
        "unit": _UNITS["same"] if names[0] == "same" else str(ds.attrs.get("units") or _UNITS.get(names[0], "")),
        "at": ", ".join(_coordinate(ds, axis, int(i)) for axis, i in where),
        # the interval of a share never includes zero
        "intervals excluding zero": "–" if names[0] == "same" else f"{sure} of {int(tested.sum())}",
    }


def _rounded(*numbers: float) -> list[str]:
    """Return an effect and its two limits as text, with the decimals that the width of the interval allows."""
    width = float(numbers[2] - numbers[1])
    decimals = min(6, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3
    return [signed(float(number), decimals) for number in numbers]


def _coordinate(ds: xr.Dataset, axis: str, index: int) -> str:
    """Return where an effect is on one axis: its label, or the name of the axis with a number."""
    value = ds[axis].values[index] if axis in ds.coords else index
    return f"{axis.replace('_', ' ')} {value}" if isinstance(value, int | float | np.number) else str(value)


def _experiment(session: Session, name: str, stored: StoredResults) -> pn.Column:
    """Return the sections of one experiment: question, figures, null distributions, numbers, findings and methods."""
    record, sets = registry.find(name), stored.experiments[name]
    gallery: Gallery = record.load_figures().gallery(sets)
    label = f"{session.name}-{name}"
    return pn.Column(
        widgets.html(f"<h2>{escape(record.title)}</h2><p class='wb-lead'>{escape(record.question)}</p>"),
        widgets.card("Findings", widgets.html(content.findings(sets))),
        *_figures(session, gallery, label),
        *(_null(session, ds, f"{label}-{key}-null") for key, ds in sets.items() if drawable(ds)),
        *(part for key, ds in sets.items() for part in _numbers(ds, key.replace("_", " "), f"{label}-{key}")),
        widgets.card("Methods", widgets.html(content.method(sets)), collapsed=True),
        sizing_mode="stretch_width",
    )


def _figures(session: Session, gallery: Gallery, label: str) -> list[Any]:
    """Return the figures of an experiment or, if there are many, a list that selects one of them."""
    if len(gallery) <= _STACKED:
        return [_drawn(session, item, f"{label}-{key}") for key, item in gallery.items()]
    labels = figure_names(gallery)
    pick = widgets.wide_select("Figure", labels, session.choice.get("figure", list(labels.values())))
    shown = box()

    def show(*_: Any) -> None:
        key = str(pick.value)
        shown[:] = [widgets.guarded(lambda: _drawn(session, gallery[key], f"{label}-{key}"))]

    def picked(*_: Any) -> None:
        session.put(figure=str(pick.value))
        show()

    show()
    pick.param.watch(picked, "value")
    return [pick, shown]


def _drawn(session: Session, item: GalleryItem, name: str) -> pn.Column:
    return widgets.figure(item.draw(theme=session.theme), name, item.table)


def _null(session: Session, ds: xr.Dataset, name: str) -> pn.Column:
    rows = ds[["random"]].to_dataframe().reset_index()
    return widgets.figure(null_figure(ds, theme=session.theme), name, rows.copy)


def _numbers(ds: xr.Dataset, title: str, name: str) -> Iterator[Any]:
    """Yield a folded table for each set of axes; single sequences and random sets are in the files only."""
    shown = ds.drop_vars([variable for variable in ("each", "base", "random", "random_load_ratio") if variable in ds])
    for axes, rows in tables(shown).items():
        texts = rows.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
        axis_names = axes.replace("_", " and ")
        heading = f"{title[:1].upper()}{title[1:]}" + ("" if title == f"{axes}s" else f" by {axis_names}")
        yield widgets.table(heading, texts, f"{name}-{axes}", collapsed=True)


def _how_to_store(session: Session) -> list[Any]:
    """Return how to run an experiment, and a table of those that there are."""
    model = session.registry.model(session.name) or "MODEL"
    command = f"workbench study expert-ablation {session.name}.zarr --model {model} --out results"
    text = (
        "Experiments change the model and measure what follows. Run one in the folder that holds the run, and open "
        "this page again:"
    )
    rows = pd.DataFrame([{"name": record.name, "question": record.question} for record in registry.experiments()])
    return [
        widgets.empty_state("No experiment beside this run", text, command),
        widgets.table("Experiments", rows, "experiments"),
    ]


def unreadable_notes(stored: StoredResults) -> list[Any]:
    """Return notes on what could not be shown of the files beside the run."""
    notes = [theme.note(f"{name} could not be read: {why}", "warning") for name, why in stored.unreadable.items()]
    if stored.omitted:
        notes.append(theme.note(f"{stored.omitted:,} further JSON files beside the run were not read.", "warning"))
    return [widgets.html("".join(notes))] if notes else []
