"""The CPU benchmark runs whole, on a small model, and says what it measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from workbench.bench import cpu, decode
from workbench.bench.worker import Worker
from workbench.errors import JobError
from workbench.kernels import cpu as kernels
from workbench.model.export import save_random


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = replace(cpu.CFG, d_model=64, d_mlp=64, n_heads=4, n_key_value_heads=2, d_head=16, num_experts=8)
    return save_random(tmp_path_factory.mktemp("bench") / "small", small)


def test_every_model_is_timed_at_every_length(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = cpu.run([200, 50], rounds=2, threads=1, checkpoint=checkpoint, long=300)
    assert [row["tokens"] for row in result["lengths"]] == [50, 200]
    assert set(result["load_s"]) == {"workbench", "transformers"}
    for row in result["lengths"]:
        assert 0 < row["workbench_s"] < 30
        assert 5e7 < row["workbench_bytes"] < 4e9
        assert row["speed_beside_transformers"] == pytest.approx(row["transformers_s"] / row["workbench_s"], rel=1)
        assert row["recording"] > -1
    table = capsys.readouterr().out
    assert "50" in table
    assert "1 threads" in table
    assert result["long"]["tokens"] == 300
    assert "300 tokens, recorded" in table


def test_decoding_is_timed_with_both_kernels(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kernels.unavailable():
        pytest.skip("no compiled kernels here")
    result = decode.run(checkpoint, rounds=1, threads=1)
    assert [row["batch"] for row in result["decode"]] == [1, 8]
    for row in result["decode"]:
        ratio = row["compiled_tokens_per_s"] / row["torch_tokens_per_s"]
        assert row["speed_beside_torch"] == pytest.approx(ratio)
    assert "batch 8:" in capsys.readouterr().out


def test_a_worker_that_cannot_load_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the workbench process ended"):
        Worker("workbench", tmp_path / "nothing", threads=1)
