"""The flat-buffer family: sign steps and plain steps of any module, with gradients by torch.

All trainable parameters of the running tasks are one buffer `[t, P]`, and the model sees views of it. torch computes
the gradients; one operator then moves all tensors of these tasks and flags non-finite values, and another sums the
meta-gradients. Tasks run together under vmap, or one by one, then several at a time on threads.
Definition: reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import compact, compiled, inputs, modes, ops, threads
from .lazy import cached_property
from .losses import accuracy
from .problem import Problem
from .reference import (
    LARGE,
    Run,
    all_finite,
    batched_or_not,
    gradients_of,
)
from .results import Adaptation, CompactParams, MetaGradients, TaskParams
from .sharpness import ascent, sign

if TYPE_CHECKING:
    from .layers.run import NativeRun


def why_not(problem: Problem, device_type: str) -> str | None:
    """None if the flat-buffer operators of a device type serve this problem, else the reason."""
    if problem.device.type != device_type:
        return f"the model is on {problem.device}"
    if problem.method == "maml":
        return "its steps are no part of the graph, and 'maml' differentiates through them"
    if len({parameter.dtype for parameter in problem.params.values()}) > 1:
        return "the parameters have several dtypes"
    return None if problem.inner_rule is None else no_rule(problem)


def no_rule(problem: Problem) -> str:
    """Why native steps do not serve a problem with a rule."""
    return f"its steps are plain, and inner_rule is {problem.inner_rule}"


def meta_gradients(problem: Problem) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    if problem.task_state == "int8":
        return compact.meta_gradients(problem, lambda part: batched_or_not(part, meta_gradients_of))
    return batched_or_not(problem, meta_gradients_of)


def adapt(problem: Problem) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    if problem.task_state == "int8":
        return compact.adapt(problem, lambda part: batched_or_not(part, adapt_of))
    return batched_or_not(problem, adapt_of)


# Constants that a CUDA graph reads, by id. A graph knows them only by address, so they are never freed.
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


# Some columns of a row: the first, one past the last, and their gradients `[t, columns]`.
Stretch = tuple[int, int, Tensor]


@dataclass(frozen=True)
class StepRate:
    """The rates of one step over the adapted columns, as `sign_step_` takes them.

    Attributes:
        lr: `[1]`, `[G]` (one rate per tensor) or `[P]`.
        offsets: `[G + 1]` int64, where the columns of each tensor start; None unless `lr` is `[G]`.
        sizes: Columns of each of the G tensors.
        number: The rate, if it is one Python number.
    """

    lr: Tensor
    offsets: Tensor | None = None
    sizes: tuple[int, ...] = ()
    number: float | None = None

    @cached_property
    def columns(self) -> Tensor:
        """`lr` expanded to columns, `[1]` or `[P]`."""
        if self.offsets is None:
            return self.lr
        parts = zip(self.lr.unbind(), self.sizes, strict=True)
        return torch.cat([rate.expand(size) for rate, size in parts])

    def within(self, first: int, last: int) -> float | Tensor:
        """The rates of some columns: a number, `[1]` or one per column."""
        if self.number is not None:
            return self.number
        return self.columns if self.columns.numel() == 1 else self.columns[first:last]


class Layout:
    """Where each trainable parameter is stored in a row `[P]`, adapted ones first; shared by all tasks of a call.

    Attributes:
        names: The parameters' names, in order.
        theta: `[P]`, where all tasks start.
        adapted_size: Number of leading columns that the inner loop moves.
        rates: One for each step.
    """

    def __init__(self, problem: Problem) -> None:
        others = [name for name in problem.params if name not in problem.adapted]
        self.problem = problem
        self.names = [*problem.adapted, *others]
        self._shapes = [problem.params[name].shape for name in self.names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.adapted_size = sum(self._sizes[: len(problem.adapted)])
        self.theta = torch.cat([problem.params[name].detach().reshape(-1) for name in self.names])
        rates = problem.rates
        ndims = {key: problem.params[key].ndim if key else 0 for key in rates.values}
        vary = any(rates.varies_by_step(key, ndim) for key, ndim in ndims.items())
        once = [self._rate(step) for step in range(problem.steps if vary else min(1, problem.steps))]
        self.rates = once if vary else once * problem.steps

    def views(self, buffer: Tensor, batched: bool) -> TaskParams:
        """The parameters in the columns of a buffer `[t, columns]`, as leaves of a new graph.

        `[t, *shape]` under vmap; `[*shape]` for a single task.
        """
        sizes = list(self._sizes_in(buffer.shape[1]))
        parts = zip(self.names, self._shapes, buffer.detach().split(sizes, dim=1), strict=False)
        lead = buffer.shape[:1] if batched else ()
        return {name: part.view((*lead, *shape)).requires_grad_() for name, shape, part in parts}

    def gather(
        self, gradients: Mapping[str, Tensor | None], tasks: int, zero: frozenset[str], whole: bool = False
    ) -> list[Stretch]:
        """Gradients as stretches of columns; 0 for those in `zero` and those that are None.

        With several tasks, or with `whole`, all columns are one stretch. With one task each large tensor is a stretch
        by itself, which saves a copy.
        """
        stretches: list[Stretch] = []
        together: list[Tensor] = []
        first = last = 0

        def close() -> None:
            if together:
                stretches.append((first, last, together[0] if len(together) == 1 else torch.cat(together, dim=1)))
                together.clear()

        for name, size in zip(self.names, self._sizes, strict=True):
            if name not in gradients:
                continue
            gradient = None if name in zero else gradients[name]
            of_name = self.theta.new_zeros(tasks, size) if gradient is None else gradient.reshape(tasks, size)
            if tasks == 1 and not whole and size >= LARGE:
                close()
                first = last
            together.append(of_name)
            last += size
            if tasks == 1 and not whole and size >= LARGE:
                close()
                first = last
        close()
        return stretches

    def follow(self, buffer: Tensor, views: TaskParams) -> None:
        """Copies back parameters that a forward moved to other memory (`weight.data = ...`)."""
        first, size = 0, buffer.element_size()
        for view in views.values():
            columns = view.numel() // buffer.shape[0]
            if view.data_ptr() != buffer.data_ptr() + first * size and columns:
                buffer[:, first : first + columns] = view.detach().reshape(buffer.shape[0], columns)
            first += columns

    def by_name(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters in a row `[P]`, or the adapted ones in a row `[adapted columns]`."""
        parts = zip(self.names, self._shapes, row.split(list(self._sizes_in(row.shape[-1])), dim=-1), strict=False)
        return {name: part.reshape((*row.shape[:-1], *shape)) for name, shape, part in parts}

    def _sizes_in(self, columns: int) -> list[int]:
        return self._sizes if columns == self.theta.numel() else self._sizes[: len(self.problem.adapted)]

    def _rate(self, step: int) -> StepRate:
        problem, dtype = self.problem, self.theta.dtype
        rates = problem.rates

        def as_tensor(value: float | Tensor) -> Tensor:
            return value.to(dtype) if isinstance(value, Tensor) else constant((value,), dtype, problem.device)

        if "" in rates.values:
            value = rates.at(step, "", self.theta[None, :1], {})
            return StepRate(as_tensor(value).reshape(1), number=None if isinstance(value, Tensor) else value)
        of = {name: as_tensor(rates.at(step, name, problem.params[name][None], {})) for name in problem.adapted}
        if all(rate.numel() == 1 for rate in of.values()):
            sizes = tuple(self._sizes[: len(problem.adapted)])
            offsets = constant((0, *accumulate(sizes)), torch.int64, problem.device)
            return StepRate(torch.cat([rate.reshape(1) for rate in of.values()]), offsets, sizes)
        return StepRate(torch.cat([rate.expand(1, *problem.params[n].shape).reshape(-1) for n, rate in of.items()]))


