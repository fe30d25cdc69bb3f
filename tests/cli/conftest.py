"""A folder with one small input of each kind: a run, transcripts and prompts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from tests.conftest import DATA
from workbench.experiments import graph_export
from workbench.research.recipe import Recipe

PROMPTS = (DATA / "prompts.jsonl").read_text().splitlines()[:6]


def transcript_rows() -> list[dict[str, object]]:
    prompts = [json.loads(line) for line in PROMPTS]
    return [
        {
            "id": f"{p['id']}/{effort}",
            "prompt_id": p["id"],
            "effort": effort,
            "messages": [
                *p["messages"],
                {"role": "assistant", "channel": "analysis", "content": "1+2=3;" * (1 + (effort == "high"))},
                {"role": "assistant", "channel": "final", "content": p["expected"]},
            ],
            "expected": p["expected"],
            "correct": True,
        }
        for p in prompts
        for effort in ("low", "high")
    ]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only; `workplace` is a copy."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.jsonl").write_text("\n".join(PROMPTS[:2]) + "\n")
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in transcript_rows()))
    (folder / "recipe.json").write_text(Recipe(user="2+2=", max_new_tokens=2).to_json())
    model = wb.load("nano", dtype=torch.float32)
    write_sae(folder / "sae", model.cfg.d_model)
    record = ["routing", "sinks", "logprobs", "resid_post:1", f"features:{folder / 'sae'}"]
    graph_export.write_json(model, wb.experiments.graph(model, "2+2=", max_nodes=30), folder / "graph.json")
    wb.capture(model, folder / "transcripts.jsonl", folder / "run.zarr", record=record, unit_tokens=1024)
    (folder / "run.zarr.log").unlink()
    return folder


@pytest.fixture
def workplace(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a command, with a copy of the inputs."""
    shutil.copytree(inputs, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
