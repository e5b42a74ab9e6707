"""Chains of usual layers in native code: every kind and size as the reference computes it, in every kind of call."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.cases import layers_cases, nets
from signmaml.models import ResNet12
from signmaml_ext import (
    Adam,
    Lion,
    Momentum,
    Plain,
    Sharpness,
    Signum,
    adapt,
    chain,
    evaluate,
    explain,
    layers,
    meta_step,
    structure,
)
from signmaml_ext._loader import C
from signmaml_ext.checks import check_problem

OPTIONS: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 3, "seed": 3}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def tasks(
    *shape: int, ways: int = 3, count: int = 3, shots: int = 2, queries: int = 4, dtype: torch.dtype = torch.float64
) -> Data:
    """Examples `[T, S, *shape]` and labels."""

    def draw(of_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat(count, of_class)
        return torch.randn(*y.shape, *shape, dtype=dtype) + 0.3 * y.reshape(*y.shape, *[1] * len(shape)).to(dtype), y

    return *draw(shots), *draw(queries)


def images(*kinds: nn.Module, channels: int = 3, features: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*kinds, nn.Flatten(), nn.Linear(features, 3, bias=bias))


def block(
    inputs: int, outputs: int, norm: Callable[[int], nn.Module], after: nn.Module, **conv: Any
) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, **conv), norm(outputs), after, nn.MaxPool2d(2)]


def of_widths(norm: Callable[[int], nn.Module], after: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Three blocks of growing width, on images 3 x 12 x 14."""
    return images(*block(3, 8, norm, after()), *block(8, 20, norm, after()), *block(20, 12, norm, after()), features=12)


class Functions(nn.Module):
    """Layers as functions, and a head without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 5, 2, 2), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.2, inplace=True)
        return self.head(F.avg_pool2d(F.gelu(x), 3, 1, 1).mean((2, 3)))


class Drops(nn.Module):
    """Dropouts as functions, one of which does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 30, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.max_pool2d(torch.relu(self.conv(x)), 2), 0.3, self.training)
        return F.dropout(self.head(F.dropout(x.flatten(1), 0.5, training=False)), p=0.2)


class SeriesMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 8, 5, padding=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(dim=-1))


