"""Conversion of plain values (words, YAML, TOML) to the type and range of a configuration field."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """The values that a field accepts.

    Attributes:
        help: One line.
        choices: The words allowed.
        least: The least number allowed.
        above: A number must be greater than this.
        on_resume: Whether it may differ when a run is resumed.
    """

    help: str
    choices: tuple[str, ...] | None = None
    least: float | None = None
    above: float | None = None
    on_resume: bool = False


class Kind(NamedTuple):
    """A field's type.

    Attributes:
        item: int, float, str or bool.
        many: Whether it is a tuple of them.
        optional: Whether None is allowed.
    """

    item: type
    many: bool
    optional: bool


def kind_of(hint: Any) -> Kind:
    """The kind that an annotation denotes.

    Example:
        >>> kind_of(tuple[int, ...] | None)
        Kind(item=<class 'int'>, many=True, optional=True)
    """
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    many = typing.get_origin(kinds[0]) is tuple
    item = typing.get_args(kinds[0])[0] if many else kinds[0]
    return Kind(item, many, len(kinds) < len(parts))


def converted(name: str, value: Any, kind: Kind, rule: Rule) -> Any:
    """The value converted to the field's type.

    Raises:
        ValueError: It has the wrong type or is out of range; the message names the field, what was expected and what
            was found.
    """
    if value is None:
        if kind.optional:
            return None
        raise ValueError(f"{name}: expected {_expectation(kind, rule)}, found none")
    if not kind.many:
        return _checked(name, value, kind, rule)
    values = [value] if isinstance(value, (str, int)) else value
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}: expected a list, found {value!r}")
    return tuple(_checked(name, entry, kind, rule) for entry in values)


def parse_word(name: str, text: str, kind: Kind) -> Any:
    """Parses one word of a command line; "none" is None if the kind is optional.

    Raises:
        ValueError: The word is not a value of that kind.
    """
    if kind.optional and text.lower() == "none":
        return None
    if kind.item is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name}: expected an integer, found {text!r}") from None
    if kind.item is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, found {text!r}")
        return text.lower() == "true"
    return _float(name, text) if kind.item is float else text


def _checked(name: str, value: Any, kind: Kind, rule: Rule) -> Any:
    expected = _expectation(kind, rule)
    if kind.item is str and isinstance(value, Path):
        value = str(value)
    if kind.item is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        value = _float(name, value)  # YAML reads 1e-3 (no dot) as text
    if not isinstance(value, kind.item) or (kind.item is int and isinstance(value, bool)):
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
    if isinstance(value, str) and rule.choices is not None and value not in rule.choices:
        near = difflib.get_close_matches(value, rule.choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name}: expected {expected}, found {value!r}{hint}")
    if isinstance(value, (int, float)) and not _in_range(value, rule):
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
    return value


def _in_range(value: float, rule: Rule) -> bool:
    if not -sys.float_info.max <= value <= sys.float_info.max:  # an int may exceed any float; nan compares false
        return False
    return (rule.least is None or value >= rule.least) and (rule.above is None or value > rule.above)


def _float(name: str, value: str | int) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: expected a number, found {value!r}") from None


def _expectation(kind: Kind, rule: Rule) -> str:
    if rule.choices is not None:
        return f"one of {', '.join(map(repr, rule.choices))}"
    noun = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind.item]
    if kind.many:
        noun = f"a list, each {noun}"
    if rule.least is not None:
        return f"{noun} >= {rule.least:g}"
    return noun if rule.above is None else f"{noun} > {rule.above:g}"
