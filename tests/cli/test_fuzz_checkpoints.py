"""Checkpoints with random configs, tokenizers, templates and tensor headers are read or refused in one line.

`--long` runs thirty times as many cases.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.checks import Checked
from tests.cli.damaged_files import SPECIAL, damaged_bytes, replaced, with_header, written
from tests.cli.fuzzing import cases
from tests.cli.hostile_values import changes
from tests.cli.random_commands import without_long_work
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
    "",
    "{{",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ messages.__class__ }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__ }}",
    "\ufeff",
    "{{ raise_exception('no') }}",
]


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_long_work(monkeypatch)
    shutil.copytree(DATA / "nano", workplace / "checkpoint")
    return workplace


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
