"""A table of results is Markdown away from a terminal."""

import pytest

from workbench.bench.table import markdown, processor, show


def test_numbers_are_aligned_to_the_right() -> None:
    assert markdown(("what", "ms"), [("open", "3"), ("read", "12")], text=1).splitlines() == [
        "| what | ms |",
        "|---|---:|",
        "| open | 3 |",
        "| read | 12 |",
    ]


def test_a_pipe_gets_markdown_that_is_not_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", ("what",), [("x" * 500,)])
    out = capsys.readouterr().out
    assert out.startswith("title\n\n| what |\n")
    assert "x" * 500 in out


def test_the_processor_has_cores() -> None:
    assert int(processor().split()[0]) >= 1
