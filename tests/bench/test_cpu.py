"""The CPU benchmark runs whole, on a small model, and states what it measured."""

import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workbench.bench import cpu, decode
from workbench.bench.worker import Worker, overheads
from workbench.errors import JobError
from workbench.kernels import cpu as kernels
from workbench.model import load
from workbench.model.export import save_random

PACKED = tuple(f"{matrix}.{part}" for matrix in ("gate_up", "down") for part in ("blocks", "scales"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = replace(cpu.CFG, d_model=64, d_mlp=64, n_heads=4, n_key_value_heads=2, d_head=16, num_experts=8)
    return save_random(tmp_path_factory.mktemp("bench") / "small", small)


def test_every_model_is_timed_at_every_length(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = cpu.run([200, 50], rounds=1, threads=1, checkpoint=checkpoint, long=300)
    assert [row["tokens"] for row in result["lengths"]] == [50, 200]
    assert set(result["load_s"]) == {"workbench", "transformers"}
    for row in result["lengths"]:
        assert row["workbench_s"] > 0
        assert 5e7 < row["workbench_bytes"] < 4e9
        assert row["speed_beside_transformers"] == pytest.approx(row["transformers_s"] / row["workbench_s"])
        assert row["recording"] > -1
    table = capsys.readouterr().out
    assert "50" in table
    assert "1 threads" in table
    assert result["long"]["tokens"] == 300
    assert "300 tokens, recorded" in table


def test_a_slow_minute_of_both_does_not_change_their_ratio() -> None:
    seconds = {("workbench", 50): [1.0, 10.0, 1.0], ("transformers", 50): [2.0, 20.0, 3.0]}
    memory = {("workbench", 50): 1e9, ("transformers", 50): 2e9}
    row = cpu._compare(50, seconds, [1.1, 0.9, 1.3], memory, ["transformers"])
    assert row["speed_beside_transformers"] == 2
    assert row["recording"] == pytest.approx(0.1)
    assert row["transformers_s"] / row["workbench_s"] == 3, "negative control: the ratio of the medians"


def test_a_machine_that_becomes_slower_does_not_change_what_hooks_cost() -> None:
    passes: list[str] = []

    def run(path: str) -> float:
        passes.append(path)
        return {"plain": 1.0, "recorded": 1.05, "edited": 1.1}[path] * 1.02 ** len(passes)

    ratios = overheads(run, ("recorded", "edited"), 8)
    assert statistics.median(ratios["recorded"]) == pytest.approx(1.05, abs=0.001)
    assert statistics.median(ratios["edited"]) == pytest.approx(1.1, abs=0.002)
    assert {passes.count(path) for path in ("plain", "recorded", "edited")} == {8}
    always_last = statistics.median(r for turn, r in enumerate(ratios["edited"]) if turn % 2)
    assert always_last == pytest.approx(1.1 * 1.02**2), "negative control: an order that never changes"


def test_decoding_is_timed_beside_every_baseline(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.unavailable():
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(decode, "_SPEED_BYTES", 2**20)
    result = decode.measure(checkpoint, 1, 1, contexts=(20,), baselines=("torch", "transformers"))
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [(1, 20), (8, 20)]
    for row in result["decode"]:
        assert row["speed_beside_torch"] == pytest.approx(row["tokens_per_s"] / row["torch_tokens_per_s"])
        assert row["recorded"] > -1
        assert row["edited"] > -1
        assert row["of_memory_speed"] > 0
    assert f"| 8 | 20 | {result['decode'][1]['tokens_per_s']:.1f} |" in decode.table(result)


def test_the_bytes_of_a_step_are_those_of_the_weights_it_reads(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu")
    cfg = model.cfg
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("bias")]
    plain = 2 * sum(p.numel() for p in matrices if p is not model.embed.weight)
    packed = sum(block.mlp.experts.get_buffer(name).numel() for block in model.blocks for name in PACKED)
    assert decode.bytes_read(cfg, 1, 0, cfg.num_experts) == plain + packed
    # The first layer sees a window of 128 keys.
    keys = 4 * cfg.n_key_value_heads * cfg.d_head
    assert decode.bytes_read(cfg, 3, 1000, 0) - decode.bytes_read(cfg, 3, 0, 0) == 3 * (128 + 1000) * keys


def test_a_decoder_continues_the_same_prompt_in_every_row(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    watching = [("unembed.hook_out", lambda logits, hook: seen.append(logits[:, -1]))]
    decoder = decode.Decoder(model, {"plain": lambda: model.hooks(fwd_hooks=watching)})
    with torch.no_grad():
        for _ in range(2):
            decoder(torch.tensor([[3, 5]]), 150)
        new = [int(step[1]) for step in decode.steps(torch.tensor([[3, 5]]), model.cfg.d_vocab)]
        complete = model(torch.cat([torch.arange(150), torch.tensor(new)]))[0, -1]
    assert new[0] == 5
    assert len(set(new)) == decode.STEPS, "a step that repeats a token finds its experts in the processor's cache"
    assert len(seen) == 2 * decode.STEPS
    last = seen[decode.STEPS - 1]
    assert torch.equal(last, seen[-1])
    torch.testing.assert_close(last[1], complete, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(last[0], complete, atol=1e-2)
    hits = decoder(torch.tensor([[3, 5]]), 150, "counted")["experts"]
    assert model.cfg.experts_per_token <= hits <= 2 * model.cfg.experts_per_token


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count the memory of the parent")
def test_the_memory_of_a_process_is_its_own() -> None:
    child = "from workbench.bench.worker import peak_bytes; print(peak_bytes())"
    parent = (
        "import subprocess, sys; memory = bytearray(b'1') * 600_000_000; "
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True).stdout)"
    )

    def measured(code: str) -> int:
        command = [sys.executable, "-c", parent, code]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 1e6 < measured(child) < 5e8
    inherited = "import resource; print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    assert measured(inherited) > 6e8, "negative control: what getrusage returns"


def test_a_worker_that_cannot_load_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the workbench process ended"):
        Worker("workbench", tmp_path / "nothing", threads=1)
