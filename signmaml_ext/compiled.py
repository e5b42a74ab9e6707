"""Forward passes by torch.compile, and with them their backward passes: for modules without kernels of their own.

What is compiled takes the private copy of the module as an argument. torch.compile guards all that it reads there, so
a module that changed is compiled anew. It is kept with what else is known of the model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import chain, inputs
from .checks import Problem, refuse
from .inputs import Inputs, Output


def task_forward(problem: Problem) -> Callable[[nn.Module, Inputs, Output | None], Any]:
    """The compiled twin of `_of_task`."""
    return _known(problem, _of_task)


def tasks_forward(problem: Problem) -> Callable[[nn.Module, Mapping[str, Tensor], Inputs, Output | None], Any]:
    """The compiled twin of `_of_tasks`."""
    return _known(problem, _of_tasks)


def _of_task(copy: nn.Module, x: Inputs, output: Output | None) -> Any:
    """The prediction of one task, by a copy that holds its tensors."""
    return inputs.selected(output, inputs.call(copy, x))


def _of_tasks(copy: nn.Module, own: Mapping[str, Tensor], x: Inputs, output: Output | None) -> Any:
    """The predictions of tasks side by side.

    Args:
        copy: A copy whose parameters are on the device "meta": one that its forward reaches by another way than by
            name fails there, instead of being one for all tasks.
        own: Parameters and buffers of the tasks' own, `[t, *shape]`.
        x: `[t, S, ...]`.
        output: As in `meta_step`.
    """

    def of_task(tensors: Mapping[str, Tensor], x: Inputs) -> Any:
        args, keywords = ((), x) if isinstance(x, dict) else (inputs.parts(x), {})
        return inputs.selected(output, functional_call(copy, dict(tensors), args, keywords))

    return torch.vmap(of_task)(dict(own), x)


def _known(problem: Problem, function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile made of a function, for one kind of call.

    Each kind has code of its own: torch keeps what it compiled with the code, and only so much of it.
    """
    sets = (problem.support_x,) if problem.query_x is None else (problem.support_x, problem.query_x)
    shapes = tuple((part.shape[1:], part.dtype) for x in sets for part in inputs.parts(x))
    kind = ("compiled", function.__name__, problem.model.training, problem.batch_norm, problem.precision, shapes)
    answers = chain.of_module(problem.model).answers
    if kind not in answers:
        assert isinstance(function, types.FunctionType)
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        answers[kind] = _told(lambda: torch.compile(own, dynamic=False))
    compiled = answers[kind]
    return lambda *arguments: _told(lambda: compiled(*arguments))


def _told(work: Callable[[], Any]) -> Any:
    """Runs something; what torch.compile cannot do here becomes a refusal.

    Raises:
        ValueError: No compiler is there, or it fails on this module.
    """
    try:
        return work()
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) and "Dynamo" not in str(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(lines[:2])  # the first may only say which part of torch.compile it was
    refuse("compile", "False for this model or machine", f"True, and torch.compile: {reason}")
