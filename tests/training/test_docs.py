"""The examples in the docstrings of the training API run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "building",
    "checkpoint",
    "config",
    "evaluation",
    "hypergradient",
    "models",
    "networks",
    "rates",
    "schedule",
    "splitmix",
    "stats",
    "tensors",
    "trainer",
    "values",
)


@pytest.mark.parametrize("name", ["", *(f".{module}" for module in MODULES)])
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"signmaml{name}"))
    assert result.attempted > 0
    assert result.failed == 0
