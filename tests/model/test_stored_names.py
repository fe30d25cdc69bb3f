"""Checkpoints as releases of transformers and other programs write them give the same tensors, with notes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import workbench as wb
from tests.model.conftest import BASE
from workbench.errors import InputError
from workbench.model import load
from workbench.model.checkpoint import open_checkpoint
from workbench.model.export import RandomTensors, save_checkpoint, save_random

CFG = replace(BASE, d_vocab=72, n_ctx=131_072)
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def written(folder: Path, experts: str, change: Change, **fields: object) -> Path:
    """A checkpoint with changed tensors, and its config with more fields."""
    save_random(folder, CFG, experts=experts)
    path = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in change(load_file(path)).items()}, path)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def renamed(*pairs: tuple[str, str]) -> Change:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for old, new in pairs:
            tensors = {name.replace(old, new) if name.endswith(old) else name: t for name, t in tensors.items()}
        return tensors

    return change


def with_unused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = {
        "v_head.summary.weight": torch.ones(1, 64),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.v_scale": torch.ones(1),
        "model.rotary_emb.original_inv_freq": torch.ones(8),
        "score.weight": torch.ones(1, 64),
    }
    return tensors | extra


VARIANTS: dict[str, tuple[str, Change]] = {
    "dense under the names of blocks": ("dense", renamed(("_proj", "_proj_blocks"))),
    "doubled names": ("mxfp4", renamed(("_blocks", "_blocks_blocks"), ("_scales", "_blocks_scales"))),
    "tensors without use": ("mxfp4", with_unused),
    "float32": ("dense", lambda tensors: {name: t.float() for name, t in tensors.items()}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_hold_the_same_tensors(tmp_path: Path, variant: str) -> None:
    experts, change = VARIANTS[variant]
    checkpoint = open_checkpoint(written(tmp_path / "model", experts, change))
    assert checkpoint.experts == experts
    for name, tensor in RandomTensors(CFG, experts=experts).items():
        assert torch.equal(checkpoint.tensors[name], tensor.to(checkpoint.tensors[name].dtype)), name
    assert bool(checkpoint.notes) == (variant == "tensors without use")


def test_float16_is_read_and_named(tmp_path: Path) -> None:
    halved = written(tmp_path / "model", "dense", lambda tensors: {name: t.half() for name, t in tensors.items()})
    checkpoint = open_checkpoint(halved)
    assert set(checkpoint.tensors.other_precision()) == {"F16"}
    for name, tensor in RandomTensors(CFG, experts="dense").items():
        assert torch.equal(checkpoint.tensors[name], tensor.half()), name


@pytest.mark.parametrize("with_unembedding", [True, False])
def test_a_tied_unembedding_is_the_embedding(tmp_path: Path, with_unembedding: bool) -> None:
    def tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        return tensors if with_unembedding else {name: t for name, t in tensors.items() if name != "lm_head.weight"}

    checkpoint = open_checkpoint(written(tmp_path / "model", "mxfp4", tied, tie_word_embeddings=True))
    assert torch.equal(checkpoint.tensors["unembed.weight"], RandomTensors(CFG)["embed.weight"])
    assert not checkpoint.notes


def test_an_unembedding_of_its_own_is_used_although_tied_and_noted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model", "mxfp4", lambda t: t, tie_word_embeddings=True))
    assert torch.equal(checkpoint.tensors["unembed.weight"], RandomTensors(CFG)["unembed.weight"])
    assert "differs from the embedding" in checkpoint.notes[0]
    with pytest.raises(InputError, match=r"'lm_head.weight' .* is missing"):
        open_checkpoint(
            written(tmp_path / "untied", "mxfp4", lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
        )


@pytest.mark.parametrize("index", [True, False])
def test_files_that_are_not_the_models_are_ignored_and_noted(tmp_path: Path, index: bool) -> None:
    shard_bytes = 90_000 if index else 10**9
    folder = save_checkpoint(tmp_path / "model", CFG, RandomTensors(CFG), shard_bytes=shard_bytes)
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "training.safetensors").write_bytes(b"1234")
    assert "adapter_model.safetensors, training.safetensors" in open_checkpoint(folder).notes[0]


def test_notes_are_logged_when_a_model_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(written(tmp_path / "model", "mxfp4", with_unused), device="meta")
    assert "tensors that the model does not use are ignored: model.layers.0.self_attn.k_scale" in caplog.text


BEGINNINGS: dict[str, tuple[Callable[[str], str], str | None]] = {
    "torch.compile": (lambda name: f"_orig_mod.{name}", None),
    "distributed training": (lambda name: f"module.{name}", None),
    "fully sharded training": (lambda name: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", name), None),
    "checkpointed layers": (lambda name: re.sub(r"(layers\.2\.)", r"\1_checkpoint_wrapped_module.", name), None),
    "a merged adapter": (lambda name: f"base_model.model.{name}", "'base_model.model.model.'"),
    "a part of another model": (lambda name: f"language_model.{name}", "'language_model.model.'"),
    "a backbone with its unembedding": (lambda name: name.removeprefix("model."), "''"),
    "a backbone under another name": (lambda name: name.replace("model.", "backbone."), "'backbone.'"),
}


@pytest.mark.parametrize("experts", ["dense", "mxfp4"])
@pytest.mark.parametrize("kind", list(BEGINNINGS))
def test_other_beginnings_of_names_are_the_same_tensors(tmp_path: Path, kind: str, experts: str) -> None:
    rename, noted = BEGINNINGS[kind]
    folder = written(tmp_path / "model", experts, lambda tensors: {rename(n): t for n, t in tensors.items()})
    checkpoint = open_checkpoint(folder)
    for name, tensor in RandomTensors(CFG, experts=experts).items():
        assert torch.equal(checkpoint.tensors[name], tensor), name
    assert [noted in note for note in checkpoint.notes] == ([] if noted is None else [True])


def test_two_tensors_that_differ_in_their_beginning_only_are_refused(tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"module.model.norm.weight": torch.ones(64)}

    with pytest.raises(InputError, match=r"'module.model.norm.weight' and 'model.norm.weight' are both"):
        open_checkpoint(written(tmp_path / "model", "mxfp4", twice))


def without_unembedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name != "lm_head.weight"}


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): t for name, t in without_unembedding(tensors).items()}


@pytest.mark.parametrize("change", [without_unembedding, backbone])
def test_a_backbone_without_an_unembedding_is_named_unless_it_is_tied(tmp_path: Path, change: Change) -> None:
    with pytest.raises(
        InputError, match=r"'lm_head.weight' .* is missing: this is a backbone or a classifier"
    ) as refusal:
        open_checkpoint(written(tmp_path / "model", "mxfp4", change))
    assert "\n" not in str(refusal.value)
    checkpoint = open_checkpoint(written(tmp_path / "tied", "mxfp4", change, tie_word_embeddings=True))
    assert torch.equal(checkpoint.tensors["unembed.weight"], RandomTensors(CFG)["embed.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.mlp.experts.lora_B.weight",
    ],
)
def test_an_adapter_that_was_not_merged_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}' belongs to an adapter that was not merged: save the merged model"):
        open_checkpoint(written(tmp_path / "model", "mxfp4", lambda tensors: tensors | {name: torch.ones(2, 2)}))


@pytest.mark.parametrize("index", [True, False])
def test_a_gguf_file_beside_safetensors_is_noted(tmp_path: Path, index: bool) -> None:
    folder = save_checkpoint(tmp_path / "model", CFG, RandomTensors(CFG), shard_bytes=90_000 if index else 10**9)
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    assert "GGUF files are ignored, as there are safetensors: model-Q8_0.gguf" in open_checkpoint(folder).notes


def test_a_pointer_instead_of_the_index_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", CFG, RandomTensors(CFG), shard_bytes=90_000)
    (folder / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        InputError, match=r"index.json is a pointer of git-lfs instead of the file: run `git lfs pull`$"
    ):
        open_checkpoint(folder)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", CFG)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds an adapter and no model: load the base model with adapter="):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.experts.down_proj_scales", 255),
        ("model.norm.weight", torch.inf),
        ("lm_head.weight", torch.nan),
    ],
)
def test_a_weight_that_is_no_number_is_refused_when_a_model_is_loaded(tmp_path: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[3] = value
        return tensors

    folder = written(tmp_path / "model", "mxfp4", spoil)
    with pytest.raises(InputError, match=f"tensor '{name}' .* is not finite at \\["):
        wb.load(folder, device="cpu")


def test_generate_names_the_tensor_of_a_large_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.2.self_attn.v_proj.weight"][:] = torch.nan
        return tensors

    monkeypatch.setattr("workbench.model.loading._CHECKED_BYTES", 0)
    model = wb.load(written(tmp_path / "model", "mxfp4", spoil), device="cpu")
    with pytest.raises(
        InputError, match=r"tensor 'model.layers.2.self_attn.v_proj.weight' .* is not finite at \[0, 0\]"
    ):
        model.generate([[1, 2, 3]], max_new_tokens=2)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_pointer_of_git_lfs_is_named_for_every_kind_of_file(tmp_path: Path, name: str) -> None:
    folder = save_random(tmp_path / "model", CFG)
    for template in folder.glob("chat_template*"):
        template.unlink() if name == "tokenizer_config.json" else None
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(InputError, match=f"{name} is a pointer of git-lfs instead of the file: run `git lfs pull`"):
        wb.load(folder, device="cpu")
