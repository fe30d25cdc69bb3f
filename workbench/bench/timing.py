"""Seconds on a device, and the two limits of a card, measured on the card itself."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Launch = Callable[[], object]


_ROUNDS = 3
_WARM_UP = 2
_CYCLES_PER_S = 2e9  # of a GPU's clock, at most; the wait is a little longer where it is slower
_LONGEST_WAIT_S = 0.5


class Clock:
    """Median seconds of a launch, with a cold L2 cache on a GPU.

    On a GPU one pair of events encloses `repeats` launches, each after a write that evicts the L2 cache; the same
    writes alone are timed and subtracted. Before each pair the GPU is made to wait until everything is queued:
    otherwise the events of a short kernel would measure how fast Python launches it. Elsewhere wall-clock time is
    taken. The first launches compile and warm up, and do not count.
    """

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self.device, self.repeats = device, repeats
        # Larger than any L2 cache yet: writing it evicts what the last launch left there.
        self._flush = torch.empty(2**29 if self.on_gpu else 0, dtype=torch.uint8, device=device)

    @property
    def launches(self) -> int:
        """Return how often a launch is started, at most, to be timed."""
        return _WARM_UP + 1 + _ROUNDS * self.repeats

    @property
    def on_gpu(self) -> bool:
        """Return whether launches are timed with events."""
        return self.device.type == "cuda"

    def __call__(self, launch: Launch) -> float:
        """Return the seconds of one launch."""
        for _ in range(_WARM_UP):
            launch()
        if not self.on_gpu:
            return statistics.median(_wall(launch) for _ in range(self.repeats))
        torch.cuda.synchronize(self.device)
        host_s = _wall(launch) + _wall(self._flush.zero_)
        return statistics.median(self._difference(launch, host_s) for _ in range(_ROUNDS))

    def synchronises(self, launch: Launch) -> bool:
        """Return whether a launch makes the host wait for the GPU, which no timing of the GPU alone can show."""
        if not self.on_gpu:
            return False
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return False

    def _difference(self, launch: Launch, host_s: float) -> float:
        """Return the seconds of one launch: of flushes with launches, less those of the flushes alone."""

        def flushed() -> None:
            self._flush.zero_()
            launch()

        with_launches, alone = self._pair(flushed, host_s), self._pair(self._flush.zero_, host_s)
        return max(with_launches - alone, 1e-9) / self.repeats

    def _pair(self, launch: Launch, host_s: float) -> float:
        """Return the seconds between two events around `repeats` launches that were all queued beforehand."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(min(2 * host_s * self.repeats, _LONGEST_WAIT_S) * _CYCLES_PER_S))
        start.record()
        for _ in range(self.repeats):
            launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _wall(launch: Launch) -> float:
    """Return the seconds that the host takes to launch; on a CPU, those of the computation."""
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


class Limits(NamedTuple):
    """What a card can do at most: bytes a second, and flops a second in dense bfloat16 products."""

    bandwidth: float
    flops: float

    def seconds(self, bytes: float, flops: float) -> float:
        """Return the least time that this much work takes."""
        return max(bytes / self.bandwidth, flops / self.flops)


def limits(clock: Clock) -> Limits:
    """Return a plain copy's bytes (read and written) and a plain product's flops, a second."""
    n, size = (8192, 2**30) if clock.on_gpu else (256, 2**22)
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    goal = torch.empty_like(source)
    a = torch.randn(n, n, device=clock.device, dtype=torch.bfloat16)
    return Limits(2 * size / clock(lambda: goal.copy_(source)), 2 * n**3 / clock(lambda: a @ a))
