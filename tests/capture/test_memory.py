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
wb.capture(model, sys.argv[1], sys.argv[2], record=["routing", "sinks", "resid_post"], unit_tokens=4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path: Path, rows: list[dict[str, Any]], times: int) -> int:
    """KiB at the most, of a job of its own over so many copies of the transcripts."""
    file = path / f"{times}.jsonl"
    file.write_text("".join(json.dumps(row | {"id": f"{row['id']}/{i}"}) + "\n" for i in range(times) for row in rows))
    command = [sys.executable, "-c", CHILD, str(file), str(path / f"{times}.zarr")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_job_ten_times_as_long_takes_no_more_memory(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    short, long = (peak(tmp_path, rows, times) for times in (8, 80))
    print(short, long)
    assert long < 1.1 * short, (short, long)
