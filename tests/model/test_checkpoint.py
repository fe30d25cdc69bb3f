"""Both layouts give the same tensors, transformers reads what we write, and every damage is named."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.conftest import BASE
from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_checkpoint
from workbench.model.transformer import GptOss

CFG = replace(BASE, d_vocab=104, n_ctx=131_072)
ODD = replace(CFG, n_heads=6, n_key_value_heads=2, d_head=24, num_experts=5, experts_per_token=3)


def write(folder: Path, cfg: Config = CFG, **options: Any) -> Path:
    experts = options.pop("experts", "mxfp4")
    return save_checkpoint(folder, cfg, RandomTensors(cfg, experts=experts), **options)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and an index."""
    folder = write(tmp_path_factory.mktemp("checkpoint") / "hf", shard_bytes=90_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.mark.parametrize("cfg", [CFG, ODD], ids=["ratio 8", "odd"])
def test_the_layouts_hold_the_same_model(tmp_path: Path, cfg: Config) -> None:
    cfg = replace(cfg, n_ctx=131_072)
    opened = [open_checkpoint(write(tmp_path / layout, cfg, layout=layout)) for layout in ("huggingface", "original")]
    for checkpoint in opened:
        assert checkpoint.cfg == cfg
        assert checkpoint.experts == "mxfp4"
        for name, tensor in RandomTensors(cfg).items():
            assert torch.equal(checkpoint.tensors[name], tensor), name


def test_shards_make_no_difference_but_to_the_digest(pristine: Path, tmp_path: Path) -> None:
    whole, parts = open_checkpoint(write(tmp_path / "one")), open_checkpoint(pristine)
    assert all(torch.equal(whole.tensors[name], parts.tensors[name]) for name in whole.tensors)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@torch.no_grad()
def test_transformers_reads_what_we_write_and_agrees(tmp_path: Path, experts: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "ckpt", ODD, experts=experts)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.experts == experts
    ours = GptOss(checkpoint.cfg, packed=experts == "mxfp4")
    ours.load_state_dict(dict(checkpoint.tensors.items()))
    x = torch.randint(ODD.d_vocab, (2, 90), generator=torch.Generator().manual_seed(5))
    want = theirs(x).logits
    assert float((ours(x) - want).norm() / want.norm()) <= 1e-5


def test_dense_and_packed_experts_mean_the_same(tmp_path: Path) -> None:
    tensors = dict(RandomTensors(CFG).items())
    for name in [n for n in tensors if n.endswith(".blocks")]:
        stem = name.removesuffix("blocks")
        packed = tensors.pop(name), tensors.pop(stem + "scales")
        tensors[stem + "weight"] = dequantise(*packed).mT.contiguous()
    dense = open_checkpoint(save_checkpoint(tmp_path / "dense", CFG, tensors))
    packed_model, dense_model = GptOss(CFG, packed=True), GptOss(CFG)
    packed_model.load_state_dict(dict(RandomTensors(CFG).items()))
    dense_model.load_state_dict(dict(dense.tensors.items()))
    x = torch.arange(90)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense_model(x), packed_model(x), rtol=1e-4, atol=1e-4)


def test_opening_reads_no_weight(tmp_path: Path) -> None:
    """A file whose data is a hole: opening it must not fill 400 MB of memory."""
    import psutil

    big = replace(CFG, d_vocab=3_200_000)
    tensors = RandomTensors(replace(CFG, d_vocab=104))
    folder = write(tmp_path / "big")
    header: dict[str, Any] = {}
    at = 0
    for name, value in load_file(folder / "model.safetensors").items():
        shape = (
            [big.d_vocab, big.d_model] if name in ("model.embed_tokens.weight", "lm_head.weight") else list(value.shape)
        )
        size = int(torch.tensor(shape).prod()) * value.element_size()
        dtype = {torch.bfloat16: "BF16", torch.uint8: "U8"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    fields = json.loads((folder / "config.json").read_text()) | {"vocab_size": big.d_vocab}
    (folder / "config.json").write_text(json.dumps(fields))
    before = psutil.Process().memory_info().rss
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["embed.weight"].shape == (3_200_000, 64)
    assert psutil.Process().memory_info().rss - before < 60e6
    assert len(tensors) == len(checkpoint.tensors)


Damage = Callable[[Path], None]


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], new_name: str | None = None) -> Damage:
    def damage(folder: Path) -> None:
        shard = shard_with(folder, name)
        tensors = load_file(shard)
        value = change(tensors.pop(name).clone())
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


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def copied_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "copy.safetensors")


