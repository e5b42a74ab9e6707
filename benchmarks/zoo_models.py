"""Typical models that no whole-step kernel supports, and the plain loop that users write for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model with tasks for it.

    Attributes:
        make: The model.
        shape: Shape of one example.
        ways: Classes; 0: regression.
        tasks: T.
        support: Examples of a support set.
        query: Examples of a query set.
        tokens: Number of words, if examples are token ids.
        options: Further arguments of `meta_step`.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: int = 5
    tasks: int = 8
    support: int = 5
    query: int = 25
    tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def data(self) -> Data:
        """Random tasks."""

        def draw(count: int) -> tuple[Tensor, Tensor]:
            if self.tokens:
                x = torch.randint(self.tokens, (self.tasks, count, *self.shape))
            else:
                x = torch.randn(self.tasks, count, *self.shape)
            if not self.ways:
                return x, torch.sin(x)
            return x, torch.arange(count).remainder(self.ways).expand(self.tasks, -1).contiguous()

        return (*draw(self.support), *draw(self.query))

    @property
    def loss(self) -> str:
        """The `loss` argument of `meta_step`."""
        return "cross_entropy" if self.ways else "mse"


def conv4(
    norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module] = nn.ReLU, filters: int = 32
) -> nn.Module:
    """Four blocks of convolution, norm, activation and pooling on 28 x 28 images."""
    layers: list[nn.Module] = []
    for block in range(4):
        inputs = filters if block else 1
        layers += [nn.Conv2d(inputs, filters, 3, padding=1), norm(filters), activation(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, 5))


def of_widths(*widths: int) -> nn.Module:
    """Blocks as those of `conv4`, each with its own width, on 32 x 32 images in colour."""
    layers: list[nn.Module] = []
    for inputs, filters in pairwise((3, *widths)):
        layers += [
            nn.Conv2d(inputs, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.LeakyReLU(0.1), nn.MaxPool2d(2)
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * widths[-1], 5))


def series() -> nn.Module:
    """Three convolutions of time series of 6 channels and 128 steps."""
    layers: list[nn.Module] = []
    for inputs, filters in pairwise((6, 32, 64, 64)):
        layers += [nn.Conv1d(inputs, filters, 5, padding=2), nn.BatchNorm1d(filters), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 5))


class Residual(nn.Module):
    """A block of ResNet-12: three convolutions, a 1x1 shortcut, LeakyReLU, pooling."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.LeakyReLU(0.1),
            nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.LeakyReLU(0.1),
            nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, filters, 1, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.leaky_relu(self.layers(x) + self.shortcut(x), 0.1), 2)


def resnet12(*widths: int) -> nn.Module:
    """A ResNet-12 for 32 x 32 images in colour."""
    blocks = [Residual(a, b) for a, b in pairwise((3, *widths))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.GELU, norm: bool = False) -> nn.Module:
    """Linear layers; with `norm`, a BatchNorm after each except the last."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-2], widths[-1]))


class Transformer(nn.Module):
    """Token embedding, two encoder layers, mean, head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(100, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x)).mean(1))