SIZE = (3, 12, 14)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU, "LeakyReLU": lambda: nn.LeakyReLU(0.1), "ELU": lambda: nn.ELU(0.7), "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU("tanh"), "SiLU": nn.SiLU, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid,
}  # fmt: skip
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm, widths": (lambda: of_widths(nn.BatchNorm2d), SIZE),
    "BatchNorm without scale": (lambda: of_widths(lambda c: nn.BatchNorm2d(c, affine=False)), SIZE),
    "GroupNorm": (lambda: of_widths(lambda c: nn.GroupNorm(4, c)), SIZE),
    "GroupNorm of one group": (lambda: of_widths(lambda c: nn.GroupNorm(1, c, eps=1e-3)), SIZE),
    "GroupNorm of one channel": (lambda: of_widths(lambda c: nn.GroupNorm(c, c)), SIZE),
    "InstanceNorm": (lambda: of_widths(nn.InstanceNorm2d), SIZE),
    "InstanceNorm with scale": (lambda: of_widths(lambda c: nn.InstanceNorm2d(c, affine=True)), SIZE),
    "no norm": (lambda: of_widths(lambda c: nn.Identity()), SIZE),
    "functions": (Functions, SIZE),
    "no pooling, no bias": (
        lambda: images(
            nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 5, 1),
            nn.AdaptiveAvgPool2d(1), features=5, bias=False,
        ),
        SIZE,
    ),
    "windows": (
        lambda: images(
            nn.Conv2d(3, 6, (5, 2), (2, 3), (2, 1)), nn.BatchNorm2d(6), nn.MaxPool2d(3, 1, 1), nn.SiLU(),
            nn.Conv2d(6, 9, 4, 3, 3), nn.AvgPool2d((2, 1), count_include_pad=False), nn.Sigmoid(), features=9 * 3,
        ),
        SIZE,
    ),
    "stride beyond the window": (
        lambda: images(nn.Conv2d(3, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 8, 1, 2), nn.Tanh(), features=8 * 42),
        SIZE,
    ),
    "average over a border": (
        lambda: images(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.ReLU(), features=4 * 30),
        SIZE,
    ),
    "pooling that drops a row": (
        lambda: images(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(3), features=4 * 12), SIZE,
    ),
    "layers in another order": (
        lambda: images(
            nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 3, 1, 1), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.Tanh(),
            nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.GroupNorm(3, 6), features=6 * 42,
        ),
        SIZE,
    ),
    "OmniglotFC": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(30, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.BatchNorm1d(16),
            nn.ReLU(), nn.Linear(16, 3),
        ),
        (1, 5, 6),
    ),
    "features with LayerNorm": (
        lambda: nn.Sequential(
            nn.Linear(7, 19), nn.LayerNorm(19), nn.GELU(), nn.Linear(19, 300), nn.SiLU(), nn.Linear(300, 3, bias=False)
        ),
        (7,),
    ),
    "one linear layer": (lambda: nn.Sequential(nn.Linear(7, 3)), (7,)),
    "series": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3, bias=False),
            nn.GroupNorm(3, 6), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(12, 3),
        ),
        (2, 23),
    ),
    "mean of series": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 5), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
        ),
        (2, 23),
    ),
    "mean of series as a method": (lambda: SeriesMean(), (2, 23)),
    "dropout of features": (
        lambda: nn.Sequential(
            nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(16, 12), nn.Dropout(0.5), nn.GELU(), nn.Linear(12, 3),
        ),
        (7,),
    ),
    "dropout of channels and of values": (
        lambda: images(
            *block(3, 8, nn.BatchNorm2d, nn.ReLU()), nn.Dropout2d(0.4), *block(8, 20, nn.BatchNorm2d, nn.ReLU()),
            nn.Dropout(0.3), nn.Conv2d(20, 12, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Dropout(0.5),
            features=12 * 9,
        ),
        SIZE,
    ),
    "dropout of series": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Dropout1d(0.3), nn.MaxPool1d(2), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(72, 3),
        ),
        (2, 23),
    ),
    "dropout as functions": (Drops, SIZE),
    "dropout of channels that are features": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(8, 3)
        ),
        SIZE,
    ),
    "one image wide": (lambda: of_widths(nn.BatchNorm2d), (3, 8, 8)),
    "130 channels": (
        lambda: images(
            nn.Conv2d(3, 130, 3, 1, 1), nn.GroupNorm(2, 130), nn.ReLU(), nn.Conv2d(130, 10, 3, 1, 1),
            nn.GroupNorm(2, 10), nn.ReLU(), nn.Conv2d(10, 300, 3, 1, 1), nn.GroupNorm(3, 300),
            nn.Conv2d(300, 4, 3, 1, 1), nn.ReLU(), features=4 * 16,
        ),
        (3, 4, 4),
    ),
    **{
        name: (lambda make=make: of_widths(lambda c: nn.GroupNorm(2, c), make), SIZE)
        for name, make in ACTIVATIONS.items()
    },
    **layers_cases.RESIDUAL,
    "ResNet12": (lambda: ResNet12(3, 3, (4, 6, 6, 9), 16), (3, 16, 16)),
}  # fmt: skip


