"""Commands about models: `workbench info` plans them, and every kind of file that holds nano answers alike.

Also tests `workbench.model.info`.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.running import run_command
from tests.model.formats import gguf_files as files
from tests.model.formats.mlx_files import as_mlx
from workbench.hooks.names import BLOCK, FIRST, LAST
from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.export import save_checkpoint

NANO = BUNDLED["nano"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_info_names_sizes_and_hook_points() -> None:
    text = run_command("info", "nano").out
    for word in ("attn.hook_sink", "batch pos slot d_mlp", "parameters", "experts_per_token"):
        assert word in text
    listed = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│") and "hook_" in line]
    block = [f"blocks.{{l}}.{name}" for name in BLOCK]
    assert listed == [*FIRST, *block, *LAST], "whole names in a terminal of 80 columns, in the order of the pass"


def test_info_plans_a_published_shape_without_its_weights() -> None:
    text = run_command("info", "120b", "--tokens", "1024", "--batch", "2").out
    assert "65,248,815,744" in text  # 60.8 GiB, as published
    assert "This plan needs 1 such device: 65.400 GB of weights and cache" in text
    text = run_command("info", "120b", "--memory", "24GB").out
    assert "One device of 24.000 GB does not hold it: the weights alone are 65.249 GB." in text
    assert "This plan needs 3 such devices" in text
    text = run_command("info", "120b", "--memory", "2GB").out
    assert "No number of devices of 2.000 GB does this plan" in text


def test_info_plans_what_is_recorded() -> None:
    def records(*options: str) -> int:
        text = run_command("info", "20b", *options).out
        return int(
            next(line for line in text.splitlines() if "records of a unit" in line).split("│")[2].replace(",", "")
        )

    assert records("--record", "sinks") == 2 * 16_384 * 24 * 64 * 2
    assert records("--record", "resid_post:3,7", "--unit-tokens", "1024") == 2 * 1024 * 2 * 2880 * 2


def every_kind(folder: Path) -> list[str]:
    """Nano as llama.cpp, LM Studio, Ollama, MLX and OpenAI store it: what each is called on the command line."""
    nano = open_checkpoint(NANO)
    cfg, tensors = nano.cfg, dict(nano.tensors.items())
    stored = list(files.llama_cpp(cfg, tensors).items())
    template = {"tokenizer.chat_template": (NANO / "chat_template.jinja").read_text()}
    about = files.metadata(cfg, "gpt-oss", NANO) | template
    files.write(folder / "publisher" / "nano" / "nano.gguf", about, dict(stored))
    files.write(folder / "m-00001-of-00002.gguf", about | {"split.count": 2}, dict(stored[:40]))
    files.write(folder / "m-00002-of-00002.gguf", {"split.no": 1, "split.count": 2}, dict(stored[40:]))
    old = files.write(folder / "old", files.metadata(cfg, "gptoss", NANO) | template, files.first_ollama(cfg, tensors))
    blob = folder / "ollama" / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir(parents=True)
    old.rename(blob)
    manifest = folder / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "nano" / "latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    as_mlx(Path(shutil.copytree(NANO, folder / "mlx")))
    save_checkpoint(folder / "published" / "original", cfg, tensors, layout="original")
    for name in TOKENIZER:
        shutil.copy(NANO / name, folder / "published")
    gguf, split = folder / "publisher" / "nano", folder / "m-00002-of-00002.gguf"
    return [
        str(gguf),
        str(gguf / "nano.gguf"),
        str(split),
        "ollama:nano",
        str(folder / "mlx"),
        str(folder / "published"),
    ]


def test_every_kind_of_file_answers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated, written as GGUF and generated again: the same tokens as nano's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    Path("prompts.jsonl").write_text((NANO.parent / "prompts.jsonl").read_text().splitlines()[0] + "\n")

    def answer(model: str, out: str) -> list[int]:
        done = run_command("generate", model, "prompts.jsonl", out, "--effort", "low", "--max-new-tokens", "12")
        assert done.code == 0, done.err
        tokens: list[int] = json.loads(Path(out).read_text())["tokens"]
        return tokens

    expected = answer("nano", "nano.jsonl")
    for number, model in enumerate(every_kind(tmp_path)):
        assert answer(model, f"{number}.jsonl") == expected, model
        assert "layout" in run_command("info", model).out
        assert run_command("convert-weights", model, f"{number}.gguf").code == 0
        assert answer(f"{number}.gguf", f"again-{number}.jsonl") == expected, model
    other = json.loads((NANO / "config.json").read_text()) | {"swiglu_limit": 0.5}  # negative control
    Path(shutil.copytree(NANO, "other"), "config.json").write_text(json.dumps(other))
    assert answer("other", "other.jsonl") != expected
