"""Workers load the model; the process that plans and finishes the job has its shapes only."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from tests.model.fake_gpus import Machine
from workbench.capture import cluster, job
from workbench.child_processes import python
from workbench.cli import app
from workbench.errors import InputError
from workbench.kernels import mxfp4
from workbench.model.transformer import GptOss
from workbench.runs.verify import verify


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    there = Machine()
    there.pretend(monkeypatch)
    mxfp4._table.cache_clear()
    with there:
        yield there
    mxfp4._table.cache_clear()


def test_the_parent_of_workers_puts_no_weight_on_a_gpu(
    machine: Machine, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[GptOss] = []
    capture = job.capture

    def captured(model: GptOss, *args: Any, **options: Any) -> Any:
        parents.append(model)
        return capture(model, *args, **options)

    def one_worker(task: cluster.Task, units: list[int], *, done: Any, **options: Any) -> None:
        """Compute the units in this process, as a worker would."""
        assert machine.devices == set()  # nothing has been put on a GPU before a worker has started
        for unit in units:
            done.committed(*cluster.compute_unit(task, unit))

    monkeypatch.setattr(job, "capture", captured)
    monkeypatch.setattr(cluster, "run", one_worker)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in transcripts.read_text().splitlines()[:4]))
    path = tmp_path / "run"
    try:
        result = CliRunner().invoke(app, ["capture", "nano", str(few), str(path), "--workers", "2"])
    finally:
        cluster._loaded.cache_clear()
    assert result.exit_code == 0, result.output
    assert [parent.device.type for parent in parents] == ["meta"]
    assert machine.devices == {torch.device("cuda", 0)}  # where the worker loaded it
    run = wb.open_run(path)
    assert run.provenance["device"] == "cuda"
    assert not verify(path)


def test_a_model_without_weights_is_captured_by_workers_only(
    machine: Machine, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wb.capture` of a model on the device "meta": its workers take a GPU; without workers nothing could compute."""
    tasks: list[cluster.Task] = []

    def no_worker(task: cluster.Task, *_: Any, **__: Any) -> None:
        tasks.append(task)
        raise InputError("no worker in this test")

    monkeypatch.setattr(cluster, "run", no_worker)
    model = wb.load("nano", device="meta")
    with pytest.raises(InputError, match=r"on the device 'meta' and has no weights: .* workers=2 or more"):
        wb.capture(model, transcripts, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    for device, expected in ((None, "cuda"), ("cpu", "cpu")):
        with pytest.raises(InputError, match="no worker in this test"):
            wb.capture(model, transcripts, tmp_path / f"run-{device}", workers=2, worker_device=device)
        assert tasks[-1].device == expected
    assert machine.devices == set()


def test_a_model_on_a_gpu_beside_workers_is_warned_of(
    machine: Machine,
    transcripts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_worker(*_: Any, **__: Any) -> None:
        raise InputError("no worker in this test")

    monkeypatch.setattr(cluster, "run", no_worker)
    with pytest.raises(InputError, match="no worker in this test"):
        wb.capture(wb.load("nano", device="cuda:0"), transcripts, tmp_path / "run", workers=2)
    assert "load it with device='meta'" in caplog.text


def test_workers_choose_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.worker_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cluster.worker_device("auto") == "cuda"
    for name in ("cuda:1", "cuda:0,cuda:1"):
        with pytest.raises(InputError, match=name):
            cluster.worker_device(name)


STRANGER = """
import sys
from distributed import Client
from distributed.security import Security
address, own, timeout = sys.argv[1:]
Client(address, timeout=float(timeout), security=Security.temporary() if own == "own certificate" else None).close()
print("connected")
"""


def strangers(address: str, timeout: float) -> list[str]:
    """Ways in which another process, which has no certificate of the job, comes to be connected in these seconds."""
    ways = [(address, "own certificate"), (address, "none"), (address.replace("tls://", "tcp://"), "none")]
    children = [
        subprocess.Popen(
            python("-c", STRANGER, *way, str(timeout)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for way in ways
    ]
    return [" ".join(way) for way, child in zip(ways, children, strict=True) if "connected" in child.communicate()[0]]


def test_workers_of_this_machine_admit_no_other_process(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    task = cluster.Task.of(nano, transcripts, tmp_path / "run", ["routing"], 1024, 1)
    with cluster._client(task, 1, None, lambda: None) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2]).result() == 3
        assert strangers(address, 4) == []


def test_a_scheduler_without_certificates_admits_every_process() -> None:
    """The negative control."""
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address=None, host="127.0.0.1"
    ) as open_to_all:
        assert strangers(open_to_all.scheduler_address, 60) == [f"{open_to_all.scheduler_address} none"] * 2
