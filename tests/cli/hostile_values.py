"""Texts, numbers and JSON values that no command expects."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HOSTILE_TEXT = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "-",
            "--",
            "0",
            "-1",
            "1",
            "2",
            "7",
            "0.5",
            "-0.0",
            "1e400",
            "nan",
            "inf",
            "-inf",
            "9" * 400,
            "0x10",
            "2147483647",
            "2147483648",
            "18446744073709551616",
            "1_0",
            "١٢",
            "é",
            "∞",
            "\udcff",
            "\x1b[2J",
            "a\nb",
            "a\tb",
            "%s%n",
            "{effort}",
            "{",
            "[",
            "[1, 2]",
            "{}",
            "null",
            "true",
            "x=y",
            "x=",
            "=",
            "cpu",
            "nano",
            "<script>",
            "run.zarr",
            "run.zarr/",
            "run.zarr/zarr.json",
            "transcripts.jsonl",
            "prompts.jsonl",
            "pipe",
            "link",
            "loop",
            "folder",
            "empty",
            "binary",
            "missing/deeper",
            "folder/new",
            ".",
            "..",
            "../work",
            "/dev/full",
            "/dev/null/x",
            "s3://",
            "memory://x",
            "file://run.zarr",
            "http://127.0.0.1:9/x",
            "nosuch://x",
            "://",
            "ollama:x",
            "a" * 300,
            "irregular",
            "truncated,",
            "sinks layers=9",
            "resid_post:99",
            "resid_post:-1",
            "routing",
            "logprobs",
            "html",
            "parquet",
            "safetensors",
            "datasets",
            "activations/hook_resid_post",
            "tokens",
            "low",
            "analysis",
            "user",
        ]
    ),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
    st.integers(-(2**70), 2**70).filter(lambda n: abs(n) < 64 or abs(n) > 2**31).map(str),
)


NUMBERS = st.sampled_from(["0", "1", "2", "3", "-1", "0.5", "1e-9", "1e308", "inf", "nan", "2147483648", "9" * 30])


# of what a command repeats: a large number that it accepts keeps it busy for days, as it should
REPEATS = st.sampled_from(["0", "1", "2", "-1", "0.5", "inf", "nan", "2147483648", "9" * 30])


HOSTILE_VALUE = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            7,
            2**31,
            2**40,
            2**63,
            10**30,
            0.5,
            -0.0,
            1e308,
            float("inf"),
            float("nan"),
            "",
            " ",
            "x",
            "../x",
            "/etc/passwd",
            "\x1b[2J<script>",
            "\ud800",
            "a" * 5000,
            [],
            [0],
            [[]],
            {},
            {"x": 1},
            [2**62, 2**62],
            "string",
            "float64",
            "bfloat16",
            "|O",
            "complete",
            "writing",
        ]
    ),
    st.text(max_size=5),
    st.integers(),
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Return a function that changes one value, key or entry of a JSON value, deep inside."""
    steps = draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=7))
    kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat"]))
    value = draw(HOSTILE_VALUE)

    def change(content: Any) -> Any:
        content = copy.deepcopy(content)
        at, parent, key = content, None, None
        for step in steps:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            parent, key = at, keys[step % len(keys)]
            at = at[key]
        if parent is None:
            return value
        if kind == "delete":
            del parent[key]
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(at))
        else:
            parent[key] = value
        return content

    return change
