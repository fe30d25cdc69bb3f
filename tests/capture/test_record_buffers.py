"""Records of a model on GPUs are copied on a stream of the GPU that holds them, and all copies are awaited.

The GPUs are simulated (`tests.model.fake_gpus`): a copy is carried out only once its own stream is synchronised.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests.model.fake_gpus import Machine, Stream
from workbench.capture import job
from workbench.capture.record_buffers import Buffers
from workbench.kernels import mxfp4
from workbench.model.transformer import GptOss
from workbench.runs import Run

RECORD = ["routing", "sinks", "resid_post"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    there = Machine()
    there.pretend(monkeypatch, devices=2)
    mxfp4._table.cache_clear()
    with there:
        yield there
    mxfp4._table.cache_clear()


@pytest.fixture(scope="module")
def few(transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "transcripts.jsonl"
    path.write_text("".join(line + "\n" for line in transcripts.read_text().splitlines()[:12]))
    return path


@pytest.fixture(scope="module")
def expected(nano: GptOss, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return wb.capture(nano, few, tmp_path_factory.mktemp("cpu") / "run", record=RECORD, unit_tokens=1024)


def capture_on(device: str, transcripts: Path, path: Path) -> Run:
    model = wb.load("nano", device=device, dtype=torch.float32)
    return wb.capture(model, transcripts, path, record=RECORD, unit_tokens=1024)


def same(a: Run, b: Run) -> bool:
    """Whether two runs agree up to rounding: models on CPUs and on simulated GPUs add in different orders."""
    names = ("experts", "gates", "sink", "hook_resid_post")
    pairs = [(np.asarray(a.dataset[name], np.float64), np.asarray(b.dataset[name], np.float64)) for name in names]
    return all(np.allclose(x, y, rtol=2**-6, atol=2**-8) for x, y in pairs)


@pytest.mark.parametrize(("device", "used"), [("cuda:1", {"cuda:1"}), ("cuda:0,cuda:1", {"cuda:0", "cuda:1"})])
def test_every_gpu_copies_on_its_own_stream(
    device: str, used: set[str], machine: Machine, expected: Run, few: Path, tmp_path: Path
) -> None:
    run = capture_on(device, few, tmp_path / "run")
    assert same(run, expected)
    assert {where for what, where in machine.events if what == "copy"} == used
    last = {(what, where): i for i, (what, where) in enumerate(machine.events)}
    for where in used:
        assert last["wait", where] < last["copy", where] < last["synchronize", where]


def test_one_stream_of_the_current_device_would_store_wrong_values(
    machine: Machine, expected: Run, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: copies from cuda:1 are not ordered by a stream of cuda:0, nor awaited through it."""

    def one_stream(self: Buffers, device: torch.device) -> Stream:
        return self._streams.setdefault(torch.device("cuda", 0), torch.cuda.Stream())  # type: ignore[return-value]

    monkeypatch.setattr(Buffers, "_stream", one_stream)
    assert not same(capture_on("cuda:0,cuda:1", few, tmp_path / "both"), expected)


def test_the_plan_counts_whole_powers_of_two_for_pinned_buffers(
    machine: Machine, nano: GptOss, few: Path, tmp_path: Path
) -> None:
    """As PyTorch's allocator of pinned memory rounds up; the columns of the token table are not pinned."""
    options = {"record": RECORD, "unit_tokens": 1024}
    on_cpu = job.dry_run(nano, few, tmp_path / "run", **options)
    on_gpu = job.dry_run(wb.load("nano", device="cuda", dtype=torch.float32), few, tmp_path / "run", **options)
    tokens, per_token = on_cpu.tokens, on_cpu.per_token
    assert on_cpu.memory_bytes == tokens * sum(per_token.values())
    routing = [tokens * per_token["routing"] * share // 3 for share in (1, 2)]  # a byte an index, two a gate weight
    pinned = [*routing, tokens * per_token["sinks"], tokens * per_token["hook_resid_post"]]
    rounded = [2 ** math.ceil(math.log2(size)) for size in pinned]
    assert rounded != pinned
    assert on_gpu.memory_bytes == tokens * per_token["tokens"] + sum(rounded)
