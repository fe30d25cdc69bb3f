"""Seconds on a device, and the two limits of a card, measured on the card itself."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Launch = Callable[[], object]


class Clock:
    """Medians of repeated launches: CUDA events and a cold L2 cache on a GPU, wall-clock time elsewhere.

    The first two launches compile and warm up, and do not count.
    """

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self.device, self.repeats = device, repeats
        # Larger than any L2 cache yet: writing it evicts what the last launch left there.
        self._flush = torch.empty(2**29 if self.on_gpu else 0, dtype=torch.uint8, device=device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def __call__(self, launch: Launch) -> float:
        """Seconds of one launch."""
        for _ in range(2):
            launch()
        return statistics.median(self._event(launch) if self.on_gpu else _wall(launch) for _ in range(self.repeats))

    def _event(self, launch: Launch) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _wall(launch: Launch) -> float:
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


class Limits(NamedTuple):
    """What a card can do at most: bytes a second, and flops a second in dense bfloat16 products."""

    bandwidth: float
    flops: float

    def seconds(self, bytes: float, flops: float) -> float:
        """The least time that this much work takes."""
        return max(bytes / self.bandwidth, flops / self.flops)


def limits(clock: Clock) -> Limits:
    """A plain copy's bytes (read and written) and a plain product's flops, a second."""
    n, size = (8192, 2**30) if clock.on_gpu else (256, 2**22)
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    goal = torch.empty_like(source)
    a = torch.randn(n, n, device=clock.device, dtype=torch.bfloat16)
    return Limits(2 * size / clock(lambda: goal.copy_(source)), 2 * n**3 / clock(lambda: a @ a))
