"""The networks of the few-shot literature, and loading of weights trained with other libraries."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .networks import RESNET12_WIDTHS

POOLINGS = ("max", "stride")
GROUPS = 8
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda filters: nn.BatchNorm2d(filters, track_running_stats=False),
    "group": lambda filters: nn.GroupNorm(math.gcd(GROUPS, filters), filters),
    "instance": lambda filters: nn.InstanceNorm2d(filters, affine=True),
    "none": lambda filters: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class ConvBlock(nn.Module):
    """3x3 convolution, normalisation, nonlinearity, and downsampling by 2x2 max-pooling or stride 2."""

    def __init__(
        self, channels: int, filters: int, pooling: str, norm: str = "batch", activation: str = "relu"
    ) -> None:
        super().__init__()
        stride = 2 if pooling == "stride" else 1
        self.conv = nn.Conv2d(channels, filters, 3, stride=stride, padding=1)
        self.normalize = NORMS[norm](filters)
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(2) if pooling == "max" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.normalize(self.conv(x))))


class Conv4(nn.Module):
    """The four-block convolutional network of the MAML literature, in learn2learn's layout; or any number of blocks.

    Each block is a 3x3 convolution (padding 1, with bias), BatchNorm, ReLU and a halving of the image size; a linear
    classifier takes the flattened `[C, H, W]` features. Parameters are named `features.{i}.conv.{weight,bias}`,
    `features.{i}.normalize.{weight,bias}` and `classifier.{weight,bias}`.

    BatchNorm always uses the statistics of the current batch, in training and in evaluation, as MAML's official code
    does: there are no running buffers. A state dict that has some (`running_mean`, ...) can still be loaded; they are
    ignored with a warning.

    Initialisation: Xavier-uniform weights of convolutions and classifier from torch's global generator, biases 0,
    norms with scale 1 and shift 0.

    Args:
        ways: Number of classes, >= 2; size of the prediction.
        channels: Channels of the images, >= 1.
        filters: Channels of every block, >= 1 (32 and 64 are usual), or a list or tuple of those of each block, such
            as `(64, 96, 128, 256)`.
        image_size: Height and width of the images in pixels; at least `2 ** blocks` for "max".
        pooling: "max" (2x2 max-pooling, rounding down) or "stride" (stride-2 convolutions, rounding up).
        layers: Number of blocks, >= 1. None: as many as `filters` has, else 4.
        norm: "batch"; "group" (GroupNorm of 8 groups, or as many as divide both 8 and the filters); "instance" (with
            scale and shift, for at least 2 x 2 pixels); or "none".
        activation: "relu", "leaky-relu" (slope 0.1), "elu", "gelu", "silu" or "tanh".

    Raises:
        ValueError: An argument is out of its range, or the image shrinks to nothing.

    Example:
        >>> model = Conv4(ways=5, channels=1, filters=32, image_size=28)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 5])
        >>> sum(p.numel() for p in Conv4(ways=5, channels=3, image_size=84).parameters())
        32901
        >>> parameter_count(Conv4(filters=(64, 96, 128, 256), norm="group"))
        496165
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 3,
        filters: int | list[int] | tuple[int, ...] = 32,
        image_size: int = 84,
        pooling: str = "max",
        layers: int | None = None,
        norm: str = "batch",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if isinstance(filters, (list, tuple)):
            widths = tuple(filters)
            layers = len(widths) if layers is None else layers
            if layers != len(widths) or not widths:
                raise ValueError(f"filters: expected a width for each of {layers or 1} blocks, found {filters!r}")
        else:
            layers = 4 if layers is None else layers
            _check_integer("layers", layers, 1)
            widths = (filters,) * layers
        _check_images(ways, channels, widths, image_size)
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("norm", norm, NORMS)
        _check_choice("activation", activation, ACTIVATIONS)
        sides = [image_size]
        for _ in range(layers):
            sides.append(sides[-1] // 2 if pooling == "max" else (sides[-1] + 1) // 2)
        if sides[-1] == 0:
            raise ValueError(
                f"image_size: expected at least {2**layers} pixels for {layers} blocks with 2x2 max-pooling, "
                f"found {image_size}"
            )
        _check_instance_norm(norm, sides[-2] if pooling == "max" else sides[-1], image_size)
        self.ways, self.channels, self.image_size = ways, channels, image_size
        sizes = pairwise((channels, *widths))
        self.features = nn.Sequential(*(ConvBlock(i, o, pooling, norm, activation) for i, o in sizes))
        self.classifier = nn.Linear(widths[-1] * sides[-1] * sides[-1], ways)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(_drop_running_statistics)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[B, ways]` of images `[B, channels, image_size, image_size]`."""
        return self.classifier(self.features(x).flatten(1))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions, each with a norm, beside a 1x1 convolution with a norm; then 2x2 max-pooling.

    The nonlinearity follows the first two norms, and the sum of both ways.
    """

    def __init__(self, channels: int, filters: int, norm: str, activation: str) -> None:
        super().__init__()
        bias = norm == "none"
        sizes = pairwise((channels, filters, filters, filters))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in sizes)
        self.norms = nn.ModuleList(NORMS[norm](filters) for _ in self.convs)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, bias=bias), NORMS[norm](filters))
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms[0](self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            out = norm(conv(self.activation(out)))
        return self.pool(self.activation(out + self.shortcut(x)))


class ResNet12(nn.Module):
    """The residual network of the few-shot literature (Oreshkin et al. 2018, Lee et al. 2019), without DropBlock.

    Four blocks, each of three 3x3 convolutions without bias, BatchNorm and LeakyReLU of slope 0.1 around a 1x1
    shortcut with BatchNorm, then 2x2 max-pooling (rounding down). A linear classifier takes the mean over height and
    width. Parameters are named `features.{i}.convs.{j}.weight`, `features.{i}.norms.{j}.{weight,bias}`,
    `features.{i}.shortcut.{0.weight,1.weight,1.bias}` and `classifier.{weight,bias}`.

    BatchNorm always uses the statistics of the current batch, as in `Conv4`.

    Initialisation: normal weights of convolutions with variance 2 / (filters times kernel area), from torch's global
    generator; norms with scale 1 and shift 0; the classifier as torch's `nn.Linear`.

    Args:
        ways: Number of classes, >= 2; size of the prediction.
        channels: Channels of the images, >= 1.
        widths: Channels of the four blocks, each >= 1. The published ones make 12.4 million parameters; a narrow
            variant such as `(16, 32, 64, 128)` makes half a million.
        image_size: Height and width of the images in pixels, >= 16. The network serves any size from there on; it is
            checked alone.
        norm: As in `Conv4`; with "none" the convolutions have biases, which start at 0.
        activation: As in `Conv4`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> model = ResNet12(ways=5, channels=3, widths=(8, 16, 32, 64), image_size=28)
        >>> model(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 3,
        widths: list[int] | tuple[int, ...] = RESNET12_WIDTHS,
        image_size: int = 84,
        norm: str = "batch",
        activation: str = "leaky-relu",
    ) -> None:
        super().__init__()
        if not isinstance(widths, (list, tuple)) or len(widths) != 4:
            raise ValueError(f"widths: expected four integers, found {widths!r}")
        _check_images(ways, channels, tuple(widths), image_size, "widths")
        _check_choice("norm", norm, NORMS)
        _check_choice("activation", activation, ACTIVATIONS)
        if image_size < 16:
            raise ValueError(
                f"image_size: expected at least 16 pixels for 4 blocks with 2x2 max-pooling, found {image_size}"
            )
        self.ways, self.channels, self.image_size = ways, channels, image_size
        sizes = pairwise((channels, *widths))
        self.features = nn.Sequential(*(ResidualBlock(i, o, norm, activation) for i, o in sizes))
        self.classifier = nn.Linear(widths[-1], ways)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[B, ways]` of images `[B, channels, image_size, image_size]`."""
        return self.classifier(self.features(x).mean((2, 3)))


class MLP(nn.Module):
    """Fully connected network; images are flattened.

    Parameters are named `features.{i}.{weight,bias}` and `classifier.{weight,bias}` (the output layer, also in
    regression) and start as torch's `nn.Linear` does.

    Args:
        inputs: Size of one example, >= 1.
        outputs: Size of one prediction, >= 1.
        hidden: Widths of the hidden layers; may be empty. Default (40, 40), as in MAML's sinusoid experiment.
        activation: As in `Conv4`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> MLP(1, 1)(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (40, 40), activation: str = "relu") -> None:
        super().__init__()
        for argument, value in (("inputs", inputs), ("outputs", outputs), *(("hidden", width) for width in hidden)):
            _check_integer(argument, value, 1)
        _check_choice("activation", activation, ACTIVATIONS)
        widths = [inputs, *hidden]
        self.features = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.activation = ACTIVATIONS[activation]()
        self.classifier = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions `[B, outputs]` for examples `[B, ...]` with `inputs` elements each."""
        x = x.flatten(1)
        for layer in self.features:
            x = self.activation(layer(x))
        return self.classifier(x)


class LoadReport(NamedTuple):
    """Result of `load_learn2learn_state_dict`.

    Attributes:
        loaded: Names in the model that were loaded.
        ignored: Keys of the file without a counterpart in the model: BatchNorm's running statistics.
    """

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]


# Key map, tried in order on a key without a leading "module." (wrappers such as learn2learn's MAML add one).
_KEY_MAP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"features\.\d+\.(\d+)\.(conv|normalize)\.(\w+)"), r"features.\1.\2.\3"),
    (re.compile(r"(?:features|base)\.(\d+)\.(conv|normalize)\.(\w+)"), r"features.\1.\2.\3"),
    (re.compile(r"(?:classifier|linear)\.(weight|bias)"), r"classifier.\1"),
)


def load_learn2learn_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Loads weights of learn2learn's `MiniImagenetCNN`, as the official Sign-MAML repository saves them.

    | key in the file                                                     | key in `Conv4`            |
    |---------------------------------------------------------------------|---------------------------|
    | `features.0.{i}.conv.*`, `features.{i}.conv.*`, `base.{i}.conv.*`    | `features.{i}.conv.*`      |
    | `features.0.{i}.normalize.*`, `features.{i}.normalize.*`, `base.{i}.normalize.*` | `features.{i}.normalize.*` |
    | `classifier.*`, `linear.*`                                           | `classifier.*`             |
    | any of them after `module.`                                          | the same                   |

    Both classifiers take features flattened as `[C, H, W]`, so the weight needs no reordering.

    Args:
        model: A `Conv4`, or any module with its parameter names, of the file's sizes; on any device.
        state_dict: Name -> tensor, for example from `torch.load(path, weights_only=True)`. A tensor may
            appear under two names (learn2learn registers some blocks twice) if the values are equal.

    Returns:
        The names that were loaded, and the keys that were ignored (BatchNorm's running statistics, if the model
        has none).

    Raises:
        ValueError: Keys are unknown or missing, or shapes differ from the model's; the message lists all of them,
            and the model is unchanged.

    Example:
        >>> model = Conv4(ways=5, channels=3, image_size=84)
        >>> theirs = {k.replace("features.", "features.0."): v for k, v in model.state_dict().items()}
        >>> len(load_learn2learn_state_dict(model, theirs).loaded)
        18
    """
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    ignored: list[str] = []
    problems: list[str] = []
    for key, value in state_dict.items():
        name = _translate(key)
        if name is None:
            problems.append(f"unexpected key {key!r}")
        elif name not in own and name.rpartition(".")[2] in _RUNNING:
            ignored.append(key)
        elif name not in own:
            problems.append(f"unexpected key {key!r} (the model has no {name!r})")
        elif tuple(value.shape) != tuple(own[name].shape):
            problems.append(f"{key!r} has shape {list(value.shape)}, the model's {name!r} {list(own[name].shape)}")
            found[name] = value
        elif name in found and not torch.equal(found[name], value):
            problems.append(f"two different values for {name!r}, the second from {key!r}")
        else:
            found[name] = value
    problems += [f"nothing for the model's {name!r}" for name in own if name not in found]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"state_dict: expected the weights of a network like this model, found:{listed}")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return LoadReport(tuple(found), tuple(ignored))


