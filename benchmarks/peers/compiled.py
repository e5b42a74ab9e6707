"""torch.compile: of a task's gradient and step in first order, of the gradient through all steps for maml.

For maml it traces grad within grad, so all steps become one graph, whose size and compilation time grow with K. All
tasks run in one call on a GPU and for MLPs. Convolutions on a CPU run task by task, because batched ones are slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import vmap as batched
from workloads import Problem

from peers import Step, vmap

NAME = "torch.compile"
SUMMARY = "the gradient and the step, or the whole second-order gradient of a task, compiled by Inductor"
SLOW_TO_PREPARE = True  # minutes of compilation on a CPU

Gradients = dict[str, Tensor]


def why_not(problem: Problem) -> str | None:
    return None


def prepare(problem: Problem) -> Step:
    torch._dynamo.reset()
    mode = "reduce-overhead" if problem.device.type == "cuda" else None
    one_by_one = problem.convolutional and problem.device.type == "cpu"
    found = (_second_order if problem.method == "maml" else _first_order)(problem, one_by_one, mode)

    def run() -> Gradients:
        mean: Gradients = {}
        for gradients in found():
            for name, gradient in gradients.items():
                part = (gradient if one_by_one else gradient.sum(0)) / problem.tasks
                mean[name] = mean[name] + part if name in mean else part
        return mean

    return Step(run)


def _first_order(problem: Problem, one_by_one: bool, mode: str | None) -> Callable[[], Iterator[Gradients]]:
    gradients = vmap.task_gradients(problem)
    if not one_by_one:
        gradients = batched(gradients)
    signs = problem.method == "sign-maml"

    def step(phi: Gradients, x: Tensor, y: Tensor) -> Gradients:
        grads = gradients(phi, x, y)
        if signs:
            grads = {name: gradient.sign() for name, gradient in grads.items()}
        return {name: value - problem.inner_lr * grads[name] for name, value in phi.items()}

    compiled_step = torch.compile(step, mode=mode, dynamic=False)
    compiled_gradients = torch.compile(gradients, mode=mode, dynamic=False)

    def found() -> Iterator[Gradients]:
        theta = {name: p.detach() for name, p in problem.model.named_parameters()}
        for task in range(problem.tasks) if one_by_one else (slice(None),):
            support_x, support_y, query_x, query_y = (d[task] for d in problem.data)
            phi = theta
            if not one_by_one:
                phi = {name: value.expand(problem.tasks, *value.shape).contiguous() for name, value in theta.items()}
            for _ in range(problem.steps):
                if mode is not None:
                    torch.compiler.cudagraph_mark_step_begin()
                    phi = {name: value.clone() for name, value in phi.items()}
                phi = compiled_step(phi, support_x, support_y)
            if mode is not None:
                torch.compiler.cudagraph_mark_step_begin()
                phi = {name: value.clone() for name, value in phi.items()}
            yield compiled_gradients(phi, query_x, query_y)

    return found


def _second_order(problem: Problem, one_by_one: bool, mode: str | None) -> Callable[[], Iterator[Gradients]]:
    gradients = vmap.task_meta_gradients(problem)
    if not one_by_one:
        gradients = batched(gradients, in_dims=(None, 0, 0, 0, 0))
    compiled = torch.compile(gradients, mode=mode, dynamic=False)

    def found() -> Iterator[Gradients]:
        theta = {name: p.detach() for name, p in problem.model.named_parameters()}
        for task in range(problem.tasks) if one_by_one else (slice(None),):
            if mode is not None:
                torch.compiler.cudagraph_mark_step_begin()
            yield compiled(theta, *(d[task] for d in problem.data))

    return found
