"""Texts for users use the glossary's terms: documentation, help, errors, docstrings, labels, notebooks and names.

Each entry of RETIRED is a phrase that the glossary replaces, with the term to use instead. The test reads every string
and docstring of the packages (not their comments), the Markdown pages and the notebooks' text.
"""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RETIRED = {
    r"heads? rests?\b|attention rests|where .* rests?\b": "sink attention",
    r"mass (left )?on (the|its) sinks?|sink mass": "sink attention",
    r"\beven share\b|times an even": "load relative to uniform",
    r"how often (it|an expert) is used": "expert load",
    r"whom it works with|who works together": "co-activated experts",
    r"explains itself": "run any command with --help",
    r"goes? on where (it|they)|go on where": "resume",
    r"\bbroken twin|wrong twin": "negative control",
    r"stand-in host|host of our own": "mock server",
    r"costs and brings|what effort brings": "accuracy vs. reasoning length",
    r"read with suspicion|at arm's length": "validated",
    r"dead holder": "stale lock",
    r"\b(is|are) whole\b(?! numbers)|wholly or not at all": "complete, valid",
    r"what it says|what a run says|the run says": "summary",
    r"that are meant|tokens meant|is meant for": "token selection, token mask",
    r"\bthe house\b|house style|\bthis room\b": "package, layer",
    r"take(s|n)? (experts|sinks|it|them|the thought|attention) away|thought is taken": "ablation",
    r"while it thinks|while it answers|thinking harder|think harder|thinks through": "analysis channel, reasoning effort",
    r"stands? in (the|for a) (softmax|real)": "takes part in",
    r"\bat a glance\b": "quick look",
    r"\bis being made\b|it is kept\b": "running study, cached",
    r"\bsilence\b": "ablation",
}
ALLOWED = {  # file → phrases that are quoted on purpose
    "CHANGELOG.md": (),
}
SOURCES = ("kernels", "hooks", "dashboards", "data", "workbench", "docs", "notebooks", "README.md", "CONTRIBUTING.md")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Return line numbers and texts that a user can read in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            if cell["cell_type"] == "markdown":
                yield number, "".join(cell["source"])
    elif path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield node.lineno, node.value
    elif path.suffix == ".html":
        yield from ((n, line) for n, line in enumerate(text.splitlines(), 1) if ">" in line)


def retired_phrases(path: Path) -> list[str]:
    """Return the retired phrases of a file with their lines and the terms to use."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [
        f"{name}:{line}: {match.group(0)!r}: write {term!r}"
        for line, text in strings(path)
        for phrase, term in RETIRED.items()
        for match in re.finditer(phrase, text, re.IGNORECASE)
        if match.group(0).lower() not in ALLOWED.get(name, ())
    ]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", *SOURCES], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    paths = [ROOT / name for name in names.splitlines()]
    return [p for p in paths if p.suffix in (".md", ".ipynb", ".py", ".html") and p.is_file() and not p.is_symlink()]


def test_texts_use_the_terms_of_the_glossary() -> None:
    assert [hit for path in tracked() for hit in retired_phrases(path)] == []


def test_every_replacement_is_a_term_of_the_glossary() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    for term in ("sink attention", "expert load", "negative control", "mock server", "ablation", "token selection"):
        assert term in glossary


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "Where its heads rest."),
        ("a.py", '"""What the thought is taken away from."""\n'),
        ("a.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": ["## At a glance"]}]})),
    ],
)
def test_a_retired_phrase_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert len(retired_phrases(tmp_path / name)) == 1
