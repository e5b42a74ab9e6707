"""The flat-buffer family: any module that batches, sign steps and meta-gradient mean by the native kernels.

All trainable parameters of all tasks are one buffer `[T, P]`, and the model sees views of it. torch computes the
gradients; `sign_step_` then moves all tensors of all tasks in one launch and `meta_accumulate_` takes the mean.
Definition: reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import compact, modes, ops
from .checks import Problem
from .losses import accuracy
from .reference import (
    Adaptation,
    CompactParams,
    MetaGradients,
    Run,
    TaskParams,
    gradients_of,
    run_batched,
    why_not_batched,
)


def why_not(problem: Problem, device_type: str) -> str | None:
    """None if the flat-buffer kernels of a device type serve this problem, else the reason."""
    if problem.device.type != device_type:
        return f"the model is on {problem.device}"
    if problem.method != "sign-maml":
        return f"its steps are sign steps, and the method is {problem.method!r}"
    if len({parameter.dtype for parameter in problem.params.values()}) > 1:
        return "the parameters have several dtypes"
    if problem.rates.learnable():
        return "inner_lr requires grad, which the pure PyTorch backend serves"
    reason = why_not_batched(problem)
    return None if reason is None else f"it runs all tasks together, but {reason}"


def meta_gradients(problem: Problem) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    if problem.task_state == "int8":
        return compact.meta_gradients(problem, lambda part: run_batched(part, _meta_gradients))
    return run_batched(problem, _meta_gradients)


def adapt(problem: Problem) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    if problem.task_state == "int8":
        return compact.adapt(problem, lambda part: run_batched(part, _adapt))
    return run_batched(problem, _adapt)


# Constants that a CUDA graph reads, by id. A graph knows them by address only, so they stay for good.
_captured: dict[int, Tensor] = {}


@lru_cache(maxsize=1024)
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that is written to the device once: copying it in every step would make the host wait."""
    tensor = _constant(values, dtype, device)
    if modes.is_capturing(device):
        _captured[id(tensor)] = tensor
    return tensor


class FlatParams:
    """Trainable parameters of T tasks in one buffer, adapted ones first.

    Attributes:
        buffer: `[T, P]`, contiguous.
        adapted_size: Number of leading columns that the inner loop moves.
        theta: `[P]`, where all tasks start.
        counts: `[T, adapted_size]` int8 with `task_state="int8"`, else None.
    """

    def __init__(self, problem: Problem) -> None:
        others = [name for name in problem.params if name not in problem.adapted]
        self.names = [*problem.adapted, *others]
        self.shapes = [problem.params[name].shape for name in self.names]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.adapted_size = sum(self.sizes[: len(problem.adapted)])
        theta = torch.cat([problem.params[name].detach().reshape(-1) for name in self.names])
        self.counts: Tensor | None = None
        if problem.task_state == "int8":
            self.counts = theta.new_zeros((problem.tasks, self.adapted_size), dtype=torch.int8)
        self.theta = theta
        self.buffer = theta.repeat(problem.tasks, 1)

    def views(self, buffer: Tensor) -> TaskParams:
        """The parameters by name, `[T, *shape]`, as leaves of a new graph."""
        tasks = buffer.shape[0]
        parts = zip(self.names, self.shapes, buffer.detach().split(self.sizes, dim=1), strict=True)
        return {name: part.view(tasks, *shape).requires_grad_() for name, shape, part in parts}

    def gather(self, gradients: dict[str, Tensor | None], names: list[str], zero: frozenset[str]) -> Tensor:
        """Gradients as `[T, columns of names]`; 0 for those in `zero` and those that are None."""
        tasks, columns = self.buffer.shape[0], []
        for name, size in zip(self.names, self.sizes, strict=True):
            if name not in names:
                continue
            gradient = gradients[name]
            if gradient is None or name in zero:
                columns.append(self.buffer.new_zeros(tasks, size))
            else:
                columns.append(gradient.reshape(tasks, size))
        return torch.cat(columns, dim=1)


