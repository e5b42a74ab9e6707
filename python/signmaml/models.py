"""The networks of the few-shot literature, and loading of weights trained with other libraries."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

POOLINGS = ("max", "stride")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm on batch statistics, ReLU, and downsampling by 2x2 max-pooling or stride 2."""

    def __init__(self, channels: int, filters: int, pooling: str) -> None:
        super().__init__()
        stride = 2 if pooling == "stride" else 1
        self.conv = nn.Conv2d(channels, filters, 3, stride=stride, padding=1)
        self.normalize = nn.BatchNorm2d(filters, track_running_stats=False)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2) if pooling == "max" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.normalize(self.conv(x))))


class Conv4(nn.Module):
    """The four-block convolutional network of the MAML literature, in learn2learn's layout.

    Each block is a 3x3 convolution (padding 1, with bias), BatchNorm, ReLU and a halving of the image size; a linear
    classifier takes the flattened `[C, H, W]` features. Parameters are named `features.{i}.conv.{weight,bias}`,
    `features.{i}.normalize.{weight,bias}` and `classifier.{weight,bias}`.

    BatchNorm always uses the statistics of the current batch, in training and in evaluation, as MAML's official code
    does: there are no running buffers. A state dict that has some (`running_mean`, ...) can still be loaded; they are
    ignored with a warning.

    Initialisation: Xavier-uniform weights of convolutions and classifier from torch's global generator, biases 0,
    BatchNorm with scale 1 and shift 0.

    Args:
        ways: Number of classes, >= 2; size of the prediction.
        channels: Channels of the images, >= 1.
        filters: Channels of every block, >= 1; 32 and 64 are usual.
        image_size: Height and width of the images in pixels; at least `2 ** layers` for "max".
        pooling: "max" (2x2 max-pooling, rounding down) or "stride" (stride-2 convolutions, rounding up).
        layers: Number of blocks, >= 1.

    Raises:
        ValueError: An argument is out of its range, or the image shrinks to nothing.

    Example:
        >>> model = Conv4(ways=5, channels=1, filters=32, image_size=28)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 5])
        >>> sum(p.numel() for p in Conv4(ways=5, channels=3, image_size=84).parameters())
        32901
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 3,
        filters: int = 32,
        image_size: int = 84,
        pooling: str = "max",
        layers: int = 4,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("ways", ways, 2),
            ("channels", channels, 1),
            ("filters", filters, 1),
            ("image_size", image_size, 1),
            ("layers", layers, 1),
        ):
            _check_integer(argument, value, least)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(map(repr, POOLINGS))}, found {pooling!r}")
        side = image_size
        for _ in range(layers):
            side = side // 2 if pooling == "max" else (side + 1) // 2
        if side == 0:
            raise ValueError(
                f"image_size: expected at least {2**layers} pixels for {layers} blocks with 2x2 max-pooling, "
                f"found {image_size}"
            )
        self.ways, self.channels, self.image_size = ways, channels, image_size
        widths = [channels] + [filters] * layers
        self.features = nn.Sequential(*(ConvBlock(i, o, pooling) for i, o in pairwise(widths)))
        self.classifier = nn.Linear(filters * side * side, ways)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(_drop_running_statistics)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[B, ways]` of images `[B, channels, image_size, image_size]`."""
        return self.classifier(self.features(x).flatten(1))


class MLP(nn.Module):
    """Fully connected network; images are flattened.

    Parameters are named `features.{i}.{weight,bias}` and `classifier.{weight,bias}` (the output layer, also in
    regression) and start as torch's `nn.Linear` does.

    Args:
        inputs: Size of one example, >= 1.
        outputs: Size of one prediction, >= 1.
        hidden: Widths of the hidden layers; may be empty. Default (40, 40), as in MAML's sinusoid experiment.
        activation: "relu" or "tanh".

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
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, found {activation!r}")
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


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars; tied parameters count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