def compare(model: nn.Module, data: Data, *, of: float = 1e-9, **options: Any) -> None:
    """Asserts that the family serves the call, and that all of its results are the reference's."""
    options = {**OPTIONS, **options}
    found = explain(model, *data, **options)
    assert (found.backend, found.family) == ("cpu", "layers"), found
    before = copy.deepcopy(model.state_dict())
    ours = meta_step(model, *data, **options)
    gradients = nets.grads(model)
    theirs = meta_step(model, *data, **options, backend="torch")
    for name in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=of, atol=of, equal_nan=True)
    torch.testing.assert_close(gradients, nets.grads(model), rtol=of, atol=of / 10)
    mine, its = (evaluate(model, *data, **options, backend=backend) for backend in ("auto", "torch"))
    torch.testing.assert_close(mine.logits, its.logits, rtol=of, atol=of, equal_nan=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture(params=C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = C.cpu_isa()
    C.select_cpu_isa(request.param)
    yield request.param
    C.select_cpu_isa(before)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("name", NETS)
def test_every_network_as_the_reference(name: str, method: str, isa: str) -> None:
    make, shape = NETS[name]
    compare(make().double(), tasks(*shape), method=method)


@pytest.mark.parametrize(
    "name", ["GroupNorm", "BatchNorm, widths", "OmniglotFC", "series", "dropout of channels and of values"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 0},
        {"adapt": ["*.weight"]},
        {"adapt": ["*.bias"]},
        {"inner_lr": torch.tensor([0.1, 0.01, 0.02], dtype=torch.float64)},
        {"task_state": "int8"},
        {"sharpness": Sharpness(0.05, "l2")},
        {"sharpness": Sharpness(0.05, "linf", adaptive=True)},
        {"nonfinite": "skip"},
        {"method": "maml", "adapt": ["*.weight"]},
        {"method": "maml", "adapt": ["*.bias"]},
        {"method": "maml", "inner_steps": 0},
        {"method": "maml", "nonfinite": "skip"},
        {"method": "maml", "sharpness": Sharpness(0.05, "l2")},
        {"method": "maml", "sharpness": Sharpness(0.05, "linf", adaptive=True)},
        {"method": "maml", "inner_rule": Momentum(0.9)},
        {"method": "maml", "inner_rule": Adam()},
        {"method": "fo-maml", "inner_rule": Momentum(0.5, weight_decay=0.1), "sharpness": Sharpness(0.05, "l2")},
        {"inner_rule": Signum(0.9)},
        {"inner_rule": Lion(weight_decay=0.3), "adapt": ["*.weight"]},
        {"inner_rule": Plain(weight_decay=0.1)},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_every_kind_of_call(name: str, options: dict[str, Any]) -> None:
    make, shape = NETS[name]
    compare(make().double(), tasks(*shape), **options)


@pytest.mark.parametrize("name", ["GroupNorm", "features with LayerNorm"])
@pytest.mark.parametrize("part", ["the head", "the body", "nothing of the head"])
def test_exact_maml_of_a_part(name: str, part: str) -> None:
    make, shape = NETS[name]
    model = make().double()
    names = [name for name, _ in model.named_parameters()]
    if part == "nothing of the head":
        for name in names[-2:]:
            model.get_parameter(name).requires_grad_(False)
        compare(model, tasks(*shape), method="maml", inner_lr=0.3)
        return
    compare(model, tasks(*shape), method="maml", inner_lr=0.3, adapt=names[-2:] if part == "the head" else names[:-2])


def test_exact_maml_of_a_few_tasks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.run, "TOGETHER_BYTES", 1)
    make, shape = NETS["GroupNorm"]
    compare(make().double(), tasks(*shape, count=5), method="maml")


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_rates_that_learn_and_vary(method: str) -> None:
    make, shape = NETS["GroupNorm"]
    model, data, found = make().double(), tasks(*shape), []
    for backend in ("auto", "torch"):
        rates = {
            name: torch.full_like(parameter, 0.02).requires_grad_() if i % 2 else torch.tensor([0.01, 0.03, 0.02],
            dtype=torch.float64).reshape(3, *[1] * parameter.ndim).requires_grad_()
            for i, (name, parameter) in enumerate(model.named_parameters())
        }  # fmt: skip
        meta_step(model, *data, **{**OPTIONS, "inner_lr": rates}, method=method, backend=backend)
        found.append({name: rate.grad for name, rate in rates.items()})
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-11)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found[0].values())


def test_parameters_that_do_not_train() -> None:
    make, shape = NETS["GroupNorm"]
    model = make().double()
    for name in ("0.weight", "5.bias", "13.weight"):
        model.get_parameter(name).requires_grad_(False)
    compare(model, tasks(*shape))


def test_parameters_and_images_in_another_memory_format() -> None:
    make, shape = NETS["GroupNorm"]
    model = make().double().to(memory_format=torch.channels_last)
    data = tasks(*shape)
    data = (data[0].transpose(3, 4).contiguous().transpose(3, 4), data[1], data[2], data[3])
    compare(model, data, adapt=["13.*"])
    model.zero_grad()
    compare(model, data)
    compare(model, data, method="maml")


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_targets_of_a_regression(method: str) -> None:
    model = nn.Sequential(nn.Linear(2, 17), nn.LayerNorm(17), nn.Tanh(), nn.Linear(17, 2)).double()
    x, y = torch.randn(3, 6, 2, dtype=torch.float64), torch.randn(3, 6, 2, dtype=torch.float64)
    compare(model, (x, y, x + 1, y), loss="mse", method=method)


@pytest.mark.parametrize("shape", [(4, 3), (1, 7), (9, 1)])
def test_a_view_as_images(shape: tuple[int, int]) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, (1, 1)), nn.Linear(4 * shape[0] * shape[1], 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x.view(-1, 2, *shape))).flatten(1))

    compare(Views().double(), tasks(2 * shape[0] * shape[1]))


