"""The fastest hand-written pure PyTorch that we found: no autograd, in-place steps, and the best layout for the CPU.

Convolutions: one task per thread, channels last, pooling before ReLU (a quarter of the work, the same result), no bias
before BatchNorm, direct calls of the backward operators. Multilayer perceptrons: batched matrix products over blocks of
tasks. Users would hardly write this for their own models; it shows how far PyTorch's own operators go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Problem

from peers import Step, fastest
from signmaml.models import MLP, Conv4

NAME = "hand-tuned PyTorch"
SUMMARY = "no autograd, task threads, channels last; batched products for the MLP"

aten = torch.ops.aten


def why_not(problem: Problem) -> str | None:
    if problem.method == "maml":
        return "hand-written gradients are of first order"
    return None if isinstance(problem.model, (Conv4, MLP)) else "written for Conv4 and MLP"


def prepare(problem: Problem) -> Step:
    if problem.convolutional:
        return fastest(
            {
                f"{layout}, {threads} task threads": Step(Convolutions(problem, threads, memory_format))
                for layout, memory_format in (
                    ("channels last", torch.channels_last),
                    ("channels first", torch.contiguous_format),
                )
                for threads in sorted({1, _threads(problem)})
            }
        )
    blocks = sorted({min(block, problem.tasks) for block in (25, 50, 125, 250, 500, problem.tasks)})
    return fastest({f"blocks of {block} tasks": Step(Perceptrons(problem, block)) for block in blocks})


def _threads(problem: Problem) -> int:
    """Number of task threads; a GPU needs only one, which queues the work."""
    return torch.get_num_threads() if problem.device.type == "cpu" else 1


class TaskThreads:
    """Runs a function on items in parallel threads, with torch's own threading off meanwhile."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[int], list[Tensor]], items: Iterable[int]) -> list[list[Tensor]]:
        """The results in the order of the items."""
        if self.threads == 1:
            return [function(item) for item in items]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return list(self.pool.map(function, items))
        finally:
            torch.set_num_threads(before)


