"""Multilayer perceptrons, tasks for them, and the comparison of two meta-steps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

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


def assert_same(found: MetaGradients, expected: MetaGradients, tolerance: float) -> None:
    for name in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
    for name, gradient in expected.params.items():
        torch.testing.assert_close(
            found.params[name], gradient, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
