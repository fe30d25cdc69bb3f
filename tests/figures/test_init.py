"""A difference has one value, interval, q and verdict in summary, files, figures, report and dashboard."""

import base64
import io
import json
import re
from collections.abc import Mapping
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench import registry
from workbench.dashboards import content
from workbench.errors import InputError
from workbench.figures import report
from workbench.figures.gallery import Gallery, GalleryItem
from workbench.studies import run_study
from workbench.studies.result import files_of, from_json
from workbench.studies.result import summary as summary_text

Cell = tuple[float, ...]  # difference, low, high, q, verdict
Numbers = Mapping[tuple[int, int], Cell]
Results = dict[str, dict[str, xr.Dataset]]
NAMES = ("difference", "low", "high", "q", "different")
OF_ROUTING = dict(
    zip(NAMES, ("difference", "difference_low", "difference_high", "difference_q", "expert_different"), strict=True)
)
FEW = {"n_boot": 20, "n_permutations": 99}  # of the parts of studies that are not compared here
LINE = re.compile(
    r"layer (\d+) (?:expert|head) (\d+)[:,] .*?([+-]?\d+\.\d) (?:points )?\[([+-]?\d+\.\d), ([+-]?\d+\.\d)\]"
)


@pytest.fixture(scope="module")
def results() -> Results:
    """Results of every registered study that this run, or this run with itself, has the records for."""
    run, studies = wb.open_run(DATA / "demo.zarr"), {}
    for record in registry.studies():
        options = {name: n for name, n in FEW.items() if name in record.options}
        try:
            studies[record.name] = run_study(record.name, *[run] * record.runs, **options)
        except InputError:
            continue
    return studies


def comparisons(sets: Mapping[str, xr.Dataset]) -> list[tuple[str, str, xr.Dataset]]:
    """Return dataset, control, and the cells under the names of `NAMES`, of every comparison by layer of a study."""
    compared = []
    for name, ds in sets.items():
        if "layer" in ds.dims and "control" in ds.dims and set(NAMES) <= set(ds.data_vars):
            compared += [(name, c, ds.sel(control=c)) for c in map(str, ds["control"].values)]
        elif "expert_different" in ds:
            compared.append((name, "", renamed(ds)))
    return compared


def renamed(ds: xr.Dataset) -> xr.Dataset:
    return ds[[*OF_ROUTING.values()]].rename({v: k for k, v in OF_ROUTING.items() if k != v})


def of_dataset(cells: xr.Dataset) -> Numbers:
    values = [cells[name].values.astype(float) for name in NAMES]
    return {(i, j): tuple(float(v[i, j]) for v in values) for i, j in np.ndindex(values[0].shape)}


def of_table(rows: pd.DataFrame, control: str) -> Numbers:
    rows = rows[rows["control"] == control] if control and "control" in rows else rows
    names = OF_ROUTING if "expert_different" in rows else dict(zip(NAMES, NAMES, strict=True))
    column = "expert" if "expert" in rows else "head"
    return {
        (int(row["layer"]), int(row[column])): tuple(float(row[names[name]]) for name in NAMES)
        for row in rows.to_dict("records")
    }


def array(values: Any) -> np.ndarray:
    """Return numbers of a figure, also those that a page holds as base64."""
    if not isinstance(values, dict):
        return np.array(values, dtype=float)
    numbers = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return numbers.reshape([int(n) for n in values["shape"].split(",")])


def of_heatmap(figure: go.Figure) -> Numbers:
    """Numbers under the pointer, of points as fractions; cells shown to differ are those of the first trace."""
    z, detail = array(figure.data[0].z), np.array(figure.data[0].customdata, dtype=object)[..., :6].astype(float)
    return {
        (i, j): (*(detail[i, j, :3] / 100), float(detail[i, j, 5]), float(np.isfinite(z[i, j])))
        for i, j in np.ndindex(z.shape)
    }


def differing(first: Numbers, second: Numbers) -> list[str]:
    problems = [f"{place} is missing" for place in first.keys() ^ second.keys()]
    for place in first.keys() & second.keys():
        problems += [
            f"{name} of {place}: {x} and {y}"
            for name, x, y in zip(NAMES, first[place], second[place], strict=True)
            if not np.isclose(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)
        ]
    return problems


def wrong_lines(cells: list[xr.Dataset], text: str) -> list[str]:
    """Return the lines that name a cell with numbers that no control has, or one that is not shown to differ."""
    numbers, lines = [of_dataset(one) for one in cells], []
    for line in text.splitlines():
        if match := LINE.search(line):
            layer, column, *shown = match.groups()
            place = (int(layer), int(column))
            texts = [[f"{100 * v:+.1f}" for v in one[place][:3]] for one in numbers if one.get(place, [0] * 5)[4]]
            if shown not in texts:
                lines.append(line)
    return lines


