"""Numbers of experts and windows of each layer come from lists in the metadata, and must be those of the tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.model.formats import gguf_files as files
from tests.model.formats.test_gguf_reader import CFG, NANO
from tests.model.pruned import without_last_experts
from workbench.errors import InputError
from workbench.model.checkpoint import open_checkpoint
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_checkpoint

KEEP, WINDOWS = (8, 5, 6), (16, None, 40)
PRUNED, TENSORS = without_last_experts(replace(CFG, windows=WINDOWS), RandomTensors(CFG), KEEP)
LISTS = {"expert_count": list(KEEP), "attention.sliding_window": [16, 0, 40]}


def written(path: Path, arch: str, cfg: Config = PRUNED, **numbers: Any) -> Path:
    about = files.metadata(replace(cfg, windows=CFG.windows), arch, NANO)
    tensors = files.llama_cpp(cfg, TENSORS if cfg is PRUNED else RandomTensors(cfg))
    return files.write(path, about | {f"{arch}.{name}": value for name, value in numbers.items()}, tensors)


@pytest.mark.parametrize("arch", ["gpt-oss-puzzle", "gpt-oss"])
@torch.no_grad()
def test_a_file_with_a_number_for_each_layer_is_the_same_model(tmp_path: Path, arch: str) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "m.gguf", arch, **LISTS))
    assert checkpoint.cfg == PRUNED
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensors[name].to(tensor.dtype), tensor), name
    folder = save_checkpoint(tmp_path / "hf", PRUNED, TENSORS)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((NANO / file).read_bytes())
    tokens = torch.arange(60)[None]
    expected = wb.load(folder, device="cpu")(tokens)
    assert torch.equal(wb.load(tmp_path / "m.gguf", device="cpu")(tokens), expected)
    other = written(tmp_path / "other.gguf", arch, **LISTS | {"attention.sliding_window": [40, 0, 16]})
    assert not torch.equal(wb.load(other, device="cpu")(tokens), expected), "a wrong window must be seen"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {},
            r"has layers with \[8, 5, 6\] experts, and gpt-oss.expert_count states 8: .* a list with one for each",
        ),
        ({"expert_count": [8, 6, 5]}, r"has layers with \[8, 5, 6\] experts, and .* states \[8, 6, 5\]"),
        ({"expert_count": [8, 5]}, r"expert_count is \[8, 5\], expected 3 whole numbers from 1 on"),
        ({"expert_count": [8, 0, 6]}, r"expert_count is \[8, 0, 6\], expected 3 whole numbers from 1 on"),
        ({"expert_count": ["8", "5", "6"]}, r"expected 3 whole numbers from 1 on"),
        (LISTS | {"expert_used_count": 6}, "a token goes to 6 experts, but there are 5 in layer 1"),
    ],
)
def test_numbers_that_are_not_those_of_the_tensors_are_one_line(
    tmp_path: Path, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(written(tmp_path / "m.gguf", "gpt-oss", **numbers))
    assert "\n" not in str(refusal.value)


def test_a_pruned_file_with_the_number_from_before_is_told_its_own(tmp_path: Path) -> None:
    pruned, tensors = without_last_experts(CFG, RandomTensors(CFG), (5, 5, 5))
    about = files.metadata(CFG, "gpt-oss", NANO)
    path = files.write(tmp_path / "m.gguf", about, files.llama_cpp(pruned, tensors))
    with pytest.raises(InputError, match=r"has 5 experts in every layer, and gpt-oss.expert_count states 8"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("adapter", "load the model with adapter="), ("imatrix", "name the model's own file")]
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, kind: str, remedy: str) -> None:
    path = files.write(tmp_path / "m.gguf", {"general.type": kind, "general.architecture": "gpt-oss"}, {})
    with pytest.raises(InputError, match=f"is not a model: its general.type is '{kind}': {remedy}"):
        open_checkpoint(path)


def plain(path: Path, **fields: Any) -> Path:
    about = files.metadata(CFG, "gpt-oss", NANO) | {f"gpt-oss.{name}": value for name, value in fields.items()}
    return files.write(path, about, files.llama_cpp(CFG, RandomTensors(CFG)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.dimension_count", CFG.d_head // 2),
        ("attention.value_length", CFG.d_head * 2),
        ("attention.sliding_window_pattern", 1),
        ("attention.sliding_window_pattern", [1, 1, 1]),
        ("attention.scale", 0.5),
        ("rope.scaling.attn_factor", 2.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("expert_shared_count", 1),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("swiglu_clamp_exp", [7, 5, 7]),
    ],
)
def test_a_field_that_would_change_the_results_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(
        InputError, match=rf"gpt-oss\.{name} is .*, which changes the results; only .* is computed here"
    ):
        open_checkpoint(plain(tmp_path / "m.gguf", **{name: value}))


def test_fields_at_the_values_that_change_nothing_are_read_and_unknown_ones_are_named(tmp_path: Path) -> None:
    """The negative control of refusing them."""
    neutral = {"rope.dimension_count": CFG.d_head, "attention.sliding_window_pattern": 2, "expert_gating_func": 3}
    neutral |= {
        "final_logit_softcapping": 0.0,
        "attention.scale": CFG.d_head**-0.5,
        "swiglu_clamp_exp": [7, 7, 7],
    }
    assert open_checkpoint(plain(tmp_path / "m.gguf", **neutral)).notes == ()
    windows = {"attention.sliding_window_pattern": [window is not None for window in CFG.windows]}
    assert open_checkpoint(plain(tmp_path / "list.gguf", **windows)).notes == ()
    (note,) = open_checkpoint(plain(tmp_path / "unknown.gguf", **{"tomorrow": 1})).notes
    assert note == "fields that are not read: gpt-oss.tomorrow"


@pytest.mark.parametrize("value", ["2", 2.0, 0])
def test_a_number_of_experts_per_token_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match=r"expert_used_count is .*, expected a number"):
        open_checkpoint(plain(tmp_path / "m.gguf", expert_used_count=value))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"{name} is (nan|inf), expected a number above 0"):
                open_checkpoint(plain(tmp_path / "m.gguf", **{name: value}))
