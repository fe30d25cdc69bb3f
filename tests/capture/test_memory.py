"""The memory of a job does not grow with its length."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import sys, torch
import workbench as wb
from workbench.bench.worker import peak_bytes
from workbench.capture import pipeline
torch.set_num_threads(1)
model = wb.load("nano", dtype=torch.float32)
record, unit_tokens = ["routing", "resid_post", "resid_mid", "attn_out", "mlp_out"], int(sys.argv[3])
if sys.argv[4] == "broken":  # the records of every unit stay in memory
    compute, records = pipeline.compute, []
    def keep_records(*arguments):
        computed = compute(*arguments)
        records.append({name: values.copy() for name, values in computed.records.items()})
        return computed
    pipeline.compute = keep_records
wb.capture(model, sys.argv[1], sys.argv[2], record=record, unit_tokens=unit_tokens)
print(peak_bytes())
"""


def peak(path: Path, rows: list[dict[str, Any]], times: int, unit_tokens: int, pipeline: str = "ours") -> int:
    """Bytes at the most, of a job of its own over this many copies of the transcripts; pipeline: "ours" or "broken"."""
    file = path / f"{times}.jsonl"
    file.write_text("".join(json.dumps(row | {"id": f"{row['id']}/{i}"}) + "\n" for i in range(times) for row in rows))
    run = str(path / f"{times}-{pipeline}.zarr")
    command = [sys.executable, "-c", CHILD, str(file), run, str(unit_tokens), pipeline]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def grows(once: int, ten_times: int) -> bool:
    """Whether a job ten times as long took more memory; a tenth more may be the allocator's."""
    return ten_times > 1.1 * once


@pytest.mark.slow
def test_a_job_ten_times_as_long_takes_no_more_memory(rows: list[dict[str, Any]], tmp_path: Path, long: bool) -> None:
    """Jobs of about 5 and 50 units; as a negative control, one of 25 units that keeps what it recorded."""
    times, unit_tokens = (8, 4096) if long else (2, 1024)
    once, ten_times = (peak(tmp_path, rows, n, unit_tokens) for n in (times, 10 * times))
    assert not grows(once, ten_times), (once, ten_times)
    broken = peak(tmp_path, rows, 5 * times, unit_tokens, "broken")
    assert grows(once, broken), (once, broken)
