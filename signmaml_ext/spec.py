"""What can be read off a module: facts about its structure that a backend needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn import functional as F

from . import chain
from .chain import Layer

# -----------------------------------------------------------------------------------------------------------------
# Multilayer perceptrons


@dataclass(frozen=True)
class MlpSpec:
    """A module that is linear layers with one kind of activation between them.

    Attributes:
        layers: Parameter names of each linear layer, (weight `[out, in]`, bias `[out]`).
        widths: Of the input, the hidden layers and the output.
        activation: "relu" or "tanh".
    """

    layers: tuple[tuple[str, str], ...]
    widths: tuple[int, ...]
    activation: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters in order: weight and bias of the first layer, of the second, ..."""
        return tuple(name for layer in self.layers for name in layer)


def mlp_from_module(model: nn.Module) -> MlpSpec | str:
    """The layers of a module that is a multilayer perceptron by its structure, or why it is none.

    What counts is the computation, not the class: any module whose forward is flatten (if at all), linear, activation,
    linear, ..., linear; see `chain`.
    """
    return chain.remembered(model, "mlp", _mlp_from_module)


def _mlp_from_module(model: nn.Module) -> MlpSpec | str:
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return "it has no linear layer"
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        return "it has convolutions"  # said without tracing, which takes its time
    layers = chain.layers_of(model)
    return layers if isinstance(layers, str) else _match_mlp(layers)


def _match_mlp(layers: Sequence[Layer]) -> MlpSpec | str:
    linear: list[Layer] = []
    activations: list[Layer] = []
    for layer in layers:
        if layer.kind == "linear":
            if len(activations) != len(linear):
                return f"there is no activation before layer {layer.name!r}"
            linear.append(layer)
        elif layer.kind in ("relu", "tanh"):
            activations.append(layer)
            if len(activations) != len(linear):
                return f"an activation is not between two linear layers (at {layer.name!r})"
        elif layer.kind != "flatten" or linear:
            return f"it uses more than linear layers and activations (at {layer.name!r})"
    kinds = {layer.kind for layer in activations}
    if len(linear) < 2 or len(activations) != len(linear) - 1 or len(kinds) != 1:
        return "it is not linear layers with one kind of activation between every two"
    for layer in linear:
        if getattr(layer.module, "bias", None) is None:
            return f"layer {layer.name!r} has no bias"
    if (twice := _used_twice(linear)) is not None:
        return twice
    widths = [_linear(linear[0]).in_features, *(_linear(layer).out_features for layer in linear)]
    if any(layer.size not in ((), (widths[0],)) for layer in layers if layer.kind == "flatten"):
        return f"its view is not one of examples by {widths[0]} features"
    names = tuple((f"{layer.name}.weight", f"{layer.name}.bias") for layer in linear)
    return MlpSpec(names, tuple(widths), kinds.pop())


def _linear(layer: Layer) -> nn.Linear:
    assert isinstance(layer.module, nn.Linear)
    return layer.module


def _used_twice(layers: Sequence[Layer]) -> str | None:
    """Why layers with parameters are not each a layer of its own; None if they are."""
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


def check_mlp(spec: MlpSpec, model: nn.Module, x: Tensor) -> bool:
    """Whether the module computes on examples like `x` `[S, ...]` what its spec says: the numbers, in float64."""

    def forward(parameters: Mapping[str, Tensor], examples: Tensor) -> Tensor:
        value = examples.flatten(1)
        for i, (weight, bias) in enumerate(spec.layers):
            value = F.linear(value, parameters[weight], parameters[bias])
            if i + 1 < len(spec.layers):
                value = value.relu() if spec.activation == "relu" else value.tanh()
        return value

    return chain.computes(model, spec.names, forward, x)


# -----------------------------------------------------------------------------------------------------------------
# Convolutional networks


@dataclass(frozen=True)
class ConvBlockSpec:
    """Parameter names and constants of one block: conv3x3, BatchNorm, ReLU, halving."""

    conv_weight: str  # [filters, channels in, 3, 3]
    conv_bias: str | None  # [filters]
    norm_weight: str  # [filters]
    norm_bias: str  # [filters]
    eps: float


