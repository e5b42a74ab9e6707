"""The peer that everybody has: one task after the other, as learn2learn and the official Sign-MAML code do it.

Written from the definition in plain PyTorch, without anything of this package: a copy of the parameters a task, a
forward and a backward pass a step, first order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


def meta_step(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    inner_lr: float,
    inner_steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Adds the mean meta-gradient of sign-maml to `.grad`."""
    theta: Mapping[str, Tensor] = dict(model.named_parameters())
    tasks = support_x.shape[0]
    for task in range(tasks):
        phi = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
        for _ in range(inner_steps):
            error = loss(functional_call(model, phi, (support_x[task],)), support_y[task])
            grads = torch.autograd.grad(error, list(phi.values()))
            with torch.no_grad():
                for value, gradient in zip(phi.values(), grads, strict=True):
                    value -= inner_lr * gradient.sign()
        error = loss(functional_call(model, phi, (query_x[task],)), query_y[task])
        grads = torch.autograd.grad(error / tasks, list(phi.values()))
        for parameter, gradient in zip(theta.values(), grads, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
