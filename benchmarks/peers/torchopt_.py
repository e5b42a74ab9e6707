"""TorchOpt: a functional optimiser chained from two transformations, the sign and the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "TorchOpt"
SUMMARY = "a chain of TorchOpt's functional transformations, one task after the other"


def why_not(problem: Problem) -> str | None:
    if problem.method != "sign-maml":
        return f"not written for {problem.method} yet"
    return missing("torchopt")


def prepare(problem: Problem) -> Step:
    import torchopt

    def sign_update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return torchopt.pytree.tree_map(torch.sign, updates), state

    sign = torchopt.base.GradientTransformation(lambda params: torchopt.base.EmptyState(), sign_update)
    optimizer = torchopt.chain(sign, torchopt.sgd(lr=problem.inner_lr))
    loss = LOSSES[problem.loss]

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        theta = dict(problem.model.named_parameters())
        mean: dict[str, Tensor] = {}
        for task in range(problem.tasks):
            phi = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
            state = optimizer.init(phi)
            for _ in range(problem.steps):
                error = loss(functional_call(problem.model, phi, (support_x[task],)), support_y[task])
                grads = dict(zip(phi, torch.autograd.grad(error, list(phi.values())), strict=True))
                updates, state = optimizer.update(grads, state, inplace=False)
                phi = torchopt.apply_updates(phi, updates, inplace=False)
                phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
            error = loss(functional_call(problem.model, phi, (query_x[task],)), query_y[task])
            grads = torch.autograd.grad(error / problem.tasks, list(phi.values()))
            for name, gradient in zip(phi, grads, strict=True):
                mean[name] = mean[name] + gradient if name in mean else gradient
        return mean

    return Step(run)
