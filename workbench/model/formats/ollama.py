"""Find the GGUF file of a model that Ollama downloaded.

$OLLAMA_MODELS, or else ~/.ollama/models or the folder of the service on Linux, holds manifests/HOST/NAMESPACE/MODEL/
TAG, a JSON file whose layers name blobs/sha256-….

Reference: https://github.com/ollama/ollama, types/model/name.go and manifest/manifest.go.
"""

import os
import re
from pathlib import Path
from typing import Any

from workbench.bounded_json import read_json
from workbench.errors import InputError

PREFIX = "ollama:"
_MEDIA = "application/vnd.ollama.image."
_WEIGHTS, _ADAPTER = f"{_MEDIA}model", f"{_MEDIA}adapter"
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of the service that Ollama's installer makes on Linux
_NAME = re.compile(
    r"(?:(?:(?P<host>[\w.:-]+)/)?(?P<namespace>[\w.-]+)/)?(?P<model>[\w.-]+)(?::(?P<tag>[\w.-]+))?", re.ASCII
)
_DIGEST = re.compile(r"sha256[:-](?P<hex>[0-9a-f]{64})")


def find_model(name: str) -> Path:
    """Return the file with the weights of a model such as gpt-oss:20b.

    Raises:
        InputError: the name is none of Ollama's, or the model is not there or incomplete.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        raise InputError(
            f"'{PREFIX}{name}' is not the name of an Ollama model: expected one such as ollama:gpt-oss:20b"
        )
    host, namespace = match["host"] or "registry.ollama.ai", match["namespace"] or "library"
    relative = Path("manifests", host, namespace, match["model"], match["tag"] or "latest")
    root = next((root for root in _roots() if os.path.isfile(root / relative)), _roots()[0])
    manifest = root / relative
    try:
        layers = read_json(manifest)["layers"]
        kinds = [str(layer["mediaType"]) for layer in layers]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == _WEIGHTS]
    except FileNotFoundError:
        raise InputError(
            f"Ollama has no model {name!r} in {root}: run `ollama pull {name}`, or set OLLAMA_MODELS{_known(manifest)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{manifest} is not a manifest of Ollama: {error!r}") from error
    if _ADAPTER in kinds:
        raise InputError(
            f"{manifest}: {name!r} is a model with an adapter in GGUF, which is not read: load the model alone, with "
            "adapter= and the adapter's folder of PEFT"
        )
    if not digests:
        held = ", ".join(sorted({kind.removeprefix(_MEDIA) for kind in kinds})) or "nothing"
        raise InputError(
            f"{manifest} lists no GGUF file, only {held}: a cloud model has no weights here, and models in other "
            "forms are not read; pull one in GGUF, such as gpt-oss:20b"
        )
    return _blob(root, manifest, digests)


def _roots() -> list[Path]:
    """Return the folders in which Ollama keeps its models."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path.home() / ".ollama" / "models", _SERVICE]


def _blob(root: Path, manifest: Path, digests: list[str]) -> Path:
    match: Any = _DIGEST.fullmatch(digests[0]) if len(digests) == 1 else None
    if match is None:
        raise InputError(f"{manifest} names {len(digests)} files of weights, expected one by its SHA-256")
    path = root / "blobs" / f"sha256-{match['hex']}"
    if not path.is_file():
        raise InputError(f"{path} is missing, and {manifest} lists it: pull the model again")
    return path


def _known(manifest: Path) -> str:
    """Return the tags of the same model that are there, for an error message."""
    try:
        tags = sorted(path.name for path in manifest.parent.iterdir() if path.is_file())
    except OSError:
        return ""
    return f"; there is {', '.join(tags[:5])}" if tags else ""
