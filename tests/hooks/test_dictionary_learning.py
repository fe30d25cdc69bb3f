"""Folders that dictionary_learning wrote compute what the library computes, and act where they are spliced in."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.hooks.conftest import RESID, X
from workbench.errors import InputError
from workbench.hooks.sae import load_sae, splice
from workbench.model.transformer import GptOss

FOLDERS = Path(__file__).parent / "dictionaries"
NAMES = sorted(path.name for path in FOLDERS.iterdir())
CONFIG, WEIGHTS = "config.json", "ae.pt"


def state(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / WEIGHTS, weights_only=True)


def outputs(name: str) -> dict[str, Tensor]:
    return load_file(FOLDERS / name / "outputs.safetensors")


def double_precision(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features and the reconstruction by the formulas of the papers, in float64, from the tensors of the file."""
    s, x = {key: tensor.double() for key, tensor in state(FOLDERS / name).items()}, x.double()
    if name in ("batch_topk", "topk"):
        pre = ((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        if name == "batch_topk":
            features = torch.where(pre > s["threshold"], pre, 0.0)
        else:
            lowest = pre.sort(-1, descending=True).values[:, int(s["k"]) - 1, None]
            features = torch.where(pre >= lowest, pre, 0.0)
        return features, features @ s["decoder.weight"].T + s["b_dec"]
    if name in ("jumprelu", "matryoshka"):
        centred = x - s["b_dec"] if name == "matryoshka" else x
        pre = centred @ s["W_enc"] + s["b_enc"]
        features = torch.where((pre > s["threshold"]) & (pre > 0), pre, 0.0)
        return features, features @ s["W_dec"] + s["b_dec"]
    if name == "gated":
        pre = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        features = torch.where(pre + s["gate_bias"] > 0, (s["r_mag"].exp() * pre + s["mag_bias"]).relu(), 0.0)
        return features, features @ s["decoder.weight"].T + s["decoder_bias"]
    length = s["decoder.weight"].norm(dim=0)  # the library gives the decoder unit rows when it reads an AutoEncoder
    features = ((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    return features * length, features @ s["decoder.weight"].T + s["bias"]


@pytest.mark.parametrize("name", NAMES)
def test_encode_and_decode_are_the_librarys_and_the_formulas_in_float64(name: str) -> None:
    sae, expected = load_sae(FOLDERS / name), outputs(name)
    assert 0 < (expected["features"] > 0).float().mean() < 0.9
    exact, rebuilt = double_precision(name, expected["x"])
    for features, decoded in ((expected["features"], expected["decoded"]), (exact.float(), rebuilt.float())):
        torch.testing.assert_close(sae.encode(expected["x"]), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.decode(features), decoded, rtol=1e-4, atol=1e-4)
    assert sae.cfg.hook_name == RESID


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("batch_topk", {"architecture": "standard"}),
        ("topk", {"k": 6}),
        ("jumprelu", {"apply_b_dec_to_input": True}),
        ("matryoshka", {"apply_b_dec_to_input": False}),
        ("standard", {"apply_b_dec_to_input": False}),
    ],
)
def test_the_comparison_detects_a_wrong_computation(name: str, wrong: dict[str, Any]) -> None:
    sae, expected = load_sae(FOLDERS / name), outputs(name)
    sae.cfg = replace(sae.cfg, **wrong)
    assert (sae.encode(expected["x"]) - expected["features"]).abs().max() > 1e-2


def changed(
    folder: Path,
    name: str = "batch_topk",
    options: dict[str, Any] | None = None,
    tensors: dict[str, Tensor | None] | None = None,
) -> Path:
    """A copy of a folder with other options of the trainer and other tensors; None removes one."""
    shutil.copytree(FOLDERS / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    config["trainer"] |= options or {}
    (folder / CONFIG).write_text(json.dumps(config))
    merged = {key: tensor for key, tensor in (state(folder) | (tensors or {})).items() if tensor is not None}
    torch.save(merged, folder / WEIGHTS)
    return folder


def test_a_threshold_that_was_never_estimated_is_announced(tmp_path: Path) -> None:
    folder = changed(tmp_path, tensors={"threshold": torch.tensor(-1.0)})
    with pytest.warns(UserWarning, match="never estimated in training"):
        sae = load_sae(folder)
    s, x = state(folder), outputs("batch_topk")["x"]
    plain = ((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    torch.testing.assert_close(sae.encode(x), plain, rtol=1e-5, atol=1e-5)


def test_files_of_other_releases_and_dtypes_are_read(tmp_path: Path) -> None:
    expected = load_sae(FOLDERS / "topk").encode(outputs("topk")["x"])
    older = changed(tmp_path / "older", "topk", tensors={"k": None, "threshold": None})  # before the buffers
    assert torch.equal(load_sae(older).encode(outputs("topk")["x"]), expected)
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in state(older).items()}
    torch.save(compiled, older / WEIGHTS)
    assert torch.equal(load_sae(older).encode(outputs("topk")["x"]), expected)
    half = {key: tensor.bfloat16() for key, tensor in state(older).items()}
    torch.save(half, older / WEIGHTS)
    assert load_sae(older).W_enc.dtype == torch.float32


def test_autoencodernew_has_its_bias_in_the_decoder(tmp_path: Path) -> None:
    s = state(FOLDERS / "standard")
    folder = changed(tmp_path, "standard", {"dict_class": "AutoEncoderNew"}, {"decoder.bias": s["bias"], "bias": None})
    x = outputs("standard")["x"]
    sae, features = load_sae(folder), (x @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(features), features @ s["decoder.weight"].T + s["bias"])


@pytest.mark.parametrize(
    ("submodule", "io", "expected"),
    [
        ("resid_post_layer_11", "out", "blocks.11.hook_resid_post"),
        ("mlp_out_layer_3", "out", "blocks.3.hook_mlp_out"),
        ("attention_out_layer_0", "out", "blocks.0.hook_attn_out"),
        ("resid_post_layer_11", "in", None),
        ("router_layer_2", "out", None),
        (None, "out", None),
        ("../resid_post_layer_1", "out", None),
    ],
)
def test_the_hook_point_is_the_configs(submodule: str | None, io: str, expected: str | None, tmp_path: Path) -> None:
    folder = changed(tmp_path, options={"submodule_name": submodule})
    config = json.loads((folder / CONFIG).read_text())
    config["buffer"]["io"] = io
    (folder / CONFIG).write_text(json.dumps(config))
    assert load_sae(folder).cfg.hook_name == expected
    del config["buffer"]  # the library leaves it out where the data have no config
    (folder / CONFIG).write_text(json.dumps(config))
    if io == "out":
        assert load_sae(folder).cfg.hook_name == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["batch_topk", "topk", "jumprelu"])
def test_spliced_features_are_hook_points_that_act_downstream(model: GptOss, name: str) -> None:
    sae = load_sae(FOLDERS / name)
    plain, cache = model.run_with_cache(X, names_filter=RESID)
    with splice(model, sae) as features:
        same, seen = model.run_with_cache(X, names_filter=features)
        torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[features], sae.encode(cache[RESID]))
        without = model.run_with_hooks(X, fwd_hooks=[(features, lambda acts, hook: torch.zeros_like(acts))])
    removed = cache[RESID] - (sae.decode(sae.encode(cache[RESID])) - sae.b_dec)
    expected = model.run_with_hooks(X, fwd_hooks=[(RESID, lambda x, hook: removed)])
    torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-4)
    assert (without - plain).abs().max() > 1e-2, "an edit without effect must not pass"
    with splice(model, sae, use_error_term=False):
        rebuilt = sae.decode(sae.encode(cache[RESID]))
        torch.testing.assert_close(
            model(X), model.run_with_hooks(X, fwd_hooks=[(RESID, lambda x, hook: rebuilt)]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "tensors", "message"),
    [
        ({"dict_class": "CrossCoder"}, {}, "dict_class 'CrossCoder' is not read here: expected AutoEncoder or"),
        ({"dict_class": ["BatchTopKSAE"]}, {}, "is not read here"),
        ({"dict_class": "JumpReluAutoEncoder"}, {}, "tensor 'W_dec' is missing"),
        ({}, {"more": torch.zeros(2)}, "tensor 'more' is unexpected"),
        ({}, {"threshold": None}, "tensor 'threshold' is missing"),
        ({"k": 7}, {}, r"k is \[4\] in ae.pt and 7 in config.json; they must agree"),
        ({"dict_size": 25}, {}, r"'encoder.weight' is \[32, 24\] as \[input, output\], .* make it \[32, 25\]"),
        ({"activation_dim": "many"}, {}, "activation_dim is 'many', expected a positive whole number"),
        ({}, {"b_dec": torch.full((32,), torch.nan)}, "'b_dec' is not of finite floating-point numbers"),
        ({}, {"b_dec": torch.zeros(32, dtype=torch.int32)}, "'b_dec' is not of finite floating-point numbers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    options: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load_sae(changed(tmp_path, options=options, tensors=tensors))
    assert "\n" not in str(refused.value)


class RunsCode:
    """A pickle of it makes a folder when it is read without restrictions."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return os.mkdir, (self.made,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    folder, made = changed(tmp_path / "folder"), tmp_path / "made"
    torch.save({"k": RunsCode(made)}, folder / WEIGHTS)
    with pytest.raises(InputError, match="not a file of tensors that can be read safely"):
        load_sae(folder)
    assert not made.exists()
    torch.load(folder / WEIGHTS, weights_only=False)  # the negative control: the file is as dangerous as it claims
    assert made.exists()


def test_incomplete_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "run" / "trainer_0")
    with pytest.raises(InputError, match=r"give a folder that one of them wrote; there is one in '.*trainer_0'"):
        load_sae(folder.parent)
    content = (folder / WEIGHTS).read_bytes()
    for broken in (content[:200], content[: len(content) // 2], b"no torch file", b""):
        (folder / WEIGHTS).write_bytes(broken)
        with pytest.raises(InputError, match="not a file of tensors that can be read safely") as refused:
            load_sae(folder)
        assert "\n" not in str(refused.value)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git-lfs"):
        load_sae(folder)
    torch.save([torch.zeros(2)], folder / WEIGHTS)
    with pytest.raises(InputError, match="expected a state dict"):
        load_sae(folder)
    for config, message in (("{", "is not JSON"), ("[1]", "expected an object `trainer`")):
        (folder / CONFIG).write_text(config)
        with pytest.raises(InputError, match=message):
            load_sae(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InputError, match=r"has ae\.pt and no config\.json"):
        load_sae(folder)
