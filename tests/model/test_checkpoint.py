"""Both layouts give the same tensors, transformers reads what we write, and sources are found or refused by name."""

import json
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.model.checkpoints import CFG, ODD, write
from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_checkpoint
from workbench.model.transformer import GptOss


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
    complete, parts = open_checkpoint(write(tmp_path / "one")), open_checkpoint(pristine)
    assert all(torch.equal(complete.tensors[name], parts.tensors[name]) for name in complete.tensors)


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
        for path, message in (
            (copy / shard.name, "cannot be read: Permission denied"),
            (copy, "cannot be read: Permission"),
        ):
            path.chmod(0o000)
            try:
                os.seteuid(before or 65534)
                with pytest.raises(InputError, match=message):
                    open_checkpoint(copy)
            finally:
                os.seteuid(before)
                path.chmod(0o755)


def test_a_file_instead_of_a_folder_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path, message in ((tmp_path / "f", "a file"), (tmp_path / "g", "not there")):
        with pytest.raises(InputError, match=message):
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


def test_a_hub_id_without_a_network_states_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
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
