"""The full-size run, on a small model: it does its three parts, counts memory in two ways, and holds the limit."""

from dataclasses import replace
from pathlib import Path

import pytest

from workbench.bench import full
from workbench.errors import JobError
from workbench.model.config import PUBLISHED
from workbench.model.export import save_random

CFG = replace(
    PUBLISHED["20b"],
    n_layers=2,
    windows=(128, None),
    d_model=64,
    d_mlp=64,
    n_heads=4,
    n_key_value_heads=2,
    d_head=16,
    num_experts=8,
    d_vocab=72,
)


def test_a_model_loads_generates_and_captures_below_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    result = full.run(cfg=CFG, tokens=100, new=3)
    assert all(result[f"{part}_s"] > 0 for part in ("made", "load", "generate", "capture"))
    assert 5e7 < result["own_bytes"] < result["peak_bytes"] < 4e9
    assert result["gpu_bytes"] is None
    assert "the checkpoint's pages included" in capsys.readouterr().out


def test_a_peak_above_the_limit_is_an_error(tmp_path: Path) -> None:
    checkpoint = save_random(tmp_path / "small", CFG)
    with pytest.raises(JobError, match=r"is not below 0\.10 GB"):
        full.run(checkpoint, tokens=20, new=1, limit=10**8)


def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="ended with 1"):
        full.run(tmp_path / "nothing")
