"""What a model takes and returns: one tensor or several.

A model's inputs are a tensor, a tuple of tensors (`model(*inputs)`) or a dictionary of them (`model(**inputs)`), all
with the same leading axes `[T, S, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Output = str | int | Callable[[Any], Tensor]


def parts(inputs: Inputs) -> tuple[Tensor, ...]:
    """All tensors of some inputs."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs


def first(inputs: Inputs) -> Tensor:
    """The first tensor: its leading axes and device are those of all."""
    return parts(inputs)[0]


def only(inputs: Inputs) -> Tensor:
    """The tensor of inputs that are a single tensor."""
    assert isinstance(inputs, Tensor), "several inputs are for the generic path"
    return inputs


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(change(value) for value in inputs)


def take(inputs: Inputs, tasks: slice | int) -> Inputs:
    """The inputs of some tasks, or of one."""
    return each(inputs, lambda value: value[tasks])


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for the inputs of one task."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def selected(output: Output | None, returned: Any) -> Any:
    """The part of what a model returned that `output=` names."""
    if output is None:
        return returned
    if callable(output):
        return output(returned)
    if isinstance(output, str) and not isinstance(returned, Mapping):
        return getattr(returned, output)
    return returned[output]
