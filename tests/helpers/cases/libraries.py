"""The convolutional networks of few-shot learning, written as in other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """learn2learn: attributes in a different order from their use in forward, and a lambda in place of no pooling."""

    def __init__(self, channels: int, filters: int, max_pool: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        stride = (int(2 * factor), int(2 * factor))
        if max_pool:
            self.max_pool: Callable[[Tensor], Tensor] = nn.MaxPool2d(stride, stride, ceil_mode=False)
            stride = (1, 1)
        else:
            self.max_pool = lambda x: x
        self.normalize = nn.BatchNorm2d(filters, affine=True)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, filters, (3, 3), stride=stride, padding=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.normalize(x)
        x = self.relu(x)
        return self.max_pool(x)


class ConvBase(nn.Sequential):
    def __init__(self, filters: int, channels: int, max_pool: bool, layers: int, factor: float = 1.0) -> None:
        super().__init__(*(ConvBlock(filters if i else channels, filters, max_pool, factor) for i in range(layers)))


class MiniImagenetCNN(nn.Module):
    """learn2learn, earlier versions: blocks are registered once, and a view to a fixed size flattens the features."""

    def __init__(self, ways: int = 3, filters: int = 8, layers: int = 4, side: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.base = ConvBase(filters, channels, True, layers)
        self.linear = nn.Linear(side * side * filters, ways, bias=True)
        self.features = side * side * filters

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        return self.linear(x.view(-1, self.features))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class CNN4(nn.Module):
    """learn2learn, later versions."""

    def __init__(self, ways: int = 3, filters: int = 8, layers: int = 4, side: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvBase(filters, channels, True, layers), Flatten())
        self.classifier = nn.Linear(side * side * filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class OmniglotCNN(nn.Module):
    """learn2learn: strided, the mean over height and width, and the blocks registered under two names."""

    def __init__(self, ways: int = 3, filters: int = 8, layers: int = 4, size: int = 16) -> None:
        super().__init__()
        self.base = ConvBase(filters, 1, False, layers)
        self.features = nn.Sequential(
            Lambda(lambda x: x.view(-1, 1, size, size)), self.base, Lambda(lambda x: x.mean(dim=[2, 3])), Flatten()
        )
        self.classifier = nn.Linear(filters, ways, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def torchmeta(ways: int = 3, filters: int = 8, side: int = 1, channels: int = 3) -> nn.Module:
    """Named layers in nested `nn.Sequential`; BatchNorm with momentum 1 and no running statistics."""

    def block(inputs: int) -> nn.Module:
        layers = OrderedDict(
            conv=nn.Conv2d(inputs, filters, kernel_size=3, stride=1, padding=1, bias=True),
            norm=nn.BatchNorm2d(filters, momentum=1.0, track_running_stats=False),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
        )
        return nn.Sequential(layers)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                OrderedDict((f"layer{i + 1}", block(filters if i else channels)) for i in range(4))
            )
            self.classifier = nn.Linear(filters * side * side, ways)

        def forward(self, x: Tensor) -> Tensor:
            features = self.features(x)
            features = features.view((features.size(0), -1))
            return self.classifier(features)

    return Network()


def one_sequence(ways: int = 3, filters: int = 8, side: int = 1, channels: int = 1, layers: int = 4) -> nn.Module:
    """All layers in one `nn.Sequential`, without convolution biases and with in-place ReLU, as in higher's example."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [
            nn.Conv2d(filters if i else channels, filters, 3, padding="same", bias=False),
            nn.BatchNorm2d(filters, momentum=1, affine=True),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, 2),
        ]
    return nn.Sequential(*parts, nn.Identity(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(filters * side * side, ways))


class Functional(nn.Module):
    """Functions for operations without parameters; the layers are in lists."""

    def __init__(self, ways: int = 3, filters: int = 8, layers: int = 3, side: int = 2, channels: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, eps=1e-3) for _ in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(filters if i else channels, filters, 3, 1, 1) for i in range(layers))
        self.out = nn.Linear(filters * side * side, ways)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.out(x.reshape(x.shape[0], -1))


class PoolsFirst(nn.Module):
    """The ReLU after the pooling, which changes nothing; global average pooling."""

    def __init__(self, ways: int = 3, filters: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters)
        self.conv2, self.norm2 = nn.Conv2d(filters, filters, 3, padding=1), nn.BatchNorm2d(filters)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Linear(filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.norm1(self.conv1(x)), (2, 2)).relu_()
        x = torch.relu(F.max_pool2d(self.norm2(self.conv2(x)), kernel_size=2, stride=2))
        return self.out(torch.flatten(self.average(x), start_dim=1))
