"""transformers reads what we write, we read what transformers writes, and a file states what its config has."""

import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, SHAPES, YARN, random_model, to_hf
from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise
from workbench.model.checkpoint import open_checkpoint
from workbench.model.config import Config, Rope
from workbench.model.config_file import read_config
from workbench.model.export import RandomTensors, save_checkpoint
from workbench.model.names import name_in
from workbench.model.transformer import GptOss

HEADS = {
    "heads 4:2": replace(BASE, n_heads=4, n_key_value_heads=2, d_model=32, d_mlp=160),
    "heads 6:2, 5 experts": replace(
        BASE, n_heads=6, n_key_value_heads=2, d_head=24, num_experts=5, experts_per_token=3
    ),
    "one full layer": replace(BASE, n_layers=1, windows=(None,)),
}
CONFIGS = SHAPES | HEADS


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with its experts unpacked, in transformers' orientation."""
    unpacked = {}
    for name, tensor in tensors.items():
        if name.endswith(".blocks"):
            stem = name.removesuffix("blocks")
            unpacked[stem + "weight"] = dequantise(tensor, tensors[stem + "scales"], torch.bfloat16).mT.contiguous()
        elif not name.endswith(".scales"):
            unpacked[name] = tensor
    return unpacked


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=list(CONFIGS))
def test_transformers_holds_the_tensors_that_we_wrote(tmp_path: Path, cfg: Config, experts: str) -> None:
    from transformers import GptOssForCausalLM

    tensors = RandomTensors(cfg, seed=3, experts=experts)
    folder = save_checkpoint(tmp_path / "ckpt", cfg, tensors, shard_bytes=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it unpacks the experts, for want of a GPU
        state = GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    want = dense(tensors)
    assert set(state) == {name_in("huggingface", name) for name in want}
    for name, tensor in want.items():
        assert torch.equal(state[name_in("huggingface", name)], tensor), name


def test_the_comparison_with_transformers_would_see_one_flipped_bit(tmp_path: Path) -> None:
    tensors = dict(RandomTensors(BASE).items())
    before = dense(tensors)
    tensors["blocks.1.mlp.experts.down.blocks"][0, 0, 0, 0] ^= 1
    after = dense(tensors)
    assert [name for name in after if not torch.equal(before[name], after[name])] == [
        "blocks.1.mlp.experts.down.weight"
    ]


@pytest.mark.parametrize("name", list(SHAPES))
def test_what_transformers_saves_opens_as_the_same_model(tmp_path: Path, name: str) -> None:
    cfg = SHAPES[name]
    model = random_model(cfg)
    to_hf(model).save_pretrained(tmp_path / "saved")
    opened = open_checkpoint(tmp_path / "saved")
    assert (opened.cfg, opened.layout, opened.experts) == (cfg, "huggingface", "dense")
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.tensors[key], tensor), key


def original_can_say(cfg: Config) -> Config:
    """The nearest config that the original layout has words for."""
    windows = tuple(None if layer % 2 else 16 for layer in range(cfg.n_layers))
    return replace(cfg, windows=windows, n_ctx=32 * 4096, rope=YARN)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=list(CONFIGS))
