"""Outputs: what a command may write. Every command that writes files asks here.

- Everything that can be checked is checked before anything is written.
- An output never is, contains or is inside an input, and never is a link, a device, a pipe or a socket.
- Files are written beside their destination and renamed when they are complete.
- Something that exists is refused. With `--overwrite` it is replaced, but only if the same command wrote it and nobody
  changed it since: a marker lists the command and the SHA-256 of each file it wrote. The marker lies beside the output
  (`.NAME.workbench`), that of an exported folder in it (`.workbench`).

    with staged("tokens.parquet", command="export", inputs=["run.zarr"], overwrite=False) as path:
        …                                                # write a file or a folder at `path`
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.file_lock import FileLock

MARKER = ".workbench"
_STAGING = ".staging"
_REPLACED = ".replaced"
_MAX_MARKER_BYTES = 64 * 2**20

Owned = Callable[[Path], bool]


def check_output(
    out: str | Path,
    *,
    command: str,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    owned: Owned | None = None,
) -> Path:
    """Return the path of an output that a command may write, after all checks that need no lock.

    inputs: paths that the command reads; names that are not a path of this machine are passed over. owned: whether the
    command wrote an existing file, if its content states it; the marker does otherwise.

    Raises:
        InputError: the path is an input, cannot be a file or folder, or exists and may not be replaced.
    """
    path = Path(out)
    if path.name in ("", "..") or "\0" in str(path):
        raise InputError(f"{str(out)!r} is not a name for an output: give the path of a file or folder")
    _check_parents(path)
    mode = check_kind(path)
    refuse_inputs(path, inputs)
    if mode is None:
        return path
    if not overwrite:
        raise InputError(f"{path} exists: choose another name, or --overwrite")
    if not (owned or (lambda existing: not _foreign(existing, command)))(path):
        changed = "" if owned else f" {_foreign(path, command)}"
        raise InputError(
            f"{path} exists and was not written by `workbench {command}`, or was changed since{changed}: "
            "choose another name, or remove it"
        )
    return path


def check_kind(path: Path) -> int | None:
    """Return the mode of the file or folder at a path, None if nothing is there.

    Raises:
        InputError: it is a link, a device, a pipe or a socket, or cannot be examined.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if stat.S_ISLNK(mode):
        raise InputError(f"{path} is a link: give the path that it points to")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a device, a pipe or a socket: give the path of a file or folder")
    return mode


def refuse_inputs(path: Path, inputs: Iterable[str | Path], *, holds_files: bool = False) -> None:
    """Check that an output is not an input, does not contain one and does not lie in one.

    holds_files: the output is a folder in which single files are written, which may contain an input.

    Raises:
        InputError: it is, contains or lies in one.
    """
    real = Path(os.path.realpath(path))
    for given in inputs:
        if "://" in str(given) or not os.path.lexists(given):
            continue
        source = Path(os.path.realpath(given))
        if real == source or (real.exists() and source.exists() and os.path.samefile(real, source)):
            if holds_files and source.is_dir() and not _is_run(source):
                continue
            raise InputError(f"{path} is an input of this command: choose another output")
        if real in source.parents and not holds_files:
            raise InputError(f"{path} contains the input {given}: choose another output")
        if source in real.parents and (_is_run(source) or not holds_files):
            raise InputError(f"{path} is inside the input {given}: choose another output")


def _is_run(folder: Path) -> bool:
    return (folder / "zarr.json").exists()


def _check_parents(path: Path, *, is_folder: bool = False) -> None:
    """Refuse a parent that is not a folder, or in which nothing can be made. is_folder: the path may be one, too."""
    for parent in [*([path.absolute()] if is_folder else []), *path.absolute().parents]:
        try:
            mode = os.stat(parent).st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be written: {parent}: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise InputError(f"{path} cannot be written: {parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{path} cannot be written: no permission to write in {parent}")
        return


