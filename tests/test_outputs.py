"""No command writes over what another wrote, over an input, or through a link; nothing is half-written."""

import errno
import itertools
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import outputs
from workbench.errors import InputError
from workbench.experiments.jacobians import JacobianLens
from workbench.model.safetensors_file import save_tensors
from workbench.outputs import check_output, staged, write_files


def put(path: Path, text: str = "new", **options: object) -> None:
    with staged(path, **{"command": "export", **options}) as part:  # type: ignore[arg-type]
        part.write_text(text)


def put_folder(path: Path, text: str = "new", **options: object) -> None:
    with staged(path, **{"command": "export", **options}) as part:  # type: ignore[arg-type]
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "a").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else "" if p.is_dir() else p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file() or p.name.endswith(".staging")
    }


@pytest.mark.parametrize("write", [put, put_folder])
def test_only_what_the_same_command_wrote_is_replaced(tmp_path: Path, write: Callable[..., None]) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "old")
    with pytest.raises(InputError, match="exists: choose another name, or --overwrite"):
        write(out)
    with pytest.raises(InputError, match="was not written by `workbench report`"):
        write(out, command="report", overwrite=True)
    assert "old" in contents(out.parent).values()
    write(out, "new", overwrite=True)
    assert "new" in contents(out.parent).values()
    assert "old" not in contents(out.parent).values()
    write(out, "newer", overwrite=True)


@pytest.mark.parametrize("write", [put, put_folder])
@pytest.mark.parametrize("how", ["edited", "no marker"])
def test_what_somebody_changed_is_kept(tmp_path: Path, write: Callable[..., None], how: str) -> None:
    out = tmp_path / "out"
    write(out)
    marker = out / outputs.MARKER if out.is_dir() else tmp_path / f".out{outputs.MARKER}"
    if how == "no marker":
        marker.unlink()
    elif out.is_dir():
        (out / "notes.txt").write_text("mine")
    else:
        out.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="was changed since"):
        write(out, overwrite=True)
    assert contents(tmp_path) == before


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    run = tmp_path / "data" / "run.zarr"
    run.mkdir(parents=True)
    (run / "zarr.json").write_text("{}")
    os.link(run / "zarr.json", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "data")
    for out, message in (
        (run, "is an input"),
        (run.parent, "contains the input"),
        (run / "x", "is inside the input"),
        (tmp_path / "soft" / "run.zarr", "is an input"),
        (tmp_path / "soft" / ".." / "data" / "run.zarr" / "y", "is inside the input"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(out, command="export", inputs=[run], overwrite=True, owned=lambda path: True)
    with pytest.raises(InputError, match="is an input"):
        check_output(tmp_path / "hard", command="x", inputs=[run / "zarr.json"], overwrite=True, owned=lambda p: True)
    assert check_output(tmp_path / "free", command="export", inputs=[run, "nano", "s3://bucket/run"])
    with pytest.raises(InputError, match="is inside the input"):
        write_files({"a": ""}, run / "tables", command="study", inputs=[run])
    write_files({"a": ""}, run.parent, command="study", inputs=[run])  # single files beside the run


def test_links_devices_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "fifo"):
        for options in ({}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"is a link|is a device, a pipe"):
                put(tmp_path / name, **options)
            with pytest.raises(InputError, match=r"is a link|is a device, a pipe"):
                write_files({name: "new"}, tmp_path, command="study", **options)  # type: ignore[arg-type]
    for device in ("/dev/full", "/dev/null"):
        with pytest.raises(InputError, match="is a device"):
            put(Path(device), overwrite=True)
    assert (tmp_path / "target").read_text() == "mine"
    for out in (tmp_path / "target" / "x", "", "..", "a\0b", tmp_path / "x" / ".."):
        with pytest.raises(InputError):
            put(Path(out))


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    put(out, "old")
    before = contents(tmp_path)
    with suppress(KeyboardInterrupt), staged(out, command="export", overwrite=True) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match="there cannot be written: No space left"):
            write_files({"a": "new"}, tmp_path / "not" / "there", command="study")
    assert not (tmp_path / "not").exists()
    # a killed process: its staging folder is removed by the next
    left = tmp_path / ".out.killed.staging"
    left.mkdir()
    put(out, overwrite=True)
    assert not left.exists()


def put_files(path: Path, **options: Any) -> None:
    write_files({path.name: "new"}, path.parent, **options)


@pytest.mark.parametrize("write", [put, put_files])
def test_a_disk_that_fills_after_the_rename_leaves_a_complete_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    """The marker could not be shortened: the command succeeds, and may replace its output later."""
    out, list_files = tmp_path / "out", outputs._write_marker

    def full(*arguments: Any, also: bool = False) -> None:
        if not also:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        list_files(*arguments, also=True)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_write_marker", full)
        write(out, command="export")
    write(out, command="export", overwrite=True)
    assert out.read_text() == "new"


