"""Layers with different numbers of experts compute what a dense model computes whose other experts are never chosen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench as wb
from tests.model.conftest import BASE, random_model, to_hf
from tests.model.pruned import pruned_nano, with_unreachable_experts, without_last_experts
from workbench.errors import InputError
from workbench.hooks.interventions import applied, forbid
from workbench.model.checkpoint import open_checkpoint
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_checkpoint
from workbench.model.formats.gguf_writer import write_gguf
from workbench.model.transformer import GptOss

KEEP = (8, 5, 6)
CFG = replace(BASE, n_ctx=131_072, windows=(16, None, 40))
X = torch.randint(BASE.d_vocab, (2, 90), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def full() -> GptOss:
    return random_model(CFG).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(full: GptOss, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg, tensors = without_last_experts(CFG, full.state_dict(), KEEP)
    return save_checkpoint(tmp_path_factory.mktemp("pruned") / "model", cfg, tensors)


def opened(folder: Path) -> GptOss:
    checkpoint = open_checkpoint(folder)
    model = GptOss(checkpoint.cfg).requires_grad_(False)
    model.load_state_dict(dict(checkpoint.tensors.items()))
    return model


@torch.no_grad()
def test_logits_are_those_of_transformers_with_experts_that_nobody_reaches(full: GptOss, folder: Path) -> None:
    model, dense = opened(folder), GptOss(replace(CFG, windows=(16, None, 16))).requires_grad_(False)
    assert model.cfg.layer_experts == KEEP
    dense.load_state_dict(with_unreachable_experts(full.state_dict(), CFG, KEEP))
    narrow = GptOss(replace(model.cfg, windows=dense.cfg.windows)).requires_grad_(False)  # transformers has one window
    narrow.load_state_dict(model.state_dict())
    expected = to_hf(dense)(X).logits
    assert float((narrow(X) - expected).norm() / expected.norm()) <= 1e-5
    every = to_hf(random_model(dense.cfg))(X).logits
    assert float((narrow(X) - every).norm() / every.norm()) > 1e-2, "a model with all experts must not pass"
    assert not torch.allclose(model(X), narrow(X)), "the window of each block counts"


@torch.no_grad()
def test_a_pruned_nano_is_nano_without_the_experts(tmp_path: Path) -> None:
    keep = (16, 9, 12, 4)
    model, nano = (wb.load(m, device="cpu", dtype=torch.float32) for m in (pruned_nano(tmp_path / "p", keep), "nano"))
    tokens = torch.tensor([wb.harmony.render([{"role": "user", "content": "12+34"}], tokenizer=nano.tokenizer)])
    edits = [forbid(layer, range(n, 16)) for layer, n in enumerate(keep) if n < 16]
    with applied(nano, *edits):
        expected = nano(tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, nano(tokens), atol=1e-2)
    generated = model.generate(tokens, max_new_tokens=8, temperature=0.0)
    with applied(nano, *edits):
        same = nano.generate(tokens, max_new_tokens=8, temperature=0.0)
    assert torch.equal(torch.as_tensor(generated), torch.as_tensor(same))
    assert model.cfg.all_experts == sum(keep)
    assert model.cfg.n_params == sum(p.numel() for p in GptOss(model.cfg).parameters())
    assert Config.from_json(json.loads(json.dumps(model.cfg.to_json()))) == model.cfg


def test_biases_of_layers_of_different_sizes_have_no_stack(folder: Path) -> None:
    model = opened(folder)
    with pytest.raises(InputError, match=r"b_out of all layers: the layers have \d+ to \d+ experts"):
        model.b_out  # noqa: B018
    assert [len(block.mlp.b_out) for block in model.blocks] == list(model.cfg.layer_experts or ())


def test_an_expert_that_a_layer_does_not_have_is_refused(folder: Path) -> None:
    model = opened(folder)
    for layer, experts in ((1, [5]), (2, [7])):
        with (
            pytest.raises(
                InputError, match=rf"experts \[{experts[0]}\]: layer {layer} has experts 0 to {KEEP[layer] - 1}"
            ),
            applied(model, forbid(layer, experts)),
        ):
            model(X)
    with applied(model, forbid(0, [7])):
        model(X)
    with (
        pytest.raises(InputError, match="forbidding 2 of 5 experts leaves fewer than the 4"),
        applied(model, forbid(1, [0, 1])),
    ):
        model(X)


def changed(folder: Path, **fields: Any) -> Path:
    """A folder with other fields in its config; ... removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def test_a_list_of_numbers_states_the_same(full: GptOss, tmp_path: Path) -> None:
    cfg, tensors = without_last_experts(replace(CFG, windows=(16, None, 16)), full.state_dict(), KEEP)
    folder = save_checkpoint(tmp_path / "model", cfg, tensors)
    listed = changed(folder, model_type="gpt_oss", block_configs=..., num_local_experts=list(KEEP))
    assert open_checkpoint(listed).cfg == cfg
    with pytest.raises(InputError, match=r"layers with \[8, 5, 6\] experts, and its config says 8: .* write this list"):
        open_checkpoint(changed(listed, num_local_experts=8))
    with pytest.raises(InputError, match=r"layers with \[8, 5, 6\] experts, and its config says \[8, 6, 5\]"):
        open_checkpoint(changed(listed, num_local_experts=[8, 6, 5]))


