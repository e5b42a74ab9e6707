"""Sign-MAML, FO-MAML and MAML from their definition: one task after the other, one loop a line of the paper.

Written apart from the package, without functional calls or batching: a copy of the module a task, its parameters
replaced by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
}


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor with history in the place of a parameter."""
    *path, leaf = name.split(".")
    for part in path:
        model = getattr(model, part)
    model._parameters.pop(leaf, None)
    setattr(model, leaf, value)


def task_meta_gradient(
    model: nn.Module,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    inner_lr: float,
    inner_steps: int,
    method: str,
    loss: str = "cross_entropy",
    second_order_sign: bool = False,
    still: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Meta-gradient, query loss and support losses of one task.

    `still` names parameters that the inner loop leaves alone. `second_order_sign` differentiates through the sign.
    """
    support_x, support_y, query_x, query_y = data
    learner = copy.deepcopy(model)
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    phi = dict(theta)
    losses = []
    for _ in range(inner_steps):
        for name, value in phi.items():
            set_parameter(learner, name, value)
        error = LOSSES[loss](learner(support_x), support_y)
        losses.append(error.detach())
        create_graph = method == "maml" or second_order_sign
        moving = [name for name in phi if name not in still]
        grads = torch.autograd.grad(error, [phi[name] for name in moving], create_graph=create_graph)
        for name, gradient in zip(moving, grads, strict=True):
            step = torch.sign(gradient) if method == "sign-maml" else gradient
            phi[name] = phi[name] - inner_lr * step
    for name, value in phi.items():
        set_parameter(learner, name, value)
    error = LOSSES[loss](learner(query_x), query_y)
    grads = torch.autograd.grad(error, list(theta.values()))
    return dict(zip(theta, grads, strict=True)), error.detach(), losses


def meta_gradient(model: nn.Module, support_x, support_y, query_x, query_y, **options):  # type: ignore[no-untyped-def]
    """Mean meta-gradient by name, query losses `[T]` and support losses `[K, T]`."""
    sums: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    queries, supports = [], []
    for data in zip(support_x, support_y, query_x, query_y, strict=True):
        grads, query_loss, support_losses = task_meta_gradient(model, data, **options)
        for name, gradient in grads.items():
            sums[name] += gradient
        queries.append(query_loss)
        supports.append(torch.stack(support_losses) if support_losses else query_loss.new_empty(0))
    tasks = len(queries)
    means = {name: total / tasks for name, total in sums.items()}
    return means, torch.stack(queries), torch.stack(supports, dim=1)
