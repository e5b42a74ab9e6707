"""The native calls of the family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _loader, chain, compact, flat, fused, recognition
from ..inputs import Inputs, only
from ..problem import Problem
from ..results import Adaptation, MetaGradients, TaskParams
from .spec import LayersSpec, read

# The parameters and gradients of the tasks that run together take about this many bytes: they stay in the cache.
TOGETHER_BYTES = 8 * 2**20


def why_not(problem: Problem) -> str | None:
    """None if the program's kernels serve this problem on the CPU, else the reason."""
    found = read(problem.model)
    if isinstance(found, str):
        return found
    if problem.device.type != "cpu":
        return f"its kernels are the CPU's, and the model is on {problem.device}"
    if problem.method == "maml":
        return "its kernels have first derivatives only, and 'maml' needs second ones"
    if problem.loss not in ("cross_entropy", "mse"):
        return "the loss is a callable"
    reason = fused.why_not(problem, found.names)
    if reason is not None:
        return reason
    if problem.batch_norm != "batch" and any(block.norm == "batch" for block in found.blocks):
        return f"it normalises by the batch, and batch_norm is {problem.batch_norm!r}"
    if problem.batch_norm == "support":
        return "it keeps no statistics of the support set, and batch_norm is 'support'"
    if not problem.zero_dead_bias and found.unmoved:
        return "its biases in front of BatchNorm have gradient 0, and zero_dead_bias=False asks for rounding noise"
    if problem.loss == "mse" and any(
        tuple(y.shape[2:]) != (found.outputs,) for y in (problem.support_y, problem.query_y) if y is not None
    ):
        return f"the targets are not [T, S, {found.outputs}]"
    return _why_not_examples(problem, found)


def _why_not_examples(problem: Problem, found: LayersSpec) -> str | None:
    x = only(problem.support_x)
    example = tuple(x.shape[2:])
    if found.size(example) is None:
        return f"its examples are no {found.reads}: {list(example)}"
    program = program_of(problem, found)
    if isinstance(program, str):
        return program
    counts = [y.shape[1] for y in (problem.support_y, problem.query_y) if y is not None]
    for block, (read_size, made, _) in zip(found.blocks, program.sizes, strict=True):
        if block.product == "linear":
            takes = problem.model.get_parameter(block.weight).shape[1]
            if takes != math.prod(read_size):
                return f"{block.weight!r} takes {takes} features, and these examples give {math.prod(read_size)}"
        elif block.product == "conv" and problem.model.get_parameter(block.weight).shape[1] != read_size[0]:
            return f"{block.weight!r} takes other channels than these examples give"
        if block.scale is not None and problem.model.get_parameter(block.scale).shape[0] != made[0]:
            return f"{block.scale!r} is not of {made[0]} channels"
        values = made[1] * made[2] * (min(counts) if block.norm == "batch" else made[0] // block.groups)
        if block.norm != "none" and values == 1:
            return "a normalisation would see one value"
    if not recognition.verified(found, problem.model, x[0]):
        return "it does not compute what its structure says"
    return None


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


def meta_gradients(problem: Problem) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    if problem.task_state == "int8":
        return compact.meta_gradients(problem, lambda part: flat.meta_gradients_of(NativeRun.of(part)))
    return flat.meta_gradients_of(NativeRun.of(problem))


def adapt(problem: Problem) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    if problem.task_state == "int8":
        return compact.adapt(problem, lambda part: flat.adapt_of(NativeRun.of(part)))
    return flat.adapt_of(NativeRun.of(problem))


@dataclass
class NativeRun:
    """One pass over the tasks of a problem, with native gradients: what `flat.Tasks` needs of a `reference.Run`.

    Attributes:
        problem: The call.
        spec: The module's program.
        program: The same, as native code takes it.
    """

    problem: Problem
    spec: LayersSpec
    program: Any
    batched = True

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
        of_task = 2 * sum(p.numel() for p in self.problem.params.values()) * self.problem.dtype.itemsize
        size = max(1, TOGETHER_BYTES // (of_task * threads)) * threads
        return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]

    def threads(self) -> int:
        """One chunk at a time: the native call has the threads."""
        return 1

    def stop(self) -> None:
        """Nothing waits for a first task here."""

    def dead(self, step: int) -> frozenset[str]:
        """Parameters whose gradient is exactly 0."""
        return self._unmoved

    def gradients(
        self, views: TaskParams, x: Inputs, y: Tensor, *, differentiates: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass of t tasks.

        Args:
            views: Their own parameters by name, `[t, *shape]`; all others are the model's.
            x: `[t, S, ...]`.
            y: `[t, S]` labels, or `[t, S, outputs]`.
            differentiates: Whether gradients are wanted.

        Returns:
            Loss `[t]`, predictions `[t, S, outputs]`, and the gradients of `views` side by side, `[t, columns]`.
        """
        problem, x = self.problem, only(x).contiguous()
        y = y.contiguous()
        tasks, count = y.shape[:2]
        shared = {
            name: self._model_parameter(name).detach().contiguous() for name in self.spec.names if name not in views
        }
        parameters = [
            _place(views[name]) if name in views else (shared[name].data_ptr(), 0) for name in self.spec.names
        ]
        row, gradients = None, []
        if differentiates:
            sizes = [view[0].numel() for view in views.values()]
            row = x.new_empty(tasks, sum(sizes))
            starts = dict(zip(views, _starts(sizes), strict=True))
            address, step = row.data_ptr(), row.element_size()
            gradients = [
                (address + starts[name] * step, row.shape[1]) if name in starts else (0, 0) for name in self.spec.names
            ]
        loss, predictions = x.new_empty(tasks), x.new_empty(tasks, count, self.spec.outputs)
        labels = problem.loss == "cross_entropy"
        threads, is_double = torch.get_num_threads(), x.dtype == torch.float64
        plan = self.program.plan(tasks, count, is_double, threads)
        with fused.WORKSPACE.of((plan["workspace_bytes"],), torch.uint8) as workspace:
            self.program.run(
                parameters, gradients, x.data_ptr(), y.data_ptr() if labels else 0, 0 if labels else y.data_ptr(),
                loss.data_ptr(), predictions.data_ptr(), workspace.data_ptr(), tasks, count, is_double, threads,
            )  # fmt: skip
        return loss, predictions, row

    def _model_parameter(self, name: str) -> Tensor:
        params: Mapping[str, Tensor] = self.problem.params
        return params[name] if name in params else self.problem.model.get_parameter(name)


def _place(view: Tensor) -> tuple[int, int]:
    """The address of a tensor `[t, *shape]`, and how far two tasks are apart."""
    assert view[0].is_contiguous()
    return view.data_ptr(), view.stride(0)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
