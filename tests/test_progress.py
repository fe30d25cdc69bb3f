"""Progress away from a terminal is plain lines on standard error, the last one with the total."""

import pytest

from workbench.progress import progress


def test_the_last_line_has_the_total_and_earlier_ones_wait(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("capture", 3, "units") as advance:
        advance(1)
        assert capsys.readouterr().err == "", "lines are ten seconds apart"
        advance(2, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("capture: 3 of 3 units, ")
    assert "MB/s" in err
    assert "left" not in err


def test_a_detail_takes_the_place_of_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("study", 1, "units", detail=lambda: "permutation 7 of 99") as advance:
        advance(1)
    assert capsys.readouterr().err == "study: 1 of 1 unit, permutation 7 of 99\n"
