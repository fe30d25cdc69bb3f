"""Runs whose metadata was changed on purpose, with manifests that agree with the change."""

import json
from pathlib import Path
from typing import Any

import zarr

from workbench.runs import manifest
from workbench.runs.storage import ROOT, LocalStorage


def forge(run: Path) -> None:
    """Write every digest of a run again, as an attacker would to deceive its reader.

    What cannot be read is left as it is.
    """
    storage = LocalStorage(run)
    for path in sorted((run / "manifest").glob("*.json"), key=lambda path: path.name == "complete.json"):
        key = f"manifest/{path.name}"
        try:
            listed = json.loads(path.read_bytes())["files"]
            files = {name: manifest.entry([storage.read(name)]) for name in listed}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        manifest.write(storage, key, files)
    try:
        root: Any = json.loads((run / ROOT).read_bytes())
        root["attributes"]["digest"] = manifest.attributes_digest((run / ROOT).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    (run / ROOT).write_text(json.dumps(root))


def make_schema_2(run: Path) -> None:
    """Make a run one without manifests, in which only values can be compared with each other."""
    for path in (run / "manifest").iterdir():
        path.unlink()
    (run / "manifest").rmdir()
    zarr.open_group(str(run)).attrs["schema"] = 2