def chain_at_random(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A chain of layers whose kinds and sizes come from a seed, and the shape of its examples."""
    draw = random.Random(seed)
    channels, height, width = shape = (draw.randint(1, 10), draw.randint(5, 13), draw.randint(5, 13))
    found: list[nn.Module] = []
    for _ in range(draw.randint(1, 4)):
        outputs, kernel = draw.randint(1, 36), (draw.randint(1, 4), draw.randint(1, 4))
        if draw.random() < 0.5:
            kernel = (3, 3)
        stride = draw.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        padding = (draw.randint(0, kernel[0] - 1), draw.randint(0, kernel[1] - 1))
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=draw.random() < 0.5)
        sizes = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
        if min(sizes) < 2:
            continue
        found.append(conv)
        channels, (height, width) = outputs, sizes
        for _ in range(draw.randint(0, 3)):
            kind = draw.choice(["batch", "group", "activation", "max", "average", "dropout"])
            if kind == "batch":
                found.append(nn.BatchNorm2d(channels, affine=draw.random() < 0.7))
            elif kind == "group":
                groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
                found.append(nn.GroupNorm(groups, channels))
            elif kind == "dropout":
                found.append(draw.choice([nn.Dropout, nn.Dropout2d])(draw.choice([0.1, 0.5])))
            elif kind == "activation":
                found.append(draw.choice(list(ACTIVATIONS.values()))())
            elif min(height, width) >= 4:
                window, step = draw.randint(2, 3), draw.randint(1, 3)
                pool = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
                found.append(pool(window, step, window // 2 if draw.random() < 0.5 else 0))
                pad = found[-1].padding
                height, width = ((n + 2 * pad - window) // step + 1 for n in (height, width))
    return nn.Sequential(*found, nn.Flatten(), nn.Linear(channels * height * width, 3)), shape


@pytest.mark.parametrize("seed", range(40))
def test_chains_at_random(seed: int) -> None:
    model, shape = chain_at_random(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    data = tasks(*shape, shots=1 + seed % 3)
    if not any(isinstance(module, nn.Conv2d) for module in model):
        model.insert(0, nn.Flatten())
    for method in ("fo-maml", "maml"):
        compare(model.double(), data, of=1e-7, method=method)


class AtRandom(nn.Module):
    """Layers that read any earlier ones, and sums of any two, from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        channels = draw.randint(1, 20)
        self.parts = nn.ModuleList([nn.Conv2d(3, channels, 3, 1, 1)])
        self.reads: list[tuple[int, ...]] = [(0,)]
        for _ in range(draw.randint(4, 12)):
            recent = range(max(1, len(self.parts) - 2), len(self.parts) + 1)
            kind = draw.choice(["conv", "norm", "activation", "sum"])
            if kind == "sum":
                self._put(nn.Identity(), draw.choice(recent), draw.choice(recent))
                continue
            kernel = draw.choice([1, 3, 3])
            part = {
                "conv": nn.Conv2d(channels, channels, kernel, 1, kernel // 2, bias=draw.random() < 0.5),
                "norm": draw.choice([nn.BatchNorm2d(channels), nn.GroupNorm(1, channels)]),
                "activation": draw.choice(list(ACTIVATIONS.values()))(),
            }[kind]
            self._put(part, draw.choice(recent))
        unread = sorted(set(range(1, len(self.parts) + 1)) - {n for reads in self.reads for n in reads})
        for first in unread[:-1]:
            self._put(nn.Identity(), first, len(self.parts))
        self.head = nn.Linear(channels * 9, 3)

    def _put(self, part: nn.Module, *reads: int) -> None:
        self.parts.append(part)
        self.reads.append(reads)

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for part, reads in zip(self.parts, self.reads, strict=True):
            made.append(part(made[reads[0]] if len(reads) == 1 else made[reads[0]] + made[reads[1]]))
        return self.head(F.max_pool2d(made[-1], 2).flatten(1))


@pytest.mark.parametrize("seed", range(40))
def test_networks_at_random(seed: int) -> None:
    model = AtRandom(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for method in ("fo-maml", "maml"):
        compare(model.double(), tasks(3, 6, 7, shots=1 + seed % 3), of=1e-7, method=method)


@pytest.mark.parametrize(("method", "steps"), [("sign-maml", 0), ("maml", 2)])
@pytest.mark.parametrize("name", NETS)
def test_float32_is_as_exact_as_torch(name: str, method: str, steps: int) -> None:
    """Gradients of a pass, and through two steps: the distance from float64, against that of torch in float32."""
    make, shape = NETS[name]
    model, data = make(), tasks(*shape, shots=4, dtype=torch.float32)
    exact = copy.deepcopy(model).double()
    options = {**OPTIONS, "inner_steps": steps, "method": method}
    meta_step(exact, data[0].double(), data[1], data[2].double(), data[3], **options, backend="torch")
    truths, errors = nets.grads(exact), []
    for backend in ("cpu", "torch"):
        model.zero_grad()
        meta_step(model, *data, **options, backend=backend)
        errors.append({
            key: float((parameter.grad.double() - true).norm() / true.norm())
            for key, parameter in model.named_parameters()
            if (true := truths[key]) is not None and true.norm() > 1e-12
        })  # fmt: skip
    for key, error in errors[0].items():
        assert error <= 2 * errors[1][key] + 5e-6, (key, error, errors[1][key])


@pytest.mark.parametrize("name", ["GroupNorm", "BatchNorm, widths", "no norm", "features with LayerNorm"])
def test_the_same_bits_for_any_threads_and_company(name: str) -> None:
    make, shape = NETS[name]
    model, data = make(), tasks(*shape, count=5, queries=30, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(adapt(model, *data[:2], **OPTIONS))
            meta_step(model, *data, **OPTIONS)
            found[-1] |= {f"grad {key}": grad for key, grad in nets.grads(model).items()}
            model.zero_grad()
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())
    alone = adapt(model, data[0][3:4], data[1][3:4], **OPTIONS)
    assert all(torch.equal(value[0], found[0][key][3]) for key, value in alone.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["GroupNorm", "BatchNorm, widths", "OmniglotFC"])
def test_a_broken_task_stays_alone(name: str, bad: float) -> None:
    make, shape = NETS[name]
    model, data = make().double(), tasks(*shape, count=5)
    whole = adapt(model, *data[:2], **OPTIONS)
    data[0][1, 0].view(-1)[0] = bad
    broken = adapt(model, *data[:2], **OPTIONS)
    others = [0, 2, 3, 4]
    assert all(torch.equal(value[others], broken[key][others]) for key, value in whole.items())
    assert meta_step(model, *data, **OPTIONS).nonfinite.tolist() == [False, True, False, False, False]
    model.zero_grad()
    compare(model, data, nonfinite="skip")


def test_a_tap_that_meets_only_zeros_does_not_move() -> None:
    """Its gradient is 0 exactly, so a sign step leaves it; F(2x2, 3x3) alone would leave rounding there."""
    model = images(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8),
        nn.ReLU(), features=8 * 64,
    ).double()  # fmt: skip
    data = tasks(1, 8, 8)
    for x in (data[0], data[2]):
        x[..., 2:, :] = 0  # the first convolution's outputs are 0 from row 3 on
        x[..., :2, :] = x[..., :2, :].abs()
    compare(model, data)
    with torch.no_grad():
        model[0].weight.abs_().neg_()  # no output is above 0
    moved = adapt(model, *data[:2], **OPTIONS)["2.weight"]
    assert torch.equal(moved, model[2].weight.expand_as(moved)), "nothing comes through"
    compare(model, data)


class Wraps(nn.Module):
    def __init__(self, model: nn.Module, around: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.around = model, around

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.model, x)


def _drops_the_second_first(net: Any, x: Tensor) -> Tensor:
    first, second = net.a(x), net.b(x)
    return F.dropout(second, 0.2) + F.dropout(first, 0.3)


def _wrapped(around: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: images(Wraps(nn.Conv2d(3, 3, 3, 1, 1), around), features=3 * 168)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "running statistics": (NETS["BatchNorm, widths"][0], {"batch_norm": "running"}, "normalises by the batch"),
    "statistics of the support set": (NETS["GroupNorm"][0], {"batch_norm": "support"}, "no statistics"),
    "rounding noise": (NETS["BatchNorm, widths"][0], {"zero_dead_bias": False}, "asks for rounding noise"),
    "a loss": (NETS["GroupNorm"][0], {"loss": lambda p, y: (p - y[:, None]).square().mean()}, "loss is a callable"),
    "groups": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.ReLU(), features=6 * 168), {}, "groups or dilation",
    ),
    "padding by reflection": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), features=6 * 168), {},
        "pads by 'reflect'",
    ),
    "a kernel of one side": (
        lambda: images(nn.Conv2d(3, 6, 2, padding="same"), nn.ReLU(), features=6 * 168), {}, "pads one side more",
    ),
    "LayerNorm of images": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm((12, 14)), features=6 * 168), {},
        "something else than features",
    ),
    "dropout of alpha": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1), nn.AlphaDropout(0.5), features=6 * 168), {},
        "AlphaDropout in training mode",
    ),
    "dropout of everything": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1), nn.Dropout(1.0), features=6 * 168), {}, "dropout's share is 1",
    ),
    "dropout of a tensor's share": (
        lambda: images(
            nn.Conv2d(3, 6, 3, padding=1), Wraps(nn.Identity(), lambda _, x: F.dropout(x, torch.tensor(0.5))),
            features=6 * 168,
        ), {}, "its dropout's share is of type Tensor",
    ),
    "dropout of the channels of series in images": (
        lambda: images(nn.Conv2d(3, 6, 3, padding=1), nn.Dropout1d(0.5), features=6 * 168), {}, "reads something else",
    ),
    "nothing seen behind a dropout": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(504, 1), nn.Dropout(1 - 1e-12), nn.Linear(1, 3)
        ), {}, "does not compute what its structure says",
    ),
    "running InstanceNorm": (
        lambda: of_widths(lambda c: nn.InstanceNorm2d(c, track_running_stats=True)), {}, "keeps running statistics",
    ),
    "the mean of each row": (
        lambda: Wraps(nn.Conv2d(3, 2, 3), lambda conv, x: conv(x).mean(-1).flatten(1)), {}, "not over all positions",
    ),
    "no linear layer": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.LayerNorm(504)), {}, "no convolution and no"),
    "linear along the last axis": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(12, 3), nn.Flatten()), {}, "along the last axis",
    ),
    "flattened before a norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(720), nn.Linear(720, 3)), {},
        "comes no linear layer",
    ),
    "a share of a sum": (
        lambda: Wraps(NETS["GroupNorm"][0](), lambda model, x: model(x) + 0 * model(x)), {}, "it uses mul in a way",
    ),
    "a sum with a number": (_wrapped(lambda conv, x: conv(x) + 1), {}, "it uses add"),
    "a multiple of a sum": (_wrapped(lambda conv, x: torch.add(conv(x), x, alpha=2)), {}, "it uses add in a way"),
    "examples added to themselves": (_wrapped(lambda conv, x: conv(x + x)), {}, "adds its examples to themselves"),
    "a sum of images and channels": (
        _wrapped(lambda conv, x: F.adaptive_avg_pool2d(y := conv(x), 1) + y), {}, "adds what has other axes",
    ),
    "a sum of sizes that torch makes equal": (
        _wrapped(lambda conv, x: F.max_pool2d(y := conv(x), (12, 14)) + y), {}, "expected a summand of 3 x 1 x 1",
    ),
    "what nothing reads": (
        _wrapped(lambda conv, x: (F.relu(conv(x)), conv(x).add(x))[1]), {}, "nothing reads what 'relu' gives",
    ),
    "a summand that is overwritten": (
        _wrapped(lambda conv, x: F.relu(y := conv(x), inplace=True) + y), {}, "does not compute what its structure",
    ),
    "dropouts in another order than their blocks": (
        lambda: images(
            layers_cases.Branches(_drops_the_second_first, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1)),
            features=6 * 168,
        ), {}, "dropouts come in another order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    make, options, reason = REFUSED[name]
    model, data = make().double(), tasks(*SIZE)
    options = {**OPTIONS, **options}
    if name in ("linear along the last axis", "LayerNorm of images", "no linear layer"):
        assert reason in str(layers.read(model))
        return
    found = explain(model, *data, **options)
    assert found.family != "layers"
    assert reason in str(found.families["cpu"].get("layers", "")), found