def item_of(gallery: Gallery, name: str, control: str) -> GalleryItem:
    end = {"none": "naive", "position": "matched"}.get(control, control.replace(" ", "_"))
    return gallery[f"{name}_{end}" if control else f"difference_{name}"]


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "\n", re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)))


def wrong(study: str, sets: dict[str, xr.Dataset]) -> dict[str, list[str]]:
    """Return what differs from the datasets in each place where the results of a study are shown."""
    problems_of: dict[str, list[str]] = {}
    files, gallery = files_of(sets), registry.find(study).load_figures().gallery(sets)
    html = "".join(report.section(study, sets))
    in_report = dict(re.findall(r'<script type="application/json" id="([^"]*)-light">(.*?)</script>', html, re.DOTALL))

    def note(place: str, problems: list[str]) -> None:
        problems_of[place] = problems_of.get(place, []) + problems

    for name, control, cells in comparisons(sets):
        expected = of_dataset(cells)
        stored = from_json(json.loads(files[f"{study}_{name}.json"]))
        note("JSON", differing(expected, of_dataset(stored.sel(control=control) if control else renamed(stored))))
        dims = "_".join([*(["control"] if control else []), *map(str, cells["difference"].dims)])
        rows = pd.read_csv(io.StringIO(files[f"{study}_{name}_{dims}.csv"]))
        note("CSV", differing(expected, of_table(rows, control)))
        if not np.isfinite(cells["low"]).any() or control == "token":
            continue
        item = item_of(gallery, name, control)
        for theme in ("light", "dark"):
            note("figure", differing(expected, of_heatmap(item.draw(theme=theme))))
        note("dashboard's table", differing(expected, of_table(item.table(), control)))
        label = next(label for label, own in gallery.items() if own is item)
        if text := in_report.get(f"{study}_{label}"):
            note("report's figure", differing(expected, of_heatmap(plotly.io.from_json(text))))
    note("report", wrong_lines([cells for _, _, cells in comparisons(sets)], text_of(html)))
    by_name = {name: [cells for n, _, cells in comparisons(sets) if n == name] for name, _, _ in comparisons(sets)}
    for name, cells in by_name.items():
        one = {name: sets[name]}
        note("summary", wrong_lines(cells, summary_text(one)))
        note("dashboard", wrong_lines(cells, text_of(content.findings(one))))
    return problems_of


STUDIES = ("routing", "sinks", "channels", "effort", "risk-difference", "sink-difference", "compare")


def test_studies_with_comparisons_are_these(results: Results) -> None:
    assert {study for study, sets in results.items() if comparisons(sets)} == set(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_every_place_has_the_numbers_of_the_dataset(results: Results, study: str) -> None:
    problems_of = wrong(study, results[study])
    assert {place: problems[:3] for place, problems in problems_of.items() if problems} == {}
    expected = {"JSON", "CSV", "figure", "dashboard's table", "summary", "report", "dashboard"}
    assert expected <= problems_of.keys()
    if study != "compare":  # a run does not differ from itself
        assert LINE.search(summary_text(results[study])), "lines with numbers are compared"
        assert LINE.search(text_of("".join(report.section(study, results[study]))))


@pytest.mark.parametrize(
    ("place", "variable", "change"),
    [
        ("figure", "difference", 0.001),
        ("dashboard's table", "low", 0.001),
        ("CSV", "q", 0.5),
        ("JSON", "different", 1.0),
        ("summary", "high", 0.01),
    ],
)
def test_another_number_in_one_place_is_noticed(results: Results, place: str, variable: str, change: float) -> None:
    """Negative control: what is compared differs in one number."""
    name, _, cells = comparisons(results["channels"])[0]
    expected, other = of_dataset(cells), cells.copy(deep=True)
    at = np.unravel_index(
        int(np.argmax(np.abs(cells["difference"].values) * cells["different"].values)), cells["q"].shape
    )
    values = other[variable].values
    values[at] = not values[at] if variable == "different" else values[at] + change
    if place == "summary":
        assert wrong_lines([other], summary_text({name: results["channels"][name]}))
        return
    shown = {n: other[n].values.astype(float) for n in NAMES}
    broken = {p: tuple(float(shown[n][p]) for n in NAMES) for p in expected}
    assert differing(expected, broken) == [
        f"{variable} of {tuple(map(int, at))}: "
        f"{expected[at][NAMES.index(variable)]} and {broken[at][NAMES.index(variable)]}"
    ]
