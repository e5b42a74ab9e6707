"""Small networks and tasks that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """As in learn2learn: attributes in a different order from their use in forward."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.max_pool = nn.MaxPool2d(2)
        self.normalize = nn.BatchNorm2d(filters, affine=True)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


def conv4(ways: int = 3, channels: int = 1, filters: int = 4, size: int = 16, layers: int = 4) -> nn.Module:
    """A learn2learn-style Conv4."""
    blocks = [ConvBlock(channels if i == 0 else filters, filters) for i in range(layers)]
    side = size // 2**layers
    return nn.Sequential(nn.Sequential(*blocks), nn.Flatten(), nn.Linear(filters * side * side, ways))


def mlp(inputs: int = 4, ways: int = 3, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """An MLP with two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, ways))


class Attention(nn.Module):
    """A very small vision transformer: patches, one encoder layer, mean, head."""

    def __init__(self, ways: int = 3, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 16, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(nn.Module):
    """A GRU over the rows of an image."""

    def __init__(self, ways: int = 3, width: int = 16) -> None:
        super().__init__()
        self.gru = nn.GRU(width, 8, batch_first=True)
        self.head = nn.Linear(8, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.flatten(1, 2))[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class WithUnused(nn.Module):
    """Has a layer that the forward never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class FunctionalDropout(nn.Module):
    """Draws random numbers without any dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.5, self.training))


def image_tasks(
    tasks: int = 3,
    ways: int = 3,
    shots: int = 2,
    queries: int = 3,
    channels: int = 1,
    size: int = 16,
    dtype=torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise around one mean image per class, so that there is something to learn."""
    means = torch.randn(tasks, ways, 1, channels, size, size, dtype=dtype)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = means + torch.randn(tasks, ways, count, channels, size, size, dtype=dtype)
        y = torch.arange(ways).repeat_interleave(count).expand(tasks, -1)
        return x.flatten(1, 2), y.contiguous()

    return *draw(shots), *draw(queries)


def vector_tasks(
    tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 3, inputs: int = 4, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with vectors."""
    support_x, support_y, query_x, query_y = image_tasks(tasks, ways, shots, queries, 1, inputs, dtype)
    return support_x[:, :, 0, 0], support_y, query_x[:, :, 0, 0], query_y


def regression_tasks(tasks: int = 3, shots: int = 5, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sinusoids of random phase, `[T, S, 1]`."""
    phase = torch.rand(tasks, 1, 1, dtype=dtype) * 3
    support_x, query_x = (torch.rand(tasks, shots, 1, dtype=dtype) * 10 - 5 for _ in range(2))
    return support_x, torch.sin(support_x + phase), query_x, torch.sin(query_x + phase)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    """`.grad` by name; clears the gradients of the model."""
    taken = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return taken
