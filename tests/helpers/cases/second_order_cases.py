"""Exact MAML and learnable rates on the CPU by a native module other than the package's own, against the reference in
float64.

Every case has two steps, a rate for every tensor or element, and step or not, and raises if a result is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from helpers.cases import perceptrons
from signmaml.models import Conv4
from signmaml_ext import _loader, conv, mlp, reference
from signmaml_ext.problem import Problem

STEPS = 2


def rates_of(
    model: nn.Module, adapt: list[str] | None, *, learnable: bool, elements: bool, by_step: bool
) -> dict[str, Tensor]:
    found = {}
    for name, value in model.named_parameters():
        shape = tuple(value.shape) if elements else (1,) * value.ndim
        rate = 0.02 + 0.1 * torch.rand((STEPS, *shape) if by_step else shape, dtype=value.dtype)
        if adapt is None or name in adapt:
            found[name] = rate.requires_grad_(learnable)
    return found


def check(native: ModuleType, family: ModuleType, problem: Problem) -> None:
    assert family.why_not(problem) is None
    found, expected = family.meta_gradients(problem, native), reference.meta_gradients(problem)
    for own, others in ((found.params, expected.params), (found.rates, expected.rates)):
        assert own.keys() == others.keys()
        for name, value in others.items():
            if value is not None:
                assert (own[name] - value).norm() <= 1e-10 * value.norm() + 1e-13, name


def convolutional(
    native: ModuleType,
    pooling: str = "max",
    *,
    channels: int = 2,
    layers: int = 2,
    adapt: list[str] | None = None,
    learnable: bool = False,
    elements: bool = False,
    by_step: bool = True,
    method: str = "maml",
) -> None:
    size, ways = 9, 3  # pooling drops the last row and column
    model = Conv4(ways=ways, channels=channels, filters=8, image_size=size, pooling=pooling, layers=layers).double()
    for name, value in model.named_parameters():
        if "normalize" in name:  # scales of both signs: pooling takes the largest and the smallest value
            nn.init.normal_(value, std=0.7)
    sets = []
    for count in (4, 3):
        sets.append(torch.randn(2, count, channels, size, size, dtype=torch.float64) + 0.4)
        sets.append(torch.randint(ways, (2, count)))
    rates = rates_of(model, adapt, learnable=learnable, elements=elements, by_step=by_step)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": STEPS, "method": method, "adapt": adapt}
    check(native, conv, perceptrons.problem_of(model, tuple(sets), loss="cross_entropy", **options))


def perceptron(
    native: ModuleType,
    activation: type[nn.Module],
    loss: str,
    *,
    adapt: list[str] | None = None,
    learnable: bool = False,
    elements: bool = False,
    by_step: bool = True,
    method: str = "maml",
) -> None:
    widths = (3, 6, 5, 2)
    model = perceptrons.network(widths, activation).double()
    data = perceptrons.tasks_for(widths, loss, 3, 5, 3, torch.float64)
    rates = rates_of(model, adapt, learnable=learnable, elements=elements, by_step=by_step)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": STEPS, "method": method, "adapt": adapt}
    check(native, mlp, perceptrons.problem_of(model, data, loss=loss, **options))


Case = Callable[[ModuleType], None]


def of_conv() -> dict[str, Case]:
    """The quick cases that find most errors come first."""
    cases: dict[str, Case] = {
        "gray": partial(convolutional, channels=1),
        "gray, stride": partial(convolutional, pooling="stride", channels=1),
        "stride": partial(convolutional, pooling="stride"),
        "the classifier": partial(convolutional, adapt=["classifier.weight", "classifier.bias"]),
        "two tensors": partial(
            convolutional, adapt=["features.1.conv.weight", "features.0.normalize.bias"], learnable=True
        ),
        "a bias that does not move": partial(convolutional, adapt=["features.0.conv.bias"], learnable=True),
        "elements and steps": partial(convolutional, elements=True, learnable=True),
    }
    for method, elements in itertools.product(("sign-maml", "fo-maml", "maml"), (False, True)):
        cases[f"{method}, {'elements' if elements else 'tensors'}"] = partial(
            convolutional, elements=elements, learnable=True, by_step=False, method=method
        )
    for pooling, layers in (("max", 3), ("stride", 1), ("stride", 3)):
        cases[f"{pooling}, {layers} blocks"] = partial(convolutional, pooling=pooling, layers=layers)
    return cases


def of_mlp() -> dict[str, Case]:
    """The quick cases that find most errors come first."""
    cases: dict[str, Case] = {}
    for loss, activation in itertools.product(("mse", "cross_entropy"), (nn.Tanh, nn.ReLU)):
        cases[f"{loss}, {activation.__name__}"] = partial(perceptron, activation=activation, loss=loss)
    for adapt in (["1.bias"], ["3.weight"], ["1.weight", "5.bias"]):
        cases[" and ".join(adapt)] = partial(perceptron, activation=nn.Tanh, loss="mse", adapt=adapt, learnable=True)
    cases["cross_entropy, elements"] = partial(
        perceptron, activation=nn.ReLU, loss="cross_entropy", learnable=True, elements=True
    )
    for method, elements in itertools.product(("sign-maml", "fo-maml", "maml"), (False, True)):
        for by_step in (False, True):
            name = f"{method}, {'elements' if elements else 'tensors'}{' and steps' if by_step else ''}"
            cases[name] = partial(
                perceptron, activation=nn.Tanh, loss="mse", learnable=True, elements=elements, by_step=by_step,
                method=method,
            )  # fmt: skip
    return cases


def alone(case: Case) -> Case:
    """The case with its own random numbers, on a module that runs what the package's own would."""

    def run(native: ModuleType) -> None:
        _loader.C = native  # what is not the package's own module runs its CUDA kernels
        torch.manual_seed(0)
        case(native)

    return run


# Cases by group and name. Each can run alone.
GROUPS: dict[str, dict[str, Case]] = {
    group: {name: alone(case) for name, case in cases.items()}
    for group, cases in (("conv", of_conv()), ("mlp", of_mlp()))
}
