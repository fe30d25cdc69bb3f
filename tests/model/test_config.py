"""Both spellings of a config give the same model, published numbers come out, and doubts are refused by name.

Also tests `workbench.model.config_fields` and `workbench.model.config_file`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.model.config import Config, Rope
from workbench.model.config_file import read_config

# The published config.json of gpt-oss-20b (Hugging Face), fields that matter, and OpenAI's original beside it.
HF_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
ORIGINAL_20B: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def read(tmp_path: Path, fields: object) -> Config:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    (tmp_path / "config.json").write_bytes(text)
    return read_config(tmp_path)


def test_both_spellings_of_the_20b_are_the_same_model(tmp_path: Path) -> None:
    assert read(tmp_path, HF_20B) == read(tmp_path, ORIGINAL_20B)


def test_transformers_5_writes_the_rope_elsewhere(tmp_path: Path) -> None:
    fields = {k: v for k, v in HF_20B.items() if k not in ("rope_scaling", "rope_theta")}
    fields["rope_parameters"] = HF_20B["rope_scaling"] | {"rope_theta": 150000}
    assert read(tmp_path, fields) == read(tmp_path, HF_20B)


@pytest.mark.parametrize(
    ("change", "total", "active"),
    [
        ({}, 20_914_757_184, 3.61e9),
        (
            {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": None},
            116_829_156_672,
            5.13e9,
        ),
    ],
)
def test_published_parameter_counts(tmp_path: Path, change: dict[str, Any], total: int, active: float) -> None:
    cfg = read(tmp_path, HF_20B | change)
    assert cfg.n_params == total
    assert cfg.n_active_params == pytest.approx(active, rel=2e-3)
    assert cfg.windows[:2] == (128, None)


def test_a_config_survives_json(tmp_path: Path) -> None:
    cfg = read(tmp_path, HF_20B)
    assert Config.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": 2870}, "multiple of 32"),
        ({"num_attention_heads": 60}, "cannot share 8"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types needs one of"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types needs one of"),
        ({"layer_types": 24}, "layer_types needs one of"),
        ({"layer_types": [["full_attention"]] * 24}, "layer_types needs one of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not computed"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"mscale": 0.7}}, "rope_parameters.'mscale' = 0.7 is unknown"),
        (
            {"rope_scaling": HF_20B["rope_scaling"] | {"truncate": "false"}},
            "truncate is 'false', expected true or false",
        ),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"factor": 0.5}}, "a factor of at least 1"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"beta_fast": 0.5}}, "beta_fast above beta_slow"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"rope_theta": 10000}}, "contradict each other"),
        ({"rope_scaling": "yarn"}, "rope_parameters is 'yarn', expected an object"),
        ({"rope_scaling": None}, "rope_scaling is null, which some releases of transformers read as YaRN"),
        (
            {"rope_scaling": HF_20B["rope_scaling"] | {"attention_factor": 1.0}},
            "attention_factor is 1.0; only the default",
        ),
        (
            {"rope_scaling": HF_20B["rope_scaling"] | {"partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' = 0.5 is unknown",
        ),
        (
            {"rope_scaling": HF_20B["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "'mscale_all_dim' = 1.0 is unknown",
        ),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5 is unknown"),
        ({"pruned_heads": {"0": [1]}}, "'pruned_heads' = {'0': [1]} is unknown"),
        ({"swiglu_limit": None}, "'swiglu_limit' is missing"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "'factor' = 8.0 is unknown"),
        ({"rope_theta": None}, "'rope_theta' is missing"),
        ({"rope_theta": 1}, "theta above 1"),
        ({"initial_context_length": 8192}, "4096 and rope_parameters.../initial_context_length 8192 contradict"),
        # transformers would use max_position_embeddings, and not initial_context_length
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 32.0}},
            "rope_parameters.'original_max_position_embeddings' is missing",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": False}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"num_experts_per_tok": 33, "experts_per_token": None}, "33 experts, but there are 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"sliding_window": None}, "'sliding_window' is missing"),
        ({"head_dim": 63}, "d_head is 63"),
        ({"norm_type": "layernorm"}, "'norm_type' = 'layernorm' is unknown"),
        ({"quantization_config": "mxfp4"}, "quantization_config is 'mxfp4', expected an object"),
        ({"swiglu_limit": float("inf")}, "swiglu_limit is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"motto": "x" * 10_000}, "'motto' = 'xxx"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers is '24'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not read"),
        ({"logit_softcap": 30.0}, "'logit_softcap' = 30.0 is unknown"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_a_config_we_do_not_compute_is_refused_by_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        read(tmp_path, HF_20B | change)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value).replace(str(tmp_path), "")) < 250


@pytest.mark.parametrize("name", [name for name in ORIGINAL_20B if name != "num_experts"])
def test_no_number_of_the_original_spelling_is_assumed(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is missing"):
        read(tmp_path, {k: v for k, v in ORIGINAL_20B.items() if k != name})


def test_the_original_spelling_without_scaling_is_plain_rope(tmp_path: Path) -> None:
    cfg = read(tmp_path, ORIGINAL_20B | {"rope_scaling_factor": 1.0})
    assert cfg.rope == Rope.plain(150_000.0)
    assert cfg.n_ctx == 4096


def test_layers_without_a_window_need_none(tmp_path: Path) -> None:
    cfg = read(tmp_path, HF_20B | {"layer_types": ["full_attention"] * 24, "sliding_window": None})
    assert cfg.windows == (None,) * 24


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    GptOssConfig(num_hidden_layers=24, num_local_experts=32).save_pretrained(tmp_path)
    assert read_config(tmp_path) == read(tmp_path, HF_20B)


def test_absent_fields_mean_what_transformers_assumes(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    absent = {"swiglu_limit", "head_dim", "rope_scaling", "rope_theta", "sliding_window"}
    cfg = read(tmp_path, {name: value for name, value in HF_20B.items() if name not in absent})
    assert cfg == read(tmp_path, HF_20B)
    theirs = GptOssConfig()
    assert (cfg.swiglu_limit, cfg.d_head, cfg.windows[0]) == (
        theirs.swiglu_limit,
        theirs.head_dim,
        theirs.sliding_window,
    )
    assert cfg.rope.theta == theirs.rope_parameters["rope_theta"]
    narrow = {"head_dim": None, "hidden_size": 2048, "num_attention_heads": 16}
    assert read(tmp_path, HF_20B | narrow).d_head == 128
    assert read(tmp_path, HF_20B | {"num_experts_per_tok": 2}).experts_per_token == 2  # experts_per_token is 4


def test_every_unknown_field_is_in_one_message(tmp_path: Path) -> None:
    rope = HF_20B["rope_scaling"] | {"wobble": 2}
    fields = HF_20B | {"rope_scaling": rope, "motto": "x", "softcap": 30.0}
    with pytest.raises(InputError) as refusal:
        read(tmp_path, fields)
    for expected in ("'motto' = 'x'", "'softcap' = 30.0", "rope_parameters.'wobble' = 2", "--ignore-field wobble"):
        assert expected in str(refusal.value)
    assert read_config(tmp_path, ignore_fields=("motto", "softcap", "wobble")) == read(tmp_path, HF_20B)


def test_neutral_rope_fields_change_nothing(tmp_path: Path) -> None:
    extras = {"attention_factor": 1.3465735902799727, "mscale": 1.0, "partial_rotary_factor": 1.0}
    fields = HF_20B | {"rope_scaling": HF_20B["rope_scaling"] | extras, "partial_rotary_factor": 1.0}
    assert read(tmp_path, fields) == read(tmp_path, HF_20B)


def test_a_config_dictionary_of_transformers_is_read(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    written = GptOssConfig(num_hidden_layers=24, num_local_experts=32).to_dict()
    generation = {"max_length": 20, "num_beams": 1, "temperature": 1.0, "torchscript": False, "pruned_heads": {}}
    older = generation | {"typical_p": 1.0, "finetuning_task": None, "is_decoder": False, "top_k": 50}
    assert read(tmp_path, written | older) == read(tmp_path, HF_20B)


def test_an_unknown_field_can_be_declared_harmless(tmp_path: Path) -> None:
    plain = read(tmp_path, HF_20B)
    rope = HF_20B["rope_scaling"] | {"mscale": 0.7, "attention_factor": None}
    (tmp_path / "config.json").write_text(json.dumps(HF_20B | {"motto": "x", "_note": 1, "rope_scaling": rope}))
    assert read_config(tmp_path, ignore_fields=("motto", "mscale")) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'"\xff"', "cannot be read as JSON"),
        (b"[1]", "holds a list"),
        (b'{"rms_norm_eps": 1e-5, "rms_norm_eps": 0.5}', "an object has the name 'rms_norm_eps' twice"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        read_config(tmp_path)
