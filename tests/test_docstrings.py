"""Public functions document the errors that they raise and the shapes of their arrays.

The API pages show signatures and docstrings, so both are read from the sources: a function that raises InputError has a
`Raises:` section, and an array in its signature has a shape, in the annotation or in square brackets in the docstring.
A method without a docstring of its own is documented by its class.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import workbench as wb
from tests.syntax_trees import tree_of, trees  # noqa: F401

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "hooks", "dashboards", "data", "workbench")
HELP_TEXTS = ("workbench/cli", "workbench/bench/command.py", "data/command.py")  # docstrings of commands are their help
NO_SHAPES = ("data", "workbench/bench")  # scripts that train, evaluate and measure; they are not an interface
# with which the docstring of a function that returns something may begin
VERB = (
    r"(Return|Yield|Draw|Write|Read|Run|Load|Compute|Check|Add|Remove|Create|Make|Open|Store|Measure|Compare|Estimate"
    r"|Generate|Compile|Take|Sum|Import|Attach|Count|Apply|Start|Label|Propagate|Call|Raise|Train|Put|Capture|Launch|Decode|Give|Turn|Replace)\b"
)
ARRAYS = ("Tensor", "ndarray", "NDArray")


pytestmark = pytest.mark.usefixtures("trees")


class Function(NamedTuple):
    """A public function or method: its node, and its docstring or that of its class."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    docstring: str


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yield public functions and methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield Function(node.name, node, ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = ast.get_docstring(node) or ""
            for method in node.body:
                private = isinstance(method, ast.FunctionDef) and method.name[0] == "_" and method.name[:2] != "__"
                if isinstance(method, ast.FunctionDef) and not private:
                    own = ast.get_docstring(method)
                    special = method.name.startswith("__")
                    yield Function(f"{node.name}.{method.name}", method, f"{own or about}{about if special else ''}")


def raises_input_error(function: ast.AST) -> bool:
    """Return whether the function itself, not one defined inside it, has a statement that raises InputError."""
    ahead = list(ast.iter_child_nodes(function))
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and "InputError" in ast.unparse(node.exc):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            ahead += ast.iter_child_nodes(node)
    return False


def has_bare_array(annotation: ast.expr) -> bool:
    """Return whether the annotation contains an array type without a shape."""
    parameters = getattr(getattr(annotation, "slice", None), "elts", ())
    if any(isinstance(e, ast.Constant) and isinstance(e.value, str) for e in parameters):
        return False  # jaxtyping: Float[Tensor, "batch pos"]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value in ARRAYS
    if getattr(annotation, "attr", getattr(annotation, "id", "")) in ARRAYS:
        return True
    return any(has_bare_array(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def missing_raises(source: str) -> list[str]:
    """Return the names of functions that raise InputError and do not document it."""
    documented = functions(tree_of(source))
    return [f.name for f in documented if raises_input_error(f.node) and "Raises:" not in f.docstring]


def missing_shapes(source: str) -> list[str]:
    """Return the names of functions with an array whose shape stands neither in the signature nor in the docstring."""
    names = []
    for f in functions(tree_of(source)):
        arguments = [*f.node.args.posonlyargs, *f.node.args.args, *f.node.args.kwonlyargs]
        annotations = [a.annotation for a in arguments if a.annotation] + ([f.node.returns] if f.node.returns else [])
        if any(map(has_bare_array, annotations)) and "[" not in f.docstring:
            names.append(f.name)
    return names


def sources(*but: str) -> dict[str, str]:
    paths = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    by_name = {p.relative_to(ROOT).as_posix(): p for p in paths}
    return {n: p.read_text("utf-8") for n, p in by_name.items() if not n.startswith(but)}


def test_errors_are_documented() -> None:
    assert [f"{path}: {name}" for path, text in sources(*HELP_TEXTS).items() for name in missing_raises(text)] == []


def test_shapes_are_documented() -> None:
    texts = sources(*HELP_TEXTS, *NO_SHAPES)
    assert [f"{path}: {name}" for path, text in texts.items() for name in missing_shapes(text)] == []


def test_first_lines_are_sentences() -> None:
    """A docstring starts with a capital letter or a name in code, and its first paragraph ends with a full stop."""
    for path, text in sources().items():
        for function in functions(tree_of(text)):
            first = (ast.get_docstring(function.node) or "It.").split("\n\n")[0]
            assert first.rstrip("`")[-1] in ".:)" or first.startswith("`"), f"{path}: {function.name}: {first}"


def without_verb(source: str) -> list[str]:
    """Return the names of functions with a result whose docstring does not begin with a verb."""
    lines = []
    for f in functions(tree_of(source)):
        own, returns = ast.get_docstring(f.node), f.node.returns
        if own and returns is not None and ast.unparse(returns) != "None" and not re.match(VERB, own):
            lines.append(f"{f.name}: {own.splitlines()[0]}")
    return lines


def test_first_lines_begin_with_a_verb() -> None:
    lines = [f"{path}: {name}" for path, text in sources(*HELP_TEXTS).items() for name in without_verb(text)]
    assert lines == []
    assert len(without_verb('def f(x) -> int:\n    """The largest x."""\n')) == 1  # a negative control


@pytest.mark.parametrize(
    "source",
    [
        'def f(x):\n    """Return x."""\n    if x:\n        raise InputError("wrong")\n    return x\n',
        'class A:\n    """A."""\n    def f(self):\n        raise InputError("wrong") from None\n',
    ],
)
def test_an_undocumented_error_is_found(source: str) -> None:
    assert len(missing_raises(source)) == 1
    documented = source.replace('."""', '.\n\n    Raises:\n        InputError: always.\n    """')
    assert missing_raises(documented) == []


@pytest.mark.parametrize("annotation", ["Tensor", "np.ndarray", "dict[str, Tensor]", "Tensor | None"])
def test_an_array_without_a_shape_is_found(annotation: str) -> None:
    assert missing_shapes(f'def f(x: {annotation}) -> None:\n    """Do it."""\n') == ["f"]
    assert missing_shapes(f'def f(x: {annotation}) -> None:\n    """Do it with [batch pos]."""\n') == []
    assert missing_shapes('def f(x: Float[Tensor, "batch pos"]) -> None:\n    """Do it."""\n') == []


PUBLIC = ("hooks", "kernels", "dashboards", "experiments", "figures", "harmony", "studies", "research")  # of `wb.*`


def public_modules() -> set[str]:
    """Return the modules of the public packages, without subpackages and private modules."""
    paths = [path for package in PUBLIC for path in (ROOT / "workbench" / package).glob("*.py")]
    return {f"{path.parent.name}.{path.stem}" for path in paths if not path.stem.startswith("_")}


def documented_modules() -> set[str]:
    """Return the modules whose functions the API pages show."""
    pages = [page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    names = [line.split()[1] for page in pages for line in page.splitlines() if line.startswith("::: ")]
    return {name.removeprefix("workbench.") for name in names}


def test_the_api_pages_show_every_public_module() -> None:
    assert sorted(public_modules() - documented_modules()) == []
    assert {"experiments.effects", "hooks.interventions", "kernels.moe"} <= public_modules()


def test_the_api_pages_show_the_module_of_every_public_name() -> None:
    objects = [wb.load, wb.open_run, wb.Run, wb.InputError, wb.Recorder, wb.accuracy, wb.answers, wb.direction]
    objects += [wb.finetune, wb.probe, wb.top_experts]
    assert {thing.__module__.removeprefix("workbench.") for thing in objects} <= documented_modules()
