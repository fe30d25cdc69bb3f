"""Find the files of a GGUF model: one, or the parts of a split, which are called NAME-00001-of-0000N.gguf.

A part states its number and the count of parts; the first one has the model's metadata.

Reference: https://github.com/ggml-org/llama.cpp, tools/gguf-split.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from workbench.errors import InputError
from workbench.model.formats.gguf_file import MAGIC, GgufFile

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def find_files(source: Path) -> list[Path]:
    """Return the GGUF files of a source: a file with the others of its split, those of a folder, or none.

    Raises:
        InputError: a part of a split is missing, a folder holds several models, or its models are in folders below.
    """
    try:
        if source.is_file():
            with source.open("rb") as file:
                is_gguf = source.suffix.lower() == ".gguf" or file.read(4) == MAGIC
            return _parts(source) if is_gguf else []
        if not source.is_dir() or any(source.glob("*.safetensors")) or (source / "original").is_dir():
            return []
        files = sorted(path for path in source.glob("*.gguf") if not path.name.startswith("mmproj"))
        below = [] if files or (source / "config.json").exists() else _below(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    if below:
        raise InputError(
            f"{source} has GGUF files in folders below it: give one of them, such as {', '.join(below[:3])}"
        )
    models = {_model_of(path): path for path in files}
    if len(models) > 1:
        raise InputError(
            f"{source} holds {len(models)} GGUF models, {', '.join(sorted(models)[:4])}: give one of its files"
        )
    return _parts(next(iter(models.values()))) if models else []


def _below(folder: Path) -> list[str]:
    """Return the GGUF files in the folders of a model folder or of a model in the hub's cache."""
    files = [
        path for pattern in ("*/*.gguf", "snapshots/*/*.gguf", "snapshots/*/*/*.gguf") for path in folder.glob(pattern)
    ]
    return sorted(str(path) for path in files)


def _model_of(path: Path) -> str:
    """Return a name that the parts of a split share."""
    match = _SPLIT.fullmatch(path.name)
    return f"{match['stem']}-…-of-{match['count']}.gguf" if match else path.name


def _parts(path: Path) -> list[Path]:
    """Return all files of the split to which a file belongs."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise InputError(
            f"{path}: there is no part {int(match['number'])} of {count}: restore the file's original name"
        )
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise InputError(f"{path} is one of {count} files, and {missing[0]} is missing: download it")
    return parts


def check_split(files: Sequence[GgufFile]) -> None:
    """Check that files are all parts of one split, in order, from what each states.

    Raises:
        InputError: a file was renamed, is a part of another model, or tensors are missing.
    """
    for number, file in enumerate(files):
        count, own = file.metadata.get(_COUNT, len(files)), file.metadata.get(_NUMBER, number)
        stated = f"{file.path} is part {_plus_one(own)} of {count} of a split model"
        if count != len(files) and len(files) == 1:
            raise InputError(f"{stated}: rename the parts to NAME-00001-of-0000N.gguf and so on, in one folder")
        if count != len(files) or own != number:
            raise InputError(
                f"{stated}, and its name states {number + 1} of {len(files)}: restore the original names of the parts"
            )
        for key in ("general.architecture", "general.name", _TENSORS):
            first, here = files[0].metadata.get(key), file.metadata.get(key)
            if None not in (first, here) and here != first:
                raise InputError(
                    f"{file.path} belongs to another model than {files[0].path.name}: {key} is {here!r}, not {first!r}"
                )
    total, held = files[0].metadata.get(_TENSORS), sum(len(file.tensors) for file in files)
    if total is not None and total != held:
        raise InputError(
            f"{files[0].path}: the parts hold {held} tensors, the model has {total}: a part belongs to another "
            "model: download all parts again"
        )


def _plus_one(number: object) -> object:
    return number + 1 if isinstance(number, int) else number