class Convolutions:
    """The meta-step of a Conv4."""

    def __init__(self, problem: Problem, threads: int, memory_format: torch.memory_format) -> None:
        model = problem.model
        assert isinstance(model, Conv4)
        self.problem, self.memory_format = problem, memory_format
        self.workers = TaskThreads(threads)
        blocks = list(model.features)
        self.strides = [block.conv.stride[0] for block in blocks]
        self.pools = [isinstance(block.pool, nn.MaxPool2d) for block in blocks]
        self.eps = [block.normalize.eps for block in blocks]
        self.names, self.dead = [], []
        for i in range(len(blocks)):
            self.names += [
                f"features.{i}.conv.weight",
                f"features.{i}.normalize.weight",
                f"features.{i}.normalize.bias",
            ]
            self.dead.append(f"features.{i}.conv.bias")
        self.names += ["classifier.weight", "classifier.bias"]

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        support_x, support_y, query_x, query_y = self.problem.data
        parameters = dict(self.problem.model.named_parameters())
        theta = [self._laid_out(parameters[name].detach()) for name in self.names]
        # Convert the images' layout once per call, outside the threads.
        supports = [self._laid_out(images) for images in support_x]
        queries = [self._laid_out(images) for images in query_x]

        def task(index: int) -> list[Tensor]:
            phi = [value.clone() for value in theta]
            for _ in range(self.problem.steps):
                grads = self._gradients(phi, supports[index], support_y[index])
                if self.problem.method == "sign-maml":
                    torch._foreach_sign_(grads)
                torch._foreach_add_(phi, grads, alpha=-self.problem.inner_lr)
            return self._gradients(phi, queries[index], query_y[index])

        total, *others = self.workers.map(task, range(self.problem.tasks))
        for grads in others:
            torch._foreach_add_(total, grads)
        torch._foreach_div_(total, float(self.problem.tasks))
        mean = dict(zip(self.names, total, strict=True))
        return mean | {name: torch.zeros_like(parameters[name]) for name in self.dead if name in parameters}

    def _laid_out(self, value: Tensor) -> Tensor:
        return value.contiguous(memory_format=self.memory_format) if value.ndim == 4 else value

    def _gradients(self, phi: list[Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
        saved = []
        for i, (stride, pool, eps) in enumerate(zip(self.strides, self.pools, self.eps, strict=True)):
            weight, gamma, beta = phi[3 * i : 3 * i + 3]
            z = torch.conv2d(x, weight, None, stride, 1)
            y, mean, rstd = torch.native_batch_norm(z, gamma, beta, None, None, True, 0.0, eps)
            # max(relu(y)) = relu(max(y)), and where it is 0 neither order passes a gradient.
            out, where = aten.max_pool2d_with_indices(y, [2, 2], [2, 2]) if pool else (y, None)
            out.relu_()
            saved.append((x, z, y, mean, rstd, where, out))
            x = out
        features = x.flatten(1)
        weight, bias = phi[-2:]
        logits = torch.addmm(bias, features, weight.t())
        # d mean cross-entropy / d logits = (softmax - one-hot) / S
        delta = logits.softmax(1)
        delta[torch.arange(len(labels), device=labels.device), labels] -= 1
        delta /= len(labels)
        tail = [delta.t() @ features, delta.sum(0)]
        flowing = (delta @ weight).view(x.shape)
        if self.memory_format == torch.channels_last:
            flowing = flowing.contiguous(memory_format=torch.channels_last)
        grads: list[Tensor] = []
        for i in reversed(range(len(self.strides))):
            weight, gamma, _ = phi[3 * i : 3 * i + 3]
            x, z, y, mean, rstd, where, out = saved[i]
            flowing = aten.threshold_backward(flowing, out, 0)
            if where is not None:
                flowing = aten.max_pool2d_with_indices_backward(
                    flowing, y, [2, 2], [2, 2], [0, 0], [1, 1], False, where
                )
            flowing, gamma_grad, beta_grad = aten.native_batch_norm_backward(
                flowing, z, gamma, None, None, mean, rstd, True, self.eps[i], [True, True, True]
            )
            stride = self.strides[i]
            flowing, weight_grad, _ = aten.convolution_backward(
                flowing, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, [i > 0, True, False]
            )
            grads = [weight_grad, gamma_grad, beta_grad, *grads]
        return [*grads, *tail]


class Perceptrons:
    """The meta-step of an MLP with ReLU and the mean squared error; each thread takes a block of tasks at a time."""

    def __init__(self, problem: Problem, block: int) -> None:
        self.problem, self.block = problem, block
        model = problem.model
        assert isinstance(model, MLP)
        assert isinstance(model.activation, nn.ReLU) and problem.loss == "mse"
        self.workers = TaskThreads(_threads(problem) if block < problem.tasks else 1)
        self.names = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        problem = self.problem
        theta = [p.detach() for p in problem.model.parameters()]
        firsts = range(0, problem.tasks, self.block)
        sums = self.workers.map(functools.partial(self._block, theta), firsts)
        total = sums[0]
        for others in sums[1:]:
            torch._foreach_add_(total, others)
        torch._foreach_div_(total, float(problem.tasks))
        return dict(zip(self.names, total, strict=True))

    def _block(self, theta: list[Tensor], first: int) -> list[Tensor]:
        support_x, support_y, query_x, query_y = (d[first : first + self.block] for d in self.problem.data)
        tasks = support_x.shape[0]
        phi = [value.expand(tasks, *value.shape).contiguous() for value in theta]
        for _ in range(self.problem.steps):
            grads = self._gradients(phi, support_x, support_y)
            if self.problem.method == "sign-maml":
                torch._foreach_sign_(grads)
            torch._foreach_add_(phi, grads, alpha=-self.problem.inner_lr)
        return [gradient.sum(0) for gradient in self._gradients(phi, query_x, query_y)]

    @staticmethod
    def _gradients(phi: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        inputs = []
        for i in range(0, len(phi), 2):
            inputs.append(x)
            x = torch.baddbmm(phi[i + 1].unsqueeze(1), x, phi[i].mT)
            if i + 2 < len(phi):
                x = F.relu_(x)
        delta = (x - y).mul_(2 / (y.shape[1] * y.shape[2]))
        grads: list[Tensor] = []
        for i in reversed(range(0, len(phi), 2)):
            grads = [torch.bmm(delta.mT, inputs[i // 2]), delta.sum(1), *grads]
            if i:
                delta = aten.threshold_backward(torch.bmm(delta, phi[i]), inputs[i // 2], 0)
        return grads
