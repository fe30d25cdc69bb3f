"""`bench dashboard` measures every page of a run in a browser; it takes a minute, so it runs with --long."""

from pathlib import Path

import pytest

from workbench.bench import dashboard


@pytest.mark.long
def test_every_page_is_measured(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = dashboard.run(str(demo_run), rounds=1, sessions=2)
    assert result
    assert "the server's peak" in capsys.readouterr().out
    assert dashboard._peak(1) >= 0