@contextmanager
def staged(
    out: str | Path,
    *,
    command: str,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    owned: Owned | None = None,
) -> Iterator[Path]:
    """Yield a path beside `out` for a file or folder, which replaces `out` when the block ends without an error.

    An `out` that was itself yielded by this function, as that of a command to a function that writes a checkpoint, is
    yielded as it is: the command locks and renames it, and its errors name the file that the user named.

    Raises:
        InputError: `out` may not be written, see `check_output`, or another process is writing it.
    """
    if Path(out).parent.name.endswith(_STAGING):
        yield Path(out)
        return
    inputs = list(inputs)
    path = check_output(out, command=command, inputs=inputs, overwrite=overwrite, owned=owned)
    with made_parents(path), FileLock(path), staging_folder(path) as folder:
        check_output(path, command=command, inputs=inputs, overwrite=overwrite, owned=owned)  # another may have ended
        part = folder / path.name
        with write_errors(path):
            yield part
            _publish(part, path, folder, command, mark=owned is None)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Make errors of writing, such as those of a full disk, an `InputError` that names the output.

    Raises:
        InputError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        reason = error.strerror or f"{error}; the disk may be full"  # NumPy states neither reason nor number
        raise InputError(f"{path} cannot be written: {reason}") from error


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make the folders above a path, and remove those made if the block ends with an error and they are empty."""
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside a locked path; those that killed processes left are removed.

    What such a process had set aside, to replace it, is moved back if nothing has its name.
    """
    for entry in list(path.parent.iterdir()):
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(_STAGING) and not entry.is_symlink():
            _remove_staging(entry, path)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_STAGING}")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove_staging(folder, path)


def _remove_staging(folder: Path, path: Path) -> None:
    """Remove a staging folder. Ctrl-C in the meantime is raised afterwards. What was to be replaced is moved back."""
    try:
        if os.path.lexists(folder / _REPLACED) and not os.path.lexists(path):  # ended between two renames
            os.rename(folder / _REPLACED, path)
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        _remove_staging(folder, path)
        raise


def _publish(part: Path, path: Path, staging: Path, command: str, *, mark: bool) -> None:
    """Rename what was staged to its destination. The marker first lists the old and the new content."""
    marker = path.with_name(f".{path.name}{MARKER}")
    if part.is_dir():
        if mark:
            files = {str(key): (command, digest) for key, digest in _contents(part).items()}
            _write_marker(part / MARKER, files, staging)
        replace_folder(part, path, staging)
        return
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    if path.is_dir():
        os.rename(path, staging / _REPLACED)
    digest = sha256(part)
    if mark:
        _write_marker(marker, {path.name: (command, digest)}, staging, also=True)
    os.replace(part, path)
    if mark:
        _unlist_replaced(marker, {path.name: (command, digest)}, staging)


def replace_folder(part: Path, path: Path, staging: Path) -> None:
    """Rename a folder to a path. What was there is set aside in the staging folder, whose removal removes it."""
    if os.path.lexists(path):
        os.rename(path, staging / _REPLACED)
    os.rename(part, path)


def write_files(
    files: Mapping[str, str | bytes],
    out_dir: str | os.PathLike[str],
    *,
    command: str,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    marker: str | None = None,
) -> list[Path]:
    """Write files into a folder, each complete or not at all, and return their paths.

    All are checked and staged before the first is renamed. marker: the name of the file that lists them, in the folder;
    beside the folder if None.

    Raises:
        InputError: a name is not a file name, or a file may not be written, see `check_output`.
    """
    refuse_paths(files)
    out = check_folder(out_dir, inputs=inputs)
    with write_errors(out if out.name else out.absolute()), made_parents(out / "file"):
        listing = _listing(out, marker)
        with FileLock(listing), staging_folder(out / MARKER) as staging:
            known = read_marker(listing)
            for name in files:
                _check_file(out / name, command, known, inputs, overwrite)
            listed: dict[str, tuple[str, str]] = {}
            for name, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                (staging / name).write_bytes(data)
                listed[name] = (command, hashlib.sha256(data).hexdigest())
            _write_marker(listing, listed, staging, also=True)
            for name in files:
                os.replace(staging / name, out / name)
            _unlist_replaced(listing, listed, staging)
    return [out / name for name in files]


