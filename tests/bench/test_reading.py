"""The run of random numbers that `bench reading` writes is a valid run, and its queries are all answered."""

from pathlib import Path

from workbench.bench.reading import ask, make
from workbench.runs import open_run
from workbench.runs.verify import verify


def test_the_random_run_is_valid_and_every_query_is_timed(tmp_path: Path) -> None:
    path = str(tmp_path / "random.zarr")
    make(path, 1000, seed=3)
    run = open_run(path)
    assert verify(path) == []
    assert set(run.sequences["effort"]) <= {"low", "medium", "high"}
    result = ask(path, rounds=1)
    assert result["tokens"] == int(run.sequences["length"].sum())
    names = [row["question"] for row in result["questions"]]
    assert {"open", "tables", "one conversation, all layers"} <= set(names)
    assert {f"total {name}" for name in run.summaries} <= set(names)
    chunk = max((p for p in Path(path, "routing").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert verify(path), "the negative control: damage is found"
