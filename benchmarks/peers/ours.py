"""signmaml_ext itself: `meta_step` with each backend that supports the problem, called as users do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from workloads import Problem

import signmaml_ext
from peers import Step


def why_not(problem: Problem, backend: str) -> str | None:
    """None if the backend supports the problem on this machine, else the backend's reason."""
    options: dict[str, Any] = {"inner_lr": problem.inner_lr, "inner_steps": problem.steps, "loss": problem.loss}
    options["method"] = problem.method
    return signmaml_ext.explain(problem.model, *problem.data, **options).reasons[backend]


def prepare(problem: Problem, backend: str) -> Step:
    model = problem.model

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        signmaml_ext.meta_step(
            model,
            *problem.data,
            inner_lr=problem.inner_lr,
            inner_steps=problem.steps,
            loss=problem.loss,
            method=problem.method,
            backend=backend,
        )
        return {name: p.grad for name, p in model.named_parameters()}

    return Step(run)
