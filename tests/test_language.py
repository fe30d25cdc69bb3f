"""Texts use the glossary's terms: documentation, help, errors, docstrings, comments, labels, notebooks, test names.

Each entry of RETIRED is a phrase that the glossary replaces, with the term to use instead. The test reads every string,
docstring and comment of the packages, the names of functions and classes, the Markdown pages and the notebooks' text.

NO_NAMES are words that do not describe the value that they would name. Another test reads every name that the
sources, the tests and the notebooks give: variables, parameters, attributes, functions, classes, imports and keywords.
"""

import ast
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.syntax_trees import tree_of, trees  # noqa: F401

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
    r"while it thinks|while it answers|thinking harder|think harder|thinks through": "analysis channel, effort",
    r"stands? in (the|for a) (softmax|real)": "takes part in",
    r"\bat a glance\b": "quick look",
    r"\bis being made\b|it is kept\b": "running study, cached",
    r"\bsilenc(e|es|ed|ing)\b(?!_logs)": "ablation",
    r"(?<!chain of )(?<!chain-of-)\bthoughts?\b(?! of)|what (it|the model) thinks|\b(it|model) thinks\b": (
        "analysis channel, chain of thought"
    ),
    r"\b(thinking|analysis) and answering|while answering|\banswering (channel|text)": "final channel, final answer",
    r"\brests? on the sinks?": "sink attention",
    r"share of slots it|share of slots an expert": "expert load",
    r"gates? of an expert": "gate weight",
    r"\btak(e|es|en|ing) (an expert|the expert|experts|the sinks?|sinks) away": "ablation",
    r"(?<!-to-)\bpeers?\b": "baseline",
    r"(?<!broken )(?<!wrong )\btwins?\b": "negative control, broken implementation",
    r"\bstand-ins?\b": "mock server",
    r"\b(a|the|this|each|every|another) (wing|room|floor)s? of the (house|code|workbench)|\bthe house\b": (
        "layer, package"
    ),
    r"folder or (a )?bucket|\b(place|bucket) of a run": "storage, local storage, object storage",
    r"what a run (has|holds)\b": "recorded quantities",
    r"\ba run is whole|whole run is": "complete, valid",
    r"\bthe words of (a|the) (study|result)|\bin plain words\b": "summary",
    r"\bspecimens?\b": "compile case",
    # not terms, but phrases that readers who are not native speakers have to decode
    r"\bin the place of\b": "instead of",
    r"\bso many\b(?! other)": "this many",
    r"\b(told|tells?) ([a-z' ]{1,40} )?apart\b": "distinguish",
    r"\ba (row|line|panel|page|column) an? "
    r"(row|token|slot|sequence|message|cell|label|channel|effort|answer|expert)\b": ("one row for each token"),
    r"\b(a|the|its|each) [a-z]+ stands? (beside|in for)\b|\bstands? in for\b": "is compared with, is used instead of",
    r"\bspeaks?\b|\bthinks? (more|less)\b|\bmore thinking\b": "uses the format, the analysis is longer",
    r"\bwhoever\b": "the process or user that …",
    r"\bunder way\b": "running",
    r"\b(says|tells|wants|knows)\b": "states, shows, requires, has: a file, a run or a model is not a person",
    r"\bbehind\b": "after, follows; of data: the data of a figure",
}
ALLOWED = {  # file → phrases that are quoted on purpose
    "CHANGELOG.md": ("peers",),  # the former value of an option
    "data/tasks.py": ("says",),  # a developer, who is a person
    "workbench/experiments/sink_ablation.py": ("silence",),  # the former name of the command, accepted for one version
}
SOURCES = (
    "kernels",
    "hooks",
    "dashboards",
    "data",
    "workbench",
    "docs",
    "notebooks",
    "scripts",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "mkdocs.yml",
    "CITATION.cff",
)

PLAIN = (".md", ".toml", ".yml", ".cff")

NO_NAMES = ("said", "found", "kept", "whole", "each", "through", "named")
ALLOWED_NAMES = {  # file → names that are not ours to choose, with the reason
    "workbench/experiments/sentence_importance.py": {
        "kept": "a column of the result, which files of earlier versions have"
    },
}


pytestmark = pytest.mark.usefixtures("trees")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Return line numbers and texts that a user can read in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in PLAIN:
        yield from enumerate(text.splitlines(), 1)
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            if cell["cell_type"] == "markdown":
                yield number, "".join(cell["source"])
    elif path.suffix == ".py":
        tree = tree_of(text)
        examples = path.is_relative_to(ROOT / "tests")  # their strings are inputs: only docstrings are texts
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(tree):
            if isinstance(node, documented) and examples:
                yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value and not examples:
                yield node.lineno, node.value
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.lineno, re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", node.name)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    elif path.suffix == ".html":
        yield from ((n, line) for n, line in enumerate(text.splitlines(), 1) if ">" in line)


