"""A GGUF file that we write is read back bit for bit, by the gguf package too, and llama.cpp generates with it."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.cli.test_cli import run
from tests.model.formats import gguf_files as files
from tests.model.formats.gguf_files import CFG, NANO, ODD
from workbench.errors import InputError
from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.export import RandomTensors, save_random
from workbench.model.formats.gguf_writer import write_gguf
from workbench.model.rope import inverse_frequencies


@torch.no_grad()
def test_nano_survives_gguf_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nano.gguf"
    code, output, _ = run(capsys, "convert-weights", "nano", str(path))
    assert (code, "nano.gguf: " in output) == (0, True)
    ours, theirs = wb.load("nano", device="cpu"), wb.load(path, device="cpu")
    for (name, before), (other, after) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(before, after), name
    assert theirs.cfg == ours.cfg
    text = "12+34*5="
    assert theirs.tokenizer.encode(text) == ours.tokenizer.encode(text)
    assert theirs.tokenizer.digest == ours.tokenizer.digest
    assert theirs.tokenizer.chat_template == ours.tokenizer.chat_template
    again = open_checkpoint(write_gguf(open_checkpoint(path), tmp_path / "again.gguf"))
    assert again.tokenizer().digest == ours.tokenizer.digest
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in open_checkpoint(path).tensors.items())
    assert run(capsys, "convert-weights", "nano", str(path))[0] == 2  # it exists
    assert run(capsys, "convert-weights", "nano", str(tmp_path / "folder"))[0] == 2


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_what_we_write_is_what_the_gguf_package_reads(tmp_path: Path, experts: str) -> None:
    from gguf import GGUFReader

    save_random(tmp_path / "model", ODD, experts=experts)
    path = write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf")
    read = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected = files.llama_cpp(ODD, RandomTensors(ODD, experts=experts))
    assert set(read) == set(expected)
    for name, (shape, kind, data) in expected.items():
        assert read[name].shape.tolist() == list(reversed(shape)), name
        assert (int(read[name].tensor_type), read[name].data.tobytes()) == (kind, data), name
    back = open_checkpoint(path)
    assert (back.cfg, back.experts) == (ODD, experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (16, 16, None)}, "GGUF cannot express windows"),
        ({"swiglu_limit": 5.0}, "cannot express swiglu_limit 5.0"),
    ],
)
def test_what_gguf_cannot_express_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_random(tmp_path / "model", replace(CFG, **change))
    with pytest.raises(InputError, match=message):
        write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def bfloat16_step(value: torch.Tensor) -> float:
    """Return the distance of neighbouring bfloat16 numbers; llama.cpp rounds activations to this or coarser."""
    return float(2.0 ** (math.floor(math.log2(abs(float(value)))) - 7))


@pytest.mark.long
@torch.no_grad()
def test_llama_cpp_generates_the_same_text(tmp_path: Path) -> None:
    """Greedy, for a prompt of every task at two efforts. Needs `llama-simple` of llama.cpp on the PATH.

    llama.cpp truncates the YaRN ramp, which a GGUF does not state: the model here does so too for the comparison.
    """
    program = shutil.which("llama-simple")
    if program is None:
        pytest.skip("llama-simple is not on the PATH")
    path = write_gguf(open_checkpoint(NANO), tmp_path / "nano.gguf")
    model = wb.load("nano", device="cpu", dtype=torch.float32)
    model._rotation = inverse_frequencies(replace(model.cfg.rope, truncate=True), model.cfg.d_head)
    rows = [json.loads(line) for line in (BUNDLED["nano"].parent / "prompts.jsonl").read_text().splitlines()]
    of_task = {row["meta"]["task"]: row for row in rows}
    compared, ties = 0, []
    for row, effort in product(of_task.values(), ("low", "high")):
        prompt = wb.harmony.render(row["messages"], tokenizer=model.tokenizer, effort=effort)
        text = model.tokenizer.decode(prompt)
        done = subprocess.run([program, "-m", path, "-n", "60", text], capture_output=True, text=True, check=True)
        text_of_llama_cpp = done.stdout.rstrip("\n").removeprefix(text)
        ours = model.generate([prompt], max_new_tokens=60)[0]
        wanted = model.tokenizer.decode(ours).removesuffix("<|return|>").removesuffix("<|call|>")
        if len(ours) == 60:  # the limit: llama.cpp counts from another token on
            length = min(len(text_of_llama_cpp), len(wanted))
            text_of_llama_cpp, wanted = text_of_llama_cpp[:length], wanted[:length]
        compared += 1
        if text_of_llama_cpp != wanted:
            same = next(
                n for n in range(len(ours)) if not text_of_llama_cpp.startswith(model.tokenizer.decode(ours[: n + 1]))
            )
            logits = model(torch.tensor([[*prompt, *ours[:same]]]))[0, -1]
            (first, second), ids = logits.topk(2)
            theirs = text_of_llama_cpp.removeprefix(model.tokenizer.decode(ours[:same]))
            own, other = (model.tokenizer.decode([id]) for id in ids.tolist())
            logp = logits.log_softmax(-1)[ids].tolist()
            ties.append(f"{own!r} {logp[0]:.4f}, {other!r} {logp[1]:.4f}")
            assert theirs.startswith(other), (theirs, ties)
            assert first - second <= bfloat16_step(first), "a difference that rounding does not explain"
    print(f"{compared} texts, {len(ties)} of which differ at two tokens that are a tie within rounding: {ties}")
    assert compared >= 20
    assert len(ties) <= 0.1 * compared
