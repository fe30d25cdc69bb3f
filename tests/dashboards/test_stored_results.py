"""Results beside a run are found by the run's digest; what is of another run, hidden or unreadable is not shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from workbench.dashboards import results_pages
from workbench.dashboards.stored_results import stored_beside
from workbench.studies.result import save


def effects(digest: str, *, study: str = "sink-ablation", shift: float = 0.0) -> xr.Dataset:
    """A result as experiments store it: two interventions, one with an interval that excludes zero."""
    values = {"change": [-2.0 + shift, 0.1], "low": [-3.0 + shift, -0.2], "high": [-1.0 + shift, 0.4]}
    attrs = {"study": study, "title": "Without sinks", "summary": "s", "method": "m", "not_controlled": "n"}
    return xr.Dataset(
        {name: (("intervention",), np.array(v)) for name, v in values.items()},
        {"intervention": ["all", "one"]},
        attrs | {"run_digest": digest, "workbench_version": "0", "seed": 0, "units": "nat"},
    )


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "r.zarr"
    path.mkdir(parents=True)
    return path


def test_results_of_the_run_are_found_and_those_of_another_are_not(run_path: Path) -> None:
    save({"sinks": effects("mine")}, run_path.parent / "results")
    save({"sinks": effects("another")}, run_path.parent / "others")
    save({"own": effects("mine", study="routing")}, run_path.parent / "studies")  # no experiment
    experiments = stored_beside(run_path, "mine").experiments
    assert {name: list(sets) for name, sets in experiments.items()} == {"sink-ablation": ["sinks"]}
    np.testing.assert_array_equal(experiments["sink-ablation"]["sinks"]["change"], [-2.0, 0.1])
    assert stored_beside(run_path, "nobody's").experiments == {}


def test_a_result_that_is_replaced_is_read_again(run_path: Path) -> None:
    save({"sinks": effects("mine")}, run_path.parent / "results")
    assert stored_beside(run_path, "mine").experiments
    save({"sinks": effects("mine", shift=1.0)}, run_path.parent / "results", overwrite=True)
    assert float(stored_beside(run_path, "mine").experiments["sink-ablation"]["sinks"]["change"][0]) == -1.0


def test_what_cannot_be_read_is_named_and_what_is_hidden_or_linked_is_passed_over(run_path: Path) -> None:
    folder = run_path.parent
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    (folder / "deep.json").write_text("[" * 1000)
    (folder / "result.json").write_text(json.dumps({"attrs": {"study": "sink-ablation"}, "data_vars": 3}))
    (folder / ".hidden.json").write_text("{")
    secret = folder.parent / "secret.json"
    secret.write_text(json.dumps({"nodes": [], "links": [], "metadata": {}}))
    (folder / "link.json").symlink_to(secret)
    (run_path / "zarr.json").write_text("{")
    stored = stored_beside(run_path, "mine")
    assert set(stored.unreadable) == {"broken.json", "deep.json", "result.json"}
    assert stored.graphs == {}, "a link may lead anywhere"


def test_the_table_of_experiments_names_the_largest_effect_and_counts_intervals() -> None:
    table = results_pages.overview_table({"sink-ablation": {"sinks": effects("mine")}})
    row: dict[str, Any] = table.to_dict("records")[0]
    assert row["largest effect"] == "-2.0"
    assert row["95 % interval"] == "[-3.0, -1.0]"
    assert row["at"] == str(effects("mine")["intervention"].values[0])
    assert row["intervals excluding zero"] == "1 of 2"


def test_an_effect_without_an_interval_is_not_the_largest() -> None:
    ds = effects("mine").copy(deep=True)
    for limit in ("low", "high"):
        ds[limit][int(np.argmax(np.abs(ds["change"].values)))] = np.nan
    row: dict[str, Any] = results_pages.overview_table({"sink-ablation": {"sinks": ds}}).to_dict("records")[0]
    assert row["largest effect"] != "-2.0", "a negative control is the test above: with its interval it is"
    assert "nan" not in row["95 % interval"]
    assert row["intervals excluding zero"].endswith("of 1")


def test_each_measure_has_a_row_in_its_own_unit_and_effects_of_controls_have_none() -> None:
    change = np.array([[0.1, 30.0], [-0.2, 10.0]])
    cells = ("intervention", "measure")
    variables = {name: (cells, change + shift) for name, shift in (("change", 0.0), ("low", -0.05), ("high", 0.05))}
    ds = xr.Dataset(variables, {"measure": ["correct", "new tokens"]}, effects("mine").attrs)
    rows = results_pages.overview_table({"generated-answers": {"answers": ds}}).to_dict("records")
    assert [(row["quantity"], row["largest effect"], row["unit"]) for row in rows] == [
        ("correct", "-0.20", "share of answers"),
        ("new tokens", "+30.00", "tokens"),
    ]
    with_controls = xr.concat([effects("mine"), effects("mine", shift=-50.0)], "which")
    row = results_pages.overview_table({"steering": {"direction": with_controls}}).to_dict("records")[0]
    assert row["largest effect"] == "-2.0", "negative control: the control's own is -52"


def test_a_share_of_equal_answers_is_shown_as_the_share_of_changed_ones() -> None:
    """The largest effect is where fewest answers stay the same; no interval of a share includes zero."""
    values = {"same": [0.7, 0.1], "same_low": [0.4, 0.05], "same_high": [0.9, 0.3]}
    ds = xr.Dataset({name: ("change", np.array(v)) for name, v in values.items()}, attrs={"units": "nat"})
    row = results_pages.overview_table({"chain-of-thought": {"cot": ds}}).to_dict("records")[0]
    assert (row["largest effect"], row["95 % interval"]) == ("+0.90", "[+0.70, +0.95]")
    assert (row["unit"], row["intervals excluding zero"]) == ("share of changed answers", "–")


@pytest.mark.parametrize(
    ("numbers", "texts"),
    [
        ((-3.65, -30.1, 2.78), ["-4", "-30", "+3"]),
        ((0.00208, -0.0023, 0.0203), ["+0.002", "-0.002", "+0.020"]),
        ((-1e-9, -0.01, 0.01), ["0.000", "-0.010", "+0.010"]),
    ],
)
def test_an_effect_has_the_digits_that_its_interval_allows(numbers: tuple[float, ...], texts: list[str]) -> None:
    assert results_pages._rounded(*numbers) == texts
    assert [f"{number:+.3g}" for number in numbers] != texts, "negative control: three digits of each"
