"""`bench capture` times the forward pass, captures of several records, and names the tools that are not installed."""

from pathlib import Path

import pytest
import torch

from workbench.bench import capture
from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.formats.gguf_writer import write_gguf


def test_every_way_is_timed_and_missing_tools_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: object) -> None:
        raise ImportError("no such tool")

    monkeypatch.setattr(capture, "_bridge", absent)
    monkeypatch.setattr(capture, "_nnsight", absent)
    result = capture.run("nano", tokens=32, rounds=1, dtype=torch.float32)
    assert len(result["ways"]) >= 3
    assert all(row["tokens_per_s"] > 0 for row in result["ways"])
    assert set(result["missing"].values()) == {"not installed (no such tool)"}
    assert len(result["missing"]) == 2
    assert capsys.readouterr().out.count("not installed (no such tool)") == 2


def test_other_tools_are_left_out_for_what_they_do_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(open_checkpoint(BUNDLED["nano"]), tmp_path / "nano.gguf")
    result = capture.run(str(path), tokens=8, rounds=1, dtype=torch.float32)
    assert len(result["ways"]) == 3
    assert capsys.readouterr().out.count("reads folders in the Hugging Face layout only") == 2
