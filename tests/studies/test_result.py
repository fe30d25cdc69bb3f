"""Files of a study: complete, readable by anything, and never half-written."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.errors import InputError
from workbench.studies import files, result
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


def test_saving_again_replaces_and_leaves_other_files_alone(datasets, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "routing.txt").write_text("old")
    result.save(datasets, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "routing.txt").read_text() != "old"


def test_a_failure_while_writing_leaves_the_old_files_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_files({"a.txt": "new", "b.txt": "new"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["../a.txt", "/tmp/a.txt", "b/a.txt", ".."])
def test_a_name_that_leaves_the_directory_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="cannot be the name of a file"):
        files.write_files({"fine.txt": "", name: ""}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_directory_is_refused(datasets, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        result.save(datasets, tmp_path / "out")
