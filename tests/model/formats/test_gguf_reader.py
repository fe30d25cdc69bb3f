"""GGUF files of llama.cpp and Ollama hold the same tensors as safetensors, and damaged files are refused."""

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import workbench as wb
from tests.cli.test_cli import run
from tests.model.formats import gguf_files as files
from tests.model.formats.gguf_files import CFG, GENERATIONS, NANO, ODD, written
from workbench.errors import InputError
from workbench.kernels import cpu
from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.mxfp4 import Mxfp4
from workbench.model.checkpoint import open_checkpoint
from workbench.model.config import Config
from workbench.model.export import RandomTensors
from workbench.model.formats.gguf_file import GgufFile
from workbench.model.formats.gguf_reader import _q8_0


@pytest.mark.parametrize("generation", list(GENERATIONS))
@pytest.mark.parametrize("cfg", [CFG, ODD], ids=["ratio 8", "odd"])
def test_every_generation_holds_the_same_tensors(tmp_path: Path, generation: str, cfg: Config) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model.gguf", generation, cfg))
    assert (checkpoint.cfg, checkpoint.experts, checkpoint.notes) == (cfg, "mxfp4", ())
    assert not checkpoint.tensors.other_precision()
    for name, tensor in RandomTensors(cfg).items():
        assert torch.equal(checkpoint.tensors[name].to(tensor.dtype), tensor), name


def test_scales_are_read_alone_and_after_the_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model.gguf"))
    name, expected = "blocks.1.mlp.experts.gate_up.", RandomTensors(CFG)
    alone = checkpoint.tensors[name + "scales"]
    assert torch.equal(checkpoint.tensors[name + "blocks"], expected[name + "blocks"])
    for scales in (alone, checkpoint.tensors[name + "scales"], checkpoint.tensors[name + "scales"]):
        assert torch.equal(scales, expected[name + "scales"])


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_experts_are_used_as_the_file_holds_them_with_the_same_results_bit_for_bit(
    tmp_path: Path, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu.unavailable():
        pytest.skip("numba compiles nothing here: experts are reordered when they are loaded")
    path = written(tmp_path / "model.gguf", generation)
    mapped = wb.load(path)
    matrix = mapped.blocks[1].mlp.experts.gate_up.matrix
    assert isinstance(matrix, GgmlMxfp4)
    assert len(matrix.parts) == (1 if generation.endswith("August 2025") else 2)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "unavailable", lambda: "for the test")
        in_memory = wb.load(path)
    assert isinstance(in_memory.blocks[1].mlp.experts.gate_up.matrix, Mxfp4)
    rng = torch.Generator().manual_seed(0)
    for count in (1, 7, 40):  # compiled products of one and of a few rows, and torch's of many
        tokens = torch.randint(CFG.d_vocab, (1, count), generator=rng)
        assert torch.equal(mapped(tokens), in_memory(tokens))
    gradients = []
    for model in (mapped, in_memory):
        with torch.enable_grad():
            stream = model.embed(tokens).detach().requires_grad_()
            model.residual(tokens, stream=stream).float().square().sum().backward()
        gradients.append(stream.grad)
    assert torch.equal(*gradients)
    wrong = mapped.blocks[1].mlp.experts.gate_up
    wrong.mapped = matrix._replace(halves=not matrix.halves)  # negative control
    assert not torch.equal(mapped(tokens), in_memory(tokens))
    assert not torch.equal(mapped(tokens[:, :1]), in_memory(tokens[:, :1]))


