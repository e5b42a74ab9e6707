"""higher: a patched module and a differentiable optimiser per task, first order."""

from __future__ import annotations

import torch
from torch import Tensor
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "higher"
SUMMARY = "innerloop_ctx of higher with a sign callback, one task after the other"


def why_not(problem: Problem) -> str | None:
    if problem.method != "sign-maml":
        return f"not written for {problem.method} yet"
    return missing("higher")


def prepare(problem: Problem) -> Step:
    import higher

    loss = LOSSES[problem.loss]
    model = problem.model
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.inner_lr)

    def signs(grads: list[Tensor]) -> list[Tensor]:
        return [gradient.sign() for gradient in grads]

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        mean: dict[str, Tensor] = {}
        names = [name for name, _ in model.named_parameters()]
        for task in range(problem.tasks):
            with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (learner, steps):
                for _ in range(problem.steps):
                    steps.step(loss(learner(support_x[task]), support_y[task]), grad_callback=signs)
                error = loss(learner(query_x[task]), query_y[task])
                grads = torch.autograd.grad(error / problem.tasks, list(learner.parameters()))
            for name, gradient in zip(names, grads, strict=True):
                mean[name] = mean[name] + gradient if name in mean else gradient
        return mean

    return Step(run)
