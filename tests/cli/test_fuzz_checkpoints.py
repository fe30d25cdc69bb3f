"""Checkpoints with random configs, tokenizers, templates and tensor headers are read or refused in one line.

`--long` runs thirty times as many cases.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.fuzzing import SPECIAL, Checked, cases, changes, replaced, without_long_work
from tests.conftest import DATA

QUICK = 40
COMMANDS = {
    "info checkpoint": 4,
    "convert-weights checkpoint out.gguf": 2,
    "capture checkpoint transcripts.jsonl out.zarr --dry-run --unit-tokens 1024": 1,
    "generate checkpoint prompts.jsonl out.jsonl --max-new-tokens 1 --effort low": 1,
}
WEIGHTED = [command for command, weight in COMMANDS.items() for _ in range(weight)]
JSON_FILES = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
TEMPLATES = [
    "", "{{", "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ messages.__class__ }}", "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__ }}", "\ufeff", "{{ raise_exception('no') }}",
]  # fmt: skip


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_long_work(monkeypatch)
    shutil.copytree(DATA / "nano", workplace / "checkpoint")
    return workplace


@contextlib.contextmanager
def written(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content, for as long as the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file whose header is changed."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def damaged_bytes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a function that cuts a file, or changes some of its bytes, most of them near its start."""
    cut = draw(st.booleans())
    places = draw(st.lists(st.integers(0, 200) | st.integers(0, 2**21), min_size=1, max_size=4))
    values = draw(st.binary(min_size=4, max_size=4))

    def damage(content: bytes) -> bytes:
        if cut:
            return content[: places[0] % len(content)]
        changed = bytearray(content)
        for place, value in zip(places, values, strict=False):
            changed[place % len(content)] = value
        return bytes(changed)

    return damage


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Any]:
    """Return the name of a file of a checkpoint, and what is written or put in its place."""
    kind = draw(st.sampled_from(["json", "json", "header", "header", "bytes", "special", "template"]))
    weights = DATA / "nano" / "model.safetensors"
    if kind == "json":
        name = draw(st.sampled_from(JSON_FILES))
        return name, json.dumps(draw(changes())(json.loads((DATA / "nano" / name).read_bytes()))).encode()
    if kind == "header":
        return weights.name, with_header(weights.read_bytes(), draw(changes()))
    if kind == "bytes":
        return weights.name, draw(damaged_bytes())(weights.read_bytes())
    if kind == "template":
        return "chat_template.jinja", draw(st.sampled_from(TEMPLATES)).encode()
    return draw(st.sampled_from([*JSON_FILES, weights.name, "chat_template.jinja"])), draw(
        st.sampled_from(list(SPECIAL))
    )


def test_random_checkpoints(folder: Path, long: bool) -> None:
    @cases(QUICK, long=long)
    @given(damages(), st.sampled_from(WEIGHTED))
    def check(damage: tuple[str, Any], command: str) -> None:
        run_case(folder, command, *damage)

    check()


def run_case(folder: Path, command: str, name: str, damage: bytes | str) -> None:
    path = folder / "checkpoint" / name
    with replaced(path, damage) if isinstance(damage, str) else written(path, damage):
        Checked(folder).run(*command.split())
