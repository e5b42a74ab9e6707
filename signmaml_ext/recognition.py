"""What a native family knows about a module: read from its structure and verified numerically."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from . import chain
from .chain import Layer


class Spec(Hashable, Protocol):
    """A network as a family computes it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters, in the order of the native calls."""

    @property
    def outputs(self) -> int:
        """Width of the predictions."""

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Parameters whose gradient is exactly 0, so that no step moves them."""

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's definition: predictions `[S, outputs]` of examples `[S, ...]`."""

    def example(self, model: nn.Module) -> tuple[int, ...]:
        """The shape of an example that the module takes."""


def computes(spec: Spec, model: nn.Module, x: Tensor) -> bool:
    """Whether the module computes what its spec says, checked numerically on examples like `x` `[S, ...]`."""
    return chain.computes(model, spec.names, spec.forward, x, spec.draws)


def verified(spec: Spec, model: nn.Module, x: Tensor) -> bool:
    """`computes`, once for each structure of the module and shape of its examples."""
    known = chain.of_module(model)
    key = (spec, tuple(x.shape[1:]))
    if key not in known.computed:
        if not computes(spec, model, x):
            return False
        known.computed.add(key)
    return True


def linear(layer: Layer) -> nn.Linear:
    """The module of a linear layer."""
    assert isinstance(layer.module, nn.Linear)
    return layer.module


def used_twice(layers: Sequence[Layer]) -> str | None:
    """Why the layers do not each have parameters of their own; None if they do."""
    names: set[str] = set()
    owners: dict[int, str] = {}
    for layer in layers:
        if layer.name in names:
            return f"layer {layer.name!r} is used twice"
        names.add(layer.name)
        assert layer.module is not None
        for parameter in layer.module.parameters():
            if id(parameter) in owners:
                return f"layers {owners[id(parameter)]!r} and {layer.name!r} share parameters"
            owners[id(parameter)] = layer.name
    return None
