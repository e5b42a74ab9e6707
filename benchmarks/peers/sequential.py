"""The baseline: a loop over tasks, as in learn2learn and the official Sign-MAML code.

Written from the definition in plain PyTorch, without this package: one copy of the parameters per task, one forward and
backward pass per step. maml differentiates through the steps (create_graph); the others are first order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from workloads import LOSSES, Problem

from peers import Step

NAME = "sequential loop"
SUMMARY = "plain PyTorch, autograd, one task after the other"


def why_not(problem: Problem) -> str | None:
    return None


def prepare(problem: Problem) -> Step:
    return Step(lambda: meta_step(problem))


def meta_step(problem: Problem) -> dict[str, Tensor]:
    """The mean meta-gradient by parameter name."""
    loss = LOSSES[problem.loss]
    support_x, support_y, query_x, query_y = problem.data
    theta = dict(problem.model.named_parameters())
    mean: dict[str, Tensor] = {}
    second_order = problem.method == "maml"
    for task in range(problem.tasks):
        # In second order every step stays in autograd's graph, back to these leaves.
        start = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
        phi = start
        for _ in range(problem.steps):
            error = loss(functional_call(problem.model, phi, (support_x[task],)), support_y[task])
            grads = torch.autograd.grad(error, list(phi.values()), create_graph=second_order)
            if second_order:
                moved = zip(phi.items(), grads, strict=True)
                phi = {name: value - problem.inner_lr * gradient for (name, value), gradient in moved}
                continue
            with torch.no_grad():
                for value, gradient in zip(phi.values(), grads, strict=True):
                    value -= problem.inner_lr * (gradient.sign() if problem.method == "sign-maml" else gradient)
        error = loss(functional_call(problem.model, phi, (query_x[task],)), query_y[task])
        of = start if second_order else phi
        for name, gradient in zip(of, torch.autograd.grad(error / problem.tasks, list(of.values())), strict=True):
            mean[name] = mean[name] + gradient if name in mean else gradient
    return mean
