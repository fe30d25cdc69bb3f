"""Numbers with their nouns."""

import ast
import re
from pathlib import Path

import pytest

from workbench.counting import count_of, plural_or_singular

ROOT = Path(__file__).parents[1]
FOLDERS = ("workbench", "dashboards", "data")
# what a user may have one of; of tokens, layers, heads and experts a model or a run has many
NOUNS = "sentences|prompts|sequences|units|conversations|transcripts|samples|files|workers|problems|answers|nodes|steps"
# a plural that follows a number in braces and does not belong to "{n} of {total} …" with a fixed total
PLURAL = re.compile(rf"\}}( new| random| more)? ({NOUNS})\b")


def plurals(text: str) -> list[str]:
    """f-strings that write a plural after whatever number; those of errors name numbers that are wrong."""
    tree = ast.parse(text)
    errors = {inner for node in ast.walk(tree) if isinstance(node, ast.Raise) for inner in ast.walk(node)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) and node not in errors)
    return [ast.unparse(s) for s in strings if PLURAL.search("".join(map(piece, s.values)))]


def piece(value: ast.expr) -> str:
    """The text of a part of an f-string; "{}" for a number that may be one, "5" for a constant."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    constant = isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name) and value.value.id.isupper()
    return "5" if constant else "{}"


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("sentence",), "0 sentences"),
        (1, ("sentence",), "1 sentence"),
        (2, ("sentence",), "2 sentences"),
        (12_345, ("token",), "12,345 tokens"),
        (1, ("analysis", "analyses"), "1 analysis"),
        (3, ("analysis", "analyses"), "3 analyses"),
    ],
)
def test_a_number_has_its_noun(number: int, nouns: tuple[str, ...], text: str) -> None:
    assert count_of(number, *nouns) == text


def test_no_text_has_a_plural_for_whatever_number() -> None:
    sources = {p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if not p.is_symlink()}
    wrong = {str(p.relative_to(ROOT)): texts for p in sorted(sources) if (texts := plurals(p.read_text()))}
    assert not wrong


def test_the_scan_finds_a_plural() -> None:
    """The negative control."""
    assert plurals("print(f'{n} sentences')")
    assert plurals("print(f'{n:,} of {total} new transcripts are missing')")
    assert not plurals("print(f'{count_of(n, \"sentence\")} of {n} others')")


@pytest.mark.parametrize(
    ("number", "plural", "noun"),
    [
        (1, "units", "unit"),
        (0, "units", "units"),
        (2, "units", "units"),
        (1, "passes", "pass"),
        (1, "examples", "example"),
    ],
)
def test_a_plural_is_the_singular_after_one(number: int, plural: str, noun: str) -> None:
    assert plural_or_singular(number, plural) == noun
