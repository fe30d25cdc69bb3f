"""Every file of a finished run, damaged in every way: verify finds it, and no read gives another number."""

import contextlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.runs.bombs import bomb, plant
from tests.runs.conftest import make_older, write_run
from tests.runs.forging import forge
from workbench.compression import frame_size
from workbench.errors import InputError
from workbench.runs.manifest import DamageError
from workbench.runs.reader import Run, open_run
from workbench.runs.verify import verify

LENGTHS = (700, 900)


def delete(file: Path, _: Path) -> None:
    file.unlink()


def truncate(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, _: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(bytes(content))


def grow(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def swap(file: Path, other: Path) -> None:
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {f.__name__: f for f in (delete, truncate, grow, flip, swap)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "run"
    write_run(path, lengths=LENGTHS)
    return path


def damaged(intact: Path, copy: Path, damage: str, step: int = 1) -> Iterator[Path]:
    """The copy with one file after the other damaged, and repaired afterwards. step: take every step-th file."""
    shutil.copytree(intact, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    for file, other in list(zip(files, [*files[1:], files[0]], strict=True))[::step]:
        before = file.read_bytes(), other.read_bytes()
        if damage == "swap" and before[0] == before[1]:
            continue
        DAMAGES[damage](file, other)
        yield file.relative_to(copy)
        file.write_bytes(before[0])
        other.write_bytes(before[1])


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_verify_finds_all_damage_to_all_files(intact: Path, tmp_path: Path, damage: str, long: bool) -> None:
    step = 1 if long else 5
    missed = [str(file) for file in damaged(intact, tmp_path / "run", damage, step) if not verify(tmp_path / "run")]
    assert not missed
    assert verify(tmp_path / "run") == []


def values(run: Run) -> dict[str, np.ndarray]:
    """Everything that a reader can ask for."""
    arrays: dict[str, np.ndarray] = {f"dataset/{n}": v.to_numpy() for n, v in run.dataset.data_vars.items()}
    names = [n for n in run.dataset.data_vars if n not in ("sequence", "position", "channel")]
    for number, block in enumerate(run.blocks(*map(str, names))):
        arrays |= {f"block {number}/{n}": v for n, v in block.items()}
    arrays |= {f"summary/{n}": run.summary(n).to_numpy() for n in run.summaries}
    arrays |= {f"total/{n}": run.total(n).to_numpy() for n in run.summaries}
    for name, table in (("sequences", run.sequences), ("messages", run.messages), ("groups", run.groups)):
        arrays |= {f"{name}/{column}": table[column].to_numpy() for column in table}
    return arrays | {"model": np.array(str(run.model)), "status": np.array(run.status)}


def wrong(path: Path, want: dict[str, np.ndarray]) -> list[str]:
    """Names of what is read without an error and is not what was written."""
    try:
        result = values(open_run(path))
    except Exception:  # any error is better than a wrong number
        return []
    return [name for name, value in want.items() if not same(result[name], value)]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_read_raises_or_is_right(intact: Path, tmp_path: Path, damage: str, long: bool) -> None:
    want, path = values(open_run(intact)), tmp_path / "run"
    silent = {}
    for file in damaged(intact, path, damage, 1 if long else 11):
        if names := wrong(path, want):
            silent[str(file)] = names
    assert not silent


@pytest.mark.filterwarnings("ignore::workbench.runs.reader.NoChecksumsWarning", "ignore:Object at")
@pytest.mark.parametrize("damage", ["delete", "swap"])
def test_without_manifests_missing_files_are_errors_and_exchanged_ones_wrong_numbers(
    intact: Path, tmp_path: Path, damage: str, long: bool
) -> None:
    """Exchanged files are the negative control: the same reads of the run as schema 2 has it."""
    shutil.copytree(intact, tmp_path / "older")
    want = values(open_run(make_older(tmp_path / "older")))
    copies = damaged(tmp_path / "older", tmp_path / "run", damage, 1 if long else 7)
    silent = [str(file) for file in copies if wrong(tmp_path / "run", want)]
    assert bool(silent) == (damage == "swap"), silent


def test_the_digest_changes_with_the_content(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert open_run(tmp_path / "a").digest == open_run(tmp_path / "b").digest
    write_run(tmp_path / "c", units=[0])
    first = open_run(tmp_path / "c").digest
    write_run(tmp_path / "c", seed=1)
    assert first != open_run(tmp_path / "c").digest
    assert open_run(tmp_path / "c").digest != open_run(tmp_path / "a").digest


def test_a_full_check_finds_every_changed_byte(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact, tmp_path / "run")
    file = max(tmp_path.rglob("activations/**/c/*/*/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DamageError, match="is not the file that was written"):
        values(open_run(tmp_path / "run", check="full"))


BOMBED = ["tokens/id", "routing/gates", "sequences/id", "sequences/length", "messages/start", "summaries/gate_sum"]


@pytest.mark.parametrize("claimed", [2**32, None], ids=["told", "untold"])
@pytest.mark.parametrize("array", BOMBED)
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(
    intact: Path, tmp_path: Path, array: str, claimed: int | None
) -> None:
    run = shutil.copytree(intact, tmp_path / "run")
    plant(run, array, bomb(2**32, claimed=claimed))
    forge(run)
    assert not any("changed" in problem.what for problem in verify(run)), "the manifests agree"
    with memory_limit(2**30), pytest.raises(InputError, match="unpacks to") as error:
        values(open_run(run))
    assert "\n" not in str(error.value)
    with memory_limit(2**30):
        assert re.search("unpacks to|larger than", str(verify(run, recompute=True)))


def test_a_reader_that_unpacks_whatever_is_there_is_noticed(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the sizes are not compared."""
    monkeypatch.setattr("workbench.compression._size_within", lambda data, spec: frame_size(data))
    with pytest.raises((AssertionError, MemoryError)):
        test_a_chunk_that_unpacks_to_gigabytes_is_refused(intact, tmp_path, "sequences/id", 2**32)


ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codecs": [LITTLE_ENDIAN, {"name": "gzip", "configuration": {"level": 1}}]}, "is packed by 'gzip'"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40]}}}, "has chunks of 1,099,"),
        # what reads whole shards would read other values than zarr, which would read none for files of other names
        ({"codecs": [{"name": "transpose", "configuration": {"order": [0]}}, LITTLE_ENDIAN, ZSTD]}, "by 'transpose'"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, ZSTD]}, "of other names or another byte"),
        ({"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}}, "of other names or another byte"),
        ({"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}}, "of other names or another"),
        ({"dimension_names": ["row"]}, "has another shape, dtype or dimensions"),
    ],
)
@pytest.mark.parametrize("array", ["tokens/id", "tokens/message"])
def test_metadata_that_would_be_read_as_something_else_is_refused(
    intact: Path, tmp_path: Path, array: str, change: dict[str, object], reason: str
) -> None:
    run = shutil.copytree(intact, tmp_path / "run")
    path = run / array / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    forge(run)
    with memory_limit(2**30), pytest.raises(DamageError, match=reason):
        values(open_run(run))
    with memory_limit(2**30), pytest.raises(DamageError, match=reason):
        list(open_run(run).blocks(array.partition("/")[2]))
    assert {problem.where for problem in verify(run)} == {array}


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let this process add at most this many bytes to its address space."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("array", ["routing/experts", "tokens/id", "sequences/id", "messages/role", "units/committed"])
def test_a_group_in_place_of_an_array_is_named(intact: Path, tmp_path: Path, array: str) -> None:
    """Also where every manifest agrees with it, as somebody would write them to deceive its reader."""
    damaged_run = shutil.copytree(intact, tmp_path / "run")
    assert (damaged_run / array / "zarr.json").exists()
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (damaged_run / array / "zarr.json").write_text(json.dumps(group))
    forge(damaged_run)
    assert verify(damaged_run)
