"""What is read is what was written; gaps and uncommitted units are never seen; reading is lazy.

Also tests `workbench.runs.committed` and `workbench.runs.group`.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore

from tests.runs.conftest import LENGTHS, unit_data, write_run
from workbench.errors import InputError
from workbench.runs.reader import Run, open_run
from workbench.runs.summaries import float32_of


def test_every_token_comes_back_where_it_was(run_path: Path) -> None:
    layout = write_run(run_path)  # nothing left to do
    run = open_run(run_path)
    data = run.dataset.compute()
    parts = [unit_data(layout, unit) for unit in layout.units]
    for name in ("id", "sequence", "position", "channel"):
        assert np.array_equal(data[name], np.concatenate([tokens[name] for tokens, _ in parts]))
    for name in ("experts", "gates", "sink", "router_logits"):
        assert np.array_equal(data[name], np.concatenate([records[name] for _, records in parts], 1))
    bits = np.concatenate([records["activations/hook_resid_post"] for _, records in parts], 1)
    assert np.array_equal(data["hook_resid_post"].sel(layer=[0, 2]), float32_of(bits))
    assert data["hook_resid_post"].sel(layer=1).isnull().all(), "layer 1 was not recorded"
    assert data["layer"].values.tolist() == [0, 1, 2]
    assert data.sizes["token"] == sum(LENGTHS)


def test_uncommitted_units_and_gaps_are_invisible(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "r", units=[0, 2])
    run = open_run(tmp_path / "r")
    seen = [s for i in (0, 2) for s in layout.units[i].sequences]
    assert run.status == "writing"
    assert run.progress == (2, len(layout.units))
    assert list(run.sequences.index) == seen
    assert set(run.messages["sequence"]) == set(seen)
    assert np.unique(run.dataset["sequence"]).tolist() == seen
    assert run.dataset.sizes["token"] == sum(LENGTHS[s] for s in seen)
    assert run.summary("expert_count")["sequence"].values.tolist() == seen
    more = open_run(tmp_path / "r")
    assert more.digest == run.digest
    write_run(tmp_path / "r", units=[1])
    assert open_run(tmp_path / "r").digest != run.digest


def test_a_run_without_a_committed_unit_is_empty_not_an_error(tmp_path: Path) -> None:
    write_run(tmp_path / "r", units=[])
    run = open_run(tmp_path / "r")
    assert run.dataset.sizes["token"] == 0
    assert len(run.sequences) == 0
    assert run.summary("tokens").sizes["sequence"] == 0


def test_summaries_add_up_to_the_tokens(run_path: Path) -> None:
    run = open_run(run_path)
    data = run.dataset.compute()
    counts = run.summary("expert_count")
    for sequence, channel, layer, expert in [(0, 0, 0, 0), (3, 2, 1, 7), (5, 5, 2, 3)]:
        here = (data["sequence"].values == sequence) & (data["channel"].values == channel)
        assert int(counts[sequence, channel, layer, expert]) == (data["experts"].values[layer, here] == expert).sum()
    assert int(counts.sum()) == sum(LENGTHS) * 3 * 2
    assert run.summary("tokens").sum("channel").values.tolist() == list(LENGTHS)
    sums = run.summary("sink_sum").sum(["sequence", "channel"])
    np.testing.assert_allclose(sums, data["sink"].values.astype(float).sum(1), rtol=1e-5)
    pairs = run.summary("coactivation").sum("channel").values
    assert np.array_equal(np.diagonal(pairs, axis1=1, axis2=2), counts.sum(["sequence", "channel"]))
    assert run.summary("transition").dims == ("channel", "layer_pair", "expert", "expert_2")


def test_summaries_name_channels_efforts_and_tasks(run_path: Path) -> None:
    counts = open_run(run_path).summary("expert_count")
    assert counts.sel(channel="analysis").dims == ("sequence", "layer", "expert")
    assert counts["effort"].values.tolist() == ["low", "high"] * 4
    assert counts["task"].values.tolist() == ["t"] * 8
    with pytest.raises(InputError, match="it holds"):
        open_run(run_path).summary("nonsense")


def test_one_sequence_by_number_or_id(run_path: Path) -> None:
    run = open_run(run_path)
    for which in (3, "s3"):
        one = run.sequence(which)
        assert one.sizes["token"] == LENGTHS[3]
        assert (one["sequence"].values == 3).all()
    with pytest.raises(InputError, match="'s99' is not in"):
        run.sequence("s99")


class Counting(LocalStore):
    """Counts what is read from a store."""

    reads: ClassVar[list[str]] = []

    async def get(self, key: str, *rest: Any, **options: Any) -> Any:
        self.reads.append(key)
        return await super().get(key, *rest, **options)


def test_opening_is_the_same_work_for_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for name, lengths in (("short", LENGTHS), ("long", LENGTHS * 8)):
        write_run(tmp_path / name, lengths=lengths)
        Counting.reads = []
        monkeypatch.setattr("zarr.storage.LocalStore", Counting)
        open_run(tmp_path / name)
        counts.append(len(Counting.reads))
        monkeypatch.undo()
    assert 0 < counts[0] == counts[1] <= 4


def test_one_sequence_reads_only_its_own_shards(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zarr.storage.LocalStore", Counting)
    run = open_run(run_path)
    one = run.sequence(3)
    Counting.reads = []
    one["experts"].compute()
    shards = {key for key in Counting.reads if key.startswith("routing/experts/c/")}
    unit = next(u for u in run.layout.units if 3 in u.sequences)
    own = {unit.start // 1024, unit.start // 1024 + unit.capacity // 1024 - 1}
    assert {int(key.split("/")[-2]) for key in shards} == own


def test_plain_zarr_and_plain_xarray_open_it(run_path: Path) -> None:
    group = zarr.open_group(str(run_path), mode="r")
    assert group["sequences/id"][:].tolist() == [f"s{i}" for i in range(8)]
    for name in ("sequences", "tokens", "routing", "attention", "activations", "summaries"):
        opened = xr.open_zarr(run_path / name, consolidated=False)
        assert len(opened.data_vars) > 0
    assert xr.open_zarr(run_path / "routing", consolidated=False)["experts"].dims == ("layer", "token", "slot")


def test_the_repr_states_what_it_is(run_path: Path) -> None:
    assert "complete, " in repr(open_run(run_path))
    assert "routing, router_logits, sinks, logprobs, hook_resid_post" in repr(open_run(run_path))


# What users of xarray do with the dataset of a run: write it, read it again, send it to other processes.


@pytest.fixture
def run(run_path: Path) -> Run:
    return open_run(run_path)


def same(read: xr.Dataset, written: xr.Dataset) -> bool:
    """Whether values, labels and attributes are those that were written; a file may hold other widths of integers."""
    if {*read.variables} != {*written.variables} or read.attrs != written.attrs:
        return False
    pairs = [(read[name], written[name]) for name in written.variables]
    nan = [np.issubdtype(b.dtype, np.floating) for _, b in pairs]
    return all(
        a.dims == b.dims and np.array_equal(a.values, b.values, equal_nan=n)
        for (a, b), n in zip(pairs, nan, strict=True)
    )


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
@pytest.mark.parametrize("what", ["dataset", "selection", "sequence", "a quantity"])
def test_it_is_written_and_read_again(run: Run, kind: str, what: str, tmp_path: Path) -> None:
    data = {
        "dataset": run.dataset,
        "selection": run.select(effort="high"),
        "sequence": run.sequence(3),
        "a quantity": run.dataset[["sink"]],
    }[what]
    assert data.sizes["token"] > 0
    path = tmp_path / f"data.{kind}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # of Zarr 3: xarray writes it by itself
        if kind == "netcdf":
            data.to_netcdf(path)
            read = xr.open_dataset(path).load()
        else:
            data.to_zarr(path)
            read = xr.open_zarr(path).load()
    assert same(read, data)
    assert same(read, data.load())
    changed = data.assign(sink=data["sink"] + 1)
    assert not same(read, changed)  # a negative control


def test_attributes_that_are_lists_of_text_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """The negative control."""
    with pytest.raises((KeyError, ValueError, TypeError)):
        run.dataset.assign_attrs(channels=["analysis", "final"]).to_netcdf(tmp_path / "data.nc")


def test_it_is_pickled_with_its_run(run: Run) -> None:
    for data in (pickle.loads(pickle.dumps(run.dataset)), pickle.loads(pickle.dumps(run)).dataset):
        assert same(data, run.dataset)


def test_two_runs_are_concatenated(run: Run) -> None:
    both = xr.concat([run.dataset, run.dataset], "token")
    assert both.sizes["token"] == 2 * sum(LENGTHS)
    assert both.chunks["token"] == run.dataset.chunks["token"] * 2  # lazy still
    np.testing.assert_array_equal(both["sink"].isel(token=slice(sum(LENGTHS), None)), run["sink"])


def test_labels_are_compared_and_grouped_by(run: Run) -> None:
    data = run.select()
    means = data["sink"].groupby("effort").mean().compute()
    of_high = data["sink"].values[:, data["effort"].values == "high"]
    np.testing.assert_allclose(means.sel(effort="high").transpose("layer", "head"), of_high.mean(1), rtol=1e-5)
    assert set(np.unique(data["channel_name"])) <= set(run.dataset.attrs["channels"].split())
