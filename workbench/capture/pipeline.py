"""Compute units one after another, while threads compress and write the ones before.

Memory is bounded by the buffers: there are as many as units in flight, and the model waits for a free one. The buffers
of a unit are reused only after it is written.
"""

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from workbench.capture.compute import Computed, compute
from workbench.capture.record_buffers import Buffers
from workbench.harmony.transcripts import Transcript
from workbench.model.config import Config
from workbench.model.transformer import GptOss
from workbench.runs.schema import Layout, Spec
from workbench.runs.writer import RunWriter

IN_FLIGHT = 2  # units: one computed, one written; a third waits longer than it helps
Done = Callable[[Computed, float], None]


def buffers_for(spec: Spec, cfg: Config, layout: Layout, units: Sequence[int], *, pinned: bool) -> Buffers:
    """Return buffers that hold the largest of these units."""
    fullest = max(sum(layout.lengths[s] for s in layout.units[u].sequences) for u in units)
    return Buffers(spec, cfg, fullest, pinned=pinned)


def run(
    model: GptOss,
    rows: Sequence[Transcript],
    spec: Spec,
    writer: RunWriter,
    units: Sequence[int],
    *,
    check: Callable[[], None],
    done: Done,
    in_flight: int = IN_FLIGHT,
) -> None:
    """Compute and write these units. `check` may raise between passes; `done` is called for each committed unit.

    On any failure, units that are being written are finished, and the first failure is raised.
    """
    if not units:
        return
    free: queue.Queue[Buffers] = queue.Queue()
    for _ in range(min(in_flight, len(units))):
        free.put(buffers_for(spec, model.cfg, writer.layout, units, pinned=model.device.type == "cuda"))
    written: list[Future[None]] = []

    def write(computed: Computed, buffers: Buffers, begun: float) -> None:
        try:
            summaries = computed.summarised(model.cfg.num_experts)
            writer.write_unit(computed.unit.index, computed.tokens, computed.records, summaries)
            done(computed, time.monotonic() - begun)
        finally:
            free.put(buffers)

    with ThreadPoolExecutor(in_flight, thread_name_prefix="write") as pool:
        try:
            for index in units:
                buffers = free.get()
                _raise_first(written)
                begun = time.monotonic()
                computed = compute(model, writer.layout.units[index], rows, spec, buffers, check)
                written.append(pool.submit(write, computed, buffers, begun))
        finally:
            pool.shutdown(wait=True)
        _raise_first(written)


def _raise_first(written: list[Future[None]]) -> None:
    """Raise the error of a finished write, and drop the writes that succeeded."""
    for future in [f for f in written if f.done()]:
        future.result()
        written.remove(future)
