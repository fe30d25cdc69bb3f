"""Runs whose metadata was changed on purpose, with manifests that agree with the change."""

import json
from pathlib import Path
from typing import Any

import zarr

from tests.runs.conftest import LENGTHS, job, write_unit
from workbench.capture.plan import plan_units
from workbench.runs import manifest
from workbench.runs.storage import ROOT, LocalStorage
from workbench.runs.writer import open_writer


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
    attributes = zarr.open_group(str(run)).attrs
    attributes["schema"] = 2
    del attributes["digest"]


def write_hostile_run(path: Path, text: str) -> None:
    """Write a run of which every text is this one: of sequences, messages, checkpoint and provenance."""
    layout = plan_units(LENGTHS, 1024)
    wanted = job(layout)
    n = len(LENGTHS)
    sequences = wanted["sequences"]
    meta = json.dumps({"task": text, "domain": text, text: text})
    wanted["sequences"] = sequences.assign(
        id=[f"{text}{i}" for i in range(n)],
        prompt_id=[f"{text}{p}" for p in sequences["prompt_id"]],
        answer=text,
        meta=[meta] * n,
        notes=text,
    )
    columns = ("role", "author", "channel", "recipient", "content_type", "closed_by", "flags")
    wanted["messages"] = wanted["messages"].assign(content=0, stop=1, **dict.fromkeys(columns, text))
    wanted["checkpoint"] = {"digest": text, "name": text}
    wanted["model"] = wanted["model"] | {"model_type": text, "name": text}
    software = {"workbench": text, text: text}
    told = {"command": text, "started": text, "host": text, "software": software, "device": text, "harmony": text}
    wanted["provenance"] |= told | {"rejects": [{"line": 1, "id": text, "reason": text}]}
    with open_writer(path, **wanted) as writer:
        for index in writer.pending():
            write_unit(writer, index)
        writer.finish()
