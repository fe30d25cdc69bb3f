"""SAELens' folders compute here what they compute there, and act where they are spliced in."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hooks.conftest import RESID, X
from workbench.hooks.recorders import Recorder
from workbench.hooks.sae import SAE, load_sae, splice
from workbench.model.transformer import GptOss

SAES = Path(__file__).parent / "saes"
NAMES = sorted(path.name for path in SAES.iterdir())
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def outputs(name: str) -> dict[str, Tensor]:
    return load_file(SAES / name / "outputs.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_encode_and_decode_are_saelens(name: str) -> None:
    sae, wanted = load_sae(SAES / name), outputs(name)
    assert 0 < (wanted["features"] > 0).float().mean() < 0.9
    loose = dict(rtol=2e-2, atol=2e-2) if name == "bfloat16" else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(wanted["x"]), wanted["features"], **loose)
    torch.testing.assert_close(sae.decode(wanted["features"], wanted["x"]), wanted["decoded"], **loose)
    torch.testing.assert_close(sae.error(wanted["x"]), wanted["x"] - wanted["decoded"], **loose)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("keeps_b_dec", {"apply_b_dec_to_input": True}),
        ("layer_norm", {"normalize_activations": "none"}),
        ("constant_norm", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {"architecture": "standard"}),
        ("batchtopk", {"architecture": "standard"}),
        ("topk", {"k": 6}),
        ("topk_rescaled", {"rescale_acts_by_decoder_norm": False}),
    ],
)
def test_the_comparison_notices_a_wrong_option(name: str, wrong: dict[str, Any]) -> None:
    sae, wanted = load_sae(SAES / name), outputs(name)
    sae.cfg = replace(sae.cfg, **wrong)
    assert (sae.encode(wanted["x"]) - wanted["features"]).abs().max() > 1e-2


def test_the_options_of_the_folder_are_kept() -> None:
    sae = load_sae(SAES / "standard")
    assert sae.sparsity is not None
    assert sae.sparsity.shape == (sae.cfg.d_sae,)
    assert load_sae(SAES / "topk").sparsity is None
    assert sae.cfg.hook_name == RESID
    assert load_sae(SAES / "bfloat16").W_enc.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in sae.parameters())


def test_decoding_what_was_normalised_needs_the_activation() -> None:
    with pytest.raises(ValueError, match="pass the activation to decode as `like`"):
        load_sae(SAES / "layer_norm").decode(outputs("layer_norm")["features"])
    made = outputs("topk")
    torch.testing.assert_close(load_sae(SAES / "topk").decode(made["features"]), made["decoded"])


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """The options as SAELens 3 wrote them: flat, under older names."""
    old = {name: config[name] for name in ("d_in", "d_sae", "device")}
    old |= {"dtype": "torch.float32", "hook_point": config["metadata"]["hook_name"], "hook_point_head_index": None}
    old |= {"normalize_activations": False, "finetuning_scaling_factor": False, "context_size": 128}
    if config["architecture"] == "topk":
        return old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": config["k"]}}
    return old | {"activation_fn_str": "relu"}


@pytest.mark.parametrize("name", ["standard", "topk"])
def test_older_folders_are_read(name: str, tmp_path: Path) -> None:
    shutil.copytree(SAES / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / CONFIG).write_text(json.dumps(old_style(json.loads((tmp_path / CONFIG).read_text()))))
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights | {"scaling_factor": torch.ones(24)}, tmp_path / WEIGHTS)
    assert load_sae(tmp_path).cfg == load_sae(SAES / name).cfg


def test_an_older_threshold_is_read_from_its_logarithm(tmp_path: Path) -> None:
    shutil.copytree(SAES / "jumprelu", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / WEIGHTS)
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, tmp_path / WEIGHTS)
    torch.testing.assert_close(load_sae(tmp_path).threshold, load_sae(SAES / "jumprelu").threshold)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_with_the_error_term_nothing_changes_and_without_it_the_reconstruction_flows(model: GptOss, name: str) -> None:
    sae = load_sae(SAES / name)
    at = sae.cfg.hook_name
    assert at is not None
    plain, (_, cache) = model(X), model.run_with_cache(X, names_filter=at)
    with splice(model, sae):
        torch.testing.assert_close(model(X), plain, rtol=1e-4, atol=1e-4)
    replaced = sae.decode(sae.encode(cache[at]), cache[at]).to(plain.dtype)
    wanted = model.run_with_hooks(X, fwd_hooks=[(at, lambda x, hook: replaced)])
    with splice(model, sae, use_error_term=False):
        torch.testing.assert_close(model(X), wanted)
    assert (wanted - plain).abs().max() > 1e-2
    assert torch.equal(model(X), plain)


@torch.no_grad()
def test_features_are_recorded_like_any_hook_point(model: GptOss) -> None:
    sae = load_sae(SAES / "topk")
    before = list(model.hook_dict)
    _, cache = model.run_with_cache(X)
    with splice(model, sae) as features:
        assert features == f"{RESID}.hook_sae_acts_post"
        assert set(model.hook_dict) - set(before) == {features, f"{RESID}.hook_sae_error"}
        _, spliced = model.run_with_cache(X)
        recorder = Recorder({features: torch.float32})
        model.run_with_hooks(X, fwd_hooks=recorder.fwd_hooks)
    torch.testing.assert_close(spliced[features], sae.encode(cache[RESID]))
    torch.testing.assert_close(spliced[f"{RESID}.hook_sae_error"], sae.error(cache[RESID]))
    torch.testing.assert_close(recorder.take()[features], spliced[features].flatten(0, 1))
    assert list(model.hook_dict) == before
    assert not model.hook_dict[RESID].fwd_hooks


@torch.no_grad()
def test_an_edited_feature_moves_the_activation_along_its_direction(model: GptOss) -> None:
    sae = load_sae(SAES / "standard")

    def add(acts: Tensor, hook: object) -> Tensor:
        acts = acts.clone()
        acts[..., 7] += 3.0
        return acts

    with splice(model, sae) as features, model.hooks(fwd_hooks=[(features, add)]):
        _, cache = model.run_with_cache(X, names_filter=RESID)
    _, plain = model.run_with_cache(X, names_filter=RESID)
    torch.testing.assert_close(cache[RESID], plain[RESID] + 3 * sae.W_dec[7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_error_term", [True, False])
def test_gradients_flow_through_the_features_and_not_the_error(model: GptOss, use_error_term: bool) -> None:
    sae, seen = load_sae(SAES / "jumprelu"), {}

    def start(x: Tensor, hook: object) -> Tensor:
        seen["before"] = x.clone().requires_grad_()
        return seen["before"]

    def end(x: Tensor, hook: object) -> None:
        seen["after"] = x

    with (
        model.hooks(fwd_hooks=[(RESID, start)]),
        splice(model, sae, use_error_term=use_error_term),
        model.hooks(fwd_hooks=[(RESID, end)]),
    ):
        model(X)
    x = seen["before"]
    (wanted,) = torch.autograd.grad(sae.decode(sae.encode(x)).square().sum(-1).sqrt().sum(), x)
    direction = (seen["after"] - sae.error(x).detach() if use_error_term else seen["after"]).square().sum(-1).sqrt()
    torch.testing.assert_close(torch.autograd.grad(direction.sum(), x)[0], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_saes_nest_and_outlive_a_reset_of_the_users_hooks(model: GptOss) -> None:
    plain = model(X)
    with splice(model, load_sae(SAES / "hook_z")) as heads, splice(model, load_sae(SAES / "gated")) as stream:
        torch.testing.assert_close(model(X), plain, rtol=1e-4, atol=1e-4)
        model.reset_hooks()  # the user's hooks, not these
        _, cache = model.run_with_cache(X, names_filter=[heads, stream])
        assert set(cache) == {heads, stream}
        with (
            pytest.raises(ValueError, match=r"spliced in at 'blocks\.1\.hook_resid_post' already"),
            splice(model, load_sae(SAES / "topk")),
        ):
            pass
    assert torch.equal(model(X), plain)


def test_a_splice_that_fails_leaves_no_hook(model: GptOss) -> None:
    before = list(model.hook_dict)
    with (
        pytest.raises(ValueError, match="width 32, got 8"),
        splice(model, load_sae(SAES / "topk"), at="blocks.0.attn.hook_q"),
    ):
        model(X)
    with (
        pytest.raises(ValueError, match=r"no hook point 'blocks\.9\.hook_resid_post'; the last layer is 1"),
        splice(model, load_sae(SAES / "topk"), at="blocks.9.hook_resid_post"),
    ):
        pass
    assert list(model.hook_dict) == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def spoilt(folder: Path, name: str, options: dict[str, Any]) -> Path:
    shutil.copytree(SAES / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | options))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "transcoder"}, "architecture 'transcoder' is not read here: expected standard or topk"),
        ({"architecture": "jumprelu_skip_transcoder"}, "architecture 'jumprelu_skip_transcoder' is not read here"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not read here"),
        ({"architecture": "batchtopk"}, "architecture 'batchtopk' .* save_inference_model makes a jumprelu"),
        ({"normalize_activations": "expected_average_only_in"}, "its factor is not in the folder: fold it in"),
        ({"normalize_activations": True}, "'expected_average_only_in' is not read here"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations 'batch_norm' is not read here"),
        ({"reshape_activations": "patches"}, "reshape_activations 'patches' is not read here"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' is not read here"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index 3 is not read here"),
        ({"dtype": "float8"}, "dtype 'float8' is not read here"),
        ({"apply_b_dec_to_input": "maybe"}, "apply_b_dec_to_input 'maybe' is not read here"),
        ({"d_in": 0}, "d_in is 0, expected a positive whole number"),
        ({"d_sae": "many"}, "d_sae is 'many'"),
        ({"hook_name": 7}, "hook_name is 7, expected the name of a hook point"),
        ({"k": 25}, "k 25 is above d_sae 24"),
        ({"k": None}, "k is 0, expected a positive whole number"),
        ({"d_in": 64}, r"'W_enc' has shape \[32, 24\], cfg.json requires \[64, 24\]"),
        ({"architecture": "jumprelu"}, "tensor 'threshold' is missing"),
        ({"architecture": "gated"}, "tensor 'b_enc' is unexpected"),
    ],
)
def test_what_is_not_read_is_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_sae(spoilt(tmp_path, "topk", options))
    assert "\n" not in str(refused.value)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        save_file(weights | {name: change(weights[name])}, folder / WEIGHTS)

    return spoil


def of_another_size(folder: Path) -> None:
    save_file({"sparsity": torch.zeros(5)}, folder / "sparsity.safetensors")


def pipe(name: str) -> Callable[[Path], None]:
    """A pipe without a writer: a reader that opens it waits forever."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pipe(WEIGHTS), "sae_weights.safetensors is not a file"),
        (pipe("sparsity.safetensors"), "sparsity.safetensors is not a file"),
        (pipe(CONFIG), "is not JSON that can be read"),
        (without(CONFIG), "has no cfg.json"),
        (without(WEIGHTS), "sae_weights.safetensors is missing"),
        (truncated, "is truncated or no safetensors file"),
        (not_json, "is not JSON that can be read"),
        (a_list, "expected an object of options, got list"),
        (changed("b_enc", lambda b: b * torch.nan), "'b_enc' is not of finite floating-point numbers"),
        (changed("b_enc", lambda b: b.to(torch.int32)), "'b_enc' is not of finite floating-point numbers"),
        (changed("W_dec", lambda w: w[:-1]), r"'W_dec' has shape \[23, 32\], cfg.json requires \[24, 32\]"),
        (of_another_size, r"sparsity.safetensors: tensor 'sparsity' has shape \[5\]"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    spoil(spoilt(tmp_path, "standard", {}))
    with pytest.raises(ValueError, match=message) as refused:
        load_sae(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_sae_without_a_home_needs_to_be_told(model: GptOss) -> None:
    sae = load_sae(SAES / "topk")
    homeless = SAE(replace(sae.cfg, hook_name=None), dict(sae.named_parameters()))
    with pytest.raises(ValueError, match="give a hook point with `at`"), splice(model, homeless):
        pass