class Rooms:
    """Tensors by name in one block of memory, or in memory of their own where there is none or no more.

    Args:
        block: `[n]`, which nobody else uses meanwhile.
    """

    def __init__(self, block: Tensor | None = None) -> None:
        self._free, self._named = block, dict[str, Tensor]()

    def of(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """The tensor of a name, uninitialised at first; its shape is the same each time."""
        if name not in self._named:
            size = math.prod(shape)
            if self._free is None or size > self._free.numel():
                self._named[name] = like.new_empty(shape)
            else:
                self._named[name], self._free = self._free[:size].view(shape), self._free[size:]
        return self._named[name]


class Tasks:
    """Some tasks in one buffer: their inner loop and their query pass.

    Args:
        run: The pass they belong to: with gradients by torch or by native code.
        layout: The layout of their parameters.
        which: Their slice of the task axis.
        learns: Whether the steps will be differentiated: through gradients ('maml') and inner rates.
        rooms: Memory for the buffer and native gradients.

    Attributes:
        buffer: `[t, P]`, their parameters.
        counts: `[t, adapted columns]` int8 with `task_state="int8"`, else None.
        directions: `[t, adapted columns]` of each step, if `learns` and rates are learnable; else None.
        nonfinite: `[t]` bool.
    """

    def __init__(
        self, run: Run | NativeRun, layout: Layout, which: slice, *, learns: bool = False, rooms: Rooms | None = None
    ) -> None:
        self.run, self.layout, self.which = run, layout, which
        self.number = which.stop - which.start
        self._rooms = rooms or Rooms()
        self.buffer = self._room("buffer", layout.theta.numel()).copy_(layout.theta)
        self.nonfinite = torch.zeros(self.number, dtype=torch.bool, device=layout.theta.device)
        self._row: Tensor | None = None  # the last native pass's gradients, side by side
        self.counts: Tensor | None = None
        self.directions: list[Tensor] | None = [] if run.problem.rates.learnable() and learns else None
        self._path: list[Tensor] | None = [] if run.problem.method == "maml" and learns else None
        if run.problem.task_state == "int8":
            self.counts = self.buffer.new_zeros((self.number, layout.adapted_size), dtype=torch.int8)

    def inner_loop(self) -> Tensor:
        """Takes the K inner steps; returns the support loss `[K, t]`."""
        problem = self.run.problem
        x, y = inputs.take(problem.support_x, self.which), problem.support_y[self.which]
        adapted_part = self.buffer[:, : self.layout.adapted_size]
        moved = adapted_part  # the buffer itself when everything adapts
        if not moved.is_contiguous():
            moved = self._room("moved", self.layout.adapted_size).copy_(adapted_part)
        losses = []
        for step, rate in enumerate(self.layout.rates):
            if self._path is not None:
                self._path.append(self._room(f"step {step}", self.layout.adapted_size).copy_(moved))
            views = self.layout.views(moved, self.run.batched)
            loss, _, gradients = self._pass(views, x, y, step)
            losses.append(loss)
            whole = self.counts is not None or self.directions is not None  # in one stretch
            stretches = self.gather(gradients, step, whole)
            self.layout.follow(moved, views)
            del gradients, views
            if problem.sharpness is not None:
                there = self._sharpest(moved, stretches)
                loss, _, gradients = self._pass(self.layout.views(there, self.run.batched), x, y, step)
                self.nonfinite |= ~loss.isfinite()
                stretches = self.gather(gradients, step, whole)
                del gradients
            if self.directions is not None:
                ((_, _, grads),) = stretches
                self.directions.append(sign(grads) if problem.method == "sign-maml" else grads.clone())
            for first, last, grads in stretches:
                self._step(moved, first, last, grads, rate)
        if moved.data_ptr() != self.buffer.data_ptr():
            adapted_part.copy_(moved)
        support_loss = torch.stack(losses) if losses else self.buffer.new_empty(0, self.number)
        self.nonfinite |= ~support_loss.isfinite().all(0)
        return support_loss

    def _room(self, name: str, columns: int) -> Tensor:
        return self._rooms.of(name, self.number, columns, like=self.layout.theta)

    def gather(self, gradients: Mapping[str, Tensor | None], step: int, whole: bool) -> list[Stretch]:
        """The gradients of the last pass as stretches; see `Layout.gather`."""
        if self._row is not None:
            return [(0, self._row.shape[1], self._row)]
        return self.layout.gather(gradients, self.number, self.run.dead(step), whole)

    def _sharpest(self, moved: Tensor, stretches: list[Stretch]) -> Tensor:
        """The parameters `[t, adapted columns]` at the sharpest place near them; flags non-finite gradients."""
        assert self.run.problem.sharpness is not None
        for _, _, grads in stretches:
            self.nonfinite |= ~all_finite(grads)
        values = [moved[:, first:last] for first, last, _ in stretches]
        offsets = ascent(self.run.problem.sharpness, values, [grads for _, _, grads in stretches])
        return torch.cat([value + offset for value, offset in zip(values, offsets, strict=True)], dim=1)

    def _step(self, moved: Tensor, first: int, last: int, grads: Tensor, rate: StepRate) -> None:
        flags = self.nonfinite
        here = moved[:, first:last]
        if self.run.problem.method != "sign-maml":
            flags |= ~all_finite(grads)
            columns = rate.within(first, last)
            if isinstance(columns, Tensor):
                here.addcmul_(grads, columns, value=-1)
            else:
                here.sub_(grads, alpha=columns)
        elif self.counts is not None:
            theta = self.layout.theta[: self.layout.adapted_size]
            ops.compact_sign_step_(
                self.counts, moved, theta, grads, rate.lr, segment_offsets=rate.offsets, nonfinite=flags
            )
        elif last - first == moved.shape[1]:
            ops.sign_step_(moved, grads, rate.lr, segment_offsets=rate.offsets, nonfinite=flags)
        else:
            columns = rate.within(first, last)
            lr = columns if isinstance(columns, Tensor) else rate.lr
            ops.sign_step_(here, grads, lr.contiguous(), nonfinite=flags)

    def query(self, *, wants_gradients: bool) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Loss `[t]`, prediction `[t, Q, ...]` and, if wanted, the gradient by name."""
        problem = self.run.problem
        assert problem.query_x is not None and problem.query_y is not None
        x, y = inputs.take(problem.query_x, self.which), problem.query_y[self.which]
        views = self.layout.views(self.buffer, self.run.batched)
        if not wants_gradients:
            views = {name: view.detach() for name, view in views.items()}
        loss, prediction, gradients = self._pass(views, x, y, problem.steps)
        self.nonfinite |= ~loss.isfinite()
        return loss, prediction, gradients

    def differentiate_steps(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The gradient of each learnable rate, `[t, *rate_shape]` by key, from that of the query loss.

        With 'maml', the query gradients, which must be native ones, also become the meta-gradients, from the last step
        to the first: v <- v - H (rate * v), and the rates of a step see v before that.
        """
        totals = dict[str, Tensor]()
        if self._path is None:
            for step, direction in enumerate(self.directions or ()):
                self._add_rate_gradients(step, gradients, direction, totals)
            return totals
        run, row, layout = self.run, self._row, self.layout
        assert not isinstance(run, Run) and row is not None
        problem = run.problem
        x, y = inputs.take(problem.support_x, self.which), problem.support_y[self.which]
        theta = layout.by_name(layout.theta.expand(self.number, -1))
        of_moved = row[:, : layout.adapted_size]
        for step in reversed(range(problem.steps)):
            if self.directions is not None:
                self._add_rate_gradients(step, layout.by_name(of_moved), self.directions[step], totals)
            here = theta | layout.by_name(self._path[step])
            rates = layout.rates[step].within(0, layout.adapted_size)
            along = torch.mul(of_moved, rates, out=self._room("along", layout.adapted_size))
            examples = run.examples(x, y, first_task=self.which.start, step=step)
            row -= run.hessian(here, examples, layout.by_name(along), self._room("products", row.shape[1]))
        return totals

    def _add_rate_gradients(
        self, step: int, gradients: Mapping[str, Tensor | None], direction: Tensor, totals: dict[str, Tensor]
    ) -> None:
        """Adds the gradients of a step's rates to `totals`.

        d loss / d rate = -<gradient, direction>, of the parameters after the step, summed over all that share the rate.
        """
        rates, moved_by = self.run.problem.rates, self.layout.by_name(direction)
        products = {
            name: gradient.reshape(moved_by[name].shape) * moved_by[name]
            for name, gradient in gradients.items()
            if gradient is not None and name in moved_by
        }
        for key in rates.learnable():
            of_key = products if key == "" else {name: products[name] for name in products if name == key}
            rates.sum_to_rate(key, step, of_key, totals)

    def _pass(
        self, views: TaskParams, x: inputs.Inputs, y: Tensor, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Loss, prediction, and gradients of the views if those require grad."""
        run, first = self.run, self.which.start
        differentiates = any(view.requires_grad for view in views.values())
        if not isinstance(run, Run):
            columns = sum(view.numel() for view in views.values()) // self.number if differentiates else 0
            # A name for each kind of pass: the support set's gradients may be of fewer parameters.
            into = self._room("query" if step == run.problem.steps else "support", columns) if columns else None
            examples = run.examples(x, y, first_task=first, step=step)
            loss, prediction, self._row = run.gradients(views, examples, views if differentiates else (), into)
            return loss, prediction, {} if self._row is None else {**self.layout.by_name(self._row)}
        by_support = run.problem.batch_norm == "support" and step == run.problem.steps
        if run.problem.compile and not by_support:
            return compiled.run_pass(run, views, x, y, first_task=first, step=step, differentiates=differentiates)
        loss, prediction = run.loss_and_prediction(views, x, y, first_task=first, step=step)
        gradients = gradients_of(loss, views) if differentiates else {}
        return loss.detach(), prediction.detach(), gradients


@dataclass(frozen=True)
class _Part:
    """Results of a meta-step on some tasks: gradients, names that have one, and per-task values."""

    grads: list[Stretch]
    rates: dict[str, Tensor]
    reached: frozenset[str]
    loss: Tensor
    accuracy: Tensor | None
    support_loss: Tensor
    nonfinite: Tensor


def meta_gradients_of(run: Run | NativeRun) -> MetaGradients:
    """The meta-step of all tasks, with the run's gradients."""
    problem, layout = run.problem, Layout(run.problem)
    assert problem.query_y is not None
    skip = problem.nonfinite == "skip"

    def part_of(which: slice, block: Tensor | None) -> _Part:
        tasks = Tasks(run, layout, which, learns=True, rooms=Rooms(block))
        support_loss = tasks.inner_loop()
        loss, prediction, gradients = tasks.query(wants_gradients=True)
        assert problem.query_y is not None
        rate_gradients = tasks.differentiate_steps(gradients)
        return _Part(
            grads=tasks.gather(gradients, problem.steps, skip),
            rates=rate_gradients,
            reached=frozenset(name for name, gradient in gradients.items() if gradient is not None),
            loss=loss,
            accuracy=accuracy(problem.loss, prediction, problem.query_y[which]),
            support_loss=support_loss,
            nonfinite=tasks.nonfinite,
        )

    total = torch.zeros_like(layout.theta)
    rates = {key: torch.zeros_like(rate.detach()) for key, rate in problem.rates.learnable().items()}
    lives, parts, reached = [], [], frozenset[str]()
    chunks = run.chunks()
    memory = nullcontext() if isinstance(run, Run) else run.memory(layout.theta.numel())
    with (
        memory as block,
        closing(threads.map_in_order(lambda which: part_of(which, block), chunks, run.threads(), run.stop)) as in_order,
    ):
        for part in in_order:
            reached |= part.reached
            for first, last, grads in part.grads:
                _add(total[first:last], grads, part.nonfinite, skip, whole=len(chunks) == 1)
            live = ~part.nonfinite if skip else torch.ones_like(part.nonfinite)
            for key, of_tasks in part.rates.items():
                mask = live.view(-1, *[1] * (of_tasks.ndim - 1))
                rates[key] += torch.where(mask, of_tasks, torch.zeros_like(of_tasks)).sum(0)
            lives.append(live)
            # Without the gradients, which would take memory while other tasks run.
            parts.append((part.loss, part.accuracy, part.support_loss, part.nonfinite))
    losses, accuracies, support_losses, flags = zip(*parts, strict=True)
    live_tasks = torch.cat(lives).sum()
    mean = total if len(chunks) == 1 else total / live_tasks.clamp(min=1)
    found = layout.by_name(mean)
    return MetaGradients(
        params={name: found[name] if name in reached else None for name in problem.params},
        rates={key: value / live_tasks.clamp(min=1) if problem.steps else None for key, value in rates.items()},
        query_loss=torch.cat(losses),
        query_accuracy=None if accuracies[0] is None else torch.cat(accuracies),
        support_loss=torch.cat(support_losses, dim=1),
        nonfinite=torch.cat(flags),
        live_tasks=live_tasks,
    )


def _add(total: Tensor, grads: Tensor, nonfinite: Tensor, skip: bool, whole: bool) -> None:
    """Adds the sum over live tasks (with `whole`, their mean), in order, and flags non-finite gradients."""
    if whole or grads.shape[0] == 1:  # the mean over one task is its gradient
        ops.meta_accumulate_(total, grads, nonfinite=nonfinite, skip_nonfinite=skip)
        return
    mean = torch.zeros_like(total)
    ops.meta_accumulate_(mean, grads, nonfinite=nonfinite, skip_nonfinite=skip)
    total += mean * (~nonfinite).sum() if skip else mean * grads.shape[0]


def adapt_of(run: Run | NativeRun) -> Adaptation:
    """The inner loop of all tasks, with the run's gradients."""
    problem, layout = run.problem, Layout(run.problem)

    def part_of(which: slice) -> tuple[Tasks, Tensor, Tensor | None, Tensor | None]:
        tasks = Tasks(run, layout, which)
        support_loss = tasks.inner_loop()
        if problem.query_x is None:
            return tasks, support_loss, None, None
        return tasks, support_loss, *tasks.query(wants_gradients=False)[:2]

    parts = list(threads.map_in_order(part_of, run.chunks(), run.threads(), run.stop))
    tasks, support_losses, losses, predictions = zip(*parts, strict=True)
    phi = torch.cat([of_chunk.buffer[:, : layout.adapted_size] for of_chunk in tasks])
    adapted: Mapping[str, Tensor] = layout.by_name(phi)
    statistics: Mapping[str, Tensor] = {}
    if problem.task_state == "int8":
        counts = torch.cat([of_chunk.counts for of_chunk in tasks])
        adapted = CompactParams(layout.by_name(counts), problem.params, problem.rates)
    elif problem.batch_norm == "support" and problem.query_x is None and isinstance(run, Run):
        statistics = run.support_statistics(dict(adapted))
    prediction = None if problem.query_x is None else torch.cat(predictions)
    shares = None
    if prediction is not None and problem.query_y is not None:
        shares = accuracy(problem.loss, prediction, problem.query_y)
    return Adaptation(
        params=adapted,
        support_loss=torch.cat(support_losses, dim=1),
        query_loss=None if problem.query_x is None else torch.cat(losses),
        query_accuracy=shares,
        logits=prediction,
        nonfinite=torch.cat([of_chunk.nonfinite for of_chunk in tasks]),
        statistics=statistics,
    )