def _rates_by_step(problem: Problem, layout: FlatParams) -> list[tuple[Tensor, Tensor | None]]:
    """`lr` and `segment_offsets` of `sign_step_` for every step, over the adapted columns."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    sizes = [shapes[name].numel() for name in problem.adapted]
    offsets = constant((0, *accumulate(sizes)), torch.int64, problem.device)

    def as_tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(layout.buffer.dtype)
        return constant((value,), layout.buffer.dtype, problem.device)

    by_step: list[tuple[Tensor, Tensor | None]] = []
    for step in range(problem.steps):
        if "" in problem.rates.values:
            like = layout.buffer[:1, :1]
            by_step.append((as_tensor(problem.rates.at(step, "", like, {})).reshape(1), None))
            continue
        rates = {n: as_tensor(problem.rates.at(step, n, problem.params[n][None], {})) for n in problem.adapted}
        if all(rate.numel() == 1 for rate in rates.values()):
            by_step.append((torch.cat([rate.reshape(1) for rate in rates.values()]), offsets))
        else:
            full = [rate.expand(1, *shapes[name]).reshape(-1) for name, rate in rates.items()]
            by_step.append((torch.cat(full), None))
    return by_step


def _inner_loop(run: Run, layout: FlatParams, nonfinite: Tensor) -> Tensor:
    """Moves `layout.buffer` through the K steps; returns the support loss `[K, T]`."""
    problem = run.problem
    losses = []
    adapted_part = layout.buffer[:, : layout.adapted_size]
    moved = adapted_part.contiguous()  # the buffer itself when everything adapts
    for step, (lr, offsets) in enumerate(_rates_by_step(problem, layout)):
        views = _adapted_views(problem, layout, moved)
        loss, _ = run.loss_and_prediction(views, problem.support_x, problem.support_y, first_task=0, step=step)
        losses.append(loss.detach())
        gradients = gradients_of(loss, views)
        grads = layout.gather(gradients, list(problem.adapted), run.dead(step))
        if layout.counts is None:
            ops.sign_step_(moved, grads, lr, segment_offsets=offsets, nonfinite=nonfinite)
        else:
            theta = layout.theta[: layout.adapted_size]
            ops.compact_sign_step_(layout.counts, moved, theta, grads, lr, segment_offsets=offsets, nonfinite=nonfinite)
    if moved.data_ptr() != layout.buffer.data_ptr():
        adapted_part.copy_(moved)
    support_loss = torch.stack(losses) if losses else layout.buffer.new_empty(0, problem.tasks)
    nonfinite |= ~support_loss.isfinite().all(0)
    return support_loss


def _adapted_views(problem: Problem, layout: FlatParams, moved: Tensor) -> TaskParams:
    count = len(problem.adapted)
    parts = zip(problem.adapted, layout.shapes, moved.detach().split(layout.sizes[:count], dim=1), strict=False)
    return {name: part.view(problem.tasks, *shape).requires_grad_() for name, shape, part in parts}


def _meta_gradients(run: Run) -> MetaGradients:
    problem = run.problem
    assert problem.query_x is not None and problem.query_y is not None
    layout = FlatParams(problem)
    nonfinite = torch.zeros(problem.tasks, dtype=torch.bool, device=problem.device)
    support_loss = _inner_loop(run, layout, nonfinite)
    views = layout.views(layout.buffer)
    loss, prediction = run.loss_and_prediction(
        views, problem.query_x, problem.query_y, first_task=0, step=problem.steps
    )
    gradients = gradients_of(loss, views)
    nonfinite |= ~loss.detach().isfinite()
    skip = problem.nonfinite == "skip"
    mean = layout.buffer.new_zeros(layout.buffer.shape[1])
    grads = layout.gather(gradients, layout.names, run.dead(problem.steps))
    ops.meta_accumulate_(mean, grads, nonfinite=nonfinite, skip_nonfinite=skip)
    parts = zip(layout.names, layout.shapes, mean.split(layout.sizes), strict=True)
    means = {name: None if gradients[name] is None else part.view(shape) for name, shape, part in parts}
    live = ~nonfinite if skip else torch.ones_like(nonfinite)
    return MetaGradients(
        params={name: means[name] for name in problem.params},
        rates={},
        query_loss=loss.detach(),
        query_accuracy=accuracy(problem.loss, prediction, problem.query_y),
        support_loss=support_loss,
        nonfinite=nonfinite,
        live_tasks=live.sum(),
    )


def _adapt(run: Run) -> Adaptation:
    problem = run.problem
    layout = FlatParams(problem)
    nonfinite = torch.zeros(problem.tasks, dtype=torch.bool, device=problem.device)
    support_loss = _inner_loop(run, layout, nonfinite)
    params = {name: view.detach() for name, view in layout.views(layout.buffer).items()}
    loss = prediction = shares = None
    if problem.query_x is not None and problem.query_y is not None:
        found = run.loss_and_prediction(params, problem.query_x, problem.query_y, first_task=0, step=problem.steps)
        loss, prediction = (value.detach() for value in found)
        nonfinite |= ~loss.isfinite()
        shares = accuracy(problem.loss, prediction, problem.query_y)
    adapted: Mapping[str, Tensor] = {name: params[name] for name in problem.adapted}
    if layout.counts is not None:
        sizes = layout.sizes[: len(problem.adapted)]
        parts = zip(problem.adapted, layout.shapes, layout.counts.split(sizes, dim=1), strict=False)
        counts = {name: part.reshape(problem.tasks, *shape) for name, shape, part in parts}
        adapted = CompactParams(counts, problem.params, problem.rates)
    by_support = problem.batch_norm == "support" and problem.task_state == "full"
    statistics = run.support_statistics(params) if by_support else {}
    return Adaptation(adapted, support_loss, loss, shares, prediction, nonfinite, statistics)
