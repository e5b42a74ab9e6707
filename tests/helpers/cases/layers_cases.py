"""Passes of programs of layers by a native module, against torch in float64: losses, predictions and gradients.

Memory starts as NaN, so that nothing unwritten may be read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.cases.second_order_cases import Case, alone
from signmaml_ext import layers

TASKS, EXAMPLES, WAYS = 3, 7, 3


def passes(
    native: ModuleType, make: Callable[[], nn.Module], shape: tuple[int, ...], *, squares: bool = False,
    wanted: Callable[[str], bool] = lambda name: True, row: int | None = None,
) -> None:  # fmt: skip
    """One pass of three tasks, whose parameters are random, and one in which they share every other tensor.

    Args:
        native: The module.
        make: Makes the network.
        shape: Of an example.
        squares: Whether the loss is the mean squared error.
        wanted: Which parameters get a gradient.
        row: The only row of images that is not 0; None: all.
    """
    spec = layers.read(make())
    assert not isinstance(spec, str), spec
    size = spec.size(shape)
    program = native.LayersProgram([block.entries() for block in spec.blocks], size)
    sizes = {name: parameter.shape for name, parameter in make().named_parameters()}
    x = torch.randn(TASKS, EXAMPLES, *shape, dtype=torch.float64)
    if row is not None:
        kept = x[..., row, :].clone()
        x.zero_()[..., row, :] = kept
    labels = torch.randint(WAYS, (TASKS, EXAMPLES))
    target = torch.randn(TASKS, EXAMPLES, WAYS, dtype=torch.float64)
    for shares in (False, True):
        parameters = {name: 0.4 * torch.randn(TASKS, *sizes[name], dtype=torch.float64) for name in spec.names}
        for name in list(spec.names)[::2] if shares else ():
            parameters[name][1:] = parameters[name][:1]
        grads = {name: torch.full_like(value, torch.nan) for name, value in parameters.items()}
        loss = torch.full((TASKS,), torch.nan, dtype=torch.float64)
        predictions = torch.full((TASKS, EXAMPLES, WAYS), torch.nan, dtype=torch.float64)
        workspace = torch.full((program.plan(TASKS, EXAMPLES, True, 1)["workspace_bytes"],), 255, dtype=torch.uint8)
        apart = [0 if shares and i % 2 == 0 else sizes[name].numel() for i, name in enumerate(spec.names)]
        program.run(
            [(value.data_ptr(), by) for value, by in zip(parameters.values(), apart, strict=True)],
            [(grads[name].data_ptr() if wanted(name) else 0, sizes[name].numel()) for name in spec.names],
            x.data_ptr(), 0 if squares else labels.data_ptr(), target.data_ptr() if squares else 0, loss.data_ptr(),
            predictions.data_ptr(), workspace.data_ptr(), TASKS, EXAMPLES, True, 1,
        )  # fmt: skip
        for task in range(TASKS):
            own = {name: value[task].clone().requires_grad_() for name, value in parameters.items()}
            out = spec.forward(own, x[task])
            expected = F.mse_loss(out, target[task]) if squares else F.cross_entropy(out, labels[task])
            _close("loss", loss[task], expected)
            _close("predictions", predictions[task], out)
            gradients = torch.autograd.grad(expected, list(own.values()))
            for name, gradient in zip(own, gradients, strict=True):
                if not wanted(name):
                    assert grads[name].isnan().all(), f"{name} was written"
                elif name not in spec.unmoved:
                    _close(name, grads[name][task], gradient)
                    assert bool((grads[name][task][gradient == 0] == 0).all()), f"{name} is not exactly 0"


def _close(name: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected.detach()).norm() / (expected.detach().norm() + 1e-9))
    assert error <= 1e-9, f"{name} is {error:.1e} away"


def network(*kinds: nn.Module, features: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*kinds, nn.Flatten(), nn.Linear(features, WAYS, bias=bias))


SIZE = (3, 6, 7)
ACTIVATIONS: dict[str, nn.Module] = {
    "ReLU": nn.ReLU(), "LeakyReLU": nn.LeakyReLU(0.2), "ELU": nn.ELU(0.7), "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU("tanh"), "SiLU": nn.SiLU(), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(),
}  # fmt: skip


def after_zeros() -> nn.Module:
    """The second convolution's taps meet what the first one makes of other than zeros, and nothing else."""
    return network(
        nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 9, 3, 1, 1), nn.GroupNorm(3, 9), nn.LeakyReLU(0.1),
        features=9 * 42,
    )  # fmt: skip


def _cases() -> dict[str, Case]:
    def case(make: Callable[[], nn.Module], shape: tuple[int, ...] = SIZE, **options: Any) -> Case:
        return alone(lambda native: passes(native, make, shape, **options))

    found = {
        "3x3 by tiles": case(
            lambda: network(
                nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 10, 3, 1, 1), nn.BatchNorm2d(10),
                nn.ReLU(), nn.MaxPool2d(2), features=90,
            )
        ),
        "3x3 after zeros below the first row": case(after_zeros, row=0),
        "3x3 after zeros above the last row": case(after_zeros, row=5),
        "a few examples at once": case(
            lambda: network(
                nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.AvgPool2d(30), nn.Conv2d(8, 5, 2), features=5
            ),
            (3, 60, 60),
        ),
        "3x3 without a norm": case(
            lambda: network(
                nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, 1, 1), nn.ReLU(), features=45
            )
        ),
        "strides": case(
            lambda: network(
                nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 1)), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 9, 4, 3, 2),
                nn.GroupNorm(9, 9), nn.Tanh(), nn.Conv2d(9, 4, 1, 2), nn.ELU(), features=8,
            )
        ),
        "average": case(
            lambda: network(
                nn.Conv2d(3, 6, 3), nn.AvgPool2d(2, 1, 1), nn.SiLU(), nn.Conv2d(6, 6, 2),
                nn.AvgPool2d(2, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1), features=6,
            )
        ),
        "overlapping maximum": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.MaxPool2d(3, 1, 1), features=120)
        ),
        "features": case(
            lambda: nn.Sequential(
                nn.Linear(19, 21), nn.LayerNorm(21), nn.GELU(), nn.Linear(21, 6, bias=False), nn.BatchNorm1d(6),
                nn.ReLU(), nn.Linear(6, WAYS),
            ),
            (19,),
        ),
        "squares": case(lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, WAYS)), (5,), squares=True),
        "a norm first": case(
            lambda: network(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh(), features=126)
        ),
        "the head alone": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.ReLU(), features=120), wanted=lambda name: name.startswith("3.")
        ),
        "scales alone": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), features=120),
            wanted=lambda name: name.startswith("1."),
        ),
    }  # fmt: skip
    for name, activation in ACTIVATIONS.items():
        found[name] = case(lambda kind=activation: nn.Sequential(nn.Linear(5, 9), kind, nn.Linear(9, WAYS)), (5,))
    return found


# Cases by group and name. Each can run alone.
GROUPS: dict[str, dict[str, Case]] = {"layers": _cases()}
