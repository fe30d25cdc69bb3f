"""How long each study of a run takes: a run of ten million tokens, such as `bench reading` writes."""

import time
from typing import Any

from workbench import registry
from workbench.bench.table import processor, show
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.runs import open_run
from workbench.studies import run_study


def measure(path: str) -> dict[str, Any]:
    """Return wall and processor seconds of every study that the run has what it needs for, each on a run opened anew.

    Studies of two runs compare the run with itself. Those that lack a record are listed with the reason.
    """
    run = open_run(path)
    tokens = int(run.sequences["length"].sum())
    rows, left_out = [], {}
    for record in registry.studies():
        runs = [open_run(path) for _ in range(record.runs)]
        wall, processor_seconds = time.perf_counter(), time.process_time()
        try:
            results = run_study(record.name, *runs)
        except InputError as error:
            left_out[record.name] = str(error)
            continue
        rows.append(
            {
                "study": record.name,
                "seconds": time.perf_counter() - wall,
                "processor_seconds": time.process_time() - processor_seconds,
                "datasets": len(results),
            }
        )
    heading = f"{tokens:,} tokens of {count_of(len(run.sequences), 'sequence')}, {processor()}"
    cells = [
        (str(r["study"]), f"{r['seconds']:.1f}", f"{r['processor_seconds']:.1f}", str(r["datasets"])) for r in rows
    ]
    show(heading, ("study", "seconds", "processor seconds", "datasets"), cells)
    for name, reason in left_out.items():
        print(f"{name}: left out, as {reason}")
    return {"tokens": tokens, "sequences": len(run.sequences), "processor": processor(), "studies": rows}
