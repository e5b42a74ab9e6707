"""Passes over the tasks of a problem whose gradients native code computes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _loader, chain, fused, modes
from ..inputs import Inputs, only
from ..lazy import cached_property
from ..problem import Problem
from ..results import TaskParams
from .spec import LayersSpec, read

# The parameters and gradients of the tasks that run together take about this many bytes: they stay in the cache.
TOGETHER_BYTES = 8 * 2**20

ROWS = fused.Scratch()


def program_of(problem: Problem, found: LayersSpec, native: ModuleType = _loader.C) -> Any:
    """The native program for a problem's examples, kept until the module changes; or why there is none."""
    size = found.size(tuple(only(problem.support_x).shape[2:]))
    answers = chain.of_module(problem.model).answers
    key = ("native layers program", found, size)
    if key not in answers:
        try:
            answers[key] = native.LayersProgram([block.entries() for block in found.blocks], size)
        except ValueError as error:
            answers[key] = str(error)
    return answers[key]


class Examples(NamedTuple):
    """What a pass of t tasks reads, besides parameters.

    Attributes:
        x: `[t, S, ...]`.
        y: `[t, S]` labels, or `[t, S, outputs]`.
        first_task: Number of the first of these tasks in the problem.
        step: The inner step; K for the query pass.
    """

    x: Tensor
    y: Tensor
    first_task: int
    step: int


