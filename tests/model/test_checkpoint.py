"""Both layouts give the same tensors, transformers reads what we write, and every damage is named.

Also tests `workbench.model.opened_checkpoint` and `workbench.model.safetensors_file`.
"""

import json
import os
import re
import shutil
import struct
import tempfile
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
    "header is no JSON": (edit_header(lambda h: "{nope"), "not a safetensors header"),
    "header is a list": (edit_header(lambda h: "[]"), "not a safetensors header"),
    "header is deep": (edit_header(lambda h: "[" * 100_000), "not a safetensors header"),
    "metadata is no object": (edit_header(lambda h: h.update(__metadata__=3)), "not a safetensors header"),
    "dtype is a list": (edit_header(lambda h: first_tensor(h).update(dtype=["U8"])), "which is not read here"),
    "shape is a text": (edit_header(lambda h: first_tensor(h).update(shape="64")), "are no counts"),
    "trailing bytes": (trailing, "7 bytes after the last tensor"),
    "index is no JSON": (index_of(lambda i: "{"), "is not an index"),
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
    "negative offset": (edit_header(lambda h: first_tensor(h).update(data_offsets=[-4, 4])), "are no counts"),
    "unknown dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F8_E4M3")), "dtype F8_E4M3"),
    "duplicate in one file": (edit_header(duplicated), "is there twice"),
    "duplicate in two files": (without_index(copied_shard), "is both in"),
    "tensor missing": (edit(EMBED, lambda t: None), "lacks it"),
    "tensor left over": (edit(EMBED, lambda t: t, "lm_head.extra"), "lacks it|left over"),
    "wrong shape": (edit(EMBED, lambda t: t[:-1]), r"shape \[103, 64\], the config wants \[104, 64\]"),
    "wrong dtype": (edit(EMBED, lambda t: t.double()), "dtype F64, wanted BF16 or F16 or F32"),
    "pointer of git-lfs": (lfs_pointer, "model-00001-of-.* is a git-lfs pointer: run git lfs pull"),
    "config is a pointer of git-lfs": (lfs_config, "config.json is a git-lfs pointer: run git lfs pull"),
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
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError, match=said) as refusal:
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


def test_the_digest_does_not_depend_on_file_names_but_on_the_config(folder: Path, pristine: Path) -> None:
    before = open_checkpoint(pristine).digest
    assert open_checkpoint(folder).digest == before
    (folder / "model.safetensors.index.json").unlink()
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"{9 - i}.safetensors")
    assert open_checkpoint(folder).digest == before
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    assert open_checkpoint(folder).digest != before


def test_without_permission_the_folder_and_the_file_are_named(folder: Path) -> None:
    """As another user, since root may read everything."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        copy = Path(shutil.copytree(folder, Path(open_to_all) / "copy"))
        for path, said in (
            (copy / shard.name, "cannot be read: Permission denied"),
            (copy, "cannot be read: Permission"),
        ):
            path.chmod(0o000)
            try:
                os.seteuid(before or 65534)
                with pytest.raises(InputError, match=said):
                    open_checkpoint(copy)
            finally:
                os.seteuid(before)
                path.chmod(0o755)


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


def test_a_folder_with_both_layouts_is_read_in_its_own(folder: Path) -> None:
    write(folder / "original", replace(CFG, num_experts=9), layout="original")
    assert open_checkpoint(folder).layout == "huggingface"
    for path in folder.glob("*.*"):
        path.unlink()
    opened = open_checkpoint(folder)
    assert (opened.layout, opened.cfg.num_experts, opened.path) == ("original", 9, folder / "original")


@pytest.mark.parametrize(
    "source",
    ["../../nowhere", "openai/..", "/no/such/folder", "a b/c", "one", "a/b/c", "", "a/b\0", "x" * 9999, "ä/b", "a/b\n"],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(source: str) -> None:
    with pytest.raises(InputError, match=r"neither a folder|cannot be read") as refusal:
        resolve(source)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("source", "revision"), [(".", "main"), ("nano", "main"), ("a/b", "../../x"), ("a/b", "/etc")])
def test_a_revision_is_one_of_a_hub_id(source: str, revision: str) -> None:
    with pytest.raises(InputError, match="revision"):
        resolve(source, revision=revision)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no network."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_revision_is_found_without_a_network(folder: Path, offline: Path) -> None:
    cached = offline / "models--a--b"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    shutil.move(folder, cached / "snapshots" / "abc")
    assert resolve("a/b") == cached / "snapshots" / "abc"
    assert open_checkpoint(resolve("a/b", revision="main")).cfg == CFG
    with pytest.raises(InputError, match=r"a/b is incomplete in the local cache .* HF_HOME"):
        resolve("a/b", revision="v2")


def test_the_original_layout_is_downloaded_only_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    def download(
        repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        for name in hub:
            if any(fnmatch(name, p) for p in allow_patterns) and not any(
                fnmatch(name, p) for p in ignore_patterns or ()
            ):
                (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / repo / name).touch()
        (tmp_path / repo).mkdir(parents=True, exist_ok=True)
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = ["config.json", "a.safetensors", "a.bin", "original/config.json", "original/a.safetensors", "metal/model.bin"]
    both = resolve("a/both")
    hub = ["README.md", "original/config.json", "original/a.safetensors", "original/a.pt"]
    original = resolve("a/original")
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*.*")} for f in (both, original)]
    assert files == [{"config.json", "a.safetensors"}, {"original/config.json", "original/a.safetensors"}]


def test_a_failing_network_of_any_kind_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class ProxyError(Exception):
        pass

    def fail(*args: Any, **options: Any) -> str:
        raise ProxyError("no proxy\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no proxy\); download it elsewhere"):
        resolve("a/b")


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = {}

    def unreachable(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="HF_HOME"):
        resolve("openai/gpt-oss-20b", revision="main")
    assert asked["repo"] == "openai/gpt-oss-20b"
    assert asked["revision"] == "main"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