def test_a_pruned_model_with_the_number_from_before_is_told_its_own(full: GptOss, tmp_path: Path) -> None:
    cfg, tensors = without_last_experts(replace(CFG, windows=(16, None, 16)), full.state_dict(), (5, 5, 5))
    folder = save_checkpoint(tmp_path / "model", replace(cfg, layer_experts=None), tensors)
    with pytest.raises(
        InputError, match=r"has 5 experts in every layer, and its config says 8: .* write 5 as the number"
    ):
        open_checkpoint(changed(folder, num_local_experts=8))
    assert open_checkpoint(changed(folder, num_local_experts=5)).cfg.num_experts == 5


def test_the_original_layout_with_other_numbers_is_told_what_holds_them(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", replace(CFG, windows=(16, None, 16)), RandomTensors(CFG), layout="original")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"block.1.mlp.gate.weight": tensors["block.1.mlp.gate.weight"][:5].clone()}, path)
    with pytest.raises(InputError, match="the original layout has one number: use the Hugging Face layout"):
        open_checkpoint(tmp_path / "model")


BLOCKS = [{"num_local_experts": n, "sliding_window": w} for n, w in zip(KEEP, CFG.windows, strict=True)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_configs": ...}, "field 'block_configs' is missing"),
        ({"block_configs": BLOCKS[:2]}, "block_configs is .*expected a list of 3 objects, one for each layer"),
        (
            {"block_configs": [*BLOCKS[:2], {"num_local_experts": 6}]},
            r"field block_configs\[2\]\.'sliding_window' is missing",
        ),
        (
            {"block_configs": [*BLOCKS[:2], {**BLOCKS[2], "num_local_experts": 0}]},
            r"block_configs\[2\]\.num_local_experts is 0",
        ),
        (
            {"block_configs": [*BLOCKS[:2], {**BLOCKS[2], "num_local_experts": 3}]},
            "goes to 4 experts, but there are 3 in layer 2",
        ),
        (
            {"block_configs": [*BLOCKS[:2], {**BLOCKS[2], "no_op": True}]},
            r"block_configs\[2\]\.'no_op' = True is unknown",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types .* contradict the sliding_window of block_configs"),
        (
            {"model_type": "gpt_oss", "block_configs": ..., "num_local_experts": [8, 5]},
            "num_local_experts is .*, or 3 of them",
        ),
        (
            {"model_type": "gpt_oss", "block_configs": ..., "num_local_experts": [8, 5, "6"]},
            "num_local_experts is .*, or 3 of them",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(changed(Path(shutil.copytree(folder, tmp_path / "copy")), **fields))
    assert "\n" not in str(refusal.value)


def test_formats_that_cannot_express_it_refuse(folder: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, windows=(16, None, 16), layer_experts=KEEP)
    with pytest.raises(InputError, match="GGUF has one number of experts for all layers"):
        write_gguf(open_checkpoint(folder), tmp_path / "model.gguf")
    with pytest.raises(InputError, match="the original layout cannot say layer_experts"):
        save_checkpoint(tmp_path / "original", cfg, RandomTensors(cfg), layout="original")
