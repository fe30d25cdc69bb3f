"""PEFT's LoRA folders act here as they do in transformers with PEFT, on weights that stay as they are."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

import workbench as wb
from tests.model.conftest import SHAPES, hf_config, random_model, to_hf
from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise, quantise
from workbench.model.cache import KVCache
from workbench.model.config import Config
from workbench.model.lora import load_adapter, unload_adapter
from workbench.model.transformer import GptOss

# transformers' name for gradient checkpointing is on its way out; PEFT still asks for it.
# Its check of patterns looks at modules only: those of parameters act all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHAPE = "ratio 3, d_head 24"
X = torch.randint(SHAPES[SHAPE].d_vocab, (2, 45), generator=torch.Generator().manual_seed(5))
Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTER, GATE_UP, DOWN = "mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    **{name: ([name], []) for name in ATTENTION},
    "router": ([], [ROUTER]),
    "gate_up": ([], [GATE_UP]),
    "down": ([], [DOWN]),
    "experts": ([], [DOWN, GATE_UP]),
    "all": (ATTENTION, [ROUTER, GATE_UP, DOWN]),
}


def with_peft(hf: GptOssForCausalLM, modules: Sequence[str], parameters: Sequence[str], **options: Any) -> PeftModel:
    """transformers' model with PEFT's adapter, loud enough to be heard."""
    config = LoraConfig(
        **dict(
            r=3,
            lora_alpha=7,
            target_modules=list(modules),
            target_parameters=list(parameters),
            init_lora_weights=False,
        )
        | options
    )
    peft = get_peft_model(hf, config)
    rng = torch.Generator().manual_seed(3)
    for name, p in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.1, generator=rng)
    return peft.eval()


def dense_and_packed(cfg: Config) -> tuple[GptOss, GptOss]:
    """The same numbers twice: experts packed, and dense."""
    dense, packed = random_model(cfg), GptOss(cfg, packed=True)
    state = dense.state_dict()
    for name in [name for name in state if name.endswith(("gate_up.weight", "down.weight"))]:
        stem, blocks, scales = name.removesuffix(".weight"), *quantise(state[name].mT.contiguous())
        state[name].copy_(dequantise(blocks, scales, torch.float32).mT)
        state |= {f"{stem}.blocks": blocks, f"{stem}.scales": scales}
    packed.load_state_dict({name: state[name] for name in packed.state_dict()})
    return packed.requires_grad_(False).eval(), dense.requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> tuple[GptOss, GptOss]:
    return dense_and_packed(SHAPES[SHAPE])


@pytest.fixture(scope="module")
def folders(models: tuple[GptOss, GptOss], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of each adapter PEFT's folder and the logits of transformers with it."""
    made = {}
    for name, (modules, parameters) in TARGETS.items():
        folder = tmp_path_factory.mktemp("adapters") / name
        made[name] = folder, save_adapter(folder, models[1], modules, parameters)
    return made


@torch.no_grad()
def save_adapter(
    folder: Path, model: GptOss, modules: Sequence[str], parameters: Sequence[str], **options: Any
) -> Tensor:
    peft = with_peft(to_hf(model), modules, parameters, **options)
    peft.save_pretrained(folder)
    return peft(X).logits


@torch.no_grad()
def error(model: GptOss, folder: Path, wanted: Tensor) -> float:
    """The largest difference from the wanted logits, relative to the largest of them."""
    load_adapter(model, folder)
    try:
        return float((model(X) - wanted).abs().max() / wanted.abs().max())
    finally:
        unload_adapter(model)


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_each_target_is_what_transformers_with_peft_computes(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], targets: str, kind: str
) -> None:
    model = models[kind == "dense"]
    folder, wanted = folders[targets]
    with torch.no_grad():
        assert (model(X) - wanted).abs().max() / wanted.abs().max() > 1e-2  # the adapter is heard
    assert error(model, folder, wanted) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 5, "experts.gate_up_proj": 2, r"layers\.[02]\..*down_proj": 1, "router.weight": 4}},
        {"alpha_pattern": {"q_proj": 1, "down_proj": 30, "mlp.router.weight": 2.5}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_scales_and_ranks_follow_the_config(
    models: tuple[GptOss, GptOss], options: dict[str, Any], tmp_path: Path
) -> None:
    wanted = save_adapter(tmp_path, models[1], *TARGETS["all"], **options)
    assert error(models[0], tmp_path, wanted) <= 1e-5


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {SHAPE}))
def test_other_shapes(shape: str, tmp_path: Path) -> None:
    packed, dense = dense_and_packed(SHAPES[shape])
    wanted = save_adapter(tmp_path, dense, *TARGETS["all"])
    assert error(packed, tmp_path, wanted) <= 1e-5
    assert error(dense, tmp_path, wanted) <= 1e-5


