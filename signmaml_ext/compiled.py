"""Compiled passes: one torch.compile'd function for prediction, loss and gradients of one task, or of tasks under vmap.

The function takes a private copy of the module as an argument. torch.compile guards everything that it reads there, so
a module that changed is compiled again. The function is cached with everything else that is known about the module.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from . import chain, inputs, modes
from .checks import refuse
from .inputs import Inputs, Output
from .losses import Loss
from .reference import Run, Seen, kind_of, task_loss
from .results import TaskParams

# Loss `[t]`, prediction `[t, S, ...]`, gradients by name.
Found = tuple[Tensor, Tensor, dict[str, Tensor | None]]


def run_pass(
    run: Run, params: TaskParams, x: Inputs, y: Tensor, *, first_task: int, step: int, differentiates: bool
) -> Found:
    """One compiled pass of t tasks, which does what `Run.loss_and_prediction` and `gradients_of` do.

    Args:
        run: The pass over all tasks that it belongs to.
        params: Per-task parameters, `[t, *shape]` under vmap and `[*shape]` for a single task.
        x: `[t, S, ...]`.
        y: `[t, S, ...]`.
        first_task: Number of the first of these tasks.
        step: Inner step; the query pass counts as step K.
        differentiates: Whether to compute gradients; otherwise the dictionary is empty.

    Raises:
        ValueError: torch.compile cannot compile it here. Tasks that run together are then tried one by one.
    """
    run.wait_for_first(first_task, step)
    modes.collect()
    known, key = chain.of_module(run.problem.model).answers, _kind(run, params, x, y, differentiates, step)
    while True:
        compiled = known.get(key)
        if compiled is None or compiled.times > 1:
            compiled = _Compiled(compiled)
            compiled.seen = run.look(params, x, y, first_task=first_task, step=step)
            known[key] = compiled
        run.know(compiled.seen, step)
        found = _pass_of(run, compiled, params, x, y, first_task, step, differentiates)
        if compiled.times <= 1:
            run.first_is_done(step)
            return found
        # Something that the forward reads has changed, so what is known about the pass may no longer hold.


def _kind(run: Run, params: TaskParams, x: Inputs, y: Tensor, differentiates: bool, step: int) -> Hashable:
    """The key of a compiled pass: passes with different keys are compiled separately."""
    problem = run.problem
    settings: tuple[Hashable, ...] = (
        problem.model.training,
        problem.batch_norm,
        problem.zero_dead_bias,
        problem.precision,
    )
    codes = (kind_of(problem.loss), kind_of(problem.output))
    shapes = tuple((part.shape, part.dtype) for part in (*inputs.parts(x), y))
    return "compiled", run.batched, differentiates, step == problem.steps, *settings, codes, tuple(params), shapes


class _Compiled:
    """The compiled function for passes of one kind.

    Args:
        before: The one that this replaces, because something that the forward reads has changed.

    Attributes:
        seen: What an uncompiled pass of this kind showed.
        times: How often it was compiled: more than once if something that the forward reads has changed.
    """

    seen: Seen

    def __init__(self, before: _Compiled | None) -> None:
        self._changes: int = 0 if before is None else before._changes + 1
        if self._changes > MOST_CHANGES:
            _refuse("a forward that reads something that changes from call to call")
        # Each has its own code object: torch caches compiled code per code object, up to a limit.
        assert isinstance(_whole_pass, types.FunctionType)
        own = types.FunctionType(_whole_pass.__code__.replace(), _whole_pass.__globals__, _whole_pass.__name__)
        self.times = 0
        self._compiled = _told(lambda: torch.compile(own, dynamic=False, fullgraph=True, backend=self._backend))

    def __call__(self, *arguments: Any) -> Found:
        found: Found = _told(lambda: self._compiled(*arguments))
        return found

    def _backend(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.times += 1
        made: Callable[..., Any] = torch._dynamo.lookup_backend(BACKEND)(graph, examples)
        return made


# The torch.compile backend, and how often a model may change.
BACKEND = "inductor"
MOST_CHANGES = 32


def _pass_of(
    run: Run,
    compiled: _Compiled,
    params: TaskParams,
    x: Inputs,
    y: Tensor,
    first_task: int,
    step: int,
    differentiates: bool,
) -> Found:
    detached = {name: value.detach() for name, value in params.items()}
    # On the device "meta": a parameter that the forward reaches other than by name then causes an error instead of
    # becoming a constant.
    copy = run.replicas.make({name: value.to("meta") for name, value in detached.items()})
    if compiled.seen.writes_input:
        x = inputs.each(x, Tensor.clone)
    autocast = run.problem.device.type if run.problem.precision == "bf16" else None
    how = _How(run.problem.loss, run.problem.output, autocast, run.batched, differentiates)
    if run.batched:
        loss, prediction, gradients = compiled(copy, detached, run.buffers_of(y.shape[0]), x, y, how)
    else:
        with run.stream(first_task, step):
            loss, prediction, gradients = compiled(copy, detached, {}, inputs.take(x, 0), y[0], how)
        loss, prediction = loss[None], prediction[None]
    if loss.is_meta:
        _refuse("a forward that reaches parameters past their names")
    unused = compiled.seen.facts.unused
    return loss, prediction, {name: None if name in unused else value for name, value in gradients.items()}


class _How(NamedTuple):
    """What a pass depends on besides tensors.

    Attributes:
        loss: As in `meta_step`.
        output: As in `meta_step`.
        autocast: Device type for bfloat16 autocast; None: no autocast.
        together: Whether tensors have a leading task axis.
        differentiates: Whether to compute gradients.
    """

    loss: Loss
    output: Output | None
    autocast: str | None
    together: bool
    differentiates: bool


def _whole_pass(copy: nn.Module, params: TaskParams, buffers: TaskParams, x: Inputs, y: Tensor, how: _How) -> Found:
    """The function that is compiled."""

    def of_task(params: TaskParams, buffers: TaskParams, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        return _loss_and_prediction(copy, params, buffers, x, y, how)

    function: Any = grad_and_value(of_task, has_aux=True) if how.differentiates else of_task
    found = (torch.vmap(function) if how.together else function)(params, buffers, x, y)
    gradients, (loss, prediction) = found if how.differentiates else ({}, found)
    return loss, prediction, gradients


def _loss_and_prediction(
    copy: nn.Module, params: TaskParams, buffers: TaskParams, x: Inputs, y: Tensor, how: _How
) -> tuple[Tensor, Tensor]:
    args, keywords = ((), x) if isinstance(x, dict) else (inputs.parts(x), {})
    tensors = {**params, **buffers}
    if how.autocast is None:
        returned = functional_call(copy, tensors, args, keywords)
    else:
        with torch.autocast(how.autocast, dtype=torch.bfloat16):
            returned = functional_call(copy, tensors, args, keywords)
    prediction = inputs.selected(how.output, returned)
    if how.autocast is not None and isinstance(prediction, Tensor) and not prediction.is_complex():
        prediction = prediction.float()
    loss = task_loss(how.loss, prediction, y)
    return loss, prediction if isinstance(prediction, Tensor) else loss.new_empty(0)


def _refuse(reason: str) -> NoReturn:
    refuse("compile", "False for this model or machine", f"True, and {reason}")


def _told(work: Callable[[], Any]) -> Any:
    """Runs `work` and turns errors of torch.compile into a refusal.

    Raises:
        ValueError: There is no compiler, or torch.compile does not serve this module.
    """
    try:
        return work()
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) and "Dynamo" not in str(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[:2])  # the first may only name the part of torch.compile that failed
    _refuse(f"torch.compile: {reason}")
