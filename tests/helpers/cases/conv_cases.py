"""Conv-N networks for tests of the kernels: shapes, data, the definition in plain PyTorch, and the native call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from signmaml_ext import reference


@dataclass(frozen=True)
class Net:
    """A network of the family, and how many tasks and images it sees."""

    blocks: int = 2
    channels: int = 1
    filters: int = 8
    height: int = 9
    width: int = 7
    ways: int = 3
    halving: str = "max"
    readout: str = "flatten"
    conv_bias: bool = True
    eps: float = 1e-5
    tasks: int = 2
    support: int = 3
    query: int = 4

    @property
    def shape(self) -> dict[str, Any]:
        """The shape as the native functions take it."""
        names = ("blocks", "channels", "filters", "height", "width", "ways", "halving", "readout", "conv_bias")
        return {name: getattr(self, name) for name in names} | {"eps": [self.eps] * self.blocks}

    @property
    def features(self) -> int:
        height, width = self.height, self.width
        for _ in range(self.blocks):
            height, width = (n // 2 if self.halving == "max" else (n + 1) // 2 for n in (height, width))
        return self.filters * (height * width if self.readout == "flatten" else 1)

    @property
    def tensors(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters in theta's order."""
        shapes: list[tuple[int, ...]] = []
        for block in range(self.blocks):
            shapes.append((self.filters, self.filters if block else self.channels, 3, 3))
            shapes += [(self.filters,)] * (3 if self.conv_bias else 2)
        return [*shapes, (self.ways, self.features), (self.ways,)]

    @property
    def dead(self) -> list[bool]:
        """Whether each tensor has a gradient of exactly 0, as the convolutions' biases have."""
        of_block = [False, True, False, False] if self.conv_bias else [False, False, False]
        return [*of_block * self.blocks, False, False]


@dataclass
class Data:
    """Parameters and tasks, float32."""

    params: list[Tensor]
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, device: str) -> Data:
        moved = {name: getattr(self, name).to(device) for name in ("support_x", "support_y", "query_x", "query_y")}
        return replace(self, params=[p.to(device) for p in self.params], **moved)

    def tasks(self, chosen: slice) -> Data:
        names = ("support_x", "support_y", "query_x", "query_y")
        return replace(self, **{name: getattr(self, name)[chosen].clone() for name in names})


