"""higher: a patched module and a differentiable optimiser per task.

maml keeps the graph of the steps, back to the model's own weights; the other methods keep none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "higher"
SUMMARY = "innerloop_ctx of higher, one task after the other; the sign is a callback"


def why_not(problem: Problem) -> str | None:
    return missing("higher")


def prepare(problem: Problem) -> Step:
    import higher

    loss = LOSSES[problem.loss]
    model = problem.model
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.inner_lr)
    second_order = problem.method == "maml"
    options = {"track_higher_grads": second_order, "copy_initial_weights": not second_order}

    def signs(grads: list[Tensor]) -> list[Tensor]:
        return [gradient.sign() for gradient in grads]

    callback = signs if problem.method == "sign-maml" else None

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        mean: dict[str, Tensor] = {}
        names = [name for name, _ in model.named_parameters()]
        for task in range(problem.tasks):
            with higher.innerloop_ctx(model, optimizer, **options) as (learner, steps):
                for _ in range(problem.steps):
                    steps.step(loss(learner(support_x[task]), support_y[task]), grad_callback=callback)
                error = loss(learner(query_x[task]), query_y[task])
                of = model if second_order else learner
                grads = torch.autograd.grad(error / problem.tasks, list(of.parameters()))
            for name, gradient in zip(names, grads, strict=True):
                mean[name] = mean[name] + gradient if name in mean else gradient
        return mean

    return Step(run)
