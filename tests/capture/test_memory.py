"""The memory of a job does not grow with its length."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import resource, sys, torch
import workbench as wb
torch.set_num_threads(1)
model = wb.load("nano", dtype=torch.float32)
record, unit_tokens = ["routing", "sinks", "resid_post"], int(sys.argv[3])
wb.capture(model, sys.argv[1], sys.argv[2], record=record, unit_tokens=unit_tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path: Path, rows: list[dict[str, Any]], times: int, unit_tokens: int) -> int:
    """KiB at the most, of a job of its own over this many copies of the transcripts."""
    file = path / f"{times}.jsonl"
    file.write_text("".join(json.dumps(row | {"id": f"{row['id']}/{i}"}) + "\n" for i in range(times) for row in rows))
    command = [sys.executable, "-c", CHILD, str(file), str(path / f"{times}.zarr"), str(unit_tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_job_ten_times_as_long_takes_no_more_memory(rows: list[dict[str, Any]], tmp_path: Path, long: bool) -> None:
    """Jobs of about 5 and 50 units."""
    times, unit_tokens = (8, 4096) if long else (4, 2048)
    once, ten_times = (peak(tmp_path, rows, n, unit_tokens) for n in (times, 10 * times))
    print(once, ten_times)
    assert ten_times < 1.1 * once, (once, ten_times)
