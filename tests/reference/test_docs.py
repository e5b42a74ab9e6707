"""The examples in the docstrings run."""

from __future__ import annotations

import doctest

import pytest

from signmaml_ext import api


@pytest.mark.parametrize("name", ["meta_step", "evaluate", "adapt", "explain"])
def test_docstring_example(name):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(getattr(api, name), name, globs={})
    result = runner.run(example)
    assert result.attempted > 0
    assert result.failed == 0
