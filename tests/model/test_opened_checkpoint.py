"""Every damage to a checkpoint is refused in one line that names it.

Also tests `workbench.model.safetensors_file`.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.errors import InputError
from workbench.model.checkpoint import open_checkpoint

Damage = Callable[[Path], None]


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None], new_name: str | None = None, keep: bool = False
) -> Damage:
    def damage(folder: Path) -> None:
        shard = shard_with(folder, name)
        tensors = load_file(shard)
        value = change(tensors[name].clone())
        if not keep:
            del tensors[name]
        if value is not None:
            tensors[new_name or name] = value.contiguous()
        save_file(tensors, shard)

    return damage


def edit_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        shard = next(iter(sorted(folder.glob("*.safetensors"))))
        raw = shard.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + n])
        text = change(header)
        text = (text if isinstance(text, str) else json.dumps(header)).encode()
        shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])

    return damage


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in header.items() if k != "__metadata__")


def all_at_the_same_place(header: dict[str, Any]) -> None:
    first = dict(first_tensor(header))
    for name in header:
        if name != "__metadata__":
            header[name] = first


def duplicated(header: dict[str, Any]) -> str:
    text = json.dumps(header)
    name = next(k for k in header if k != "__metadata__")
    return text[:-1] + f', "{name}": {json.dumps(header[name])}}}'


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def drop_index_and_shard(folder: Path) -> None:
    drop_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 100)


def huge_header(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def escaping_link(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    outside = folder.parent / "elsewhere.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def escaping_config(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def dangling_link(folder: Path) -> None:
    (folder / "more.safetensors").symlink_to("gone")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")


def trailing(folder: Path) -> None:
    with sorted(folder.glob("*.safetensors"))[0].open("ab") as file:
        file.write(bytes(7))


def short_file(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes(b"1234")


def index_of(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        text = change(index)
        path.write_text(text if isinstance(text, str) else json.dumps(index))

    return damage


def without_index(damage: Damage) -> Damage:
    def both(folder: Path) -> None:
        damage(folder)
        (folder / "model.safetensors.index.json").unlink()

    return both


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def copied_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "copy.safetensors")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4808762992\n"


def lfs_pointer(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_text(POINTER)


def lfs_config(folder: Path) -> None:
    (folder / "config.json").write_text(POINTER)


def same_weight_twice(folder: Path) -> None:
    without_index(edit(SCALES, lambda t: t, SCALES.replace("_scales", "_blocks_scales"), keep=True))(folder)


NORM = "model.norm.weight"
EMBED, SCALES = "model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj_scales"
BLOCKS, DOWN = "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty folder": (emptied, "no config.json"),
    "shard missing": (drop_shard, "is missing: download it again"),
    "shard missing, no index": (drop_index_and_shard, r"holds \d of \d shards"),
    "truncated": (truncate, "beyond the file: truncated"),
    "huge header": (huge_header, "header of 1,099,511,627,776 bytes"),
    "file of four bytes": (without_index(short_file), "in a file of 4 bytes"),
    "pipe": (without_index(pipe), "is not a file"),
    "dangling link": (without_index(dangling_link), "cannot be read: No such file"),
    "header is not JSON": (edit_header(lambda h: "{nope"), "not a safetensors header"),
    "header is a list": (edit_header(lambda h: "[]"), "not a safetensors header"),
    "header is deep": (edit_header(lambda h: "[" * 100_000), "not a safetensors header"),
    "metadata is not an object": (edit_header(lambda h: h.update(__metadata__=3)), "not a safetensors header"),
    "dtype is a list": (edit_header(lambda h: first_tensor(h).update(dtype=["U8"])), "which is not read here"),
    "shape is a text": (edit_header(lambda h: first_tensor(h).update(shape="64")), "are not valid counts"),
    "trailing bytes": (trailing, "7 bytes after the last tensor"),
    "index is not JSON": (index_of(lambda i: "{"), "is not an index"),
    "index without a map": (index_of(lambda i: i.clear()), "is not an index"),
    "index names another shard": (
        index_of(lambda i: i["weight_map"].update({EMBED: "gone.safetensors"})),
        "but it is in",
    ),
    "index names another tensor": (
        index_of(lambda i: i["weight_map"].update(x="../../x")),
        "is in '../../x', which is missing",
    ),
    "overlap": (edit_header(all_at_the_same_place), "overlaps"),
    "wrong size": (edit_header(lambda h: first_tensor(h)["shape"].append(2)), "bytes, has"),
    "negative offset": (edit_header(lambda h: first_tensor(h).update(data_offsets=[-4, 4])), "are not valid counts"),
    "unknown dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F8_E4M3")), "dtype F8_E4M3"),
    "duplicate in one file": (edit_header(duplicated), "is stored twice"),
    "duplicate in two files": (without_index(copied_shard), "is both in"),
    "tensor missing": (edit(EMBED, lambda t: None), "lacks it"),
    "tensor left over": (edit(EMBED, lambda t: t, "lm_head.extra"), "lacks it|unexpected"),
    "wrong shape": (edit(EMBED, lambda t: t[:-1]), r"shape \[103, 64\], the config requires \[104, 64\]"),
    "wrong dtype": (edit(EMBED, lambda t: t.double()), "dtype F64, wanted BF16 or F16 or F32"),
    "pointer of git-lfs": (
        lfs_pointer,
        "model-00001-of-.* is a pointer of git-lfs instead of the file: run `git lfs pull`",
    ),
    "config is a pointer of git-lfs": (
        lfs_config,
        "config.json is a pointer of git-lfs instead of the file: run `git lfs pull`",
    ),
    "the same weight twice": (same_weight_twice, "are both 'model.layers.1.mlp.experts.down_proj_scales'"),
    "int8 scales": (edit(SCALES, lambda t: t.view(torch.int8)), "dtype I8, wanted U8"),
    "tensor missing, no index": (without_index(edit(NORM, lambda t: None)), r"'model.norm.weight' \(64,\) is missing$"),
    "tensor left over, no index": (
        without_index(edit(EMBED, lambda t: t, keep=True, new_name="x")),
        "'x' is not part of",
    ),
    "embedding missing, no index": (without_index(edit(EMBED, lambda t: None)), "no embedding called"),
    "one layer dense": (edit(BLOCKS, lambda t: torch.zeros(8, 96, 64, dtype=torch.bfloat16), DOWN), "lacks it"),
    "one layer dense, no index": (
        without_index(edit(BLOCKS, lambda t: torch.zeros(8, 96, 64, dtype=torch.bfloat16), DOWN)),
        r"but '[\w.]+\.1\.mlp\.experts\.down_proj' is there: all experts must be packed, or all dense",
    ),
    "pickle": (pickles, "is a pickle"),
    "link out of the folder": (escaping_link, "link out of the checkpoint"),
    "config is a link out of the folder": (escaping_config, "link out of the checkpoint"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_refused_in_one_line_that_names_it(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"), [(SCALES, 255), (EMBED, torch.nan), ("model.layers.0.self_attn.sinks", torch.inf)]
)
def test_values_that_are_no_numbers_are_found_with_their_place(folder: Path, name: str, value: float) -> None:
    open_checkpoint(folder).check_values()
    shape = torch.Size(())

    def spoil(t: torch.Tensor) -> torch.Tensor:
        nonlocal shape
        shape = t.shape
        return t.flatten().index_fill(0, torch.tensor([t.numel() - 2, t.numel() - 1]), value).view_as(t)

    edit(name, spoil)(folder)
    place = [n - 1 for n in shape[:-1]] + [shape[-1] - 2]
    for chunk in (7, 1 << 24):
        with pytest.raises(InputError, match=rf"not finite at {re.escape(str(place))}"):
            open_checkpoint(folder).check_values(chunk)


def test_the_digest_sees_any_change_of_a_small_file(folder: Path) -> None:
    before = open_checkpoint(folder).digest
    edit(EMBED, lambda t: t.index_fill(0, torch.tensor([50]), 0.5))(folder)
    assert open_checkpoint(folder).digest != before
