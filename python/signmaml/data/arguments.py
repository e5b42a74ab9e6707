"""Checks of arguments: each message names the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral
from typing import Any

import numpy as np
import torch

SPLITS = ("train", "val", "test")


def check_integer(name: str, value: Any, low: int, high: int | None = None, note: str = "") -> int:
    """Returns `value` as an int in `low..high`; raises TypeError or ValueError otherwise.

    Args:
        name: The argument's name, for the message.
        value: The argument. Booleans are rejected.
        low: The least value allowed.
        high: The greatest value allowed; None: no limit.
        note: An explanation of the limits, added to the message in brackets.
    """
    expected = f"{name}: expected an integer" + (f", {low} or more" if high is None else f" in {low}..{high}")
    if note:
        expected += f" ({note})"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{expected}, found {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{expected}, found {number}")
    return number


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Returns `value` if it is one of `choices`; raises ValueError otherwise."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, found {value!r}")
    return value


def check_split(value: Any) -> str:
    """Returns `value` if it names a split; raises ValueError otherwise."""
    return check_choice("split", value, SPLITS)


def a_few(names: Collection[str], limit: int = 5) -> str:
    """The first `limit` names for a message, then how many more there are.

    Example:
        >>> a_few(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = list(names)[:limit]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def plain_label(label: Any) -> Any:
    """A label as Python's own number or string, so that equal ones are one."""
    return label.item() if isinstance(label, (torch.Tensor, np.generic)) else label
