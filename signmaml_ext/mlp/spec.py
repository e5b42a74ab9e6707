"""Which modules are multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .. import chain
from ..chain import Layer
from ..lazy import cached_property
from ..recognition import linear, used_twice


@dataclass(frozen=True)
class MlpSpec:
    """A module that is linear layers with one kind of activation between them.

    Attributes:
        layers: Parameter names of each linear layer, (weight `[out, in]`, bias `[out]`).
        widths: Widths of the input, the hidden layers and the output.
        activation: "relu" or "tanh".
    """

    layers: tuple[tuple[str, str], ...]
    widths: tuple[int, ...]
    activation: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters in order: weight and bias of the first layer, of the second, ..."""
        return tuple(name for layer in self.layers for name in layer)

    @property
    def outputs(self) -> int:
        return self.widths[-1]

    @property
    def draws(self) -> bool:
        return False

    @property
    def unmoved(self) -> tuple[str, ...]:
        return ()

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        value = x.flatten(1)
        for i, (weight, bias) in enumerate(self.layers):
            value = F.linear(value, parameters[weight], parameters[bias])
            if i + 1 < len(self.layers):
                value = value.relu() if self.activation == "relu" else value.tanh()
        return value

    def example(self, model: nn.Module) -> tuple[int, ...]:
        return (self.widths[0],)


def read(model: nn.Module) -> MlpSpec | str:
    """The layers of a module that is a multilayer perceptron by its structure, or why it is not.

    The computation counts, not the class: any module whose forward is flatten (if at all), linear, activation,
    linear, ..., linear; see `chain`.
    """
    return chain.remembered(model, "mlp", _read)


def _read(model: nn.Module) -> MlpSpec | str:
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return "it has no linear layer"
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        return "it has convolutions"  # decided without tracing, which is slow
    layers = chain.layers_of(model)
    return layers if isinstance(layers, str) else _match(layers)


def _match(layers: Sequence[Layer]) -> MlpSpec | str:
    linears: list[Layer] = []
    activations: list[Layer] = []
    for layer in layers:
        if layer.kind == "linear":
            if len(activations) != len(linears):
                return f"there is no activation before layer {layer.name!r}"
            linears.append(layer)
        elif layer.kind in ("relu", "tanh"):
            activations.append(layer)
            if len(activations) != len(linears):
                return f"an activation is not between two linear layers (at {layer.name!r})"
        elif layer.kind != "flatten" or linears:
            return f"it uses more than linear layers and activations (at {layer.name!r})"
    kinds = {layer.kind for layer in activations}
    if len(linears) < 2 or len(activations) != len(linears) - 1 or len(kinds) != 1:
        return "it is not linear layers with one kind of activation between every two"
    for layer in linears:
        if getattr(layer.module, "bias", None) is None:
            return f"layer {layer.name!r} has no bias"
    if (twice := used_twice(linears)) is not None:
        return twice
    widths = [linear(linears[0]).in_features, *(linear(layer).out_features for layer in linears)]
    if any(layer.size not in ((), (widths[0],)) for layer in layers if layer.kind == "flatten"):
        return f"its view is not one of examples by {widths[0]} features"
    names = tuple((f"{layer.name}.weight", f"{layer.name}.bias") for layer in linears)
    return MlpSpec(names, tuple(widths), kinds.pop())