def test_all_layouts_hold_the_same_canonical_tensors(tmp_path: Path, cfg: Config) -> None:
    cfg = original_can_say(cfg)
    tensors = RandomTensors(cfg, seed=1)
    shuffled = dict(sorted(tensors.items()))  # k before q: the order of a dict must not leak into the fused rows
    hf = open_checkpoint(save_checkpoint(tmp_path / "hf", cfg, shuffled))
    original = open_checkpoint(save_checkpoint(tmp_path / "original", cfg, shuffled, layout="original", shard_bytes=1))
    unpacked = open_checkpoint(save_checkpoint(tmp_path / "dense", cfg, dense(tensors)))
    assert (hf.layout, original.layout, unpacked.layout) == ("huggingface", "original", "huggingface")
    assert hf.cfg == original.cfg == unpacked.cfg == cfg
    assert list(hf.tensors) == list(original.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(hf.tensors[name], tensor), name
        assert torch.equal(original.tensors[name], tensor), name
    for name, tensor in dense(hf.tensors).items():
        assert torch.equal(unpacked.tensors[name], tensor), name


def test_plain_rope_survives_both_layouts(tmp_path: Path) -> None:
    cfg = replace(BASE, rope=Rope.plain(10_000.0))
    for layout in ("huggingface", "original"):
        assert read_config(save_checkpoint(tmp_path / layout, cfg, RandomTensors(cfg), layout=layout)) == cfg


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"windows": (None, None, None)}, "original", "cannot store windows"),
        ({"eps": 1e-6}, "original", "cannot store eps"),
        ({"swiglu_alpha": 1.0}, "original", "cannot store swiglu_alpha"),
        ({"n_ctx": 512}, "original", "cannot store n_ctx"),
        ({"rope": replace(YARN, truncate=True)}, "original", "cannot store rope"),
        ({"num_experts": 3}, "huggingface", "3"),
    ],
)
def test_a_config_that_would_be_read_as_another_is_not_written(
    tmp_path: Path, change: dict[str, object], layout: str, message: str
) -> None:
    cfg = replace(replace(BASE, n_ctx=131_072), **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path / "ckpt", cfg, RandomTensors(cfg), layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_the_config_are_not_written(tmp_path: Path) -> None:
    good = dict(RandomTensors(BASE).items())
    name = "blocks.1.attn.k.bias"
    wrong: list[tuple[Mapping[str, Tensor], str]] = [
        ({n: t for n, t in good.items() if n != name}, f"'{name}' is missing"),
        (good | {"blocks.3.ln1.weight": good["ln_final.weight"]}, "unexpected"),
        (good | {name: good[name][:-1]}, r"\[15\], the config requires \[16\]"),
        (good | {name: good[name].half()}, "is torch.float16"),
        (
            good | {"blocks.0.mlp.experts.down.scales": good["blocks.0.mlp.experts.down.scales"].view(torch.int8)},
            "int8",
        ),
    ]
    for tensors, message in wrong:
        with pytest.raises(InputError, match=message):
            save_checkpoint(tmp_path / "ckpt", BASE, tensors)
    with pytest.raises(InputError, match="layout 'gguf' is unknown"):
        save_checkpoint(tmp_path / "ckpt", BASE, good, layout="gguf")
    with pytest.raises(InputError, match="packed experts only"):
        save_checkpoint(tmp_path / "ckpt", BASE, dense(good), layout="original")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_overwritten_and_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", BASE, RandomTensors(BASE))
    with pytest.raises(InputError, match="exists"):
        save_checkpoint(tmp_path / "a", BASE, RandomTensors(BASE))

    def fail(folder: Path) -> None:
        assert (folder / "config.json").exists()
        raise OSError("disk full")

    with pytest.raises(InputError, match="cannot be written: disk full"):
        save_checkpoint(tmp_path / "b", BASE, RandomTensors(BASE), extra=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    killed = tmp_path / ".b.1234.staging"  # a process that was killed left it
    killed.mkdir()
    (killed / "part-0.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path / "b", BASE, RandomTensors(BASE))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())


class Counted(Mapping[str, Tensor]):
    """Tensors that know how many of their bytes were alive when another one was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.most = tensors, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.most = max(self.most, sum(t.nbytes for ref in self.alive if (t := ref()) is not None))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_memory_holds_a_shard_or_the_largest_tensor(tmp_path: Path) -> None:
    cfg = replace(BASE, d_vocab=4000)
    largest, everything = 4000 * 64 * 2, sum(t.nbytes for t in RandomTensors(cfg).values())
    streamed, unsharded = Counted(RandomTensors(cfg)), Counted(RandomTensors(cfg))
    save_checkpoint(tmp_path / "streamed", cfg, streamed, shard_bytes=100_000)
    save_checkpoint(tmp_path / "whole", cfg, unsharded)
    assert streamed.most <= largest + 100_000
    assert unsharded.most >= 0.9 * everything > 2 * streamed.most
    sizes = [p.stat().st_size for p in (tmp_path / "streamed").glob("*.safetensors")]
    assert sum(size > 120_000 for size in sizes) == 2  # embedding and unembedding, one tensor each


def test_random_tensors_are_a_function_of_seed_and_name() -> None:
    one, again, other = RandomTensors(BASE, seed=1), RandomTensors(BASE, seed=1), RandomTensors(BASE, seed=2)
    for name, tensor in one.items():
        assert torch.equal(again[name], tensor)
        assert not torch.equal(other[name], tensor)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@torch.no_grad()
def test_random_models_are_sane_and_still_reach_every_branch(experts: str) -> None:
    """Logits of a few units, some gates beyond the limit but not most, sinks that take a share, experts all used."""
    cfg = replace(BASE, d_model=256, d_mlp=256, n_layers=4, windows=(16, None) * 2)
    tensors = RandomTensors(cfg, experts=experts)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    model = GptOss(cfg, packed=experts == "mxfp4")
    model.load_state_dict(dict(tensors.items()))
    tokens = torch.randint(cfg.d_vocab, (2, 90), generator=torch.Generator().manual_seed(0))
    logits, cache = model.run_with_cache(
        tokens, names_filter=lambda n: n.endswith(("hook_gate", "hook_sink", "hook_expert_indices"))
    )
    assert 0.3 < float(logits.std()) < 10
    for name, value in cache.items():
        if name.endswith("hook_gate"):
            assert 0.001 < float((value > cfg.swiglu_limit).float().mean()) < 0.3, name
        elif name.endswith("hook_sink"):
            assert 0.02 < float(value.mean()) < 0.9, name
        else:
            assert len(value.unique()) == cfg.num_experts, name


def test_packed_random_experts_are_as_loud_as_dense_ones() -> None:
    packed, loose = dense(RandomTensors(BASE)), RandomTensors(BASE, experts="dense")
    for part in ("gate_up", "down"):
        name = f"blocks.0.mlp.experts.{part}.weight"
        ratio = float(packed[name].float().std() / loose[name].float().std())
        assert abs(math.log(ratio)) < math.log(1.5), (name, ratio)
