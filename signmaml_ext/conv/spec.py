"""Which modules are Conv-N networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .. import chain
from ..chain import Layer
from ..lazy import cached_property
from ..recognition import linear, used_twice


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
        channels: Channels of the images.
        filters: Filters of every block.
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

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def draws(self) -> bool:
        return False

    @property
    def unmoved(self) -> tuple[str, ...]:
        return tuple(block.conv_bias for block in self.blocks if block.conv_bias is not None)

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """With BatchNorm on the statistics of the images at hand."""
        for block in self.blocks:
            bias = None if block.conv_bias is None else parameters[block.conv_bias]
            stride = 2 if self.halving == "stride" else 1
            x = F.conv2d(x, parameters[block.conv_weight], bias, stride=stride, padding=1)
            scale, shift = parameters[block.norm_weight], parameters[block.norm_bias]
            x = F.batch_norm(x, None, None, scale, shift, training=True, eps=block.eps).relu()
            if self.halving == "max":
                x = F.max_pool2d(x, 2)
        features = x.flatten(1) if self.readout == "flatten" else x.mean((2, 3))
        return F.linear(features, parameters[self.classifier[0]], parameters[self.classifier[1]])

    def example(self, model: nn.Module) -> tuple[int, ...]:
        """A square image if the classifier's number of features allows one, else one of the least height."""
        scale = 2 ** len(self.blocks)
        flattened = model.get_parameter(self.classifier[0]).shape[1] // self.filters
        positions = flattened if self.readout == "flatten" else 1
        side = math.isqrt(positions)
        height = side if side * side == positions else 1
        return self.channels, scale * height, scale * (positions // height)


def read(model: nn.Module) -> ConvSpec | str:
    """The blocks of a module that is a Conv-N network by its structure, or why it is not.

    Recognises the usual ways of writing conv3x3, BatchNorm, ReLU and a halving: modules or functions, in blocks or in
    one sequence, pooling after or before the ReLU (their order changes neither value nor gradient), the classifier on
    the flattened features or on their mean over height and width; see `chain`.
    """
    return chain.remembered(model, "conv", _read)


def _read(model: nn.Module) -> ConvSpec | str:
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "it has no 2d convolution"  # decided without tracing, which is slow
    layers = chain.layers_of(model)
    return layers if isinstance(layers, str) else _match(layers)


# One block by the kinds of its layers -> how it halves the image. The stride of the convolution must agree.
_BLOCKS = {
    ("conv", "norm", "relu", "pool"): "max",
    ("conv", "norm", "pool", "relu"): "max",
    ("conv", "norm", "relu"): "stride",
}


def _match(layers: Sequence[Layer]) -> ConvSpec | str:
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
    return _why_not_uniform(blocks) or used_twice(used) or _conv_spec(blocks, layers, halvings, readout)


def _conv(layer: Layer) -> nn.Conv2d:
    assert isinstance(layer.module, nn.Conv2d)
    return layer.module


def _norm(layer: Layer) -> nn.modules.batchnorm._BatchNorm:
    assert isinstance(layer.module, nn.modules.batchnorm._BatchNorm)
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
    """ "flatten" or "mean", or why the layers after the blocks are not a linear classifier."""
    kinds = tuple(layer.kind for layer in tail)
    if kinds not in (("flatten", "linear"), ("mean", "linear"), ("mean", "flatten", "linear")):
        return f"after its blocks come {', '.join(kinds) or 'no layers'}, not flatten or mean, and one linear layer"
    classifier = linear(tail[-1])
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
        ways=linear(classifier).out_features,
        halving=next(iter(halvings)),
        readout=readout,
    )
