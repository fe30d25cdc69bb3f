"""A long random test goes on after a failure, lists every kind of failure once, and ends in time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.fuzzing import cases


def test_a_long_test_lists_all_failures(capsys: pytest.CaptureFixture[str]) -> None:
    @cases(4, long=True)
    @given(st.integers(0, 3))
    def check(number: int) -> None:
        if number == 1:
            raise ZeroDivisionError("one")
        if number == 2:
            raise KeyError("two")

    with pytest.raises(AssertionError) as failed:
        check()
    assert str(failed.value).count("ZeroDivisionError at ") == 1
    assert str(failed.value).count("KeyError at ") == 1
    assert "'number': 2" in str(failed.value)
    assert "of 120 cases" in capsys.readouterr().out


def test_a_short_test_ends_at_the_first_failure() -> None:
    @cases(4, long=False)
    @given(st.integers(0, 3))
    def check(number: int) -> None:
        assert number < 1

    with pytest.raises(AssertionError, match="assert"):
        check()


def test_a_long_test_ends_after_its_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUZZ_MINUTES", "0")

    @cases(4, long=True)
    @given(st.integers())
    def check(number: int) -> None: ...

    check()
    assert "0 of 120 cases" in capsys.readouterr().out