EMBED, SCALES = "model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj_scales"
BLOCKS, DOWN = "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty folder": (emptied, "no config.json"),
    "shard missing": (drop_shard, "is missing: download it again"),
    "shard missing, no index": (drop_index_and_shard, r"holds \d of \d shards"),
    "truncated": (truncate, "beyond the file: truncated"),
    "huge header": (huge_header, "header of 1,099,511,627,776 bytes"),
    "header is no JSON": (edit_header(lambda h: "{nope"), "not a safetensors header"),
    "overlap": (edit_header(all_at_the_same_place), "overlaps"),
    "wrong size": (edit_header(lambda h: first_tensor(h)["shape"].append(2)), "bytes, has"),
    "negative offset": (edit_header(lambda h: first_tensor(h).update(data_offsets=[-4, 4])), "are no counts"),
    "unknown dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F8_E4M3")), "dtype F8_E4M3"),
    "duplicate in one file": (edit_header(duplicated), "is there twice"),
    "duplicate in two files": (copied_shard, "is both in"),
    "tensor missing": (edit(EMBED, lambda t: None), "lacks it"),
    "tensor left over": (edit(EMBED, lambda t: t, "lm_head.extra"), "lacks it|left over"),
    "wrong shape": (edit(EMBED, lambda t: t[:-1]), r"shape \[103, 64\], the config wants \[104, 64\]"),
    "wrong dtype": (edit(EMBED, lambda t: t.half()), "dtype F16, wanted BF16 or F32"),
    "int8 scales": (edit(SCALES, lambda t: t.view(torch.int8)), "dtype I8, wanted U8"),
    "one layer dense": (edit(BLOCKS, lambda t: torch.zeros(8, 96, 64, dtype=torch.bfloat16), DOWN), "lacks it"),
    "pickle": (pickles, "is a pickle"),
    "link out of the folder": (escaping_link, "link out of the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_refused_in_one_line_that_names_it(folder: Path, damage: str) -> None:
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError, match=said) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"), [(SCALES, 255), (EMBED, torch.nan), ("model.layers.0.self_attn.sinks", torch.inf)]
)
def test_values_that_are_no_numbers_are_found_with_their_place(folder: Path, name: str, value: float) -> None:
    open_checkpoint(folder).check_values()
    edit(name, lambda t: t.flatten().index_fill(0, torch.tensor([3]), value).view_as(t))(folder)
    with pytest.raises(InputError, match="not finite at"):
        open_checkpoint(folder).check_values()


def test_the_digest_sees_any_change_of_a_small_file(folder: Path) -> None:
    before = open_checkpoint(folder).digest
    edit(EMBED, lambda t: t.index_fill(0, torch.tensor([50]), 0.5))(folder)
    assert open_checkpoint(folder).digest != before


def test_a_file_instead_of_a_folder_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path, said in ((tmp_path / "f", "a file"), (tmp_path / "g", "not there")):
        with pytest.raises(InputError, match=said):
            open_checkpoint(path)


def test_a_hub_cache_of_links_to_blobs_is_read(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        shutil.move(path, blobs / str(i))
        (snapshot / path.name).symlink_to(blobs / str(i))
    assert open_checkpoint(snapshot).cfg == CFG


@pytest.mark.parametrize("source", ["../../nowhere", "openai/..", "/no/such/folder", "a b/c", "one", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="neither a folder"):
        resolve(source)


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = {}

    def offline(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="HF_HOME"):
        resolve("openai/gpt-oss-20b", revision="main")
    assert asked["repo"] == "openai/gpt-oss-20b"
    assert asked["revision"] == "main"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_folder_that_exists_is_not_overwritten_and_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "a")

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "b", extra=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
