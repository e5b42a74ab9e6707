"""learn2learn 0.2, as the official Sign-MAML code uses it: one clone per task, updated by the sign of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "learn2learn"
SUMMARY = "clone_module and maml_update of learn2learn, one task after the other"


def why_not(problem: Problem) -> str | None:
    if problem.method != "sign-maml":
        return f"not written for {problem.method} yet"
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

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        model.zero_grad()
        for task in range(problem.tasks):
            learner = learn2learn.clone_module(model)
            for _ in range(problem.steps):
                error = loss(learner(support_x[task]), support_y[task])
                grads = torch.autograd.grad(error, list(learner.parameters()))
                learner = maml_update(learner, problem.inner_lr, [gradient.sign() for gradient in grads])
            (loss(learner(query_x[task]), query_y[task]) / problem.tasks).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    return Step(run)
