"""Sign-MAML, FO-MAML and MAML from their definition: a loop over tasks, one gradient per step.

Independent of the package: no functional calls and no batching, but a deep copy of the module for each task and step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.cases import rules

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def meta_gradient(
    model: nn.Module,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    inner_lr: float,
    inner_steps: int,
    method: str,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    adapt: list[str] | None = None,
    second_order_sign: bool = False,
    sharpness: float = 0.0,
    vector: rules.Vector | None = None,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
    """Mean meta-gradient by name, query losses `[T]`, support losses `[K, T]`; None for parameters that no loss uses.

    BatchNorm normalises by the current set, in training and evaluation; each forward starts from the model's buffers.
    `second_order_sign` differentiates through the sign, whose derivative is 0. `sharpness` is the radius of the lower
    step of Sharp-MAML, `vector` what an inner rule steps along, and `weight_decay` its lambda.
    """
    keep_history = method == "maml" or second_order_sign
    criterion = LOSSES[loss] if isinstance(loss, str) else loss
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = [name for name in names if adapt is None or any(fnmatchcase(name, pattern) for pattern in adapt)]
    sums: dict[str, Tensor | None] = dict.fromkeys(names)
    queries, supports = [], []
    # torch's other attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if keep_history else nullcontext():
        for task in zip(*data, strict=True):
            gradients, query, support = _task(
                model, task, adapted, inner_lr, inner_steps, method == "sign-maml", keep_history, criterion, sharpness,
                vector or rules.plain(), weight_decay,
            )  # fmt: skip
            for name, gradient in gradients.items():
                if gradient is not None:
                    gradient, previous = gradient.to_dense(), sums[name]
                    sums[name] = gradient if previous is None else previous + gradient
            queries.append(query)
            supports.append(torch.stack(support) if support else query.new_empty(0))
    tasks = len(queries)
    means = {name: None if total is None else total / tasks for name, total in sums.items()}
    return means, torch.stack(queries), torch.stack(supports, 1)


def _task(
    model: nn.Module,
    data: tuple[Tensor, ...],
    adapted: list[str],
    rate: float,
    steps: int,
    by_sign: bool,
    keep_history: bool,
    loss: Callable[[Tensor, Tensor], Tensor],
    sharpness: float,
    vector: rules.Vector,
    weight_decay: float,
) -> tuple[dict[str, Tensor | None], Tensor, list[Tensor]]:
    support_x, support_y, query_x, query_y = data
    learner = _copy(model)
    theta = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    phi, losses = dict(theta), []
    seen: dict[str, list[Tensor]] = {name: [] for name in adapted}
    factors = dict.fromkeys(theta, 1.0)  # of d phi / d theta, where the steps have no history
    for step in range(steps):
        if step > 0:
            # With a history, each step gets its own copy of the module, whose parameters are tensors with a history:
            # a checkpointed forward reads them again in the backward pass.
            learner = _with(model, phi, keep_history)
            if not keep_history:
                phi = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        error = loss(learner(support_x), support_y)
        losses.append(error.detach())
        moving = [phi[name] for name in adapted]
        found = torch.autograd.grad(error, moving, create_graph=keep_history, allow_unused=True)
        if sharpness > 0:
            dense = {name: g.to_dense() for name, g in zip(adapted, found, strict=True) if g is not None}
            norm = sum((g**2).sum() for g in dense.values()) ** 0.5 + 1e-12
            place = {name: phi[name] + sharpness * g / norm for name, g in dense.items()}
            there = _with(model, phi | place, keep_history)
            at = place if keep_history else {n: p for n, p in there.named_parameters() if n in dense}
            error = loss(there(support_x), support_y)
            sharp = torch.autograd.grad(error, list(at.values()), create_graph=keep_history, allow_unused=True)
            found = [dict(zip(at, sharp, strict=True)).get(name) for name in adapted]
        for name, gradient in zip(adapted, found, strict=True):
            if gradient is not None:
                seen[name].append(gradient.to_dense())  # sparse embeddings have sparse gradients
                along = vector(seen[name])
                direction = along.sign() if by_sign else along
                factors[name] *= 1 - rate * weight_decay
                moved = (1 - rate * weight_decay) * phi[name] - rate * direction
                phi[name] = moved if keep_history else moved.detach().requires_grad_()
    learner = _with(model, phi, keep_history)
    if not keep_history:
        theta = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    error = loss(learner(query_x), query_y)
    found = torch.autograd.grad(error, list(theta.values()), allow_unused=True)
    if not keep_history:
        found = [None if g is None else g * factors[name] for name, g in zip(theta, found, strict=True)]
    return dict(zip(theta, found, strict=True)), error.detach(), losses


def _copy(model: nn.Module) -> nn.Module:
    learner = copy.deepcopy(model)
    for module in learner.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats = False
    return learner


def _with(model: nn.Module, phi: dict[str, Tensor], keep_history: bool) -> nn.Module:
    """A fresh copy with the given parameters: copied by value or, with `keep_history`, used as they are."""
    learner = _copy(model)
    if not keep_history:
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                if name in phi:
                    parameter.copy_(phi[name])
        return learner
    placed = {id(p): phi[name] for name, p in learner.named_parameters() if name in phi}
    for module in learner.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in placed:
                module._parameters[name] = placed[id(parameter)]
    return learner
