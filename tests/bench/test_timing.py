"""The clock measures the GPU and not Python, on a simulated GPU with a timeline of its own."""

from collections.abc import Callable

import pytest
import torch

from workbench.bench import timing
from workbench.bench.timing import Clock

FLUSH_S = 170e-6


class Gpu:
    """Host time and GPU time in seconds. The host returns from a launch before the GPU has run it."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.launches = 0

    def work(self, host_s: float, gpu_s: float) -> None:
        self.host += host_s
        self.gpu = max(self.gpu, self.host) + gpu_s
        self.launches += 1

    def synchronize(self, device: object = None) -> None:
        self.host = max(self.host, self.gpu)


class Event:
    """A CUDA event on the simulated timeline."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def record(self) -> None:
        self.at = max(self._gpu.gpu, self._gpu.host)

    def synchronize(self) -> None:
        self._gpu.synchronize()

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


class Flush:
    """Stands for the tensor whose writing evicts the L2 cache."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def zero_(self) -> None:
        self._gpu.work(5e-6, FLUSH_S)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(simulated))
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: simulated.work(5e-6, cycles / 2e9))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: simulated.host)
    return simulated


@pytest.fixture
def clock(gpu: Gpu) -> Clock:
    made = Clock(torch.device("cpu"), repeats=20)
    made.device, made._flush = torch.device("cuda"), Flush(gpu)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("host_s", [20e-6, 400e-6])  # less and more than a flush takes
@pytest.mark.parametrize("gpu_s", [4e-6, 3e-3])
def test_a_launch_takes_what_the_gpu_takes(clock: Clock, gpu: Gpu, host_s: float, gpu_s: float) -> None:
    def launch() -> None:
        gpu.work(host_s, gpu_s)

    assert clock(launch) == pytest.approx(gpu_s, rel=1e-3)
    gpu.synchronize()
    if host_s > FLUSH_S:  # the negative control: one launch between two events, without a wait for the queue
        assert one_event_pair_a_launch(clock, launch, gpu) > gpu_s + 0.5 * (host_s - FLUSH_S)


def one_event_pair_a_launch(clock: Clock, launch: Callable[[], None], gpu: Gpu) -> float:
    start, end = Event(gpu), Event(gpu)
    clock._flush.zero_()
    start.record()
    launch()
    end.record()
    return start.elapsed_time(end) / 1e3


def test_what_compiles_in_the_first_launches_does_not_count(clock: Clock, gpu: Gpu) -> None:
    def launch() -> None:
        gpu.work(20e-6, 1.0 if gpu.launches < 2 else 50e-6)

    assert clock(launch) == pytest.approx(50e-6, rel=1e-3)
    assert gpu.launches > 3 * 2 * clock.repeats


def test_a_launch_that_waits_for_the_gpu_is_reported(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("out of memory")

    assert clock.synchronises(waits)
    assert not clock.synchronises(lambda: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        clock.synchronises(fails)
    assert modes == ["error", 0] * 3
