"""The four workloads of the benchmarks, on random data of the right sizes.

  A  84 x 84 RGB, Conv4-32 with max-pooling, 1 shot, 1 query per class, T = 8: the official set-up of Sign-MAML
  B  28 x 28, Conv4-64 with stride 2 (Omniglot), 1 shot, 15 queries per class, T = 32
  C  32 x 32 RGB, Conv4-64 with max-pooling (FC100), 5 shots, 15 queries per class, T = 8
  D  sinusoid regression, MLP 1-40-40-1, 10 shots, 10 queries, T = 1000
By default all use sign-maml, K = 5 inner steps and float32; all except D are 5-way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import counts
import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from signmaml.models import MLP, Conv4

WAYS = 5
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}

METHODS = ("sign-maml", "fo-maml", "maml")

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One meta-step to compute.

    Attributes:
        model: The initial model; has the dtype and device of the data.
        data: support_x `[T, S, ...]`, support_y, query_x `[T, Q, ...]`, query_y.
        loss: "cross_entropy" or "mse".
        inner_lr: Rate of every inner step.
        steps: K.
        method: One of METHODS.
    """

    model: nn.Module
    data: Data
    loss: str
    inner_lr: float
    steps: int
    method: str = "sign-maml"

    @property
    def tasks(self) -> int:
        """T."""
        return self.data[0].shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.data[0].device

    @property
    def convolutional(self) -> bool:
        """Whether the model is a Conv4 rather than an MLP."""
        return isinstance(self.model, Conv4)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another precision."""
        data = tuple(value.to(dtype) if value.is_floating_point() else value for value in self.data)
        return replace(self, model=copy.deepcopy(self.model).to(dtype), data=data)

    def first(self, tasks: int) -> Problem:
        """The problem of the first tasks alone."""
        return replace(self, data=tuple(value[:tasks].contiguous() for value in self.data))

    def with_steps(self, steps: int) -> Problem:
        """A copy with another K."""
        return replace(self, steps=steps)


@dataclass(frozen=True)
class Workload:
    """A network and task sizes to measure a meta-step on.

    Attributes:
        summary: One line of description.
        net: The network for `counts`.
        shots: Support examples per class (per task in regression).
        queries: Query examples per class, likewise.
        tasks: Default T.
        inner_lr: Rate of the sign steps.
    """

    summary: str
    net: counts.ConvNet | counts.Perceptron
    shots: int
    queries: int
    tasks: int
    inner_lr: float

    @property
    def support(self) -> int:
        """S."""
        return self.shots * (WAYS if isinstance(self.net, counts.ConvNet) else 1)

    @property
    def query(self) -> int:
        """Q."""
        return self.queries * (WAYS if isinstance(self.net, counts.ConvNet) else 1)

    def flops(self, tasks: int, steps: int, method: str = "sign-maml") -> int:
        """FLOPs of one meta-step; see `counts`."""
        count = counts.second_order_flops if method == "maml" else counts.meta_step_flops
        return count(self.net, tasks=tasks, support=self.support, query=self.query, steps=steps)

    def problem(self, *, tasks: int, steps: int, device: torch.device, seed: int = 0) -> Problem:
        """Weights and data from a seed; the same for every implementation."""
        torch.manual_seed(seed)
        if isinstance(self.net, counts.ConvNet):
            net = self.net
            model: nn.Module = Conv4(net.ways, net.channels, net.filters, net.size, net.halving, net.blocks)
            data = _images(tasks, self.shots, self.queries, net.channels, net.size)
            loss = "cross_entropy"
        else:
            inputs, *hidden, outputs = self.net.widths
            model = MLP(inputs, outputs, hidden=hidden)
            data = _sinusoids(tasks, self.shots, self.queries)
            loss = "mse"
        return Problem(model.to(device), tuple(value.to(device) for value in data), loss, self.inner_lr, steps)


def _images(tasks: int, shots: int, queries: int, channels: int, size: int) -> Data:
    """Random images; time and memory do not depend on their content."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(WAYS).repeat_interleave(count).expand(tasks, -1).contiguous()
        return torch.rand(tasks, WAYS * count, channels, size, size), labels

    return (*draw(shots), *draw(queries))


def _sinusoids(tasks: int, shots: int, queries: int) -> Data:
    """Regression tasks of random amplitude and phase."""
    amplitude, phase = torch.rand(tasks, 1, 1) * 4.9 + 0.1, torch.rand(tasks, 1, 1) * torch.pi

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, count, 1) * 10 - 5
        return x, amplitude * torch.sin(x + phase)

    return (*draw(shots), *draw(queries))


WORKLOADS: dict[str, Workload] = {
    "A": Workload(
        report.WORKLOADS["A"],
        counts.ConvNet(3, 32, 84), 1, 1, 8, 0.0035,
    ),
    "B": Workload(
        report.WORKLOADS["B"],
        counts.ConvNet(1, 64, 28, halving="stride"), 1, 15, 32, 0.01,
    ),
    "C": Workload(
        report.WORKLOADS["C"],
        counts.ConvNet(3, 64, 32), 5, 15, 8, 0.01,
    ),
    "D": Workload(
        report.WORKLOADS["D"],
        counts.Perceptron((1, 40, 40, 1)), 10, 10, 1000, 0.01,
    ),
}  # fmt: skip
