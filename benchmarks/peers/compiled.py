"""torch.compile of a task's gradient and step.

All tasks run in one call on a GPU and for MLPs. Convolutions on a CPU run task by task, because batched ones are slow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap as batched
from workloads import Problem

from peers import Step, vmap

NAME = "torch.compile"
SUMMARY = "the gradient and the step, compiled by Inductor"
SLOW_TO_PREPARE = True  # minutes of compilation on a CPU

Gradients = dict[str, Tensor]


def why_not(problem: Problem) -> str | None:
    if problem.method != "sign-maml":
        return f"not written for {problem.method} yet"
    return None


def prepare(problem: Problem) -> Step:
    torch._dynamo.reset()
    gradients = vmap.task_gradients(problem)
    one_by_one = problem.convolutional and problem.device.type == "cpu"
    if not one_by_one:
        gradients = batched(gradients)

    def step(phi: Gradients, x: Tensor, y: Tensor) -> Gradients:
        grads = gradients(phi, x, y)
        return {name: value - problem.inner_lr * grads[name].sign() for name, value in phi.items()}

    mode = "reduce-overhead" if problem.device.type == "cuda" else None
    compiled_step = torch.compile(step, mode=mode, dynamic=False)
    compiled_gradients = torch.compile(gradients, mode=mode, dynamic=False)

    def run() -> Gradients:
        theta = {name: p.detach() for name, p in problem.model.named_parameters()}
        mean: Gradients = {}
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
            for name, gradient in compiled_gradients(phi, query_x, query_y).items():
                part = (gradient if one_by_one else gradient.sum(0)) / problem.tasks
                mean[name] = mean[name] + part if name in mean else part
        return mean

    return Step(run)
