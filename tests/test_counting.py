"""Numbers with their nouns."""

import ast
import math
import re
from pathlib import Path

import pytest

from workbench.counting import count_of, plural_or_singular, signed, signed_interval

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


@pytest.mark.parametrize(
    ("value", "decimals", "kind", "expected"),
    [
        (0.312, 2, "f", "+0.31"),
        (-2.0, 2, "f", "-2.00"),
        (-0.004, 2, "f", "0.00"),
        (0.004, 2, "f", "0.00"),
        (-0.0, 3, "g", "0"),
        (-1e-9, 3, "g", "-1e-09"),
        (0.0004, 1, "%", "0.0%"),
        (-0.05, 1, "%", "-5.0%"),
        (1234.5, 1, "f", "+1234.5"),
        (float("nan"), 2, "f", "nan"),
        (float("-inf"), 2, "f", "-inf"),
    ],
)
def test_a_number_that_is_rounded_to_zero_has_no_sign(value: float, decimals: int, kind: str, expected: str) -> None:
    assert signed(value, decimals, kind) == expected


def test_an_interval_that_is_not_a_number_is_left_out() -> None:
    assert signed_interval(0.31, -0.004, 0.64, 2) == "+0.31 [0.00, +0.64]"
    assert signed_interval(0.31, math.nan, math.nan, 2) == "+0.31"


def test_no_text_of_the_project_formats_a_sign_in_another_way() -> None:
    """Formats with a sign write "-0.00"; those of plotly's hover texts begin with "%{"."""
    own_sign = re.compile(r"(?<!%)(?<!%\{)\{[^{}%]*:\+\.\d+[fg%]\}")
    assert own_sign.search('f"{x:+.2f} nats"'), "negative control"
    assert not own_sign.search("%{x:+.2f} points"), "of plotly"
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if p.name != "counting.py"]
    assert len(files) > 100, "negative control: the files are there"
    assert [p.name for p in files if own_sign.search(p.read_text())] == []
