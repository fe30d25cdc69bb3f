"""JSON of others: limits of size and depth hold before anything is built, and what is within them is unchanged."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.bounded_json import parse_json, read_json
from workbench.errors import InputError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_what_is_within_the_limits_is_read_as_json_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(values)
def test_the_depth_is_that_of_the_value(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text, max_depth=depth(value)) == value
    if depth(value):
        with pytest.raises(InputError, match="nested deeper"):
            parse_json(text, max_depth=depth(value) - 1)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 101 + "]" * 101])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="nested deeper than 100 levels"):
        parse_json(text)


def test_brackets_in_texts_do_not_count() -> None:
    assert parse_json(json.dumps(["[{" * 1000 + '\\"'])) == ["[{" * 1000 + '\\"']


def test_a_large_or_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1, 2]")
    assert read_json(path, max_bytes=6) == [1, 2]
    with pytest.raises(InputError, match="larger than 5 bytes"):
        read_json(path, max_bytes=5)
    for content, message in ((b"\xff", "not UTF-8 at byte 0"), (b"[1,", "not JSON")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_json(path)