def _translate(key: str) -> str | None:
    key = key.removeprefix("module.")
    for pattern, replacement in _KEY_MAP:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(replacement)
    return None


def _drop_running_statistics(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook of `load_state_dict`, which passes a copy, so the caller's dictionary stays unchanged."""
    dropped = [k for k in state_dict if k.startswith(f"{prefix}features.") and k.rpartition(".")[2] in _RUNNING]
    for key in dropped:
        del state_dict[key]
    if dropped:
        shown = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
        warnings.warn(
            f"Conv4 normalises by batch statistics and keeps no running ones: left out {len(dropped)} keys ({shown})",
            stacklevel=4,
        )


def _check_integer(argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}: expected an integer >= {least}, found {value!r}")


def _check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, found {value!r}")


def _check_images(ways: int, channels: int, widths: tuple[int, ...], image_size: int, name: str = "filters") -> None:
    checks = [("ways", ways, 2), ("channels", channels, 1), ("image_size", image_size, 1)]
    for argument, value, least in (*checks, *((name, width, 1) for width in widths)):
        _check_integer(argument, value, least)


def _check_instance_norm(norm: str, side: int, image_size: int) -> None:
    """`side` is the height and width of the last images that are normalised."""
    if norm == "instance" and side < 2:
        raise ValueError(
            f"image_size: expected images of which the last block normalises at least 2 x 2 pixels for norm "
            f"'instance', found {image_size}"
        )


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars; tied parameters count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