def retired_phrases(path: Path) -> list[str]:
    """Return the retired phrases of a file with their lines and the terms to use."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    texts = list(strings(path))
    together = "\n\0\n".join(text for _, text in texts).lower()  # no phrase extends over this mark
    phrases = {phrase: term for phrase, term in RETIRED.items() if re.search(phrase, together)}
    return [
        f"{name}:{line}: {match.group(0)!r}: write {term!r}"
        for line, text in texts
        for phrase, term in phrases.items()
        for match in re.finditer(phrase, text, re.IGNORECASE)
        if match.group(0).lower() not in ALLOWED.get(name, ())
    ]


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return line numbers and names of everything that a syntax tree names, where it is defined or given by keyword."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield line, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield line, name
            case ast.keyword(arg=str(name), value=value):
                yield value.lineno, name
            case ast.alias(asname=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield line, name
            case ast.MatchMapping(rest=str(name)) | ast.ExceptHandler(name=str(name)):
                yield line, name


def code_of(path: Path) -> Iterator[str]:
    """Return the Python code of a module or of the cells of a notebook, without the commands of IPython."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield text
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            if cell["cell_type"] == "code":
                yield re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE)
    elif path.suffix == ".md":
        yield from re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def unhelpful_names(path: Path) -> list[str]:
    """Return the names of a file's code that say nothing about their value, with their lines."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [
        f"{name}:{line}: {given!r}: name the thing that it is"
        for code in code_of(path)
        for line, given in names_in(tree_of(code))
        if given.strip("_") in NO_NAMES and given not in ALLOWED_NAMES.get(name, {})
    ]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", *SOURCES], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    paths = [ROOT / name for name in names.splitlines()]
    return [
        p
        for p in paths
        if p.suffix in (*PLAIN, ".ipynb", ".py", ".html") and p.is_file() and not p.is_symlink() and p != Path(__file__)
    ]


def test_texts_use_the_terms_of_the_glossary() -> None:
    assert [hit for path in tracked() for hit in retired_phrases(path)] == []


def test_names_say_what_the_thing_is() -> None:
    assert [hit for path in tracked() for hit in unhelpful_names(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "rows, kept = 1, 2",
        "for each in rows: pass",
        "[whole for whole in rows]",
        "def f(said): pass",
        "def through(): pass",
        "self._kept = []",
        "f(found=1)",
        "import x as named",
        "if (found := f()): pass",
        "lambda *each: 1",
        "try:\n    pass\nexcept ValueError as said:\n    pass",
        "match x:\n    case [1, *kept]: pass",
    ],
)
def test_a_name_that_states_nothing_is_noticed(code: str, tmp_path: Path) -> None:
    """Negative control, as a module, as a cell of a notebook and as an example on a page; longer names are not hit."""
    cells = [{"cell_type": "code", "source": ["%matplotlib inline\n", code]}]
    files = {"a.py": code, "a.ipynb": json.dumps({"cells": cells}), "a.md": f"```python\n{code}\n```\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert len(unhelpful_names(tmp_path / name)) == 1
        longer = re.sub(r"\b(_?)(said|found|kept|whole|each|through|named)\b", r"\1\2_rows", text)
        (tmp_path / name).write_text(longer)
        assert unhelpful_names(tmp_path / name) == []


def test_allowed_names_are_still_used() -> None:
    for name, allowed in ALLOWED_NAMES.items():
        given = {n for code in code_of(ROOT / name) for _, n in names_in(tree_of(code))}
        assert set(allowed) <= given


def test_every_replacement_is_a_term_of_the_glossary() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    for term in ("sink attention", "expert load", "negative control", "mock server", "ablation", "token selection"):
        assert term in glossary


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "Where its heads rest."),
        ("a.py", '"""What the thought is taken away from."""\n'),
        ("a.py", "x = 1  # a broken twin\n"),
        ("a.py", "def hide_the_thought() -> None:\n    pass\n"),
        ("a.py", '"""Return at most so many tokens."""\n'),
        ("a.py", "x = 1  # a row a token\n"),
        ("a.py", "raise ValueError('the header says 4 bytes')\n"),
        ("a.md", "The residual stream behind the layer."),
        ("a.md", "Two runs are told apart by their digests, whoever wrote them."),
        ("a.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": ["## At a glance"]}]})),
    ],
)
def test_a_retired_phrase_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert retired_phrases(tmp_path / name)
