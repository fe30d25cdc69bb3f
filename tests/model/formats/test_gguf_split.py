"""Parts of a split model are read together, in order, and only if they belong together."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.formats import gguf_files as files
from tests.model.formats.test_gguf_reader import CFG, NANO
from workbench.errors import InputError
from workbench.model.checkpoint import open_checkpoint
from workbench.model.export import RandomTensors

STORED = files.llama_cpp(CFG, RandomTensors(CFG))


def split(
    folder: Path, name: str = "m", *, count: int = 3, first: int = 20, stated: bool = True, **about: Any
) -> list[Path]:
    """A model in parts as llama-gguf-split writes them; the first may hold metadata only."""
    tensors, size = list(STORED.items()), -(-(len(STORED) - first) // (count - 1))
    chunks = [tensors[:first], *(tensors[first + i * size : first + (i + 1) * size] for i in range(count - 1))]
    paths = []
    for number, chunk in enumerate(chunks):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(STORED)} if stated else {}
        metadata = files.metadata(CFG, "gpt-oss", NANO) | about if number == 0 else {}
        path = folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(files.write(path, metadata | own, dict(chunk)))
    return paths


@pytest.mark.parametrize("first", [20, 0], ids=["tensors in all", "metadata alone in the first"])
@pytest.mark.parametrize("stated", [True, False], ids=["numbered", "not numbered"])
def test_a_split_is_read_from_any_of_its_parts_and_from_its_folder(tmp_path: Path, first: int, stated: bool) -> None:
    parts = split(tmp_path, first=first, stated=stated)
    for source in (*parts, tmp_path):
        tensors = open_checkpoint(source).tensors
        for name, tensor in RandomTensors(CFG).items():
            assert torch.equal(tensors[name].to(tensor.dtype), tensor), name


def exchanged(folder: Path) -> Path:
    first, second, _ = split(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return second


def last_two_exchanged(folder: Path) -> Path:
    _, second, third = split(folder)
    second.rename(folder / "x")
    third.rename(second)
    (folder / "x").rename(third)
    return folder


def renamed(folder: Path) -> Path:
    return split(folder)[0].rename(folder / "model.gguf")


def missing(folder: Path) -> Path:
    parts = split(folder)
    parts[2].unlink()
    return folder


def of_another_count(folder: Path) -> Path:
    split(folder)
    shutil.copy(split(folder / "other", count=2)[1], folder / "m-00002-of-00003.gguf")
    return folder


def of_another_model(folder: Path) -> Path:
    parts = split(folder)
    own = {"split.no": 1, "split.count": 3, "split.tensors.count": len(STORED) + 1}
    files.write(parts[1], own, dict(list(STORED.items())[20:30]))
    return folder


def of_another_architecture(folder: Path) -> Path:
    parts = split(folder, stated=False)
    files.write(parts[1], {"general.architecture": "llama"}, dict(list(STORED.items())[20:30]))
    return folder


def with_fewer_tensors(folder: Path) -> Path:
    parts = split(folder)
    own = {"split.no": 2, "split.count": 3, "split.tensors.count": len(STORED)}
    files.write(parts[2], own, dict(list(STORED.items())[-3:]))
    return folder


def two_splits_of_one_name(folder: Path) -> Path:
    split(folder)
    split(folder, count=2)
    return folder


def beyond_the_count(folder: Path) -> Path:
    return split(folder)[0].rename(folder / "m-00004-of-00003.gguf")


def below(folder: Path) -> Path:
    split(folder / "MXFP4")
    return folder


def pointer(folder: Path) -> Path:
    split(folder)[1].write_text("version https://git-lfs.github.com/spec/v1\n")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            exchanged,
            r"m-00001-of-00003.gguf is part 2 of 3 .*, and its name states 1 of 3: restore the original names",
        ),
        (last_two_exchanged, r"m-00002-of-00003.gguf is part 3 of 3 of a split model, and its name states 2 of 3"),
        (renamed, r"model.gguf is part 1 of 3 of a split model: rename the parts to NAME-00001-of-0000N.gguf"),
        (missing, r"is one of 3 files, and m-00003-of-00003\.gguf is missing: download it"),
        (of_another_count, r"m-00002-of-00003.gguf is part 2 of 2 of a split model, and its name states 2 of 3"),
        (of_another_model, r"m-00002-of-00003.gguf belongs to another model than m-00001-.*: split.tensors.count is"),
        (of_another_architecture, r"is a part of another model .*: general.architecture is 'llama', not 'gpt-oss'"),
        (with_fewer_tensors, r"the parts hold \d+ tensors, the model has \d+: a part belongs to another model"),
        (two_splits_of_one_name, r"holds 2 GGUF models, m-…-of-00002.gguf, m-…-of-00003.gguf: give one of its files"),
        (beyond_the_count, r"there is no part 4 of 3: restore the file's original name"),
        (below, r"has GGUF files in folders below it: give one of them, such as .*MXFP4/m-00001-of-00003.gguf"),
        (pointer, r"m-00002-of-00003.gguf is a pointer of git-lfs instead of the file: run `git lfs pull`"),
    ],
)
def test_parts_that_do_not_belong_together_are_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(make(tmp_path / "model"))
    assert "\n" not in str(refusal.value)


def test_a_folder_of_gguf_files_may_have_a_config_beside_them(tmp_path: Path) -> None:
    """As repositories of GGUF files on the hub do."""
    split(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).layout == "gguf"
