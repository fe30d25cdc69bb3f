"""A model of Ollama is found by its name; names cannot lead outside its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
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
    with pytest.raises(InputError, match="is no name of an Ollama model"):
        find_model(name)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([], "names no GGUF file, it has nothing: a cloud model has no weights here"),
        ([{**WEIGHTS, "mediaType": "application/vnd.ollama.image.tensor"}], "names no GGUF file, it has tensor:"),
        (
            [WEIGHTS, {"mediaType": "application/vnd.ollama.image.adapter", "digest": DIGEST}],
            "'gpt-oss:20b' is a model with an adapter in GGUF, which is not read",
        ),
        ([WEIGHTS, WEIGHTS], "names 2 files of weights"),
        ([{**WEIGHTS, "digest": "sha256:../x"}], "expected one by its SHA-256"),
        ([{**WEIGHTS, "digest": "sha256:" + "b" * 64}], "is missing, which"),
        (3, "is not a manifest of Ollama"),
    ],
)
def test_a_wrong_manifest_is_one_line(layers: Any, reason: str, models: Path) -> None:
    store(models, "gpt-oss/20b", layers)
    with pytest.raises(InputError, match=reason):
        find_model("gpt-oss:20b")
