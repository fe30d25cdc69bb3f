"""What a capture records does not depend on what else it records: the same bits, in bfloat16."""

from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests.model.test_attention import materialized_when_hooked
from workbench.model import load
from workbench.model.attention import Attention
from workbench.model.transformer import GptOss

MORE = ["routing", "router_logits", "sinks", "resid_post", "attn.z:0", "attn.result:0", "mlp.experts.post:1"]


@pytest.fixture(scope="module")
def half() -> GptOss:
    return load("nano", device="cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def few(transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "transcripts.jsonl"
    path.write_text("".join(line + "\n" for line in transcripts.read_text().splitlines()[:12]))
    return path


def check_routing_is_the_same(model: GptOss, transcripts: Path, folder: Path, more: list[str]) -> None:
    runs = [
        wb.capture(model, transcripts, folder / f"{i}.zarr", record=record).dataset
        for i, record in enumerate((["routing"], more))
    ]
    for name in ("experts", "gates"):
        a, b = (run[name].values for run in runs)
        assert np.array_equal(a, b), name


def test_recording_more_changes_no_recorded_bit(half: GptOss, few: Path, tmp_path: Path) -> None:
    check_routing_is_the_same(half, few, tmp_path, MORE)


def test_another_path_when_recorded_fails(
    half: GptOss, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: reading attention scores switches to a path that rounds elsewhere."""
    monkeypatch.setattr(Attention, "_attend", materialized_when_hooked)
    reading = [(f"blocks.{layer}.attn.hook_attn_scores", lambda t, hook: None) for layer in range(half.cfg.n_layers)]
    plain = wb.capture(half, few, tmp_path / "plain.zarr", record=["routing"]).dataset
    with half.hooks(fwd_hooks=reading):
        read = wb.capture(half, few, tmp_path / "read.zarr", record=["routing"]).dataset
    assert not np.array_equal(plain["gates"].values, read["gates"].values)
