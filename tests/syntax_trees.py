"""Syntax trees of sources, each parsed once for the tests of a module that read it several times."""

import ast
from collections.abc import Iterator
from functools import cache

import pytest


@cache
def tree_of(source: str) -> ast.Module:
    """Return the syntax tree of a source."""
    return ast.parse(source)


@pytest.fixture(scope="module")
def trees() -> Iterator[None]:
    """Forget the trees after the tests of a module, as they take much memory."""
    yield
    tree_of.cache_clear()
