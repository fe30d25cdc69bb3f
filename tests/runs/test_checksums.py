"""Checksums are added to a run of an older schema: no value and no name of it changes, and damage is then noticed."""

import json
import shutil
from pathlib import Path

import pytest
import zarr

from tests.runs.conftest import make_older, write_run
from tests.runs.test_damage import DAMAGES, damaged, same, values, wrong
from workbench.errors import InputError
from workbench.runs import checksums, manifest
from workbench.runs.checksums import add_checksums
from workbench.runs.expected_files import ExpectedFiles
from workbench.runs.manifest import DamageError
from workbench.runs.reader import NoChecksumsWarning, open_run
from workbench.runs.storage import LocalStorage
from workbench.runs.verify import verify

LENGTHS = (700, 900)
pytestmark = pytest.mark.filterwarnings("ignore::workbench.runs.reader.NoChecksumsWarning")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run as schema 1 has it: without manifests, totals, and the order of columns."""
    write_run(tmp_path / "older", lengths=LENGTHS)
    run = make_older(tmp_path / "older")
    shutil.rmtree(run / "totals")
    group = zarr.open_group(str(run))
    group.attrs["schema"] = 1
    for table in ("sequences", "messages"):
        del group[table].attrs["columns"]
    return run


def test_no_value_and_no_digest_changes_and_the_content_gets_a_digest(older: Path) -> None:
    before = open_run(older)
    want = values(before)
    n = add_checksums(older)
    after = open_run(older, check="full")
    assert n == len([p for p in older.rglob("*") if p.is_file() and "manifest" not in p.parts]) - 1, "all but the root"
    unchanged = values(after)
    assert all(same(unchanged[name], value) for name, value in want.items())
    assert after.digest == before.digest == before.content_digest != after.content_digest
    assert verify(older) == verify(older, recompute=True) == []


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_all_damage_is_found_afterwards(older: Path, tmp_path: Path, damage: str, long: bool) -> None:
    add_checksums(older)
    want, missed, silent = values(open_run(older)), [], []
    for file in damaged(older, tmp_path / "run", damage, 1 if long else 29):
        missed += [] if verify(tmp_path / "run") else [str(file)]
        silent += [str(file)] if wrong(tmp_path / "run", want) else []
    assert (missed, silent) == ([], [])


def test_without_them_exchanged_files_are_missed_and_read(older: Path, tmp_path: Path) -> None:
    """The negative control of the test before."""
    want, run = values(open_run(older)), shutil.copytree(older, tmp_path / "run")
    one, other = (run / "tokens" / "logprob" / "c" / name for name in "01")
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(before)
    assert not verify(run)
    assert wrong(run, want)


def test_what_is_damaged_unfinished_or_has_checksums_is_refused_and_left_alone(older: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "new", lengths=LENGTHS)
    with pytest.raises(InputError, match="has checksums"):
        add_checksums(tmp_path / "new")
    write_run(tmp_path / "part", lengths=(700, 900), units=[0])
    with pytest.raises(InputError, match=r"not finished \(1 of 2 units\): rerun its capture"):
        add_checksums(make_older(tmp_path / "part"))
    (older / "sequences" / "meta" / "c" / "0").unlink()
    with pytest.raises(DamageError, match="sequences/meta/c/0 is missing"):
        add_checksums(older)
    assert not (older / "manifest").exists()


def test_what_was_interrupted_is_done_by_the_next_command(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write_complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_checksums(older)
    assert (older / "manifest").exists()
    assert open_run(older).manifest is None
    assert checksums.add_checksums(older) > 0
    assert open_run(older).manifest is not None


def test_attributes_that_no_longer_name_the_manifests_are_damage(older: Path) -> None:
    add_checksums(older)
    root = json.loads((older / "zarr.json").read_text())
    del root["attributes"]["digest"]
    (older / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamageError, match="do not name its manifests"):
        open_run(older)
    assert verify(older)


@pytest.mark.filterwarnings("error::workbench.runs.reader.NoChecksumsWarning")
def test_a_run_without_checksums_is_named_once_with_what_to_do(older: Path) -> None:
    with pytest.warns(NoChecksumsWarning, match=r"older has no checksums \(schema 1\).*verify .*older --add-checksums"):
        open_run(older)
    open_run(older)  # a second warning would be an error
    add_checksums(older)
    open_run(older)


def test_the_layout_states_which_chunks_must_exist(older: Path, tmp_path: Path) -> None:
    expected = ExpectedFiles(LocalStorage(older), open_run(older).attrs)
    chunks = [key for key in LocalStorage(older).files() if "/c/" in key and not key.startswith("units/")]
    assert chunks
    assert all(map(expected.must_exist, chunks))
    assert not any(map(expected.must_exist, ("zarr.json", "tokens/id/zarr.json", "units/committed/c/0", "mine/x/c/0")))
    write_run(tmp_path / "part", lengths=LENGTHS, units=[0])
    part = ExpectedFiles(LocalStorage(tmp_path / "part"), open_run(tmp_path / "part").attrs)
    assert [part.must_exist(f"tokens/id/c/{unit}") for unit in range(2)] == [True, False]