class SetsTheGenerator(nn.Module):
    def __init__(self, seed: int, again: bool) -> None:
        super().__init__()
        self.body, self.head, self.seed, self.again = nn.Linear(7, 8), nn.Linear(8, 3), seed, again

    def forward(self, x: Tensor) -> Tensor:
        if not self.again:
            torch.manual_seed(self.seed)
        x = self.head(F.dropout(self.body(x), 0.5))
        if self.again:
            torch.rand(1)
        return x


@pytest.mark.parametrize("seed", [chain._SEEDS[0], chain._SEEDS[1], 99])
@pytest.mark.parametrize("again", [False, True])
def test_a_forward_that_draws_otherwise_is_refused(seed: int, again: bool) -> None:
    model, data = SetsTheGenerator(seed, again).double(), tasks(7)
    found = explain(model, *data, **OPTIONS)
    assert found.family != "layers" and "what its structure says" in found.families["cpu"]["layers"]


@pytest.mark.parametrize("change", ["permuted", "grey", "transposed", "weights"])
def test_dropout_of_values_in_another_order_in_memory_is_refused(change: str) -> None:
    """torch fills masks in the order of memory; dropout of channels does not depend on it."""
    shape, net = (1, 12, 14) if change == "grey" else SIZE, nn.Conv2d(1 if change == "grey" else 3, 4, 3, padding=1)
    for dropout, served in ((nn.Dropout, False), (nn.Dropout2d, True)):
        model = images(copy.deepcopy(net), nn.ReLU(), dropout(0.5), features=4 * 168).double()
        x, y, qx, qy = tasks(*shape)
        if change == "weights":
            model = model.to(memory_format=torch.channels_last)
        else:
            axes = (0, 1, 2, 4, 3) if change == "transposed" else (0, 1, 3, 4, 2)
            back = (0, 1, 2, 4, 3) if change == "transposed" else (0, 1, 4, 2, 3)
            x, qx = (each.permute(axes).clone(memory_format=torch.contiguous_format).permute(back) for each in (x, qx))
        found = explain(model, x, y, qx, qy, **OPTIONS)
        assert (found.family == "layers") == served, found
        if served:
            compare(model, (x, y, qx, qy))
        else:
            assert "depend on the order in memory" in found.families["cpu"]["layers"]