@dataclass(frozen=True)
class ConvSpec:
    """A module that is blocks of conv3x3 (padding 1), BatchNorm, ReLU and a halving, then one linear classifier.

    Attributes:
        blocks: The blocks in order; all have a convolution bias or none has.
        classifier: Names of weight `[ways, features]` and bias `[ways]`.
        channels: Of the images.
        filters: Of every block.
        ways: Width of the output.
        halving: "max" (stride 1, then 2x2 max-pooling) or "stride" (stride-2 convolution).
        readout: "flatten" (NCHW order) or "mean" (over height and width): what the classifier reads.
    """

    blocks: tuple[ConvBlockSpec, ...]
    classifier: tuple[str, str]
    channels: int
    filters: int
    ways: int
    halving: str
    readout: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters in the order of params/conv_meta_step.h."""
        names: list[str] = []
        for block in self.blocks:
            bias = [] if block.conv_bias is None else [block.conv_bias]
            names += [block.conv_weight, *bias, block.norm_weight, block.norm_bias]
        return (*names, *self.classifier)


def conv_from_module(model: nn.Module) -> ConvSpec | str:
    """The blocks of a module that is a Conv-N network by its structure, or why it is none.

    Served are the usual ways of writing conv3x3, BatchNorm, ReLU and a halving: modules or functions, in blocks or in
    one sequence, pooling after or before the ReLU (their order changes neither value nor gradient), the classifier on
    the flattened features or on their mean over height and width; see `chain`.
    """
    return chain.remembered(model, "conv", _conv_from_module)


def _conv_from_module(model: nn.Module) -> ConvSpec | str:
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "it has no 2d convolution"  # said without tracing, which takes its time
    layers = chain.layers_of(model)
    return layers if isinstance(layers, str) else _match_conv(layers)


# One block by the kinds of its layers -> how it halves the image. The stride of the convolution must agree.
_BLOCKS = {
    ("conv", "norm", "relu", "pool"): "max",
    ("conv", "norm", "pool", "relu"): "max",
    ("conv", "norm", "relu"): "stride",
}


def _match_conv(layers: Sequence[Layer]) -> ConvSpec | str:
    views = [layer for layer in layers if layer.kind == "images"]
    if views and (len(views) > 1 or layers[0] is not views[0]):
        return f"its view as images is not its first layer (at {views[-1].name!r})"
    layers = layers[len(views) :]
    starts = [i for i, layer in enumerate(layers) if layer.kind == "conv"]
    if not starts or starts[0] != 0:
        return "it does not start with a convolution"
    tail_start = next((i for i, layer in enumerate(layers) if layer.kind in ("mean", "flatten", "linear")), len(layers))
    if starts[-1] > tail_start:
        return f"convolution {layers[starts[-1]].name!r} comes after the features are read out"
    ends = [*starts[1:], tail_start]
    blocks = [layers[start:end] for start, end in zip(starts, ends, strict=True)]
    halvings: set[str] = set()
    for block in blocks:
        kinds = tuple(layer.kind for layer in block)
        if kinds not in _BLOCKS:
            return (
                f"the block of {block[0].name!r} is not conv, BatchNorm, ReLU and a halving, in this order, "
                f"but {', '.join(kinds)}"
            )
        reason = _why_not_convolution(block[0], _BLOCKS[kinds]) or _why_not_norm(block[1])
        if reason is not None:
            return reason
        halvings.add(_BLOCKS[kinds])
    if len(halvings) > 1:
        return "some of its blocks halve by pooling, others by stride"
    readout = _readout(layers[tail_start:])
    if readout not in ("flatten", "mean"):
        return readout
    used = [layer for layer in layers if layer.module is not None]
    return _why_not_uniform(blocks) or _used_twice(used) or _conv_spec(blocks, layers, halvings, readout)


def _conv(layer: Layer) -> nn.Conv2d:
    assert isinstance(layer.module, nn.Conv2d)
    return layer.module


def _norm(layer: Layer) -> nn.BatchNorm2d:
    assert isinstance(layer.module, nn.BatchNorm2d)
    return layer.module


def _why_not_convolution(layer: Layer, halving: str) -> str | None:
    conv = _conv(layer)
    stride = 2 if halving == "stride" else 1
    expected = {
        "kernel_size": (3, 3), "stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1), "groups": 1,
        "padding_mode": "zeros",
    }  # fmt: skip
    for setting, value in expected.items():
        found = getattr(conv, setting)
        if found == "same" and setting == "padding" and stride == 1:
            continue  # one pixel at every border of a 3x3 kernel
        if isinstance(value, tuple) and isinstance(found, int):
            found = (found, found)
        if found != value:
            where = "without pooling" if stride == 2 else "with pooling"
            return f"convolution {layer.name!r} ({where}) has {setting} {found}, not {value}"
    return None


def _why_not_norm(layer: Layer) -> str | None:
    norm = _norm(layer)
    if not norm.affine:
        return f"BatchNorm {layer.name!r} has no scale and shift"
    return None if norm.eps > 0 else f"BatchNorm {layer.name!r} has eps {norm.eps}"


def _readout(tail: Sequence[Layer]) -> str:
    """ "flatten" or "mean", or why the layers after the blocks are no linear classifier."""
    kinds = tuple(layer.kind for layer in tail)
    if kinds not in (("flatten", "linear"), ("mean", "linear"), ("mean", "flatten", "linear")):
        return f"after its blocks come {', '.join(kinds) or 'no layers'}, not flatten or mean, and one linear layer"
    classifier = _linear(tail[-1])
    if getattr(classifier, "bias", None) is None:
        return f"its classifier {tail[-1].name!r} has no bias"
    if any(layer.size not in ((), (classifier.in_features,)) for layer in tail):
        return f"its view before the classifier is not one of examples by {classifier.in_features} features"
    return kinds[0]


def _why_not_uniform(blocks: Sequence[Sequence[Layer]]) -> str | None:
    convs = [_conv(block[0]) for block in blocks]
    filters = [conv.out_channels for conv in convs]
    if len(set(filters)) > 1:
        return f"its blocks have different numbers of filters: {filters}"
    if len({conv.bias is None for conv in convs}) > 1:
        return "some of its convolutions have a bias, others none"
    return None


def _conv_spec(
    blocks: Sequence[Sequence[Layer]], layers: Sequence[Layer], halvings: set[str], readout: str
) -> ConvSpec:
    def block_spec(conv: Layer, norm: Layer) -> ConvBlockSpec:
        bias = None if _conv(conv).bias is None else f"{conv.name}.bias"
        return ConvBlockSpec(
            f"{conv.name}.weight", bias, f"{norm.name}.weight", f"{norm.name}.bias", float(_norm(norm).eps)
        )

    first, classifier = _conv(blocks[0][0]), layers[-1]
    return ConvSpec(
        blocks=tuple(block_spec(block[0], block[1]) for block in blocks),
        classifier=(f"{classifier.name}.weight", f"{classifier.name}.bias"),
        channels=first.in_channels,
        filters=first.out_channels,
        ways=_linear(classifier).out_features,
        halving=next(iter(halvings)),
        readout=readout,
    )


def check_conv(spec: ConvSpec, model: nn.Module, x: Tensor) -> bool:
    """Whether the module computes on images like `x` `[S, C, H, W]` what its spec says: the numbers, in float64.

    With BatchNorm on the statistics of the images at hand.
    """

    def forward(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        value = images
        for block in spec.blocks:
            bias = None if block.conv_bias is None else parameters[block.conv_bias]
            stride = 2 if spec.halving == "stride" else 1
            value = F.conv2d(value, parameters[block.conv_weight], bias, stride=stride, padding=1)
            scale, shift = parameters[block.norm_weight], parameters[block.norm_bias]
            value = F.batch_norm(value, None, None, scale, shift, training=True, eps=block.eps).relu()
            if spec.halving == "max":
                value = F.max_pool2d(value, 2)
        features = value.flatten(1) if spec.readout == "flatten" else value.mean((2, 3))
        return F.linear(features, parameters[spec.classifier[0]], parameters[spec.classifier[1]])

    return chain.computes(model, spec.names, forward, x)


def verified(spec: MlpSpec | ConvSpec, model: nn.Module, x: Tensor) -> bool:
    """`check_mlp` or `check_conv`, once for each structure of the module and shape of its examples."""
    known = chain.of_module(model)
    key = (spec, tuple(x.shape[1:]))
    if key not in known.computed:
        holds = check_mlp(spec, model, x) if isinstance(spec, MlpSpec) else check_conv(spec, model, x)
        if not holds:
            return False
        known.computed.add(key)
    return True


def shapes_of(model: nn.Module) -> tuple[tuple[int, ...], int] | None:
    """Shape of one example that a recognised module takes, and width of its predictions; None for other modules.

    The classifier of a convolutional network gives away how many features the image leaves, not its shape: a square
    image if there is one, else a flat one.
    """
    mlp = mlp_from_module(model)
    if isinstance(mlp, MlpSpec):
        return (mlp.widths[0],), mlp.widths[-1]
    conv = conv_from_module(model)
    if not isinstance(conv, ConvSpec):
        return None
    scale = 2 ** len(conv.blocks)
    positions = model.get_parameter(conv.classifier[0]).shape[1] // conv.filters if conv.readout == "flatten" else 1
    side = math.isqrt(positions)
    height = side if side * side == positions else 1
    return (conv.channels, scale * height, scale * (positions // height)), conv.ways
