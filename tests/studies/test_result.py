"""Files of a study: complete, readable by anything, and never half-written."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from workbench.counting import signed_interval
from workbench.errors import InputError
from workbench.studies import result
from workbench.studies.routing import study
from workbench.studies.synthetic import planted_run


@pytest.fixture(scope="module")
def datasets():
    return study(planted_run(n_prompts=8, efforts=("low", "high")), n_boot=50, n_permutations=50)


def test_tables_hold_every_number_once(datasets):
    load = datasets["load"]
    tables = result.tables(load)
    assert set(tables) == {"channel_effort", "channel_effort_layer", "channel_effort_layer_expert"}
    table = tables["channel_effort_layer_expert"]
    assert len(table) == load.share.size
    row = table[(table.channel == "final") & (table.effort == "high") & (table.layer == 3) & (table.expert == 5)]
    assert row.share.item() == load.share.sel(channel="final", effort="high", layer=3, expert=5).item()
    assert table[table.channel == "commentary"].share.isna().all()


def test_saved_files_hold_the_same_numbers(datasets, tmp_path):
    paths = result.save(datasets, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths}
    excess = datasets["analysis_vs_final"].excess.values
    table = pd.read_csv(tmp_path / "out" / "routing_analysis_vs_final_layer.csv")
    np.testing.assert_array_equal(table.excess, excess)
    stored = json.loads((tmp_path / "out" / "routing_analysis_vs_final.json").read_text())
    assert stored["data_vars"]["excess"]["data"] == excess.tolist()
    assert stored["data_vars"]["excess"]["attrs"]["units"] == "bit"
    assert stored["attrs"]["run_digest"] == "synthetic-0"
    assert (tmp_path / "out" / "routing.txt").read_text() == result.summary(datasets)


def test_json_writes_missing_as_null_and_nothing_else_that_is_not_json(datasets, tmp_path):
    result.save(datasets, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    stored = json.loads((tmp_path / "routing_load.json").read_text(), parse_constant=refuse)
    channels = stored["coords"]["channel"]["data"]
    assert stored["data_vars"]["entropy"]["data"][channels.index("commentary")][0][0] is None


def test_saving_again_replaces_its_own_files_only(datasets, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result.save(datasets, tmp_path)
    with pytest.raises(InputError, match="exists"):
        result.save(datasets, tmp_path)
    result.save(datasets, tmp_path, overwrite=True)
    (tmp_path / "routing.txt").write_text("edited")
    with pytest.raises(InputError, match="changed since"):
        result.save(datasets, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "routing.txt").read_text() == "edited"


def test_a_file_instead_of_the_directory_is_refused(datasets, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        result.save(datasets, tmp_path / "out")


def test_a_table_has_no_text_that_spreadsheets_take_for_a_formula():
    table = pd.DataFrame({"token": ["=", "=HYPERLINK(1)", "-2", "@x", "a=b", None], "value": [-1.5, 2, 3, 4, 5, 6]})
    text = result.csv_text(table)
    again = pd.read_csv(io.StringIO(text), dtype={"token": str})
    assert again.token.tolist()[:5] == ["'=", "'=HYPERLINK(1)", "'-2", "'@x", "a=b"]
    assert again.value.tolist() == table.value.tolist(), "numbers stay numbers"
    assert table.token[0] == "=", "the table itself is unchanged"
    assert "\n=," in table.to_csv(index=False), "the negative control"
    difference = signed_interval(0.31, -0.02, 0.64, 2)
    ends = pd.DataFrame({"difference": [difference, f"{difference}+cmd"]})
    assert list(pd.read_csv(io.StringIO(result.csv_text(ends))).difference) == [difference, f"'{difference}+cmd"]


def test_few_prompts_are_named_by_those_that_a_result_rests_on():
    """Negative controls: enough prompts, and intervals that are not over prompts."""

    def summary(n: int, **attrs: object) -> str:
        one = xr.Dataset(attrs={"summary": "A line.", **attrs})
        result.name_few_prompts(one, n)
        return str(one.attrs["summary"])

    assert "only 10 prompts" in summary(30, prompts=10), "the half that was measured"
    assert "only 12 prompts" in summary(12)
    assert summary(30) == summary(30, prompts=25) == summary(5, intervals_over="samples") == "A line."


def test_a_folder_of_results_may_hold_what_is_no_file(tmp_path: Path) -> None:
    one = xr.Dataset({"value": ("x", [1.0])}, attrs={"study": "routing"})
    (tmp_path / "routing_load.json").write_text(json.dumps(one.to_dict()))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    assert list(result.load(tmp_path)["routing"]) == ["load"]


def test_limits_of_an_interval_are_described_by_what_they_limit() -> None:
    definitions = {
        "load": result.Definition("expert load", "1", "a mean", ci="95 %", null="1/E"),
        "tokens_low": result.Definition("", "", "own"),
    }
    names = ("load", "load_low", "load_high", "tokens_low")
    made = result.dataset({name: (("x",), np.zeros(1)) for name in names}, {}, definitions, {})
    low = {"long_name": "expert load, lower limit", "units": "1", "definition": "lower limit of load", "ci": "95 %"}
    assert made["load_low"].attrs == low
    assert made["load_high"].attrs["definition"] == "upper limit of load"
    assert made["tokens_low"].attrs == {"definition": "own"}
    for name in ("load_mean", "tokens", "tokens_high"):
        with pytest.raises(KeyError, match=name):
            result.dataset({name: (("x",), np.zeros(1))}, {}, definitions, {})
