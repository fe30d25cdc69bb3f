"""Rows that are appended: resumed, locked, never written into a file of something else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.test_outputs import interrupt_every_step
from workbench.errors import InputError
from workbench.row_output import RowOutput, stamp, written_by


def row(name: str) -> dict[str, object]:
    return stamp({"id": name, "tokens": [1]}, "generate", seed=0)


def fill(path: Path, *names: str, **options: bool) -> list[str]:
    """Write rows of these names that are missing, and return the names of those that were there."""
    with RowOutput(path, command="generate", **options) as rows:
        known = list(rows.known)
        for name in names:
            if name not in known:
                rows.write(row(name))
        rows.finish(sorted({*known, *names}))
    return known


def names(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_rows_are_appended_and_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert fill(path, "c", "a") == []
    assert fill(path, "b") == ["a", "c"]
    assert names(path) == ["a", "b", "c"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert written_by("generate")(path)
    assert not written_by("convert")(path)


def test_half_a_row_is_cut_off_when_the_next_is_written_not_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fill(path, "a", "b")
    half = path.read_bytes()[:-9]
    path.write_bytes(half)
    with RowOutput(path, command="generate") as rows:
        assert list(rows.known) == ["a"]
    assert path.read_bytes() == half
    fill(path, "b")
    assert names(path) == ["a", "b"]


@pytest.mark.parametrize("content", [b"mine", b"mine\nhalf", b'{"id": "a"}\n', b"\xff\n", b"[" * 5000 + b"\n", b"1\n"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_something_else_is_not_changed_by_one_byte(tmp_path: Path, content: bytes, overwrite: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="exists, and line 1: not a transcript that this command wrote"):
        fill(path, "a", overwrite=overwrite)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_old_file_stays_until_the_first_new_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fill(path, "a")
    with RowOutput(path, command="generate", overwrite=True) as rows:
        assert rows.known == {}
    assert names(path) == ["a"]
    with RowOutput(path, command="generate", overwrite=True) as rows:
        rows.write(row("x"))
        assert names(path) == ["x"]
        rows.write(row("y"))
        assert names(path) == ["x", "y"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowOutput(path, command="generate"), pytest.raises(InputError, match="being written by process"):
        fill(path, "a")
    fill(path, "a")


def test_what_is_no_file_of_ones_own(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(row("a")) + "\n")
    os.link(prompts, tmp_path / "same")
    (tmp_path / "link").symlink_to(prompts)
    for out in (prompts, tmp_path / "same"):
        with pytest.raises(InputError, match="is an input"):
            RowOutput(out, command="generate", inputs=[prompts], overwrite=True)
    for out, message in (
        (tmp_path / "link", "link"),
        (Path("/dev/full"), "device"),
        (tmp_path / "no" / "x", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            RowOutput(out, command="generate", overwrite=True)
    with pytest.raises(InputError, match="was not written"):
        RowOutput(tmp_path, command="generate", overwrite=True)


def test_a_last_line_that_is_no_row_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fill(path, "a")
    content = path.read_bytes() + b"notes of mine"
    path.write_bytes(content)
    with pytest.raises(InputError, match="exists, and line 2: not a transcript"):
        fill(path, "b")
    assert not written_by("generate")(path)
    assert path.read_bytes() == content


def test_a_file_without_a_complete_line_was_written_by_no_command(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    assert not written_by("convert")(tmp_path / "mine")


def replace_rows(path: Path, text: str, overwrite: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    fill(path, f"{text} b", f"{text} a", overwrite=overwrite)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_at_every_step_leaves_complete_rows_of_one_job(tmp_path: Path, moment: str) -> None:
    left = interrupt_every_step(tmp_path, replace_rows, moment)
    assert len(left) > 5
    for number, files in enumerate(left):
        ids = [json.loads(line)["id"] for line in files["out"].splitlines()]
        assert ids in (["old a", "old b"], ["new b"], ["new b", "new a"], ["new a", "new b"]), files
        replace_rows(tmp_path / str(number) / "out", "last", overwrite=True)
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["out"]


def test_rows_that_an_interruption_loses_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an output that is removed before the first new row is on the disk."""

    def removed(rows: RowOutput, fresh: bool) -> Any:
        rows.path.unlink(missing_ok=True)
        return open(rows._part, "xb")

    monkeypatch.setattr(RowOutput, "_open", removed)
    assert any("out" not in files for files in interrupt_every_step(tmp_path, replace_rows, "before"))