def draw(net: Net, seed: int = 0, offset: float = 0.0) -> Data:
    """Weights as torch initialises them, gammas of both signs, smooth images of every class plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = []
    for shape in net.tensors:
        fan_in = torch.Size(shape[1:]).numel()
        params.append(normal(*shape) / fan_in**0.5 if len(shape) > 1 else 0.2 * normal(*shape))
    per_block = 4 if net.conv_bias else 3
    for block in range(net.blocks):
        gamma = params[per_block * block + per_block - 2]
        gamma += 1.0
        gamma[0] = -0.7  # negative: the largest value after BatchNorm is the smallest before it

    def images(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(net.ways, (net.tasks, count), generator=generator)
        noise = normal(net.tasks, count, net.channels, net.height, net.width)
        smooth = F.avg_pool2d(noise.flatten(0, 1), 3, 1, 1).view_as(noise) * 2 + 0.3 * noise
        return smooth + offset + 0.5 * y[..., None, None, None], y

    return Data(params, *images(net.support), *images(net.query))


class TF32Convolution(torch.autograd.Function):
    """A convolution with TF32 operands in all three products, like cuDNN's tensor-core kernels."""

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(TF32Convolution.rounded(x), TF32Convolution.rounded(weight), stride=stride, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = (TF32Convolution.rounded(saved) for saved in ctx.saved_tensors)
        gradient = TF32Convolution.rounded(gradient)
        return (
            torch.nn.grad.conv2d_input(x.shape, weight, gradient, stride=ctx.stride, padding=1),
            torch.nn.grad.conv2d_weight(x, weight.shape, gradient, stride=ctx.stride, padding=1),
            None,
        )


def with_ties(data: Data) -> Data:
    """Blocky images and coarse weights, exact in every precision, so that ties in a pooling window are ties for all."""
    blocky = (data.query_x[..., ::4, ::4] > 0).float().repeat_interleave(4, -1).repeat_interleave(4, -2)
    height, width = data.query_x.shape[-2:]
    coarse = (data.params[0] * 4).round() / 4
    return replace(data, query_x=blocky[..., :height, :width], params=[coarse, *data.params[1:]])


def forward(net: Net, params: list[Tensor], x: Tensor, precision: str = "fp32") -> Tensor:
    """The network's definition: logits of one task's images."""
    tensors = iter(params)
    for _ in range(net.blocks):
        weight = next(tensors)
        bias = next(tensors) if net.conv_bias else None
        stride = 1 if net.halving == "max" else 2
        if precision == "tf32":  # the bias is dead
            x = TF32Convolution.apply(x, weight, stride)
        else:
            x = F.conv2d(x, weight, bias, stride=stride, padding=1)
        x = F.batch_norm(x, None, None, next(tensors), next(tensors), training=True, eps=net.eps).relu()
        if net.halving == "max":
            x = F.max_pool2d(x, 2)
    x = x.flatten(1) if net.readout == "flatten" else x.mean((2, 3))
    return F.linear(x, *tensors)


@dataclass
class Result:
    """The results of a meta-step; None for those of a query set or gradients that were not asked for."""

    support_loss: Tensor  # [K, T]
    query_loss: Tensor | None  # [T]
    query_accuracy: Tensor | None
    logits: Tensor | None  # [T, Q, ways]
    adapted: Tensor  # [T, P]
    grads: Tensor | None  # [T, P]
    nonfinite: Tensor  # [T] bool


def gradient(
    net: Net, params: list[Tensor], x: Tensor, y: Tensor, precision: str = "fp32"
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and logits of one task in the parameters' dtype."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = forward(net, leaves, x, precision)
    loss = reference.cross_entropy(logits.float() if precision == "bf16" else logits, y)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(p) if dead else g for p, g, dead in zip(leaves, found, net.dead, strict=True)]
    return loss.detach(), grads, logits.detach()


def differentiated(
    net: Net, data: Data, task: int, rates: Tensor, adapt: list[bool], precision: str = "fp32"
) -> list[Tensor]:
    """The gradient of a task's query loss with respect to theta, through all steps: torch's double backward."""

    def loss_of(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = forward(net, params, x[task].to(rates.dtype), precision)
        return reference.cross_entropy(logits.to(rates.dtype), y[task])

    theta = [p.to(rates.dtype).requires_grad_() for p in data.params]
    moves = [moved and not dead for moved, dead in zip(adapt, net.dead, strict=True)]
    phi = list(theta)
    for of_step in rates:
        loss = loss_of(phi, data.support_x, data.support_y)
        g = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True)
        phi = [p - rate * each if move else p for p, rate, each, move in zip(phi, of_step, g, moves, strict=True)]
    loss = loss_of(phi, data.query_x, data.query_y)
    found = torch.autograd.grad(loss, theta, allow_unused=True)
    return [
        torch.zeros_like(p) if dead or g is None else g.detach()
        for p, g, dead in zip(theta, found, net.dead, strict=True)
    ]


def definition(
    net: Net,
    data: Data,
    *,
    steps: int = 1,
    lr: Tensor | float = 0.01,
    method: str = "sign-maml",
    adapt: list[bool] | None = None,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
) -> Result:
    """The meta-step task by task with torch's gradients, in any dtype."""
    adapt = adapt or [True] * len(net.tensors)
    rates = torch.as_tensor(lr, dtype=dtype).expand(steps, len(net.tensors))
    losses, queries, accuracies, scores, adapted, grads, flags = ([] for _ in range(7))
    for t in range(data.support_x.shape[0]):
        phi, flag, of_task = [p.to(dtype) for p in data.params], False, []
        for step in range(steps):
            loss, g, _ = gradient(net, phi, data.support_x[t].to(dtype), data.support_y[t], precision)
            of_task.append(loss)
            flag |= not bool(loss.isfinite())
            for i, (p, each) in enumerate(zip(phi, g, strict=True)):
                if adapt[i] and not net.dead[i]:
                    flag |= not bool(each.isfinite().all())
                    phi[i] = p - rates[step, i] * (reference.sign(each) if method == "sign-maml" else each)
        loss, g, logits = gradient(net, phi, data.query_x[t].to(dtype), data.query_y[t], precision)
        if method == "maml":
            g = differentiated(net, data, t, rates, adapt, precision)
        flag |= not bool(loss.isfinite()) or not all(bool(each.isfinite().all()) for each in g)
        losses.append(torch.stack(of_task) if of_task else loss.new_empty(0))
        queries.append(loss)
        accuracies.append((logits.argmax(-1) == data.query_y[t]).float().mean())
        scores.append(logits)
        adapted.append(torch.cat([p.reshape(-1) for p in phi]))
        grads.append(torch.cat([each.reshape(-1) for each in g]))
        flags.append(flag)
    return Result(
        torch.stack(losses, 1), torch.stack(queries), torch.stack(accuracies), torch.stack(scores),
        torch.stack(adapted), torch.stack(grads), torch.tensor(flags),
    )  # fmt: skip


@dataclass
class Call:
    """A native call with all its memory; it can be repeated, also within a graph."""

    native: ModuleType
    arguments: dict[str, Tensor]
    results: dict[str, Tensor]
    shape: dict[str, Any]
    options: dict[str, Any]

    def launch(self) -> None:
        device = self.arguments["theta"].device
        self.native.conv_meta_step_cuda(
            {name: tensor.data_ptr() for name, tensor in self.arguments.items() if tensor.numel()},
            self.shape,
            **self.options,
            device=device.index or 0,
            stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )

    def result(self) -> Result:
        return Result(**{name: self.results.get(name) for name in Result.__dataclass_fields__})  # type: ignore[arg-type]


def run(native: ModuleType, net: Net, data: Data, **options: Any) -> Result:
    """The meta-step by the CUDA kernels (emulated for data on the CPU); options are those of `prepare`."""
    call = prepare(native, net, data, **options)
    call.launch()
    return call.result()


def prepare(
    native: ModuleType,
    net: Net,
    data: Data,
    *,
    steps: int = 1,
    lr: Tensor | float = 0.01,
    method: str = "sign-maml",
    adapt: list[bool] | None = None,
    precision: str = "fp32",
    wants_grads: bool = True,
    with_query: bool = True,
    by_covariance: bool = True,
    workspace_limit: int = 0,
) -> Call:
    """Allocates everything that a call needs; memory that it must write is filled with NaN first."""
    tasks, device = data.support_x.shape[0], data.support_x.device
    query = net.query if with_query else 0
    theta = torch.cat([p.reshape(-1) for p in data.params]).to(device)
    rates = torch.as_tensor(lr, dtype=torch.float32).expand(steps, len(net.tensors)).contiguous().to(device)
    plan = native.plan_conv_meta_step(
        net.shape, tasks, net.support, query, steps, precision, 2, wants_grads=wants_grads,
        by_covariance=by_covariance, workspace_limit=workspace_limit, method=method,
    )  # fmt: skip

    def unwritten(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=device)

    results = {
        "support_loss": unwritten(steps, tasks),
        "adapted": unwritten(tasks, theta.numel()),
        "nonfinite": torch.zeros(tasks, dtype=torch.bool, device=device),
    }
    if query:
        results |= {
            "query_loss": unwritten(tasks),
            "query_accuracy": unwritten(tasks),
            "logits": unwritten(tasks, query, net.ways),
        }
        if wants_grads:
            results["grads"] = unwritten(tasks, theta.numel())
    arguments = {
        "theta": theta,
        "lr": rates,
        "adapt": torch.tensor(adapt or [True] * len(net.tensors), device=device),
        # A bit pattern that is NaN in float32, bf16 and float64.
        "workspace": torch.full((plan["workspace_bytes"],), 0xFF, dtype=torch.uint8, device=device),
        "support_x": data.support_x.contiguous(),
        "support_labels": data.support_y.contiguous(),
        "query_x": data.query_x.contiguous(),
        "query_labels": data.query_y.contiguous(),
        **results,
    }
    options = {
        "tasks": tasks,
        "support": net.support,
        "query": query,
        "steps": steps,
        "method": method,
        "precision": precision,
        "by_covariance": by_covariance,
        "workspace_limit": workspace_limit,
    }
    return Call(native, arguments, results, net.shape, options)


def split(net: Net, rows: Tensor) -> list[Tensor]:
    """Splits `[T, P]` into parameter tensors, `[T, *shape]`."""
    sizes = [torch.Size(shape).numel() for shape in net.tensors]
    return [part.view(-1, *shape) for part, shape in zip(rows.split(sizes, 1), net.tensors, strict=True)]


def errors(net: Net, found: Tensor, exact: Tensor) -> list[float]:
    """For each parameter tensor, the distance from the exact one over all tasks, relative to its norm."""
    pairs = zip(split(net, found.double().cpu()), split(net, exact), strict=True)
    return [float((f - e).norm() / e.norm().clamp(min=1e-30)) for f, e in pairs]


def peers(net: Net, data: Data, precision: str = "fp32", **options: Any) -> tuple[Result, Result]:
    """PyTorch's results in float64 and in this precision: without a step, unless the options are others.

    TF32 operands are rounded by hand, because a CPU has no such products, and summed in float32; bf16 uses autocast.
    """
    options = {"steps": 0, **options}
    exact = definition(net, data, **options)
    return exact, definition(net, data, **options, dtype=torch.float32, precision=precision)


def task_errors(net: Net, found: Result, exact: Result, peer: Result) -> Tensor:
    """Relative distances of each tensor's gradient from the exact one: `[tasks, 2, tensors]`.

    Index 0 is what was found, index 1 the peer. Zeros become 1e-12. A single task depends on luck: a classifier's few
    scores can be right to the last bit, and if ReLU or pooling decides differently from float64, one value changes a
    whole gradient, for the kernels and for PyTorch alike.
    """
    of_tasks = []
    for t in range(len(exact.nonfinite)):
        rows = slice(t, t + 1)
        of_tasks.append([errors(net, each.grads[rows], exact.grads[rows]) for each in (found, peer)])
    return torch.tensor(of_tasks).clamp(min=1e-12)


def errors_of_tasks(
    native: ModuleType,
    net: Net,
    draws: Iterable[Data],
    precision: str = "fp32",
    *,
    by_covariance: bool = True,
    **options: Any,
) -> Tensor:
    """`task_errors` of the kernels, of the tasks of all draws, beside PyTorch in the same precision: before the sign,
    unless the options are others."""
    options = {"steps": 0, **options}
    of_draws = []
    for data in draws:
        found = run(native, net, data, precision=precision, by_covariance=by_covariance, **options)
        of_draws.append(task_errors(net, found, *peers(net, data, precision, **options)))
    return torch.cat(of_draws)


# Two float32 epsilons: smaller errors are negligible, and PyTorch's own may be this small by luck.
SPACING = 2 * torch.finfo(torch.float32).eps


def draw_tasks(net: Net, least: int = 3, seed: int = 0) -> list[Data]:
    """As many draws as hold this many tasks."""
    return [draw(net, seed + i) for i in range(-(-least // net.tasks))]


def assert_within_twice_torch(net: Net, apart: Tensor) -> None:
    """Every tensor's gradient is at most twice as far from float64's as PyTorch's own in the same precision.

    `apart` is that of `task_errors`, of at least 3 tasks. Their median counts: it leaves out the tasks in which
    ReLU or pooling decides differently.
    """
    assert apart.shape[0] >= 3, apart.shape
    ours, theirs = apart.median(0).values
    for shape, error, peer in zip(net.tensors, ours.tolist(), theirs.tolist(), strict=True):
        assert error <= 2 * peer + SPACING, (shape, error, peer)


def ratio_to_torch(net: Net, apart: Tensor) -> float:
    """The median errors of the kernels relative to PyTorch's own: their geometric mean over the tensors that have a
    gradient."""
    ours, theirs = apart.median(0).values
    alive = ~torch.tensor(net.dead)
    return float((ours[alive] / theirs[alive]).log().mean().exp())
