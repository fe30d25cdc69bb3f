"""nano, and forty transcripts of unequal length, written without generating."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.model.transformer import GptOss


@pytest.fixture(scope="session")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Prompts with an analysis and their answers as last messages."""
    prompts = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    return [
        {
            "id": f"{p['id']}/{effort}",
            "prompt_id": p["id"],
            "effort": effort,
            "messages": [
                *p["messages"],
                {"role": "assistant", "channel": "analysis", "content": "1+2=3;" * (3 if effort == "high" else 1)},
                {"role": "assistant", "channel": "final", "content": p["expected"]},
            ],
            "expected": p["expected"],
            "correct": True,
            "meta": p["meta"],
        }
        for p in prompts[::10]
        for effort in ("low", "high")
    ]


@pytest.fixture(scope="session")
def transcripts(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "transcripts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, bytes]]:
    """Every byte of a run but the root's attributes, which tell when and by which process it was begun."""

    def read(path: Path) -> dict[str, bytes]:
        files = (p for p in sorted(path.rglob("*")) if p.is_file() and p != path / "zarr.json")
        return {str(p.relative_to(path)): p.read_bytes() for p in files}

    return read