def _listing(out: Path, marker: str | None) -> Path:
    """Return the path of the marker of files in a folder: in it by name, or beside it where possible."""
    if marker is not None:
        return out / marker
    real = Path(os.path.realpath(out))
    beside = real.name and os.access(real.parent, os.W_OK)
    return real.parent / f".{real.name}{MARKER}" if beside else real / MARKER


def check_folder(out_dir: str | os.PathLike[str], *, inputs: Iterable[str | Path] = ()) -> Path:
    """Return the path of a folder in which a command may write files.

    Raises:
        InputError: it is something else, lies in an input, or cannot be written.
    """
    out = Path(out_dir)
    _check_parents(out, is_folder=True)
    refuse_inputs(out, inputs, holds_files=True)
    return out


def check_files(
    names: Iterable[str],
    out_dir: str | os.PathLike[str],
    *,
    command: str,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    marker: str | None = None,
) -> None:
    """Check, before the work, that files of these names may be written into a folder.

    Raises:
        InputError: one may not, see `check_output`.
    """
    out = check_folder(out_dir, inputs=inputs)
    known = read_marker(_listing(out, marker))
    for name in names:
        _check_file(out / name, command, known, inputs, overwrite)


def _check_file(
    path: Path,
    command: str,
    known: Mapping[str, list[tuple[str, str]]],
    inputs: Iterable[str | Path],
    overwrite: bool,
) -> None:
    def owned(existing: Path) -> bool:
        return existing.is_file() and (command, sha256(existing)) in known.get(existing.name, [])

    check_output(path, command=command, overwrite=overwrite, owned=owned)
    refuse_inputs(path, inputs, holds_files=True)


def refuse_paths(names: Iterable[str]) -> None:
    """Check that names are names of files, as labels of a run must not lead out of the folder they are written to.

    Raises:
        InputError: a name has folders in it.
    """
    for name in names:
        if name != Path(name).name or name in ("", "..") or "\0" in name:
            raise InputError(f"{name!r} cannot be the name of a file; it needs one without folders")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contents(folder: Path) -> dict[Path, str]:
    """Return the digest of every file in a folder by its relative path; a link or device counts as changed."""
    digests = {}
    for at, folders, names in os.walk(folder):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(at, f)))]:
            path = Path(at, name)
            key = path.relative_to(folder)
            if str(key) != MARKER:
                digests[key] = sha256(path) if stat.S_ISREG(os.lstat(path).st_mode) else "not a regular file"
    return digests


def _foreign(path: Path, command: str) -> str:
    """Return the reason why an existing output is not as this command wrote it; "" if it is."""
    if path.is_dir():
        listed = read_marker(path / MARKER)
        if not listed:
            return f"(it has no {MARKER})"
        present = {str(key): digest for key, digest in _contents(path).items()}
    else:
        listed = read_marker(path.with_name(f".{path.name}{MARKER}"))
        present = {path.name: sha256(path)}
    for name in sorted(present.keys() | listed.keys()):
        if (command, present.get(name, "")) not in listed.get(name, []):
            return f"(see {name})"
    return ""


def read_marker(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the commands and digests of files as a marker lists them; a marker that is not a marker lists none."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) or os.path.getsize(path) > _MAX_MARKER_BYTES:
            return {}
        files: Any = parse_json(path.read_bytes())["files"]
        return {str(name): [(str(c), str(d)) for c, d in entries] for name, entries in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_marker(path: Path, files: Mapping[str, tuple[str, str]], staging: Path, *, also: bool = False) -> None:
    """Add files to a marker, instead of what it lists of them; also: beside it. It is written in `staging` first."""
    listed = read_marker(path)
    for name, entry in files.items():
        listed[name] = [*listed.get(name, []), entry] if also else [entry]
    part = staging / f"marker.{uuid.uuid4().hex}"
    part.write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    os.replace(part, path)


def _unlist_replaced(path: Path, files: Mapping[str, tuple[str, str]], staging: Path) -> None:
    """List the new files in a marker, without those that they replaced.

    The outputs are complete by now: a disk without space for this leaves a marker that lists both contents.
    """
    with suppress(OSError):
        _write_marker(path, files, staging)