def test_fewer_tasks_together_where_dropouts_have_large_masks() -> None:
    def together(dropout: nn.Module) -> int:
        model = images(nn.Conv2d(3, 64, 3, padding=1), dropout, nn.AdaptiveAvgPool2d(1), features=64).double()
        options = {"loss": "cross_entropy", "adapt": None, "backend": "auto", "precision": "fp32"}
        others = {"nonfinite": "propagate", "batch_norm": "batch", "zero_dead_bias": True, "method": "maml"}
        run = layers.run.NativeRun.of(check_problem(model, *tasks(*SIZE, count=200), **OPTIONS, **options, **others))
        return run.chunks()[0].stop

    assert together(nn.Dropout(0.5)) * 10 < together(nn.Dropout2d(0.5)) <= together(nn.Identity())


def test_nothing_is_drawn_where_no_pass_is_made() -> None:
    make, shape = NETS["dropout of features"]
    model, data, before = make().double(), tasks(*shape), torch.get_rng_state()
    adapt(model, *data[:2], inner_lr=0.01, inner_steps=0, backend="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_share_of_numpys_type_is_compared_by_value() -> None:
    model, data = nn.Sequential(nn.Linear(7, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double(), tasks(7)
    model[1].p = np.float64(0.3)
    compare(model, data)
    before = structure.of_module(model)
    model[1].p = np.float64(0.7)
    assert structure.of_module(model) != before
    compare(model, data)


def test_explain_without_data_of_a_model_that_starts_with_a_dropout_or_a_norm() -> None:
    rest = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    for model in (nn.Sequential(nn.Dropout(0.2), nn.Linear(7, 3)), nn.Sequential(nn.BatchNorm2d(3), *rest)):
        assert explain(model).family == "layers"


def test_the_program_is_told() -> None:
    make, shape = NETS["GroupNorm"]
    how = explain(make().double(), *tasks(*shape), **OPTIONS).how
    assert "conv 3x3 to 20, norm of 4 groups, relu, max 2x2; " in how and how.endswith("linear to 3)")
    assert str(layers.read(layers_cases.shortcut())).endswith(
        "2: conv 3x3 to 10, batch norm, relu; 3: conv 3x3 to 6, batch norm; 4: sum, leaky_relu, max 2x2 (of 3 and 1); "
        "5: linear to 3"
    )
    assert "; 3: sum (of the examples and 2); " in str(layers.read(layers_cases.of_features()))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "blocks: expected 1 to 64, found 0"),
        ([{"product": "conv", "channels": 0}], r"blocks\[0\]: expected channels of 1 or more, found 0"),
        ([{"product": "dense"}], r"blocks\[0\]: expected another product, found 'dense'"),
        ([{"product": "conv", "channels": 3, "kernel": (9, 9)}], r"expected larger images, found 3 x 6 x 7"),
        ([{"product": "conv", "channels": 3, "kernel": (17, 1), "padding": (8, 0)}], "expected a smaller kernel"),
        ([{"product": "conv", "channels": 3, "kernel": (1, 1), "padding": (1, 0)}], "padding below the kernel's size"),
        ([{"product": "conv", "channels": 3, "stride": (0, 1)}], "a kernel and stride of 1 or more"),
        ([{"norm": "group", "groups": 2, "eps": 1e-5}], "groups that divide 3 channels, found 2"),
        ([{"norm": "batch"}], "an eps above 0"),
        ([{"pool": "max", "pool_kernel": (2, 2), "pool_padding": (2, 0)}], "half its kernel at most"),
        ([{"product": "conv", "channels": 3}], "a last one that makes features, found 3 x 6 x 7"),
        ([{"reads": 2}], r"blocks\[0\]: expected 'reads' of 1 to 1, found 2"),
        ([{}, {"reads": 0}], r"blocks\[1\]: expected 'reads' of 1 to 2, found 0"),
        ([{}, {"product": "sum"}], r"blocks\[1\]: expected 'adds' of 1 to 1, found 0"),
        ([{"pool": "mean"}, {"product": "sum", "reads": 2, "adds": 1}], "a summand of 3 x 6 x 7, found 3 x 1 x 1"),
        ([{}, {"reads": 2, "pool": "mean"}], r"blocks\[0\]: expected a block that another one reads, found none"),
        (
            [{}, {"product": "linear", "channels": 3}, {"reads": 2, "pool": "mean"}, {"product": "sum", "adds": 2}],
            r"blocks\[0\]: expected one reader of images that a linear layer reads, found several",
        ),
    ],
)
def test_native_programs_are_checked(blocks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.LayersProgram(blocks, (3, 6, 7))


def test_native_calls_are_checked() -> None:
    program = C.LayersProgram([{"product": "linear", "channels": 2, "bias": True}], (3, 1, 1))
    assert (program.tensors, program.outputs, program.couples_examples) == (2, 2, False)
    with pytest.raises(TypeError, match=r"blocks\[0\]: expected another type for 'channels', found str"):
        C.LayersProgram([{"product": "linear", "channels": "2"}], (3, 1, 1))
    with pytest.raises(ValueError, match="count: expected 1 or more, found 0"):
        program.plan(1, 0, False, 1)
    call = {"x": 1, "labels": 1, "target": 0, "noise": [], "loss": 1, "predictions": 0, "workspace": 1}
    call |= {"tasks": 1, "count": 1}
    for wrong, message in (
        ({"parameters": [(8, 1)]}, "parameters: expected 2, found 1"),
        ({"gradients": [(8, 1)]}, "gradients: expected none or 2, found 1"),
        ({"parameters": [(8, 1), (0, 1)]}, "parameters: expected addresses, found none"),
        ({"target": 1}, "expected labels or a target, found both or none"),
        ({"loss": 0}, "expected addresses, found none"),
        ({"noise": [8]}, "noise: expected 0, found 1"),
        ({"threads": 0}, "threads: expected 1 or more, found 0"),
    ):
        arguments = {"parameters": [(8, 1), (8, 1)], "gradients": [], "is_double": False, "threads": 1, **call, **wrong}
        with pytest.raises(ValueError, match=message):
            program.run(**arguments)
    call = {name: call[name] for name in ("x", "labels", "target", "noise", "workspace", "tasks", "count")}
    for wrong, message in (
        ({"parameters": [(8, 1)]}, "parameters: expected 2, found 1"),
        ({"directions": []}, "directions: expected 2, found 0"),
        ({"products": [(8, 1)]}, "products: expected 2, found 1"),
        ({"labels": 0}, "expected labels or a target, found both or none"),
        ({"workspace": 0}, "x, workspace: expected addresses, found none"),
        ({"noise": [8]}, "noise: expected 0, found 1"),
        ({"count": 0}, "count: expected 1 or more, found 0"),
    ):
        places = {name: [(8, 1), (8, 1)] for name in ("parameters", "directions", "products")}
        with pytest.raises(ValueError, match=message):
            program.hessian(**{**places, "is_double": False, "threads": 1, **call, **wrong})
    drops = C.LayersProgram([{"product": "linear", "channels": 2, "drops": "values"}], (3, 1, 1))
    assert (drops.tensors, drops.dropouts, program.dropouts) == (1, 1, 0)
    arguments = {"parameters": [(8, 1)], "gradients": [], "is_double": False, "threads": 1, **call}
    for noise, found in (([], 0), ([0], "none")):
        with pytest.raises(ValueError, match=f"noise: expected .*, found {found}"):
            drops.run(**{**arguments, "noise": noise, "loss": 1, "predictions": 0})


def test_the_hessian_is_symmetric() -> None:
    """<u, H w> = <w, H u>, for directions that are no part of any step."""
    make, shape = NETS["GroupNorm"]
    model, (x, y, _, _) = make().double(), tasks(*shape)
    options = {"loss": "cross_entropy", "adapt": None, "backend": "auto", "precision": "fp32", "nonfinite": "propagate"}
    others = {"batch_norm": "batch", "zero_dead_bias": True, "method": "maml"}
    run = layers.run.NativeRun.of(check_problem(model, x, y, x, y, **OPTIONS, **options, **others))
    values = {name: torch.stack([p.detach()] * 3) for name, p in model.named_parameters()}
    one, other = ({name: torch.randn_like(value) for name, value in values.items()} for _ in range(2))

    def along(direction: dict[str, Tensor], of: dict[str, Tensor]) -> Tensor:
        row = torch.cat([value.flatten(1) for value in of.values()], dim=1)
        return (row * run.hessian(values, run.examples(x, y, first_task=0, step=0), direction)).sum(1)

    torch.testing.assert_close(along(one, other), along(other, one), rtol=1e-9, atol=1e-9)
