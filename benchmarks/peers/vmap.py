"""torch.func: the gradient of one task, vmapped over the number of tasks that is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import functional_call, grad, vmap
from workloads import LOSSES, Problem

from peers import Step, fastest

NAME = "torch.func vmap"
SUMMARY = "vmap(grad) over tasks, in chunks of the best size"

Gradients = dict[str, Tensor]


def why_not(problem: Problem) -> str | None:
    return None


def prepare(problem: Problem) -> Step:
    chunks = {problem.tasks}
    if problem.device.type == "cpu" and problem.convolutional:
        chunks |= {chunk for chunk in (2, 4) if chunk < problem.tasks}
    return fastest(
        {f"{chunk} tasks at a time": Step(lambda chunk=chunk: meta_step(problem, chunk)) for chunk in sorted(chunks)}
    )


def task_gradients(problem: Problem) -> Callable[[Gradients, Tensor, Tensor], Gradients]:
    """The gradient of the mean loss of one set of one task."""
    loss = LOSSES[problem.loss]

    def error(phi: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(problem.model, phi, (x,)), y)

    return grad(error)


def meta_step(problem: Problem, chunk: int) -> Gradients:
    """The mean meta-gradient by parameter name."""
    theta = {name: p.detach() for name, p in problem.model.named_parameters()}
    if problem.method == "maml":
        return _second_order(problem, theta, chunk)
    gradients = vmap(task_gradients(problem))
    mean: Gradients = {}
    for first in range(0, problem.tasks, chunk):
        support_x, support_y, query_x, query_y = (d[first : first + chunk] for d in problem.data)
        tasks = support_x.shape[0]
        phi = {name: value.expand(tasks, *value.shape) for name, value in theta.items()}
        for _ in range(problem.steps):
            grads = gradients(phi, support_x, support_y)
            if problem.method == "sign-maml":
                grads = {name: gradient.sign() for name, gradient in grads.items()}
            phi = {name: value - problem.inner_lr * grads[name] for name, value in phi.items()}
        for name, gradient in gradients(phi, query_x, query_y).items():
            part = gradient.sum(0) / problem.tasks
            mean[name] = mean[name] + part if name in mean else part
    return mean


def task_meta_gradients(problem: Problem) -> Callable[[Gradients, Tensor, Tensor, Tensor, Tensor], Gradients]:
    """The second-order gradient of one task: grad of a function whose inner steps are themselves calls of grad."""
    gradient, loss = task_gradients(problem), LOSSES[problem.loss]

    def task(start: Gradients, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        phi = start
        for _ in range(problem.steps):
            grads = gradient(phi, support_x, support_y)
            phi = {name: value - problem.inner_lr * grads[name] for name, value in phi.items()}
        return loss(functional_call(problem.model, phi, (query_x,)), query_y)

    return grad(task)


def _second_order(problem: Problem, theta: Gradients, chunk: int) -> Gradients:
    gradients = vmap(task_meta_gradients(problem), in_dims=(None, 0, 0, 0, 0))
    mean: Gradients = {}
    for first in range(0, problem.tasks, chunk):
        for name, found in gradients(theta, *(d[first : first + chunk] for d in problem.data)).items():
            part = found.sum(0) / problem.tasks
            mean[name] = mean[name] + part if name in mean else part
    return mean
