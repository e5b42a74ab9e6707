"""learn2learn 0.2: one clone per task, one backward pass per task.

Its MAML class steps for maml and fo-maml. The sign needs `maml_update`, as in the official Sign-MAML code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "learn2learn"
SUMMARY = "clones of learn2learn, updated one task after the other"


def why_not(problem: Problem) -> str | None:
    if reason := missing("learn2learn"):
        return reason
    try:
        import learn2learn  # noqa: F401
    except Exception as error:  # an old package on a new Python may raise anything
        return f"import learn2learn: {type(error).__name__}: {error}"
    return None


def prepare(problem: Problem) -> Step:
    import learn2learn
    from learn2learn.algorithms.maml import maml_update

    loss = LOSSES[problem.loss]
    model = problem.model
    maml = learn2learn.algorithms.MAML(model, lr=problem.inner_lr, first_order=problem.method == "fo-maml")

    def adapted_by_signs(x: Tensor, y: Tensor) -> nn.Module:
        learner = learn2learn.clone_module(model)
        for _ in range(problem.steps):
            grads = torch.autograd.grad(loss(learner(x), y), list(learner.parameters()))
            learner = maml_update(learner, problem.inner_lr, [gradient.sign() for gradient in grads])
        return learner

    def adapted(x: Tensor, y: Tensor) -> nn.Module:
        learner = maml.clone()
        for _ in range(problem.steps):
            learner.adapt(loss(learner(x), y))
        return learner

    adapt = adapted_by_signs if problem.method == "sign-maml" else adapted

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        model.zero_grad()
        for task in range(problem.tasks):
            learner = adapt(support_x[task], support_y[task])
            (loss(learner(query_x[task]), query_y[task]) / problem.tasks).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    return Step(run)
