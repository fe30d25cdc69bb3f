"""What other programs read is what the run holds; nothing half-written, nothing replaced unasked."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from tests.runs.conftest import write_run
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.runs import export as exporting
from workbench.runs.export import Selection, export
from workbench.runs.reader import Run, open_run

HOOK = "activations/resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("export") / "r"
    write_run(path, units=[0, 1, 3])  # an unfinished run exports what is committed
    return open_run(path)


def test_parquet_has_one_row_for_each_token(run: Run, tmp_path: Path) -> None:
    n = export(run, tmp_path / "x.parquet", format="parquet")
    table = pd.read_parquet(tmp_path / "x.parquet")
    data = run.dataset.compute()
    assert len(table) == n == data.sizes["token"]
    np.testing.assert_array_equal(table["token"], data["id"])
    np.testing.assert_array_equal(
        table["channel"].cat.codes
        if hasattr(table["channel"], "cat")
        else [CHANNELS.index(c) for c in table["channel"]],
        data["channel"],
    )
    experts = np.array([np.stack(list(row)) for row in table["experts"]])
    np.testing.assert_array_equal(experts, data["experts"].transpose("token", "layer", "slot"))
    assert set(table["effort"]) == set(run.sequences["effort"])
    assert list(table["sequence_id"]) == list(run.sequences["id"].loc[data["sequence"].to_numpy()])


def test_a_selection_by_every_label(run: Run, tmp_path: Path) -> None:
    data = run.dataset[["channel", "sequence"]].compute()
    high = run.sequences["effort"].eq("high").loc[data["sequence"].to_numpy()].to_numpy()
    final = data["channel"].to_numpy() == CHANNELS.index("final")
    chosen = Selection(channel=("final",), effort=("high",))
    assert export(run, tmp_path / "x", format="parquet", selection=chosen) == int((high & final).sum())
    with pytest.raises(InputError, match="--channel nonsense: choose from"):
        export(run, tmp_path / "y", format="parquet", selection=Selection(channel=("nonsense",)))


def test_safetensors_keep_the_recorded_bits(run: Run, tmp_path: Path) -> None:
    n = export(run, tmp_path / "x", format="safetensors", what=HOOK, layers=(2,), selection=Selection(effort=("low",)))
    index = json.loads((tmp_path / "x" / "index.json").read_text())
    table = pd.read_parquet(tmp_path / "x" / "tokens.parquet")
    parts = []
    for entry in index["files"]:
        with safe_open(tmp_path / "x" / entry["file"], "pt") as file:
            parts.append(file.get_tensor("blocks.2.hook_resid_post").float().numpy())
    data = run.dataset[["hook_resid_post", "sequence", "id"]].compute()
    low = run.sequences["effort"].eq("low").loc[data["sequence"].to_numpy()].to_numpy()
    np.testing.assert_array_equal(np.concatenate(parts), data["hook_resid_post"].sel(layer=2)[low])
    assert len(table) == index["rows"] == n
    np.testing.assert_array_equal(table["token"], data["id"][low])


def test_a_dataset_of_activations_has_rows_of_one_sequence(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "x", format="datasets", what=HOOK, layers=(0,), context=16)
    exported = datasets.load_from_disk(str(tmp_path / "x")).with_format("numpy")
    data = run.dataset[["hook_resid_post", "sequence", "id"]].compute()
    lengths = run.sequences["length"]
    assert len(exported) == int((lengths // 16).sum())
    first = data["sequence"].to_numpy() == run.sequences.index[0]
    np.testing.assert_array_equal(exported[0]["blocks.0.hook_resid_post"], data["hook_resid_post"][0, first][:16])
    np.testing.assert_array_equal(exported[0]["token_ids"], data["id"][first][:16])
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match="smaller --context"):
        export(run, tmp_path / "y", format="datasets", what=HOOK, context=100_000)


def test_a_dataset_of_tokens_has_one_row_for_each_sequence(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "x", format="datasets")
    exported = datasets.load_from_disk(str(tmp_path / "x"))
    assert [len(ids) for ids in exported["token_ids"]] == run.sequences["length"].tolist()
    assert exported["prompt_id"][:] == run.sequences["prompt_id"].tolist()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"format": "csv"}, "--format csv: choose from"),
        ({"format": "safetensors"}, "is for activations"),
        ({"format": "parquet", "what": HOOK}, "no bfloat16"),
        ({"format": "safetensors", "what": "activations/mlp_out"}, "the run holds tokens, activations/resid_post"),
        ({"format": "safetensors", "what": HOOK, "layers": (1,)}, "recorded in 0, 2"),
        ({"format": "datasets", "what": HOOK, "context": 0}, "at least 1 token"),
    ],
)
def test_what_cannot_be_exported(run: Run, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(run, tmp_path / "x", **asked)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_until_the_new_one_is_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists"):
            export(run, out, format="parquet", overwrite=overwrite)
    assert out.read_text() == "mine"
    out.unlink()
    export(run, out, format="parquet")
    before = out.read_bytes()

    def fails(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_lists", fails)
        with pytest.raises(KeyboardInterrupt):
            export(run, out, format="parquet", overwrite=True)
    assert out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"x", ".x.workbench"}
    export(run, out, format="parquet", overwrite=True)
    assert len(pd.read_parquet(out))


def test_a_run_or_the_folder_above_it_is_never_an_output(run: Run, tmp_path: Path) -> None:
    for out in (Path(run.path), Path(run.path).parent, Path(run.path) / "tokens.parquet"):
        with pytest.raises(InputError, match="input"):
            export(run, out, format="parquet", overwrite=True)
    assert open_run(run.path).status == run.status
