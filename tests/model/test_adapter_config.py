"""Options of an adapter that would change what is computed are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.model.adapter_config import expert_layout, rank_and_scale, read_adapter_config

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}


def read(folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | options))
    return read_adapter_config(folder)


def test_a_plain_adapter_is_read(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config == PLAIN
    assert rank_and_scale(config, "model.layers.0.self_attn.q_proj") == (8, 2.0)
    assert expert_layout(tmp_path, config) == "rank_major"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "option bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "option init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 4]]}, "option layer_replication"),
        ({"lora_B_layout": "other"}, "lora_B_layout 'other' is unknown"),
        ({"modules_to_save": "lm_head"}, "expected a list of module names"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
    ],
)
def test_an_option_that_changes_results_is_named(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        read(tmp_path, **options)


def test_an_ambiguous_folder_of_unsloth_asks_for_its_layout(tmp_path: Path) -> None:
    for sign in ({"unsloth_version": "2026.8"}, {"auto_mapping": {"parent_library": "unsloth.models"}}):
        config = read(tmp_path, **sign)
        with pytest.raises(InputError, match="set the option lora_B_layout"):
            expert_layout(tmp_path, config)
    transformers = {"auto_mapping": {"parent_library": "transformers.models.gpt_oss"}}
    assert expert_layout(tmp_path, read(tmp_path, **transformers)) == "rank_major"  # negative control
    assert expert_layout(tmp_path, config | {"lora_B_layout": "grouped_by_expert"}) == "grouped_by_expert"


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_adapter_config(tmp_path)


def test_a_file_and_a_folder_above_the_adapter_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"adapter\.gguf is a file: give a folder that PEFT"):
        read_adapter_config(tmp_path / "adapter.gguf")
    (tmp_path / "checkpoint-60").mkdir()
    read(tmp_path / "checkpoint-60")
    with pytest.raises(
        InputError, match=r"has no adapter_config.json, but its folder checkpoint-60 has: give a folder"
    ):
        read_adapter_config(tmp_path)