def test_mapped_experts_move_to_memory_where_their_tensors_are_needed(tmp_path: Path) -> None:
    """Their state is that of any other model; what is changed in place is used."""
    path = written(tmp_path / "model.gguf")
    model, expected = wb.load(path), RandomTensors(CFG)
    experts = model.blocks[0].mlp.experts
    assert torch.equal(experts.W_out(2), wb.load(path).double().blocks[0].mlp.experts.W_out(2))
    assert torch.equal(experts.down.blocks, expected["blocks.0.mlp.experts.down.blocks"])
    assert experts.down.mapped is None
    state = model.state_dict()
    for name in (name for name in expected if ".experts." in name):
        assert torch.equal(state[name].to(expected[name].dtype), expected[name]), name
    tokens = torch.arange(5)[None]
    before = model(tokens)
    experts.down.scales.sub_(20)
    assert not torch.equal(model(tokens), before)
    again = wb.load(path)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), model(tokens))
    assert wb.load(path).to("meta").blocks[0].mlp.experts.down.blocks.is_meta


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux which pages are in memory")
def test_pages_of_a_tensor_that_was_read_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a loaded model would take its size twice."""

    def resident() -> int:
        entries = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(re.search(r"^Rss: +(\d+)", entry, re.MULTILINE)[1]) for entry in entries)  # type: ignore[index]

    path = written(tmp_path / "m.gguf", cfg=replace(CFG, d_model=512, d_mlp=512, num_experts=16))
    checkpoint = open_checkpoint(path)
    before, size = resident(), 16 * 512 * 512 * 17 // 32 // 1024  # kB
    blocks = checkpoint.tensors["blocks.0.mlp.experts.down.blocks"]
    assert resident() < before + size // 2
    monkeypatch.setattr(GgufFile, "release", lambda self, name: None)  # negative control
    assert torch.equal(checkpoint.tensors["blocks.0.mlp.experts.down.blocks"], blocks)
    assert resident() > before + size // 2


def test_q8_0_is_dequantised_as_gguf_does_it() -> None:
    rng = np.random.default_rng(2)
    rows = gguf.quants.quantize(rng.normal(size=(5, 96)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(_q8_0(rows), expected)
    assert not np.array_equal(_q8_0(np.roll(rows, 1, -1)), expected)


def test_a_type_4_file_read_as_type_39_would_be_another_model(tmp_path: Path) -> None:
    stored = files.first_ollama(CFG, RandomTensors(CFG))
    stored = {name: (shape, 39 if kind == 4 else kind, data) for name, (shape, kind, data) in stored.items()}
    checkpoint = open_checkpoint(files.write(tmp_path / "m.gguf", files.metadata(CFG, "gptoss", NANO), stored))
    name = "blocks.0.mlp.experts.down.blocks"
    assert not torch.equal(checkpoint.tensors[name], RandomTensors(CFG)[name])


def test_quantised_matrices_are_dequantised_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = files.llama_cpp(CFG, RandomTensors(CFG), files.Q8_0)
    path = files.write(tmp_path / "m.gguf", files.metadata(CFG, "gpt-oss", NANO), tensors)
    checkpoint = open_checkpoint(path)
    assert checkpoint.experts == "mxfp4"
    names = checkpoint.tensors.other_precision()["Q8_0"]
    assert {"embed.weight", "unembed.weight", "blocks.2.attn.o.weight"} <= set(names)
    assert len(names) == 2 + 4 * CFG.n_layers
    for name in names:
        expected = RandomTensors(CFG)[name].float()
        assert (checkpoint.tensors[name] - expected).abs().max() <= expected.abs().max() / 127
    code, output, _ = run(capsys, "info", str(path))
    assert code == 0
    assert "14 tensors are stored as Q8_0, not in the published precision: embed.weight" in output


@pytest.mark.parametrize("kind", [files.BF16, files.F16, files.Q8_0])
def test_experts_that_are_not_packed_are_dense(tmp_path: Path, kind: int) -> None:
    tensors = RandomTensors(CFG, experts="dense")
    path = files.write(tmp_path / "m.gguf", files.metadata(CFG, "gpt-oss", NANO), files.llama_cpp(CFG, tensors, kind))
    checkpoint = open_checkpoint(path)
    assert checkpoint.experts == "dense"
    for name in ("blocks.1.mlp.experts.gate_up.weight", "blocks.1.mlp.experts.down.weight"):
        expected = tensors[name].float()
        tolerance = 0 if kind == files.BF16 else expected.abs().max() / (127 if kind == files.Q8_0 else 1024)
        assert (checkpoint.tensors[name].float() - expected).abs().max() <= tolerance


def test_a_folder_of_two_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        written(tmp_path / name)
    with pytest.raises(InputError, match=r"holds 2 GGUF models, a\.gguf, b\.gguf: give one of its files"):
        open_checkpoint(tmp_path)


Damage = Callable[[Path], object]


def rewritten(**changed: Any) -> Damage:
    return lambda path: written(path, **changed)


def without(name: str, more: dict[str, files.Stored] | None = None) -> Damage:
    def damage(path: Path) -> None:
        tensors = files.llama_cpp(CFG, RandomTensors(CFG))
        files.write(
            path, files.metadata(CFG, "gpt-oss", NANO), {n: t for n, t in tensors.items() if n != name} | (more or {})
        )

    return damage


def patched(at: int, content: bytes) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at : at + len(content)] = content
        path.write_bytes(bytes(data))

    return damage


ONE = files.floats(torch.ones(2, 32))
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-5000]),
        "bytes beyond the file: truncated download",
    ),
    "truncated header": (lambda path: path.write_bytes(path.read_bytes()[:300]), "header is truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "does not begin with GGUF"),
    "text": (lambda path: path.write_text("hello"), "does not begin with GGUF"),
    "pointer of git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of git-lfs",
    ),
    "version 1": (patched(4, struct.pack("<I", 1)), "GGUF version 1 is not read"),
    "big-endian": (patched(4, struct.pack(">I", 3)), "GGUF version 50331648 is not read"),
    "many tensors": (patched(8, struct.pack("<Q", 2**40)), "header is truncated or damaged"),
    "many values": (patched(16, struct.pack("<Q", 2**40)), "header is truncated or damaged"),
    "a long text": (patched(24, struct.pack("<Q", 2**60)), "header is truncated or damaged"),
    "another model": (
        rewritten(**{"general.architecture": "llama"}),
        "the architecture is 'llama', expected 'gpt-oss'",
    ),
    "no layers": (rewritten(**{"gpt-oss.block_count": 0}), "gpt-oss.block_count is 0, expected a number above 0"),
    "a text for a number": (
        rewritten(**{"gpt-oss.block_count": "many"}),
        "gpt-oss.block_count is 'many', expected a number",
    ),
    "another rope": (rewritten(**{"gpt-oss.rope.scaling.type": "linear"}), "rope scaling 'linear' is not computed"),
    "another width": (rewritten(**{"gpt-oss.embedding_length": 96}), r"has shape \[.*64.*\], the metadata require"),
    "no embedding": (without("token_embd.weight"), "tensor 'token_embd.weight' is missing"),
    "a missing tensor": (
        without("blk.1.attn_sinks.weight"),
        "tensor 'blk.1.attn_sinks.weight' or 'blk.1.attn_sinks' is missing",
    ),
    "a tensor too many": (
        without("", {"blk.0.extra.weight": ONE}),
        "tensor 'blk.0.extra.weight' is not part of a gpt-oss",
    ),
    "an unknown type": (without("", {"x": ((2, 32), 77, b"")}), "tensor 'x' has ggml type 77, which is not read here"),
    "part of a block": (without("", {"x": ((2, 33), files.Q8_0, b"")}), "rows that are not a multiple of 32"),
    "Ollama's type in another file": (without("", {"x": ((2, 32), 4, b"")}), "has ggml type 4, which is not read here"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_refused_in_one_line_that_names_it(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    path = written(tmp_path / "model.gguf")
    spoil(path)
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_a_file_without_an_unembedding_ties_it_and_reports_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    without("output.weight")(path)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.tensors["unembed.weight"], RandomTensors(CFG)["embed.weight"])
    assert "no output.weight" in checkpoint.notes[0]


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tensors = files.llama_cpp(CFG, RandomTensors(CFG))
    shape, kind, data = tensors["blk.1.ffn_down_exps.weight"]
    tensors["blk.1.ffn_down_exps.weight"] = shape, kind, b"\xff" + data[1:]
    path = files.write(tmp_path / "m.gguf", files.metadata(CFG, "gpt-oss", NANO), tensors)
    with pytest.raises(InputError, match=r"tensor 'blk.1.ffn_down_exps.weight' .* at \[0, 0, 0\]: scale byte 255"):
        wb.load(path, device="cpu")


@pytest.mark.parametrize("kind", [9, 24, 28])  # Q8_1, I8, F64: ggml has them, and the package gguf does not read them
def test_a_type_that_cannot_be_dequantised_is_refused_when_the_file_is_opened(tmp_path: Path, kind: int) -> None:
    tensors = files.llama_cpp(CFG, RandomTensors(CFG))
    shape, _, _ = tensors["blk.0.attn_q.weight"]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    tensors["blk.0.attn_q.weight"] = (shape, kind, bytes(shape[0] * shape[1] // block * size))
    with pytest.raises(InputError, match=rf"'blk.0.attn_q.weight' has ggml type {kind}, which is not read here"):
        open_checkpoint(files.write(tmp_path / "m.gguf", files.metadata(CFG, "gpt-oss", NANO), tensors))


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = files.write(
        tmp_path / "m.gguf", files.metadata(CFG, "gpt-oss", NANO), files.llama_cpp(CFG, RandomTensors(CFG))
    )
    open_checkpoint(path)  # negative control
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.1.attn_norm.weight") + len(b"blk.1.attn_norm.weight") + 4 + 8 + 4  # axes, size, type
    content[at : at + 8] = bytes(8)  # the offset: that of the first tensor
    path.write_bytes(content)
    with pytest.raises(InputError, match="overlap: the file is damaged"):
        open_checkpoint(path)
