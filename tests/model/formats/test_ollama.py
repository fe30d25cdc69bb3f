"""A model of Ollama is found by its name; names cannot lead outside its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.model.formats.gguf_files import written
from workbench.errors import InputError
from workbench.model.checkpoint import resolve
from workbench.model.formats import ollama
from workbench.model.formats.ollama import find_model

DIGEST = "sha256:" + "a" * 64
WEIGHTS = {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / DIGEST.replace(":", "-")).write_bytes(b"GGUF")
    return tmp_path


def store(models: Path, name: str, layers: Any) -> None:
    path = models / "manifests" / "registry.ollama.ai" / "library" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"layers": layers}))


def test_the_tag_is_latest_unless_it_is_named(models: Path) -> None:
    store(models, "gpt-oss/20b", [{"mediaType": "application/license", "digest": "x"}, WEIGHTS])
    store(models, "gpt-oss/latest", [WEIGHTS])
    assert find_model("gpt-oss:20b") == find_model("gpt-oss") == models / "blobs" / DIGEST.replace(":", "-")
    assert find_model("library/gpt-oss:20b").read_bytes() == b"GGUF"


def test_a_missing_model_lists_the_tags_that_are_there(models: Path) -> None:
    store(models, "gpt-oss/20b", [WEIGHTS])
    with pytest.raises(InputError, match=r"run `ollama pull gpt-oss:120b`.*there is 20b"):
        find_model("gpt-oss:120b")


def test_without_a_chosen_folder_the_users_and_the_services_are_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(models, "gpt-oss/20b", [WEIGHTS])
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=r"has no model 'gpt-oss:20b' in .*home/\.ollama/models"):
        find_model("gpt-oss:20b")
    monkeypatch.setattr(ollama, "_SERVICE", models)
    assert find_model("gpt-oss:20b").is_relative_to(models)
    own = tmp_path / "home" / ".ollama" / "models"
    own.parent.mkdir(parents=True)
    shutil.copytree(models, own, ignore=shutil.ignore_patterns("home"))
    assert find_model("gpt-oss:20b").is_relative_to(own), "the user's own come first"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../b", "", "a b", "/a", "a:b:c"])
def test_a_name_cannot_lead_elsewhere(name: str, models: Path) -> None:
    with pytest.raises(InputError, match="is not the name of an Ollama model"):
        find_model(name)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([], "lists no GGUF file, only nothing: a cloud model has no weights here"),
        ([{**WEIGHTS, "mediaType": "application/vnd.ollama.image.tensor"}], "lists no GGUF file, only tensor:"),
        (
            [WEIGHTS, {"mediaType": "application/vnd.ollama.image.adapter", "digest": DIGEST}],
            "'gpt-oss:20b' is a model with an adapter in GGUF, which is not read",
        ),
        ([WEIGHTS, WEIGHTS], "names 2 files of weights"),
        ([{**WEIGHTS, "digest": "sha256:../x"}], "expected one by its SHA-256"),
        ([{**WEIGHTS, "digest": "sha256:" + "b" * 64}], "is missing, and .* lists it"),
        (3, "is not a manifest of Ollama"),
    ],
)
def test_a_wrong_manifest_is_one_line(layers: Any, reason: str, models: Path) -> None:
    store(models, "gpt-oss/20b", layers)
    with pytest.raises(InputError, match=reason):
        find_model("gpt-oss:20b")


def ollama_store(root: Path, model: Path, name: str = "registry.ollama.ai/library/gpt-oss/20b") -> None:
    digest = "0123456789abcdef" * 4
    blob = root / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    model.rename(blob)
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "f" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    manifest.write_text(json.dumps({"layers": layers}))


@torch.no_grad()
def test_a_model_of_ollama_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    ollama_store(tmp_path / "store", written(tmp_path / "model.gguf", "Ollama, autumn 2025"))
    model = wb.load("ollama:gpt-oss:20b", device="cpu")
    assert model(torch.arange(30)[None]).isfinite().all()
    assert resolve("ollama:registry.ollama.ai/library/gpt-oss:20b") == resolve("ollama:gpt-oss:20b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ollama:gpt-oss",
            "Ollama has no model 'gpt-oss' .* run `ollama pull gpt-oss`, or set OLLAMA_MODELS; there is 20b",
        ),
        ("ollama:../../x:y", "is not the name of an Ollama model"),
        ("ollama:", "is not the name of an Ollama model"),
        ("ollama:a/b/c/d:e", "is not the name of an Ollama model"),
    ],
)
def test_a_name_that_ollama_does_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    ollama_store(tmp_path / "store", written(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match=message):
        wb.load(name, device="cpu")


def test_a_damaged_store_of_ollama_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    ollama_store(tmp_path / "store", written(tmp_path / "model.gguf"))
    next((tmp_path / "store" / "blobs").iterdir()).unlink()
    with pytest.raises(InputError, match=r"is missing, and .*20b lists it: pull the model again"):
        wb.load("ollama:gpt-oss:20b", device="cpu")
    next((tmp_path / "store" / "manifests").rglob("20b")).write_text("[]")
    with pytest.raises(InputError, match="is not a manifest of Ollama"):
        wb.load("ollama:gpt-oss:20b", device="cpu")
