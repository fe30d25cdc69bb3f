"""Each promise of the store, broken on purpose, is found."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from tests.runs.conftest import make_older, write_run
from workbench.runs.verify import verify


def shards(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("c/**/*") if p.is_file())


def test_a_whole_run_has_no_problem_and_neither_has_one_being_written(run_path: Path, tmp_path: Path) -> None:
    assert verify(run_path) == []
    write_run(tmp_path / "part", units=[0, 2])
    assert verify(tmp_path / "part") == []


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_byte_is_found_wherever_it_is(run_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    files = [p for p in shards(run_path) if "units" not in p.parts]
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))
    assert verify(run_path), f"a flipped byte in {file} was not found"


@pytest.mark.parametrize("seed", range(10))
def test_a_missing_file_is_found_and_named(run_path: Path, seed: int) -> None:
    files = [
        p
        for p in shards(run_path)
        if "units" not in p.parts and p.relative_to(run_path).parts[0] not in ("sequences", "messages")
    ]
    file = files[np.random.default_rng(seed).integers(len(files))]
    file.unlink()
    assert any(str(file.relative_to(run_path)) in problem.what for problem in verify(run_path))


def test_a_truncated_file_is_found(run_path: Path) -> None:
    file = next(p for p in shards(run_path) if "experts" in p.parts)
    file.write_bytes(file.read_bytes()[:-30])
    assert verify(run_path)


def test_a_cleared_flag_is_found(run_path: Path) -> None:
    zarr.open_group(str(run_path))["units/committed"][1] = False
    problems = verify(run_path)
    assert any(p.where == "unit 1" and "flag was cleared" in p.what for p in problems)


def test_an_early_flag_is_found(tmp_path: Path) -> None:
    write_run(tmp_path / "r", units=[0])
    zarr.open_group(str(tmp_path / "r"))["units/committed"][2] = True
    assert any(p.where == "unit 2" and "is missing" in p.what for p in verify(tmp_path / "r"))


def set_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        zarr.open_group(str(path))[name][index] = value

    return change


def status(path: Path) -> None:
    zarr.open_group(str(path)).attrs["status"] = "complete"
    zarr.open_group(str(path))["units/committed"][0] = False


def shorter_column(path: Path) -> None:
    group = zarr.open_group(str(path))
    values = group["sequences/effort"][:-1]
    del group["sequences/effort"]
    group["sequences"].create_array("effort", data=values, compressors=ZstdCodec())


def other_dtype(path: Path) -> None:
    meta = path / "routing" / "experts" / "zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"data_type": "int8"}))


LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "gates that do not sum to 1": (set_value("routing/gates", (0, 3, 0), 0.2), "do not sum to 1|descend"),
    "an expert twice": (set_value("routing/experts", (1, 5, slice(None)), 4), "twice to the same expert|not the sum"),
    "a sink above 1": (set_value("attention/sink", (2, 1, 1), 1.5), "not a probability"),
    "a summary that is off by one": (
        set_value("summaries/expert_count", (0, 2, 1, 3), 12345),
        "expert_count is not the sum",
    ),
    "a co-activation that is off": (
        set_value("summaries/coactivation", (0, 0, 0, 0, 0), 9),
        "coactivation is not the sum",
    ),
    "a token of another sequence": (set_value("tokens/sequence", (2,), 5), "does not follow the sequence table"),
    "a gap that is a token": (set_value("tokens/sequence", (-1,), 5), "gap row"),
    "a message outside its sequence": (set_value("messages/end", (2,), 4000), "message 2 is not inside"),
    "two sequences of one id": (set_value("sequences/id", (1,), "s0"), "two sequences have one id"),
    "an offset in another sequence": (set_value("sequences/offset", (1,), 0), "do not follow its units"),
    "columns of unequal length": (shorter_column, "unequal length"),
    "an array of another dtype": (other_dtype, "expected"),
    "complete though it is not": (status, "status is complete|flag was cleared"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_each_lie_is_found(run_path: Path, lie: str) -> None:
    tell, message = LIES[lie]
    make_older(run_path)
    assert verify(run_path) == []
    tell(run_path)
    problems = verify(run_path)
    assert problems
    assert any(__import__("re").search(message, problem.what) for problem in problems), problems


@pytest.mark.parametrize("lie", list(LIES))
def test_each_lie_is_found_by_the_manifest_too(run_path: Path, lie: str) -> None:
    LIES[lie][0](run_path)
    assert verify(run_path)


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    assert "cannot be opened" in verify(tmp_path)[0].what
