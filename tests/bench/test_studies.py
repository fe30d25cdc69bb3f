"""`bench studies` times every study that a run has records for, and names the others with the reason."""

from pathlib import Path

import pytest

from workbench import registry
from workbench.bench.studies import measure
from workbench.errors import InputError

DEMO = Path(__file__).parents[2] / "data" / "demo.zarr"


def test_every_study_is_timed_or_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []

    def run_study(name: str, *runs: object) -> dict[str, object]:
        calls.append((name, len(runs)))
        if name == "sinks":
            raise InputError("sinks needs a run that recorded sinks")
        return {"one": object()}

    monkeypatch.setattr("workbench.bench.studies.run_study", run_study)
    result = measure(str(DEMO))
    printed = capsys.readouterr().out
    assert calls == [(study.name, study.runs) for study in registry.studies()]
    assert [row["study"] for row in result["studies"]] == [name for name, _ in calls if name != "sinks"]
    assert all(row["seconds"] >= 0 and row["datasets"] == 1 for row in result["studies"])
    assert "sinks: left out, as sinks needs a run that recorded sinks" in printed
    assert result["tokens"] == 34_641
    assert "34,641 tokens" in printed