def test_an_output_in_a_staged_folder_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    """As the file of a function that stages for itself, called by a command that does."""
    out = tmp_path / "out"

    def convert() -> None:
        with staged(out, command="convert") as outer, staged(outer, command="write_gguf") as part:
            part.write_text("half")
            raise OSError("9 requested and 2 written")

    with pytest.raises(
        InputError, match=rf"^{out} cannot be written: 9 requested and 2 written; the disk may be full$"
    ):
        convert()
    assert contents(tmp_path) == {}


def save_with_torch(out: Path) -> None:
    JacobianLens({0: torch.zeros(50, 50)}, 1, {}).save(out)


def save_with_safetensors(out: Path) -> None:
    with staged(out, command="export") as part:
        save_tensors({"a": torch.zeros(1000)}, part)


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors])
def test_a_library_that_cannot_write_names_the_output(tmp_path: Path, save: Callable[[Path], None]) -> None:
    """torch raises a RuntimeError and safetensors an error of its own; the negative control is enough space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"full cannot be written: (File too large|.*the disk may be full)"):
            save(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {}
    save(tmp_path / "space")


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_kill_around_the_rename_leaves_a_file_that_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"
    put(out, "old")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == out:
            if moment == "after the rename":
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put(out, overwrite=True)
    assert out.read_text() == ("old" if moment == "before the rename" else "new")
    put(out, "newest", overwrite=True)
    assert out.read_text() == "newest"


class Interrupted:
    """Send Ctrl-C before or after the n-th renaming, creation or removal; `done` counts them."""

    STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")

    def __init__(self, patch: pytest.MonkeyPatch, at: int, moment: str) -> None:
        self.done, self._at, self._moment = 0, at, moment
        for name in self.STEPS:
            patch.setattr(os, name, partial(self._step, getattr(os, name)))

    def _step(self, function: Callable[..., None], *arguments: object, **options: object) -> None:
        here = self.done == self._at
        self.done += 1
        if here and self._moment == "before":
            raise KeyboardInterrupt
        function(*arguments, **options)
        if here:
            raise KeyboardInterrupt


def interrupt_every_step(folder: Path, write: Callable[..., None], moment: str) -> list[dict[str, str]]:
    """Return the files that are left after Ctrl-C at every step of replacing an output, the hidden ones included."""
    left = []
    for at in itertools.count():
        out = folder / str(at)
        write(out / "out", "old")
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            interrupted = Interrupted(patch, at, moment)
            write(out / "out", "new", overwrite=True)
        left.append(contents(out))
        if interrupted.done <= at:
            return left
    raise AssertionError


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", [put, put_folder])
def test_an_interruption_at_every_step_leaves_one_complete_output(
    tmp_path: Path, write: Callable[..., None], moment: str
) -> None:
    left = interrupt_every_step(tmp_path / "right", write, moment)
    assert len(left) > 5
    names = {"out", "out/inner/a"}
    for files in left:
        assert not [name for name in files if ".staging" in name], files
        assert [text for name, text in files.items() if name in names] in (["old"], ["new"]), files


def test_a_removal_that_an_interruption_ends_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control of the test above."""
    monkeypatch.setattr(outputs, "_remove_staging", lambda folder, path: shutil.rmtree(folder, ignore_errors=True))
    left = interrupt_every_step(tmp_path, put_folder, "before")
    assert any(".staging" in name for files in left for name in files)


def test_files_of_several_commands_share_a_folder(tmp_path: Path) -> None:
    write_files({"a.txt": "study"}, tmp_path, command="study")
    write_files({"b.txt": "figures"}, tmp_path, command="figures")
    with pytest.raises(InputError, match="not written by `workbench figures`"):
        write_files({"c.txt": "", "a.txt": "figures"}, tmp_path, command="figures", overwrite=True)
    write_files({"a.txt": "again"}, tmp_path, command="study", overwrite=True)
    assert contents(tmp_path) == {"a.txt": "again", "b.txt": "figures"}


@pytest.mark.parametrize("name", ["../a.txt", "/tmp/a.txt", "b/a.txt", "..", ""])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be the name of a file"):
        write_files({"fine.txt": "", name: ""}, tmp_path / "out", command="study")
    assert not (tmp_path / "out").exists()


def test_a_broken_rule_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: without the check of content, a file that was edited is lost."""
    out = tmp_path / "out"
    put(out)
    out.write_text("mine")
    monkeypatch.setattr(outputs, "_foreign", lambda path, command: "")
    put(out, overwrite=True)
    assert out.read_text() == "new"
    shutil.rmtree(tmp_path)


def test_a_full_disk_names_the_output_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")  # as `write` raises it: without the name of a file

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"out cannot be written: File too large"):
        write_files({"a.txt": "a"}, tmp_path / "out", command="study")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_files({"a.txt": "a"}, tmp_path / "out", command="study")
    assert (tmp_path / "out" / "a.txt").read_text() == "a", "a negative control"
