"""The names of networks, as `--model` takes them. Nothing here imports torch.

| name                        | network                                                               |
|-----------------------------|-----------------------------------------------------------------------|
| `convN`                     | N convolutional blocks (`models.Conv4`), all with `filters` channels    |
| `convN-W`                   | the same with W channels                                              |
| `convN-W1-...-WN`           | with a number of channels for each block                               |
| `resnet12`                  | `models.ResNet12` with 64, 160, 320 and 640 channels                    |
| `resnet12-W1-W2-W3-W4`      | with other channels                                                   |
| `mlp`                       | a multilayer perceptron (`models.MLP`)                                |
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

EXPECTED = (
    "'convN' such as 'conv4', 'convN-W1-...-WN' such as 'conv4-64-96-128-256', 'resnet12', 'resnet12-W-W-W-W', 'mlp'"
)
NORMS = ("batch", "group", "instance", "none")
ACTIVATIONS = ("relu", "leaky-relu", "elu", "gelu", "silu", "tanh")
RESNET12_WIDTHS = (64, 160, 320, 640)
_USUAL = ("conv4", "conv4-64-96-128-256", "resnet12", "mlp")


class Network(NamedTuple):
    """What a name says.

    Attributes:
        kind: "conv", "resnet12" or "mlp".
        blocks: Number of blocks; 0 for "mlp".
        widths: Channels of each block; empty if the name does not say them.
    """

    kind: str
    blocks: int = 0
    widths: tuple[int, ...] = ()


def named(name: str) -> Network:
    """Reads the name of a network.

    Raises:
        ValueError: There is no such network; the message lists what there is.

    Example:
        >>> named("conv4-64-96-128-256")
        Network(kind='conv', blocks=4, widths=(64, 96, 128, 256))
        >>> named("conv6-64").widths
        (64, 64, 64, 64, 64, 64)
    """
    if name == "mlp":
        return Network("mlp")
    found = re.fullmatch(r"(?:conv([1-9]\d?)|resnet12)((?:-[1-9]\d{0,5})*)", name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), _USUAL, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"model: expected one of {EXPECTED}, found {name!r}{hint}")
    widths = tuple(map(int, found[2].split("-")[1:]))
    if found[1] is None:
        if len(widths) not in (0, 4):
            raise ValueError(f"model: expected widths of blocks, 4 of them, found {len(widths)} in {name!r}")
        return Network("resnet12", 4, widths or RESNET12_WIDTHS)
    blocks = int(found[1])
    if len(widths) not in (0, 1, blocks):
        counts = f"1 or {blocks}" if blocks > 1 else "1"
        raise ValueError(f"model: expected widths of blocks, {counts} of them, found {len(widths)} in {name!r}")
    return Network("conv", blocks, widths * blocks if len(widths) == 1 else widths)