class Vision(nn.Module):
    """A small vision transformer: patches of 7 x 7, two encoder layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(nn.Module):
    """A GRU over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Sine(nn.Module):
    """The activation of a SIREN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


ANIL = {"adapt": ["17.*"]}
WORKLOADS: dict[str, Workload] = {
    "Conv4-32, GroupNorm": Workload(lambda: conv4(lambda f: nn.GroupNorm(4, f)), (1, 28, 28)),
    "Conv4-32, no norm": Workload(lambda: conv4(lambda f: nn.Identity()), (1, 28, 28)),
    "Conv4-32, LeakyReLU": Workload(lambda: conv4(nn.BatchNorm2d, lambda: nn.LeakyReLU(0.1)), (1, 28, 28)),
    "Conv4-32, GroupNorm, ANIL": Workload(lambda: conv4(lambda f: nn.GroupNorm(4, f)), (1, 28, 28), options=ANIL),
    "Conv4 64-96-128-256, LeakyReLU": Workload(lambda: of_widths(64, 96, 128, 256), (3, 32, 32), tasks=4),
    "Conv3, series": Workload(series, (6, 128)),
    "ResNet-12, narrow": Workload(lambda: resnet12(16, 32, 64, 64), (3, 32, 32), tasks=4),
    "ResNet-12 64-128-256-512": Workload(lambda: resnet12(64, 128, 256, 512), (3, 32, 32), tasks=2),
    "OmniglotFC": Workload(lambda: mlp(784, 256, 128, 64, 64, 5, activation=nn.ReLU, norm=True), (1, 28, 28)),
    "MLP 20-32-32-5, GELU": Workload(lambda: mlp(20, 32, 32, 5), (20,), tasks=32),
    "MLP 64-256-256-5, GELU": Workload(lambda: mlp(64, 256, 256, 5), (64,), tasks=32),
    "MLP 64-1024-1024-5, GELU": Workload(lambda: mlp(64, 1024, 1024, 5), (64,)),
    "SIREN 1-40-40-1": Workload(lambda: mlp(1, 40, 40, 1, activation=Sine), (1,), ways=0, tasks=100, query=10),
    "Transformer 32, 16 tokens": Workload(lambda: Transformer(32, 2), (16,), tokens=100),
    "Transformer 64, 48 tokens": Workload(lambda: Transformer(64, 4), (48,), tokens=100),
    "ViT 64, 16 patches": Workload(Vision, (1, 28, 28)),
    "GRU 32, 20 steps": Workload(Recurrent, (20, 16)),
    "Conv4-32, GroupNorm, learnable rate": Workload(
        lambda: conv4(lambda f: nn.GroupNorm(4, f)), (1, 28, 28), options={"learns_rate": True}
    ),
}


def loop(work: Workload, model: nn.Module, data: Data, *, steps: int, rate: Any, method: str) -> None:
    """A user's loop: one model copy per task, one gradient per step; adds the mean meta-gradient to `.grad`."""
    if method == "maml" or isinstance(rate, Tensor):
        with (
            sdpa_kernel(SDPBackend.MATH) if method == "maml" else nullcontext()
        ):  # other attention kernels have no second derivative
            _functional_loop(work, model, data, steps, rate, method)
        return
    loss = F.cross_entropy if work.ways else F.mse_loss
    names = [name for name, _ in model.named_parameters()]
    moving = [i for i, name in enumerate(names) if "adapt" not in work.options or name.startswith("17.")]
    for sx, sy, qx, qy in zip(*data, strict=True):
        learner = copy.deepcopy(model)
        parameters = list(learner.parameters())
        adapted = [parameters[i] for i in moving]
        for _ in range(steps):
            grads = torch.autograd.grad(loss(learner(sx), sy), adapted)
            with torch.no_grad():
                for p, g in zip(adapted, grads, strict=True):
                    p -= rate * (g.sign() if method == "sign-maml" else g)
        grads = torch.autograd.grad(loss(learner(qx), qy), parameters)
        _add(list(model.parameters()), grads, work.tasks)


def compiled_loop(work: Workload, model: nn.Module, data: Data, *, steps: int, rate: float, together: bool) -> Callable:
    """The loop with torch.compile, as in peers/compiled.py: gradient and sign step of one task, or of all by vmap."""
    loss = F.cross_entropy if work.ways else F.mse_loss
    without_buffers = copy.deepcopy(model)  # torch.func rejects a BatchNorm that updates running statistics
    for module in without_buffers.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    gradients = grad(lambda phi, x, y: loss(functional_call(without_buffers, phi, (x,)), y))
    if together:
        gradients = vmap(gradients)

    def step(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        grads = gradients(phi, x, y)
        return {name: value - rate * grads[name].sign() for name, value in phi.items()}

    compiled_step = torch.compile(step, dynamic=False)
    compiled_gradients = torch.compile(gradients, dynamic=False)

    def run() -> None:
        theta = {name: p.detach() for name, p in model.named_parameters()}
        if together:
            theta = {name: value.expand(work.tasks, *value.shape).contiguous() for name, value in theta.items()}
        for sx, sy, qx, qy in (data,) if together else zip(*data, strict=True):
            phi = theta
            for _ in range(steps):
                phi = compiled_step(phi, sx, sy)
            found = compiled_gradients(phi, qx, qy).values()
            _add(list(model.parameters()), tuple(g.sum(0) for g in found) if together else tuple(found), work.tasks)

    return run


def _functional_loop(work: Workload, model: nn.Module, data: Data, steps: int, rate: Any, method: str) -> None:
    loss = F.cross_entropy if work.ways else F.mse_loss
    theta = dict(model.named_parameters())
    moving = [name for name in theta if "adapt" not in work.options or name.startswith("17.")]
    wanted = [*theta.values(), *([rate] if isinstance(rate, Tensor) else [])]
    for sx, sy, qx, qy in zip(*data, strict=True):
        phi = dict(theta)
        for _ in range(steps):
            error = loss(functional_call(model, phi, (sx,)), sy)
            grads = torch.autograd.grad(error, [phi[name] for name in moving], create_graph=method == "maml")
            for name, g in zip(moving, grads, strict=True):
                phi[name] = phi[name] - rate * (g.sign() if method == "sign-maml" else g)
        grads = torch.autograd.grad(loss(functional_call(model, phi, (qx,)), qy), wanted)
        _add(wanted, grads, work.tasks)


def _add(parameters: list[Tensor], grads: tuple[Tensor, ...], tasks: int) -> None:
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            if p.grad is None:
                p.grad = g / tasks
            else:
                p.grad.add_(g, alpha=1 / tasks)
