"""JSON of others: limits of size and depth hold before anything is built, and what is within them is unchanged.

Modules read JSON with `workbench.bounded_json`; those that call `json.loads` themselves are listed with the reason.
"""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.bounded_json import parse_documents, parse_json, read_json
from workbench.errors import InputError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is not a fault
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


def test_bytes_are_read_as_utf_8() -> None:
    assert parse_json('["\u00e9"]'.encode()) == ["\u00e9"]
    with pytest.raises(InputError, match="not UTF-8 at byte 2"):
        parse_json(b'["\xff"]')


@given(st.lists(values, max_size=4), st.sampled_from(["\n", " ", ",\n", "\r\n"]))
def test_documents_that_follow_each_other_are_read_one_by_one(documents: list[object], separator: str) -> None:
    assert list(parse_documents(separator.join(map(json.dumps, documents)))) == documents


def test_documents_before_one_that_is_not_json_are_read() -> None:
    documents = parse_documents('{"a": 1} {"b"')
    assert next(documents) == {"a": 1}
    with pytest.raises(InputError, match="not JSON"):
        next(documents)
    with pytest.raises(InputError, match="nested deeper"):
        next(parse_documents("1 " + "[" * 101))


ROOT = Path(__file__).parents[1]
OWN_JSON = {  # module -> why it reads JSON without limits
    "workbench/bounded_json.py": "it is the reader",
    "workbench/harmony/templates.py": "request and answer of its own child process, which imports none of our modules",
    "workbench/runs/writer.py": "a copy of its own values",
    "workbench/bench/first.py": "results of its own child process",
    "workbench/bench/worker.py": "results of its own child process",
    "workbench/bench/cpu.py": "requests of its own parent process",
    "workbench/bench/gpu.py": "results of its own child process",
    "workbench/bench/full.py": "results of its own child process",
    "workbench/bench/graph.py": "results of its own child process",
    "kernels/gpu/tiles.py": "the project's own table of tiles; kernels import no other package",
}


def calls_json(source: str) -> bool:
    """Return whether a module calls `json.load`, `json.loads` or `json.JSONDecoder`, under any name."""
    readers = ("load", "loads", "JSONDecoder")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in readers and ast.unparse(node.value) == "json":
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "json" and {a.name for a in node.names} & {*readers}:
            return True
    return False


def test_json_from_outside_is_read_with_limits() -> None:
    paths = [p for package in ("workbench", "kernels", "hooks", "dashboards") for p in (ROOT / package).rglob("*.py")]
    readers = {p.relative_to(ROOT).as_posix() for p in paths if calls_json(p.read_text("utf-8"))}
    assert sorted(readers - OWN_JSON.keys()) == []
    assert "workbench/runs/writer.py" in readers


@pytest.mark.parametrize("source", ["import json\nx = json.loads(y)", "from json import load", "map(json.loads, y)"])
def test_a_reader_without_limits_is_found(source: str) -> None:
    assert calls_json(source)
    assert not calls_json("import json\njson.dumps(1)\nother.loads(2)")
