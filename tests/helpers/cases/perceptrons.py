"""Multilayer perceptrons, tasks for them, and the comparison of two meta-steps."""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
from torch import Tensor, nn

from signmaml_ext import _loader, fused, mlp
from signmaml_ext.checks import check_problem
from signmaml_ext.problem import Problem
from signmaml_ext.results import MetaGradients


def network(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def tasks_for(
    widths: tuple[int, ...], loss: str, tasks: int, support: int, query: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random tasks, with class labels or real targets to suit the loss."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, count, widths[0], dtype=dtype)
        if loss == "mse":
            return x, torch.randn(tasks, count, widths[-1], dtype=dtype)
        return x, torch.randint(widths[-1], (tasks, count))

    return *draw(support), *draw(query)


def problem_of(model: nn.Module, data: tuple[Tensor, ...], **options: object) -> Problem:
    """The checked problem, with default options."""
    chosen = {
        "inner_lr": 0.05,
        "inner_steps": 3,
        "method": "sign-maml",
        "loss": "mse",
        "adapt": None,
        "backend": "torch",
        "precision": "fp32",
        "nonfinite": "propagate",
        "batch_norm": "batch",
        "seed": 0,
        "zero_dead_bias": True,
    }
    return check_problem(model, *data, **{**chosen, **options})


def rows(problem: Problem, native: ModuleType = _loader.C) -> tuple[Tensor, Tensor]:
    """Each task's own meta-gradient `[T, P]`, and the flags: the native call alone, without the mean."""
    spec = mlp.read(problem.model)
    assert isinstance(spec, mlp.MlpSpec)
    size = sum(problem.model.get_parameter(name).numel() for name in spec.names)
    grads = torch.full((problem.tasks, size), torch.nan, dtype=problem.dtype)
    part = fused._run(problem, spec, native, mlp.call.native_call, {"grads": grads})
    return grads, part["nonfinite"]


def overflowing(tensor: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, object]]:
    """Two tasks in float32; in the second, H u of this tensor is infinite ("1.weight" or "1.bias"), and nothing else.

    The support targets are the outputs, so the step has no length. Only the output's bias adapts.
    """
    count, x, factor, rate = {"1.weight": (1, 1e3, 1.0, 5e17), "1.bias": (4, 1e-3, 3.0, 5e19)}[tensor]
    model = network((1, 1, 1), nn.ReLU)
    with torch.no_grad():
        for value, number in zip(model.parameters(), (0.0, 1.0, factor, 0.0), strict=True):
            value.fill_(number)
    support = torch.full((2, count, 1), x), torch.full((2, count, 1), factor)
    query = torch.ones(2, 1, 1), torch.tensor([factor, -1e18]).reshape(2, 1, 1)
    options = {"inner_lr": torch.tensor([rate]), "inner_steps": 1, "adapt": ["3.bias"]}
    return model, (*support, *query), options


def assert_same(found: MetaGradients, expected: MetaGradients, tolerance: float) -> None:
    for name in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
    for name, gradient in expected.params.items():
        torch.testing.assert_close(
            found.params[name], gradient, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
