"""Damage to every kind of record is found by `verify`, as that to the quantities of `tests/runs/test_damage.py`."""

import json
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.runs.test_damage import DAMAGES, damaged, values, wrong
from workbench.model.transformer import GptOss
from workbench.runs.verify import verify

RECORD: list[Any] = [
    "routing",
    "sinks",
    "router_logits layers=0-1 channel=final",
    "resid_post:1 every=2",
    "mlp_out reduce=norm",
    "attn_out:2 reduce=moments sketch=4",
    "resid_mid:0 reduce=message",
    "resid_pre:3 reduce=mean",
    wb.Recorder("expert_norm", hook="mlp.experts.hook_out", reduce=lambda values: values.norm(dim=-1), dims=("slot",)),
]


@pytest.fixture(scope="module")
def intact(nano: GptOss, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    wb.capture(nano, folder / "transcripts.jsonl", folder / "run", record=RECORD, unit_tokens=1024)
    return folder / "run"


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_to_records_is_found(intact: Path, tmp_path: Path, damage: str, long: bool) -> None:
    want, path = values(wb.open_run(intact)), tmp_path / "run"
    missed, silent = [], {}
    for number, file in enumerate(damaged(intact, path, damage, 1 if long else 12)):
        if not verify(path):
            missed.append(str(file))
        if (long or number % 4 == 0) and (names := wrong(path, want)):
            silent[str(file)] = names
    assert not missed
    assert not silent
    assert verify(path) == []
