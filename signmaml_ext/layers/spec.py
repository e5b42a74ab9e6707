"""Which modules are programs of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import chain
from ..chain import ACTIVATIONS, Layer
from ..lazy import cached_property
from ..recognition import used_twice

Pair = tuple[int, int]
MOST_BLOCKS = 64  # kLayersBlocks


@dataclass(frozen=True)
class Block:
    """A product, a normalisation, an activation, a pooling and a dropout, in this order; each may be missing ("none").

    Series are images of height 1, features images of one position.

    Attributes:
        product: "conv", "linear", "sum" (of two blocks' outputs) or "none".
        reads: How many blocks back the one is whose output it reads; the examples come before the first.
        adds: Of "sum", likewise the one whose output is added.
        weight: Name of its weight, `[channels, inputs, *kernel]` or `[channels, features]`.
        bias: Name of its bias `[channels]`; None without one.
        channels: What it makes.
        kernel: Of a convolution, `(height, width)`, like `stride` and `padding`.
        norm: "batch" (over examples and positions), "group" (over positions and the channels of a group) or "none".
        scale: Name of its scale `[channels]`; None without one.
        shift: Likewise.
        groups: Of "group".
        eps: What is added to the variance.
        activation: One of `chain.ACTIVATIONS` or "none".
        slope: Of "leaky_relu" and "elu".
        pool: "max", "average", "mean" (over all positions) or "none".
        pool_kernel: Of "max" and "average", `(height, width)`, like `pool_stride` and `pool_padding`.
        counts_padding: Whether "average" divides by positions over the border too.
        drops: What its dropout makes 0: single "values", whole "channels" of an example, or "none".
        share: How many of them, between 0 and 1.
    """

    product: str = "none"
    reads: int = 1
    adds: int = 0
    weight: str = ""
    bias: str | None = None
    channels: int = 0
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    norm: str = "none"
    scale: str | None = None
    shift: str | None = None
    groups: int = 1
    eps: float = 0.0
    activation: str = "none"
    slope: float = 0.0
    pool: str = "none"
    pool_kernel: Pair = (1, 1)
    pool_stride: Pair = (1, 1)
    pool_padding: Pair = (0, 0)
    counts_padding: bool = True
    drops: str = "none"
    share: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Its parameters, in the order of the native calls."""
        return tuple(name for name in (self.weight, self.bias, self.scale, self.shift) if name)

    def entries(self) -> dict[str, Any]:
        """The block as `LayersProgram` takes it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("weight", "scale", "shift", "share"):
            del found[name]
        return found | {"bias": self.bias is not None, "affine": self.scale is not None}

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor, added: Tensor | None = None) -> Tensor:
        """The block's definition, on images `[S, C, H, W]`; `added` is the second summand."""

        def named(name: str | None) -> Tensor | None:
            return None if name is None else parameters[name]

        if self.product == "conv":
            weight = parameters[self.weight].reshape(self.channels, -1, *self.kernel)  # of series it has one axis less
            x = F.conv2d(x, weight, named(self.bias), stride=self.stride, padding=self.padding)
        elif self.product == "linear":
            x = F.linear(x.flatten(1), parameters[self.weight], named(self.bias))[:, :, None, None]
        elif self.product == "sum":
            assert added is not None and added.shape == x.shape
            x = x + added
        if self.norm == "batch":
            x = F.batch_norm(x, None, None, named(self.scale), named(self.shift), training=True, eps=self.eps)
        elif self.norm == "group":
            x = F.group_norm(x, self.groups, named(self.scale), named(self.shift), self.eps)
        x = self._pooled(_activated(self.activation, self.slope, x))
        if self.drops == "none":
            return x
        # Not by F.dropout, which a program may have replaced, and the module with it.
        return (torch.dropout if self.drops == "values" else torch.feature_dropout)(x, self.share, True)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return x.mean((2, 3), keepdim=True)
        window = (self.pool_kernel, self.pool_stride, self.pool_padding)
        if self.pool == "max":
            return F.max_pool2d(x, *window)
        return F.avg_pool2d(x, *window, count_include_pad=self.counts_padding) if self.pool == "average" else x

    def __str__(self) -> str:
        parts = []
        if self.product == "conv":
            size = f"{self.kernel[0]}x{self.kernel[1]}"
            stride = "" if self.stride == (1, 1) else f" by {self.stride[0]}x{self.stride[1]}"
            parts.append(f"conv {size}{stride} to {self.channels}")
        elif self.product == "linear":
            parts.append(f"linear to {self.channels}")
        elif self.product == "sum":
            parts.append("sum")
        if self.norm != "none":
            parts.append("batch norm" if self.norm == "batch" else f"norm of {self.groups} groups")
        if self.activation != "none":
            parts.append(self.activation)
        if self.pool != "none":
            size = "" if self.pool == "mean" else f" {self.pool_kernel[0]}x{self.pool_kernel[1]}"
            parts.append(f"{self.pool}{size}")
        if self.drops != "none":
            parts.append(f"dropout {self.share:g}{' of channels' * (self.drops == 'channels')}")
        return ", ".join(parts)


def _activated(kind: str, slope: float, x: Tensor) -> Tensor:
    if kind == "leaky_relu":
        return F.leaky_relu(x, slope)
    if kind == "elu":
        return F.elu(x, slope)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="none" if kind == "gelu" else "tanh")
    return x if kind == "none" else _PLAIN[kind](x)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class LayersSpec:
    """A module that is a program of blocks: a chain, or with sums of two branches.

    Attributes:
        blocks: In order; each reads earlier ones.
        kind: What an example is: "images" `[C, H, W]`, "series" `[C, L]`, "features" (flattened if it has more axes).
        view: The size `[C, H, W]` that the module views its examples as first; empty if it does not.
    """

    blocks: tuple[Block, ...]
    kind: str
    view: tuple[int, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters in the order of the native calls."""
        return tuple(name for block in self.blocks for name in block.names)

    @cached_property
    def draws(self) -> bool:
        """Whether it has a dropout, which draws random numbers."""
        return any(block.drops != "none" for block in self.blocks)

    @property
    def outputs(self) -> int:
        return next(block.channels for block in reversed(self.blocks) if block.product in ("conv", "linear"))

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Biases in front of a norm whose mean is over their channel alone, which takes them away."""
        return tuple(
            block.bias
            for block in self.blocks
            if block.bias is not None
            and (block.norm == "batch" or (block.norm == "group" and block.groups == block.channels))
        )

    def size(self, example: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Channels, height and width of an example as the program takes it; None if it takes no such example."""
        if self.view:
            channels, height, width = self.view
            count = 1
            for length in example:
                count *= length
            return (channels, height, width) if count == channels * height * width else None
        if self.kind == "images":
            return (example[0], example[1], example[2]) if len(example) == 3 else None
        if self.kind == "series":
            return (example[0], 1, example[1]) if len(example) == 2 else None
        features = 1
        for length in example:
            features *= length
        return features, 1, 1

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        size = self.size(tuple(x.shape[1:]))
        if size is None:
            raise ValueError(f"x: expected {self.kind}, found examples of {tuple(x.shape[1:])}")
        made = [x.reshape(-1, *size)]
        for block in self.blocks:
            made.append(block.forward(parameters, made[-block.reads], made[-block.adds] if block.adds else None))
        return made[-1].flatten(1)

    def example(self, model: nn.Module) -> tuple[int, ...]:
        """The shape of an example, as far as the module tells it: images and series are 32 positions wide."""
        if self.view:
            return self.view
        inputs = model.get_parameter(next(block.weight for block in self.blocks if block.weight)).shape[1]
        return {"images": (inputs, 32, 32), "series": (inputs, 32), "features": (inputs,)}[self.kind]

    def __str__(self) -> str:
        if all(block.reads == 1 and not block.adds for block in self.blocks):
            return "; ".join(map(str, self.blocks))
        words = []
        for number, block in enumerate(self.blocks, 1):
            read = " and ".join(_in_words(number - back) for back in (block.reads, block.adds) if back)
            words.append(f"{number}: {block}" + (f" (of {read})" if block.reads > 1 or block.adds else ""))
        return "; ".join(words)


def _in_words(number: int) -> str:
    return str(number) if number else "the examples"


def read(model: nn.Module) -> LayersSpec | str:
    """The blocks of a module that consists of usual layers by its structure, or why it does not; see `chain`."""
    return chain.remembered(model, "layers program", _read)


def _read(model: nn.Module) -> LayersSpec | str:
    layers = chain.network_of(model)
    if isinstance(layers, str):
        return layers
    try:
        return _Matcher().match(layers)
    except _Refused as refusal:
        return str(refusal)


class _Refused(Exception):
    """The layers are no program of blocks; the message says why."""


_PRODUCTS = ("conv", "conv1d", "linear")
_NORMS = ("norm", "norm1d", "group_norm", "instance_norm", "layer_norm")
_POOLS = ("pool", "max_pool", "average_pool", "mean", "mean1d")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d")
_SLOTS = 5  # of a block: 0 product, 1 norm, 2 activation, 3 pool, 4 dropout


@dataclass(frozen=True)
class _Output:
    """What a layer gives, or the examples.

    Attributes:
        block: The block that makes it; -1: it is the examples.
        free: The first free slot of that block; _SLOTS: it has none.
        axes: Of an example: 1 for features, 2 for series, 3 for images; 0: not known.
        flattened: Whether it is images whose positions were flattened, for a linear layer to come.
        shared: Whether several layers read it, so that none may go into its block.
    """

    block: int = -1
    free: int = _SLOTS
    axes: int = 0
    flattened: bool = False
    shared: bool = False


class _Matcher:
    """Puts layers into blocks: each goes into the block that it reads if its slot and all later ones are free."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.start = 0  # axes of an example of the network; 0: not known yet
        self.at = _Output()  # what the layer at hand reads, then what it gives

    def match(self, layers: Sequence[Layer]) -> LayersSpec:
        view: tuple[int, ...] = ()
        if layers and layers[0].kind == "images":
            view, layers, self.start = layers[0].size, layers[1:], 3
        if not any(layer.kind in _PRODUCTS for layer in layers):
            raise _Refused("it has no convolution and no linear layer")
        twice = used_twice([layer for layer in layers if layer.module is not None])
        if twice is not None:
            raise _Refused(twice)
        readers = Counter(number - back for number, layer in enumerate(layers, 1) for back in layer.reads)
        if min(readers) < 0:
            raise _Refused("it reads its examples before and after it views them as images")
        outputs = [_Output()]
        for number, layer in enumerate(layers, 1):
            found = [
                replace(outputs[n], axes=outputs[n].axes or self.start, shared=outputs[n].shared or readers[n] > 1)
                for n in (number - back for back in layer.reads)
            ]
            self.at = found[0]
            if layer.kind == "sum":
                self._add(layer, *found)
            else:
                self._take(layer)
            self.start = self.start or self.at.axes
            outputs.append(self.at)
        if len(self.blocks) > MOST_BLOCKS:
            raise _Refused(f"it serves up to {MOST_BLOCKS} blocks, and these are {len(self.blocks)}")
        if self.at.axes != 1 and not self.at.flattened:
            raise _Refused("its output is no features")
        return LayersSpec(tuple(self.blocks), {1: "features", 2: "series", 3: "images"}[self.start], view)

    def _add(self, layer: Layer, first: _Output, second: _Output) -> None:
        if (1 if first.flattened else first.axes) != (1 if second.flattened else second.axes):
            raise _Refused(f"it adds what has other axes (at {layer.name!r})")
        block, added = max(first.block, second.block), min(first.block, second.block)
        if added < 0:  # the examples are read
            block, added = added, block
        if added < 0:
            raise _Refused(f"it adds its examples to themselves (at {layer.name!r})")
        number = len(self.blocks)
        self.blocks.append(Block("sum", reads=number - block, adds=number - added))
        # Features and flattened images of one size have one position.
        self.at = replace(second if first.flattened else first, block=number, free=1, shared=False)

    def _take(self, layer: Layer) -> None:
        kind = layer.kind
        if kind == "flatten":
            self.at = replace(self.at, axes=self.at.axes or 1, flattened=self.at.flattened or self.at.axes > 1)
            return
        if kind == "images":
            raise _Refused(f"its view as images is not its first layer (at {layer.name!r})")
        if self.at.flattened and kind not in ("linear", "dropout", "dropout2d"):
            raise _Refused(f"after it flattens its features comes no linear layer (at {layer.name!r})")
        if kind in _PRODUCTS:
            self._put(0, self._product(layer))
        elif kind in _NORMS:
            self._put(1, self._norm(layer))
        elif kind in ACTIVATIONS:
            self._put(2, {"activation": kind, "slope": layer.slope})
        elif kind in _POOLS:
            self._put(3, self._pool(layer))
        elif kind in _DROPOUTS:
            self._put(4, self._dropout(layer))
            if any(block.drops != "none" for block in self.blocks[self.at.block + 1 :]):
                raise _Refused(f"its dropouts come in another order than its blocks (at {layer.name!r})")
        else:
            raise _Refused(f"it has no place for {kind} (at {layer.name!r})")

    def _put(self, slot: int, settings: dict[str, Any]) -> None:
        block = self.at.block
        if block < 0 or slot < self.at.free or self.at.shared:
            self.blocks.append(Block(reads=len(self.blocks) - block))
            block = len(self.blocks) - 1
        self.blocks[block] = replace(self.blocks[block], **settings)
        self.at = replace(self.at, block=block, free=slot + 1, shared=False)

    def _images(self, layer: Layer, axes: int) -> None:
        if self.at.axes not in (0, axes):
            raise _Refused(f"{layer.name!r} reads something else than the layer before it makes")
        self.at = replace(self.at, axes=axes)

    def _product(self, layer: Layer) -> dict[str, Any]:
        module = layer.module
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))
        bias = None if module.bias is None else f"{layer.name}.bias"
        names = {"weight": f"{layer.name}.weight", "bias": bias}
        if isinstance(module, nn.Linear):
            if self.at.axes > 1 and not self.at.flattened:
                raise _Refused(f"{layer.name!r} is linear along the last axis of images")
            self.at = replace(self.at, axes=1, flattened=False)
            return {"product": "linear", "channels": module.out_features, **names}
        self._images(layer, 3 if isinstance(module, nn.Conv2d) else 2)
        if module.groups != 1 or set(module.dilation) != {1}:
            raise _Refused(f"convolution {layer.name!r} has groups or dilation")
        if module.padding_mode != "zeros":
            raise _Refused(f"convolution {layer.name!r} pads by {module.padding_mode!r}")
        kernel = (1, *module.kernel_size)[-2:]
        padding: tuple[int, ...]
        if isinstance(module.padding, str):
            if module.padding == "same" and any(size % 2 == 0 for size in module.kernel_size):
                raise _Refused(f"convolution {layer.name!r} pads one side more than the other")
            padding = tuple(size // 2 if module.padding == "same" else 0 for size in kernel)
        else:
            padding = (0, *module.padding)[-2:]
        return {
            "product": "conv", "channels": module.out_channels, "kernel": kernel,
            "stride": (1, *module.stride)[-2:], "padding": padding, **names,
        }  # fmt: skip

    def _norm(self, layer: Layer) -> dict[str, Any]:
        module: Any = layer.module
        affine = getattr(module, "weight", None) is not None
        names = {"scale": f"{layer.name}.weight", "shift": f"{layer.name}.bias"} if affine else {}
        if affine and getattr(module, "bias", None) is None:
            raise _Refused(f"{layer.name!r} has a scale and no shift")
        found: dict[str, Any] = {"eps": float(module.eps), **names}
        if not module.eps > 0:
            raise _Refused(f"{layer.name!r} has eps {module.eps}")
        if layer.kind == "norm":
            self._images(layer, 3)
            return {"norm": "batch", **found}
        if layer.kind == "norm1d":
            if self.at.axes not in (1, 2):
                raise _Refused(f"{layer.name!r} reads something else than features or series")
            return {"norm": "batch", **found}
        if layer.kind == "layer_norm":
            if self.at.axes != 1 or len(module.normalized_shape) != 1:
                raise _Refused(f"{layer.name!r} normalises something else than features")
            return {"norm": "group", "groups": 1, **found}
        if layer.kind == "instance_norm":
            if module.track_running_stats:
                raise _Refused(f"{layer.name!r} keeps running statistics")
            self._images(layer, 3 if isinstance(module, nn.InstanceNorm2d) else 2)
            return {"norm": "group", "groups": module.num_features, **found}
        if self.at.axes == 0:
            raise _Refused(f"{layer.name!r} is its first layer")
        return {"norm": "group", "groups": module.num_groups, **found}

    def _pool(self, layer: Layer) -> dict[str, Any]:
        if self.at.axes < 2:
            raise _Refused(f"{layer.name!r} pools something else than images")
        if layer.kind in ("mean", "mean1d"):
            if (layer.kind == "mean1d") != (self.at.axes == 2):
                raise _Refused(f"its mean is not over all positions (at {layer.name!r})")
            self.at = replace(self.at, flattened=True)
            return {"pool": "mean"}
        kernel, stride, padding = layer.window or ((2, 2), (2, 2), (0, 0))
        return {
            "pool": "average" if layer.kind == "average_pool" else "max", "pool_kernel": kernel,
            "pool_stride": stride, "pool_padding": padding, "counts_padding": layer.counts_padding,
        }  # fmt: skip

    def _dropout(self, layer: Layer) -> dict[str, Any]:
        if layer.kind == "dropout" or self.at.flattened:  # of features each is a channel
            return {"drops": "values", "share": layer.share}
        self._images(layer, 3 if layer.kind == "dropout2d" else 2)
        return {"drops": "channels", "share": layer.share}
