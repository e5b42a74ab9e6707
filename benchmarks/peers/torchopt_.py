"""TorchOpt: its functional SGD, whose updates autograd can differentiate.

The sign is a transformation of its own, chained before SGD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from workloads import LOSSES, Problem

from peers import Step, missing

NAME = "TorchOpt"
SUMMARY = "TorchOpt's functional transformations, one task after the other"


def why_not(problem: Problem) -> str | None:
    return missing("torchopt")


def prepare(problem: Problem) -> Step:
    import torchopt

    def sign_update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return torchopt.pytree.tree_map(torch.sign, updates), state

    second_order = problem.method == "maml"
    optimizer = torchopt.sgd(lr=problem.inner_lr, moment_requires_grad=second_order)
    if problem.method == "sign-maml":
        sign = torchopt.base.GradientTransformation(lambda params: torchopt.base.EmptyState(), sign_update)
        optimizer = torchopt.chain(sign, optimizer)
    loss = LOSSES[problem.loss]

    def run() -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = problem.data
        theta = dict(problem.model.named_parameters())
        mean: dict[str, Tensor] = {}
        for task in range(problem.tasks):
            start = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
            phi = start
            state = optimizer.init(phi)
            for _ in range(problem.steps):
                error = loss(functional_call(problem.model, phi, (support_x[task],)), support_y[task])
                found = torch.autograd.grad(error, list(phi.values()), create_graph=second_order)
                updates, state = optimizer.update(dict(zip(phi, found, strict=True)), state, inplace=False)
                phi = torchopt.apply_updates(phi, updates, inplace=False)
                if not second_order:
                    phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
            error = loss(functional_call(problem.model, phi, (query_x[task],)), query_y[task])
            of = start if second_order else phi
            grads = torch.autograd.grad(error / problem.tasks, list(of.values()))
            for name, gradient in zip(of, grads, strict=True):
                mean[name] = mean[name] + gradient if name in mean else gradient
        return mean

    return Step(run)