def flat_scale(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config["lora_alpha"] = config["r"]


def expert_major(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    for name in [name for name in factors if "experts" in name and "lora_B" in name]:
        factors[name] = factors[name].unflatten(1, (3, -1)).mT.flatten(1)


def reversed_experts(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    for name in [name for name in factors if "experts" in name and "lora_A" in name]:
        factors[name] = factors[name].unflatten(0, (-1, 3)).flip(0).flatten(0, 1)


@pytest.mark.parametrize("spoil", [flat_scale, expert_major, reversed_experts])
def test_the_comparison_notices_a_broken_implementation(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], spoil: Spoil, tmp_path: Path
) -> None:
    folder, wanted = folders["experts"]
    assert error(models[0], spoilt(folder, tmp_path, spoil), wanted) > 1e-3


def spoilt(folder: Path, copy: Path, spoil: Spoil) -> Path:
    """A copy of an adapter with something changed."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config, factors = json.loads((copy / CONFIG).read_text()), load_file(copy / WEIGHTS)
    spoil(config, factors)
    (copy / CONFIG).write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in factors.items()}, copy / WEIGHTS)
    return copy


def marked_grouped(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    expert_major(config, factors)
    config |= {"lora_B_layout": "grouped_by_expert", "auto_mapping": {"unsloth_fixed": True}}


def marked_rank_major(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config |= {"lora_B_layout": "rank_major", "auto_mapping": {"unsloth_fixed": True}}


def marked_wrongly(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    expert_major(config, factors)
    config["lora_B_layout"] = "rank_major"


def stacked_experts(factors: dict[str, Tensor]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Take PEFT's experts out of the factors: (module, gate_up or down) → A [expert, rank, inputs], B [expert, outputs, rank]."""
    found = {}
    for name in [name for name in factors if "experts" in name and "lora_A" in name]:
        a, b = factors.pop(name).unflatten(0, (-1, 3)), factors.pop(name.replace("lora_A", "lora_B"))
        module = name.partition(".experts")[0] + ".experts."
        found[module, "gate_up" if a.shape[-1] == 64 else "down"] = a, b.unflatten(1, (3, -1)).permute(2, 0, 1)
    return found


def linear_maps(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    """One linear map for each expert, as in Unsloth's 4-bit models."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for expert in range(len(a)):
            factors[f"{module}{part}_projs.{expert}.lora_A.weight"] = a[expert]
            factors[f"{module}{part}_projs.{expert}.lora_B.weight"] = b[expert]
    config["auto_mapping"] = {"unsloth_fixed": True}


def modules_of_experts(
    config: dict[str, Any], factors: dict[str, Tensor], names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> None:
    """A module for each expert, with gate and up apart."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for expert in range(len(a)):
            rows = (
                {names[0]: b[expert, 0::2], names[1]: b[expert, 1::2]} if part == "gate_up" else {names[2]: b[expert]}
            )
            for name, own in rows.items():
                factors[f"{module}{expert}.{name}.lora_A.weight"] = a[expert].clone()
                factors[f"{module}{expert}.{name}.lora_B.weight"] = own


def up_before_gate(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    modules_of_experts(config, factors, ("up_proj", "gate_proj", "down_proj"))


def numbered_weights(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    """Factors of all experts along a first axis, with gate, up and down called w1, w3 and w2."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for name, own in {"w1": b[:, 0::2], "w3": b[:, 1::2]}.items() if part == "gate_up" else [("w2", b)]:
            factors[f"{module}{name}.lora_A.weight"] = a.clone()
            factors[f"{module}{name}.lora_B.weight"] = own


@pytest.mark.parametrize(
    "arrange", [marked_grouped, marked_rank_major, linear_maps, modules_of_experts, numbered_weights]
)
def test_the_same_adapter_under_names_and_orders_of_other_programs(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], arrange: Spoil, tmp_path: Path
) -> None:
    folder, wanted = folders["experts"]
    assert error(models[0], spoilt(folder, tmp_path, arrange), wanted) <= 1e-5


def renamed(pattern: str, replacement: str) -> Spoil:
    def spoil(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
        for name in list(factors):
            factors[re.sub(pattern, replacement, name)] = factors.pop(name)

    return spoil


BEGINNINGS = {
    "without PEFT's": renamed(r"^base_model\.model\.", ""),
    "of the backbone alone": renamed(r"^base_model\.model\.model\.", "base_model.model."),
    "of the bare backbone": renamed(r"^base_model\.model\.model\.", ""),
    "of torch.compile": renamed(r"^base_model\.model\.", "base_model.model._orig_mod."),
    "of distributed training": renamed(r"^", "module."),
    "of a larger model": renamed(r"^base_model\.model\.", "base_model.model.language_model."),
    "of checkpointed layers": renamed(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module."),
    "with the adapter's name": renamed(r"(lora_[AB])\.", r"\1.my_adapter."),
}


@pytest.mark.parametrize("kind", list(BEGINNINGS))
def test_the_same_adapter_under_other_beginnings_of_names(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, wanted = folders["all"]
    assert error(models[0], spoilt(folder, tmp_path, BEGINNINGS[kind]), wanted) <= 1e-5


@pytest.mark.parametrize("arrange", [marked_wrongly, up_before_gate])
def test_a_wrong_order_is_seen_by_the_comparison(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], arrange: Spoil, tmp_path: Path
) -> None:
    folder, wanted = folders["experts"]
    assert error(models[0], spoilt(folder, tmp_path, arrange), wanted) > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of models without a hub id
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_magnitudes_whole_modules_and_the_unembedding(
    models: tuple[GptOss, GptOss], options: dict[str, Any], tmp_path: Path
) -> None:
    model = models[0]
    with torch.no_grad():
        before = model(X)
        peft = with_peft(to_hf(models[1]), *TARGETS["q_proj"], **options)
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
        peft.save_pretrained(tmp_path)
        wanted = peft(X).logits
    assert (before - wanted).abs().max() / wanted.abs().max() > 1e-2  # the adapter changes the logits
    assert error(model, tmp_path, wanted) <= 1e-5
    with torch.no_grad():
        assert torch.equal(model(X), before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of models without a hub id
@torch.no_grad()
def test_directions_of_tokens_include_an_adapter_of_the_unembedding(
    models: tuple[GptOss, GptOss], tmp_path: Path
) -> None:
    model = models[0]
    with_peft(to_hf(models[1]), ["lm_head"], []).save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    try:
        stream = torch.ones(1, 1, model.cfg.d_model)
        near(
            model.tokens_to_residual_directions(torch.tensor([3, 5])) @ stream[0, 0] * stream[0, 0, 0],
            model.unembed(stream * model.ln_final.weight)[0, 0, [3, 5]],
        )
        assert not torch.equal(model.W_U, model.unembed.weight.mT)
    finally:
        unload_adapter(model)


@torch.no_grad()
def test_every_path_carries_the_adapter(models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]]) -> None:
    model, (folder, wanted) = models[0], folders["all"]
    load_adapter(model, folder)
    try:
        every = [(name, lambda t, hook: None) for name in model.hook_dict]
        near(model.run_with_hooks(X, fwd_hooks=every), wanted)
        near(model(X.flatten()[None], packed=[X.shape[1]] * len(X)).unflatten(1, X.shape).squeeze(0), wanted)
        cache = KVCache(model.cfg, len(X), X.shape[1], device=model.device, dtype=model.dtype)
        steps = [model(part, cache=cache) for part in X.split([30, 1, 1, X.shape[1] - 32], dim=1)]
        near(torch.cat(steps, 1), wanted)
    finally:
        unload_adapter(model)


def near(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() / wanted.abs().max() <= 1e-5


@torch.no_grad()
def test_unloading_gives_the_base_back_bit_for_bit(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model = models[0]
    before, names = model(X), list(model.state_dict())
    load_adapter(model, folders["all"][0])
    with pytest.raises(InputError, match="already has the adapter"):
        load_adapter(model, folders["all"][0])
    unload_adapter(model)
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == names
    with pytest.raises(InputError, match="no adapter"):
        unload_adapter(model)


def test_gradients_reach_the_factors_through_packed_weights(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model = models[0]
    load_adapter(model, folders["all"][0])
    try:
        factors = {name: p.requires_grad_() for name, p in model.named_parameters() if ".lora." in name}
        model(X).logsumexp(-1).sum().backward()
        assert len(factors) == 14 * model.cfg.n_layers
        for name, p in factors.items():
            assert p.grad is not None, name
            assert p.grad.norm() > 0, name
    finally:
        unload_adapter(model)


@torch.no_grad()
def test_load_takes_an_adapter_and_the_digest_covers_it(tmp_path: Path) -> None:
    base = wb.load("nano", device="cpu", dtype=torch.float32)
    with_peft(GptOssForCausalLM(hf_config(base.cfg)), *TARGETS["all"]).save_pretrained(tmp_path)
    model = wb.load("nano", device="cpu", dtype=torch.float32, adapter=tmp_path)
    tokens = torch.arange(40)[None]
    assert not torch.allclose(model(tokens), base(tokens), atol=1e-2)
    assert model.checkpoint.digest != base.checkpoint.digest
    unload_adapter(model)
    assert model.checkpoint.digest == base.checkpoint.digest
    assert torch.equal(model(tokens), base(tokens))


PREFIX = "base_model.model.model.layers.0."


def option(name: str, value: Any) -> Spoil:
    return lambda config, factors: config.update({name: value})


def rename(old: str, new: str) -> Spoil:
    def spoil(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
        for name in [name for name in factors if old in name]:
            factors[name.replace(old, new)] = factors.pop(name)

    return spoil


def twice(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors |= {name.replace(".base_layer", ""): t.clone() for name, t in factors.items() if "base_layer" in name}


def drop(name: str) -> Spoil:
    return lambda config, factors: factors.__delitem__(name)


def change(name: str, make: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda config, factors: factors.update({name: make(factors[name])})


def unknown_tensor(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors[PREFIX + "self_attn.q_proj.lora_C"] = torch.ones(3)


def with_magnitude(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors[PREFIX + "self_attn.q_proj.lora_magnitude_vector"] = torch.ones(144)


def saved_experts(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config["modules_to_save"] = ["gate_up_proj"]
    factors[PREFIX + "mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 192)


Q_A, Q_B = PREFIX + "self_attn.q_proj.lora_A.weight", PREFIX + "self_attn.q_proj.lora_B.weight"
DOWN_A = PREFIX + "mlp.experts.lora_A.weight"
REFUSED: dict[str, tuple[Spoil, str]] = {
    "another method": (option("peft_type", "LOHA"), "peft_type 'LOHA' is not read here"),
    "DoRA without magnitudes": (
        option("use_dora", True),
        "use_dora is true, but blocks.0.attn.k has no lora_magnitude",
    ),
    "a magnitude without DoRA": (with_magnitude, "is a magnitude of DoRA, but use_dora is false"),
    "a bias in B": (option("lora_bias", True), "option lora_bias"),
    "trained biases": (option("bias", "lora_only"), "option bias = 'lora_only'"),
    "transposed": (option("fan_in_fan_out", True), "option fan_in_fan_out"),
    "whole modules": (option("modules_to_save", ["lm_head"]), "modules_to_save names 'lm_head', but the file holds no"),
    "packed experts in full": (saved_experts, "cannot replace a weight of this model: its experts are packed"),
    "an unknown order": (option("lora_B_layout", "sideways"), "lora_B_layout 'sideways' is unknown"),
    "trained by Unsloth": (
        option("auto_mapping", {"unsloth_fixed": True}),
        "unsloth_fixed shows that Unsloth made this .* set the option lora_B_layout",
    ),
    "on a base of Unsloth": (
        option("base_model_name_or_path", "unsloth/gpt-oss-20b"),
        "the base model 'unsloth/gpt-oss-20b' shows",
    ),
    "the embedding": (
        rename("self_attn.q_proj.lora_A.weight", "self_attn.q_proj.lora_embedding_A"),
        "adapts the embedding, which is not supported",
    ),
    "trained tokens": (option("trainable_token_indices", [1]), "option trainable_token_indices"),
    "repeated layers": (option("layer_replication", [[0, 2]]), "option layer_replication"),
    "another base": (option("init_lora_weights", "pissa_niter_4"), "option init_lora_weights = 'pissa_niter_4'"),
    "an option of tomorrow": (option("use_wonder", 2), "option use_wonder = 2"),
    "no rank": (option("r", 0), "rank 0, wanted a positive whole number"),
    "no alpha": (option("lora_alpha", "many"), "lora_alpha 'many', wanted a number"),
    "a broken pattern": (option("alpha_pattern", {"q_proj(": 1}), r"'q_proj\(', which is no pattern"),
    "another rank": (option("r", 4), r"lora_A.weight' has shape \[24, 64\], the model and the rank want \[32, 64\]"),
    "the unembedding": (
        rename("model.layers.0.self_attn.q_proj", "lm_head"),
        r"'lm_head' has factors A \[3, 64\] and B \[144, 3\], the model maps 64 to 101",
    ),
    "no such layer": (rename("layers.2.", "layers.7."), r"layers\.7\.[\w.]+' cannot be adapted in this model"),
    "the same twice": (twice, "mlp.experts.gate_up is adapted twice"),
    "two adapters": (
        lambda config, factors: factors.update({Q_A.replace("lora_A", "lora_A.other"): factors[Q_A].clone()}),
        "adapt the same module: save one adapter",
    ),
    "an adapter of MLX": (option("fine_tune_type", "lora"), r"is of an adapter of MLX: fuse it \(mlx_lm.fuse\)"),
    "not a factor": (unknown_tensor, "q_proj.lora_C' is not a LoRA factor and cannot replace a weight"),
    "half a pair": (drop(Q_B), "lora_A without its other factor"),
    "another size": (
        change(Q_A, lambda t: t[:, :32]),
        r"q_proj' has factors A \[3, 32\] and B \[144, 3\], the model maps 64 to 144",
    ),
    "another number of experts": (
        change(DOWN_A, lambda t: t[:-3]),
        r"shape \[21, 96\], the model and the rank want \[24, 96\]",
    ),
    "whole numbers": (change(Q_A, lambda t: t.to(torch.int32)), "dtype I32, wanted BF16 or F16 or F32"),
    "not finite": (change(Q_A, lambda t: t * torch.nan), "the factors of blocks.0.attn.q are not finite"),
    "nothing": (lambda config, factors: factors.clear(), "holds no LoRA factor"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_read_is_refused_by_name(
    models: tuple[GptOss, GptOss], folders: dict[str, tuple[Path, Tensor]], case: str, tmp_path: Path
) -> None:
    spoil, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refused:
        load_adapter(models[0], spoilt(folders["all"][0], tmp_path, spoil))
    assert "\n" not in str(refused.value)
    assert not any(".lora." in name for name in models[0].state_dict()), "something was attached"


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def no_object(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "has no adapter_config.json"),
        (not_json, "is not JSON that can be read"),
        (no_object, "peft_type .* is not read here"),
        (without_weights, "adapter_model.safetensors cannot be read"),
        (pickled, "adapter_model.bin is a pickle"),
        (truncated, "beyond the file: truncated"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    models: tuple[GptOss, GptOss],
    folders: dict[str, tuple[Path, Tensor]],
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(folders["all"][0], tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_adapter(models[0], folder)


def test_factors_that_changed_places_are_refused(models: tuple[GptOss, GptOss], tmp_path: Path) -> None:
    hf = to_hf(models[1])
    for layer in hf.model.layers:
        layer.mlp.experts.is_transposed = False
    with_peft(hf, [], [GATE_UP]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"A \[24, 192\] and B \[64, 24\], the model maps 64 to 192 or 96 to 64"):
        load_adapter(models[0], tmp_path)


def test_an_adapter_of_another_model_is_refused(folders: dict[str, tuple[Path, Tensor]]) -> None:
    with pytest.raises(InputError, match="the model maps 64 to 128"):
        load_adapter(random_model(SHAPES["ratio 8"]), folders["q_proj"][0])
    shallow = random_model(replace(SHAPES[SHAPE], n_layers=2, windows=(33, None)))
    with pytest.raises(
        InputError,
        match=r"layers\.2\.self_attn\.q_proj' cannot be adapted in this model: .* to 'model.layers.1.mlp.experts'",
    ):
        load_adapter(shallow, folders["q_proj"][0])
