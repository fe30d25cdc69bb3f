"""Runs with random metadata, and with pipes, devices and absurd sizes instead of their files.

Every command that reads a run ends with 0, 1 or 2 and one line, waits for nothing, and changes no file.
`--long` runs thirty times as many cases.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.checks import Checked, TooLongError
from tests.cli.damaged_files import SPECIAL, replaced
from tests.cli.fuzzing import cases
from tests.cli.hostile_values import changes
from tests.cli.random_commands import without_long_work
from tests.runs.forging import forge, make_schema_2
from workbench.runs.storage import LocalStorage

QUICK = 30  # cases of each kind
READING = {
    "verify run.zarr": 3,
    "summary run.zarr": 2,
    "study routing run.zarr": 1,
    "study sinks run.zarr": 1,
    "study effort run.zarr": 1,
    "conversation run.zarr 0 --out out.html": 1,
    "export run.zarr out --format parquet": 2,
    "dashboard run.zarr --port 45006": 2,
    "capture nano transcripts.jsonl run.zarr --unit-tokens 1024 --dtype float32 --record routing --record sinks "
    "--record logprobs --record resid_post:1": 1,
}
COMMANDS = [command for command, weight in READING.items() for _ in range(weight)]
WAYS = ["as it is", "forged", "schema 2"]


@pytest.fixture
def runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The run as it is, and one without manifests, to copy."""
    without_long_work(monkeypatch)
    away = workplace.parent / "runs"
    intact = away / "intact"
    shutil.move(workplace / "run.zarr", intact)
    older = shutil.copytree(intact, away / "older")
    make_schema_2(older)
    return {"as it is": intact, "forged": intact, "schema 2": older}


def metadata(run: Path) -> list[str]:
    """Names of the files of a run that are JSON: its own, and those of groups and arrays."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*.json"))
    return [*names, *["zarr.json"] * (len(names) // 3), *["units/committed/zarr.json"] * (len(names) // 8)]


def test_random_metadata(runs: dict[str, Path], workplace: Path, long: bool) -> None:
    names = {way: metadata(path) for way, path in runs.items()}

    @cases(QUICK, long=long)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        way = data.draw(st.sampled_from(WAYS), "way")
        name = data.draw(st.sampled_from(names[way]), "file")
        changed = data.draw(changes())(json.loads((runs[way] / name).read_bytes()))
        run_case(runs[way], workplace, way, data.draw(st.sampled_from(COMMANDS), "command"), name, changed)

    check()


def run_case(source: Path, workplace: Path, way: str, command: str, name: str, content: Any) -> None:
    run = workplace / "run.zarr"
    shutil.copytree(source, run)
    try:
        (run / name).write_text(json.dumps(content))
        if way == "forged":
            forge(run)
        Checked(workplace).run(*command.split(), may_change="run.zarr" if command.startswith("capture") else "")
    finally:
        shutil.rmtree(run)


def test_no_regular_files(runs: dict[str, Path], workplace: Path, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {way: sorted(LocalStorage(path).files()) for way, path in runs.items()}

    @cases(QUICK, long=long)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        way = data.draw(st.sampled_from(["as it is", "schema 2"]), "way")
        every = names[way]
        root = [name for name in every if name == "zarr.json" or name.startswith(("manifest", "units"))]
        name = data.draw(st.sampled_from(every) | st.sampled_from(root), "file")
        kind = data.draw(st.sampled_from(list(SPECIAL)), "kind")
        command = data.draw(st.sampled_from(COMMANDS), "command")
        folder = workplace / way
        if not folder.exists():
            folder.mkdir()
            shutil.copy(workplace / "transcripts.jsonl", folder)
            shutil.copytree(runs[way], folder / "run.zarr")
        monkeypatch.chdir(folder)
        special_case(folder, command, name, kind)
        if command.startswith("capture"):  # it may have written something
            shutil.rmtree(folder)

    check()


def special_case(folder: Path, command: str, name: str, kind: str) -> None:
    with replaced(folder / "run.zarr" / name, kind):
        Checked(folder).run(*command.split(), may_change="run.zarr" if command.startswith("capture") else "")


@pytest.mark.parametrize("part", ["sequences", "messages", "tokens", "units", "summaries", "routing/gates", "manifest"])
def test_half_deleted_runs(runs: dict[str, Path], workplace: Path, part: str, long: bool) -> None:
    """A folder of the run is gone: each command ends in one line, or does not need it."""
    for way in ("as it is", "schema 2")[: 1 + long]:
        shutil.copytree(runs[way], workplace / "run.zarr")
        shutil.rmtree(workplace / "run.zarr" / part, ignore_errors=True)
        commands = READING if long else ["summary run.zarr", "export run.zarr out --format parquet"]
        assert Checked(workplace).run("verify", "run.zarr").code == (0 if part == "manifest" and "2" in way else 1)
        for command in commands:
            Checked(workplace).run(*command.split(), may_change="run.zarr" if command.startswith("capture") else "")
        shutil.rmtree(workplace / "run.zarr")


SHAPES = {"exabytes": 2**62, "gigabytes": 10**9}
SHAPED = ["tokens/id", "routing/gates", "sequences/id", "messages/start", "summaries/gate_sum", "totals/gate_sum"]


@pytest.mark.parametrize("size", SHAPES.values(), ids=list(SHAPES))
def test_arrays_that_claim_to_be_large(runs: dict[str, Path], workplace: Path, size: int, long: bool) -> None:
    """Every array of a run without manifests, of which nothing but the layout shows how large it should be."""
    source = runs["schema 2"]
    metadata = (path for path in sorted(source.rglob("zarr.json")) if b'"array"' in path.read_bytes())
    every = [str(path.parent.relative_to(source)) for path in metadata]
    assert set(SHAPED) < set(every)
    for axis in (0, -1) if long else (0,):
        for name in every if long else SHAPED:
            content = json.loads((source / name / "zarr.json").read_bytes())
            content["shape"][axis] = size
            for command in READING if long else ["summary run.zarr"]:
                run_case(source, workplace, "schema 2", command, f"{name}/zarr.json", content)


def test_a_reader_that_waits_is_noticed(
    runs: dict[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: zarr itself, which opens a pipe and waits for somebody who writes to it."""
    monkeypatch.setattr("workbench.runs.manifest._refuse_special", lambda path: None)
    monkeypatch.setattr("tests.cli.checks.LIMIT_S", 1.0)
    shutil.copytree(runs["schema 2"], workplace / "run.zarr")
    with pytest.raises(TooLongError):
        special_case(workplace, "summary run.zarr", "zarr.json", "pipe")
