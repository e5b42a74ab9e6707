"""The configuration's fields as options of the command line: their values, converted from the parsed words."""

from __future__ import annotations

import argparse
from typing import Any

from . import config as configs
from .values import parse_word

# Fields of TrainConfig that an evaluation may override.
EVALUATION_FIELDS = (
    "data", "data_root", "split_by", "min_images", "skip_damaged", "ways", "shots",
    "method", "inner_lr", "test_steps", "batch_norm", "nonfinite",
    "sharpness_lower", "sharpness_norm", "sharpness_adaptive", "inner_rule", "inner_momentum", "inner_eps",
    "inner_weight_decay",
    "precision", "backend", "seed", "device",
)  # fmt: skip

# Those that `signmaml predict` may override: not those of data, and a task that turns NaN or Inf is always an error.
_OTHERS = (
    "nonfinite",
    "data",
    "data_root",
    "split_by",
    "min_images",
    "skip_damaged",
    "ways",
    "shots",
    "batch_norm",
    "seed",
)
PREDICTION_FIELDS = tuple(name for name in EVALUATION_FIELDS if name not in _OTHERS)


def given_fields(parsed: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line set, in their types.

    Raises:
        ValueError: A word is not a value of its field's type.
    """
    kinds = configs.kinds()
    values: dict[str, Any] = {}
    for key, text in vars(parsed).items():
        if not key.startswith("field_"):
            continue
        name = key.removeprefix("field_")
        if isinstance(text, bool):
            values[name] = text
        elif isinstance(text, list):
            items = [parse_word(name, word, kinds[name]) for word in text]
            values[name] = None if items == [None] else items
        else:
            values[name] = parse_word(name, text, kinds[name])
    return values