@dataclass
class NativeRun:
    """One pass over the tasks of a problem, with native gradients: what `flat` and `reference` need of a `Run`.

    Attributes:
        problem: The call.
        spec: The module's program.
        program: The same, as native code takes it.
    """

    problem: Problem
    spec: LayersSpec
    program: Any
    _large: fused.Scratch = field(init=False, repr=False, compare=False)
    batched = True

    def __post_init__(self) -> None:
        self._large = fused.Scratch(math.inf)

    @classmethod
    def of(cls, problem: Problem) -> NativeRun:
        found = read(problem.model)
        assert not isinstance(found, str), "why_not has a reason for this problem"
        run = cls(problem, found, program_of(problem, found))
        fused.check_classes(problem, found)
        return run

    @cached_property
    def _unmoved(self) -> frozenset[str]:
        return frozenset(self.spec.unmoved)

    def chunks(self) -> list[slice]:
        """Slices of the task axis: tasks that run together."""
        tasks, threads = self.problem.tasks, torch.get_num_threads()
        count = max(y.shape[1] for y in (self.problem.support_y, self.problem.query_y) if y is not None)
        factors = count * sum(math.prod(shape) for _, shape in self._dropouts)
        parameters = 2 * sum(p.numel() for p in self.problem.params.values())
        of_task = (parameters + factors) * self.problem.dtype.itemsize
        size = max(1, TOGETHER_BYTES // (of_task * threads)) * threads
        return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]

    def memory(self, columns: int) -> AbstractContextManager[Tensor]:
        """Memory for the parameters and gradients of a chunk, which a call leaves to the next one.

        Args:
            columns: Trainable parameters of a task.
        """
        first = self.chunks()[0]
        # At most: where the tasks are, what moves, two rows of gradients, products and their direction; and the path.
        rows = 6 + (self.problem.steps if self.problem.method == "maml" else 0)
        return ROWS.of((rows * (first.stop - first.start) * columns,), self.problem.dtype)

    def _workspace(self, size: int) -> AbstractContextManager[Tensor]:
        """Memory for a native call: what is too large to be left to the next meta-step stays for the next pass."""
        scratch = fused.WORKSPACE if size <= fused.KEPT_BYTES else self._large
        return scratch.of((size,), torch.uint8)

    def threads(self) -> int:
        """One chunk at a time: the native call has the threads."""
        return 1

    def stop(self) -> None:
        """Nothing waits for a first task here."""

    def dead(self, step: int) -> frozenset[str]:
        """Parameters whose gradient is exactly 0."""
        return self._unmoved

    def by_task(self, values: Iterable[Any]) -> list[Any]:
        """Tensors of a pass as `[t, *shape]`, as they are."""
        return list(values)

    def examples(self, x: Inputs, y: Tensor, *, first_task: int, step: int) -> Examples:
        """The examples of a pass as native code takes them."""
        return Examples(only(x).contiguous(), y.contiguous(), first_task, step)

    @cached_property
    def _dropouts(self) -> list[tuple[float, tuple[int, ...]]]:
        """Of each dropout the share that becomes 0, and the shape of an example's factors."""
        return [
            (block.share, made[:1] if block.drops == "channels" else made)
            for block, (_, _, made) in zip(self.spec.blocks, self.program.sizes, strict=True)
            if block.drops != "none"
        ]

    def _noise(self, examples: Examples) -> list[Tensor]:
        """The factors of each dropout as the reference draws them, by seed, task and step.

        They are drawn again for each native call, because those of all steps would take much memory.

        Returns:
            By dropout, `[t, S, C, H, W]` or, for whole channels, `[t, S, C]`.
        """
        x, y, first_task, step = examples
        noise = [x.new_empty(*y.shape[:2], *shape) for _, shape in self._dropouts]
        generator = torch.Generator("cpu")
        for task in range(len(y) if noise else 0):
            number = self.problem.first_task + first_task + task
            assert self.problem.seed is not None, "a call with dropouts has a seed"
            generator.manual_seed(modes.stream_seed(self.problem.seed, number, step))
            for (share, _), factors in zip(self._dropouts, noise, strict=True):
                factors[task].bernoulli_(1 - share, generator=generator).div_(1 - share)  # as torch's dropout does
        return noise

    def loss_and_prediction(
        self, params: TaskParams, x: Inputs, y: Tensor, *, first_task: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """See `reference.Run`. The loss's graph has two derivatives of the adapted parameters, in an inner step."""
        wanted = self.problem.adapted if step < self.problem.steps else tuple(params)
        examples = self.examples(x, y, first_task=first_task, step=step)
        loss, prediction = _Loss.apply(self, examples, tuple(params), frozenset(wanted), *params.values())
        return loss, prediction

    def gradients(
        self, views: TaskParams, examples: Examples, wanted: Collection[str], into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass of t tasks.

        Args:
            views: Their own parameters by name, `[t, *shape]`; all others are the model's.
            examples: Theirs.
            wanted: The views whose gradients are wanted.
            into: Memory for the gradients; None: their own.

        Returns:
            Loss `[t]`, predictions `[t, S, outputs]`, and the gradients of the wanted views, in the order of `views`
            side by side, `[t, columns]`; None if there are none.
        """
        x, y, *_ = examples
        noise = self._noise(examples)
        tasks, count = y.shape[:2]
        parameters = self._parameters(views)
        row, places = _row({name: view for name, view in views.items() if name in wanted}, x, into)
        gradients = [] if row is None else [places.get(name, _NOWHERE) for name in self.spec.names]
        loss, predictions = x.new_empty(tasks), x.new_empty(tasks, count, self.spec.outputs)
        threads, is_double = torch.get_num_threads(), x.dtype == torch.float64
        plan = self.program.plan(tasks, count, is_double, threads)
        with self._workspace(plan["workspace_bytes"]) as workspace:
            self.program.run(
                [_place(value) for value in parameters], gradients, x.data_ptr(), *self._goal(y),
                [factors.data_ptr() for factors in noise], loss.data_ptr(), predictions.data_ptr(),
                workspace.data_ptr(), tasks, count, is_double, threads,
            )  # fmt: skip
        return loss, predictions, row

    def hessian(
        self, views: TaskParams, examples: Examples, directions: TaskParams, into: Tensor | None = None
    ) -> Tensor:
        """How the gradients of all views change along a direction: the product with the loss's Hessian.

        Args:
            views: Parameters of the tasks, as for `gradients`.
            examples: Likewise.
            directions: `[t, *shape]` by name; 0 for others.
            into: Memory for the products; None: their own.

        Returns:
            The products for the views side by side, `[t, columns]`.
        """
        x, y, *_ = examples
        noise = self._noise(examples)
        tasks, count = y.shape[:2]
        parameters = self._parameters(views)
        along = {name: _dense(direction) for name, direction in directions.items()}
        row, places = _row(views, x, into)
        assert row is not None, "there are views"
        threads, is_double = torch.get_num_threads(), x.dtype == torch.float64
        plan = self.program.plan(tasks, count, is_double, threads, hessian=True)
        with self._workspace(plan["workspace_bytes"]) as workspace:
            self.program.hessian(
                [_place(value) for value in parameters],
                [_place(along[name]) if name in along else _NOWHERE for name in self.spec.names],
                [places.get(name, _NOWHERE) for name in self.spec.names],
                x.data_ptr(), *self._goal(y), [factors.data_ptr() for factors in noise], workspace.data_ptr(), tasks,
                count, is_double, threads,
            )  # fmt: skip
        return row

    def _parameters(self, views: TaskParams) -> list[Tensor]:
        """All parameters in the program's order, `[t, *shape]`."""
        of_model: Mapping[str, Tensor] = self.problem.params

        def shared(name: str) -> Tensor:
            value = of_model[name] if name in of_model else self.problem.model.get_parameter(name)
            return value.detach().contiguous()[None].expand(self.problem.tasks, *value.shape)

        return [_dense(views[name]) if name in views else shared(name) for name in self.spec.names]

    def _goal(self, y: Tensor) -> tuple[int, int]:
        """Addresses of the labels and the target, of which one is there."""
        return (y.data_ptr(), 0) if self.problem.loss == "cross_entropy" else (0, y.data_ptr())


class _Loss(torch.autograd.Function):
    """The loss of a pass, with `_Gradients` as its derivative."""

    @staticmethod
    def forward(
        ctx: Any, run: NativeRun, examples: Examples, names: tuple[str, ...], wanted: frozenset[str], *values: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed = [name for name, needs in zip(names, ctx.needs_input_grad[4:], strict=True) if needs and name in wanted]
        loss, prediction, ctx.row = run.gradients(dict(zip(names, values, strict=True)), examples, needed)
        ctx.call, ctx.needed = (run, examples, names), needed
        ctx.save_for_backward(*values)
        ctx.mark_non_differentiable(prediction)
        return loss, prediction

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = _Gradients.apply(*ctx.call, ctx.needed, ctx.row, *ctx.saved_tensors)
        by_name = dict(zip(ctx.needed, found, strict=True))
        scaled = {name: of_loss.view(-1, *[1] * (grad.ndim - 1)) * grad for name, grad in by_name.items()}
        return (*[None] * 4, *map(scaled.get, ctx.call[2]))


class _Gradients(torch.autograd.Function):
    """The gradients that a pass has computed, with the Hessian as their derivative."""

    @staticmethod
    def forward(
        ctx: Any, run: NativeRun, examples: Examples, names: tuple[str, ...], needed: list[str], row: Tensor,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.call, ctx.needed = (run, examples, names), needed
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        views = dict(zip(names, values, strict=True))
        return tuple(_parts(row, {name: views[name] for name in needed}))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        run, examples, names = ctx.call
        views = dict(zip(names, ctx.saved_tensors, strict=True))
        directions = {name: value for name, value in zip(ctx.needed, along, strict=True) if value is not None}
        return (*[None] * 5, *_parts(run.hessian(views, examples, directions), views))


# An address, and how many values lie between two tasks' tensors.
Place = tuple[int, int]
_NOWHERE: Place = (0, 0)


def _dense(view: Tensor) -> Tensor:
    """A tensor `[t, *shape]` whose tasks' values are contiguous, wherever each task's are."""
    return view if view.shape[0] == 0 or view[0].is_contiguous() else view.contiguous()


def _place(view: Tensor) -> Place:
    return view.data_ptr(), view.stride(0)


def _row(views: TaskParams, like: Tensor, into: Tensor | None) -> tuple[Tensor | None, dict[str, Place]]:
    """Room for tensors of the views' shapes side by side, `[t, columns]`, and where each is; None for no views."""
    if not views:
        return None, {}
    sizes = [view[0].numel() for view in views.values()]
    row = like.new_empty(like.shape[0], sum(sizes)) if into is None else into
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    address, step = row.data_ptr(), row.element_size()
    return row, {name: (address + at * step, row.shape[1]) for name, at in zip(views, starts, strict=True)}


def _parts(row: Tensor, views: TaskParams) -> list[Tensor]:
    """What lies side by side in a row, as `[t, *shape]`."""
    parts = row.split([view[0].numel() for view in views.values()], dim=1)
    return [part.view(view.shape) for part, view in zip(parts, views.values(), strict=True)]
