"""What the fused families share: a whole meta-step of all tasks in one native call and one fixed-order mean.

A family (conv/, mlp/) says which problems it serves and makes the native call. This module does the rest: parameters
as one row, rates as a table, memory for the results, the mean. On the CPU the mean is computed while tasks run; on CUDA
tasks run in chunks, whose gradients are then summed.
Definition: reference.py.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _loader, ops
from .checks import check_labels
from .flat import constant, no_rule
from .inputs import Inputs, only
from .problem import Problem
from .recognition import Spec as AnySpec
from .results import Adaptation, CompactParams, MetaGradients

# On CUDA at most this many bytes of gradients are held at once; more tasks run in several calls.
CHUNK_BYTES = 256 * 2**20

# The largest buffer of each kind that is kept between calls on the CPU.
KEPT_BYTES = 128 * 2**20

Spec = TypeVar("Spec", bound=AnySpec)
# A family's native call: fills the results among the tensors, by name, for all tasks of the problem.
Call = Callable[[Problem, dict[str, Tensor], Spec, ModuleType], None]


class Scratch:
    """Memory that a call on the CPU leaves to the next one: fresh memory is zeroed one page fault at a time.

    One buffer of at most `most` bytes (None: `KEPT_BYTES`) is kept. Concurrent calls, on several threads, get their own
    buffers.
    """

    def __init__(self, most: float | None = None) -> None:
        self._most = most
        self._kept: deque[Tensor] = deque(maxlen=1)  # of bytes; pop and append are atomic

    @contextlib.contextmanager
    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        """A contiguous, uninitialised tensor for the duration of a context."""
        size = math.prod(shape) * dtype.itemsize
        try:
            buffer = self._kept.pop()
        except IndexError:
            buffer = None
        if buffer is None or buffer.numel() < size:
            buffer = None  # freed before the larger one is made
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        try:
            yield buffer[:size].view(dtype).view(shape)
        finally:
            if buffer.numel() <= (KEPT_BYTES if self._most is None else self._most):
                self._kept.append(buffer)


WORKSPACE, MEAN_ROWS = Scratch(), Scratch()


def why_not(
    problem: Problem,
    names: tuple[str, ...],
    precisions: tuple[str, ...] = ("fp32",),
    *,
    steps_natively: bool = True,
) -> str | None:
    """Why no family of native kernels serves this problem, whatever its layers; None if one may.

    Args:
        problem: The call.
        names: Parameters that the family's layers use.
        precisions: The precisions that it computes in.
        steps_natively: Whether its kernels take the steps, too, or only compute gradients.
    """
    if steps_natively and problem.inner_rule is not None:
        return no_rule(problem)
    if not isinstance(problem.support_x, Tensor):
        return "the model has several inputs"
    if problem.output is not None:
        return "output= selects from what the model returns"
    if problem.precision not in precisions:
        return f"it computes in {' or '.join(precisions)} there, and precision is {problem.precision!r}"
    parameters = _parameters(problem, names)
    used = {id(parameter) for parameter in parameters}
    if any(id(parameter) not in used for parameter in problem.params.values()):
        return "it has trainable parameters that its layers do not use"
    dtypes = {parameter.dtype for parameter in parameters}
    if dtypes != {x.dtype for x in (problem.support_x, problem.query_x) if isinstance(x, Tensor)}:
        return "parameters and inputs have several dtypes"
    if not dtypes <= set(ops.SCALARS):
        return f"it computes in float32 or float64, and the model is {dtypes.pop()}"
    if steps_natively and problem.method == "maml" and problem.sharpness is not None:
        return "its kernels do not differentiate through sharpness-aware steps"
    if torch.is_autocast_enabled(problem.device.type):
        return "torch.autocast is on around the call"
    return None


def varies_within(problem: Problem) -> bool:
    """Whether elements of one parameter have rates of their own."""
    for name in problem.adapted if problem.steps and problem.rates.tensors() else ():
        rate = problem.rates.at_all_steps(name, problem.params[name].ndim, {})
        if isinstance(rate, Tensor) and rate[0].numel() != 1:
            return True
    return False


def step_options(problem: Problem, *, learns_rates: bool) -> dict[str, Any]:
    """What a native call on CUDA needs to know of its steps beside their number and method.

    Rates have a row for every step there.

    Args:
        problem: The call.
        learns_rates: Whether it gives the gradients of its rates.
    """
    return {
        "rates_by_element": varies_within(problem),
        "learns_rates": learns_rates,
        "counts_steps": problem.task_state == "int8",
        **_sharpness_options(problem),
    }


def _sharpness_options(problem: Problem) -> dict[str, Any]:
    how = problem.sharpness
    if how is None:
        return {}
    return {"sharpness_rho": how.rho, "sharpness_norm": how.norm, "sharpness_adaptive": how.adaptive}


def step_options_on_cpu(problem: Problem, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a native call on the CPU needs to know of its steps beside their number and method.

    Args:
        problem: The call.
        tensors: Arguments and results by name.

    Returns:
        Arguments of its plan, and those of the call, which are more.
    """
    by_step = problem.rates.vary_by_step(problem.params)
    of_plan = {
        "rates_by_element": tensors["lr"].numel() > (problem.steps if by_step else 1) * tensors["adapt"].numel(),
        "rates_by_step": by_step,
        "learns_rates": "mean" in tensors and tensors["mean"].numel() > tensors["theta"].numel(),
        "counts_steps": problem.task_state == "int8",
        "sharpness_rho": 0.0 if problem.sharpness is None else problem.sharpness.rho,
    }
    return of_plan, {**of_plan, **_sharpness_options(problem)}


def _parameters(problem: Problem, names: tuple[str, ...]) -> list[Tensor]:
    """Parameters by name, also those that do not require grad."""
    trainable = problem.params
    return [trainable[name] if name in trainable else problem.model.get_parameter(name) for name in names]


def on_cuda(problem: Problem, native: ModuleType) -> bool:
    """Whether the CUDA kernels run: on a CUDA device, or emulated, by a module other than the package's own."""
    return problem.device.type == "cuda" or native is not _loader.C


def meta_gradients(problem: Problem, spec: Spec | str, native: ModuleType, call: Call[Spec]) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    assert not isinstance(spec, str), "why_not has a reason for this problem"
    _check(problem, spec, native)
    parameters = _parameters(problem, spec.names)
    sizes = [parameter.numel() for parameter in parameters]
    size = sum(sizes)
    leaves = {key: rate.detach().clone().requires_grad_() for key, rate in problem.rates.learnable().items()}
    table = _rates(problem, spec.names, leaves, native)
    learned = table.numel() if leaves else 0
    if on_cuda(problem, native):
        means, live_tasks, parts = _mean_of_chunks(problem, spec, native, call, size, table, learned)
    else:
        mean = parameters[0].new_empty(size + learned)
        means = [mean[:size], mean[size:]]
        parts = [_run(problem, spec, native, call, {"mean": mean}, table.detach())]
        live_tasks = _live(problem, parts[0]["nonfinite"])
    moving = [name for name in problem.adapted if name not in spec.unmoved]
    rates = _rate_gradients(leaves, table, means[-1], moving)
    by_name = dict(zip(spec.names, means[0].split(sizes), strict=True))
    return MetaGradients(
        params={name: by_name[name].view(parameter.shape) for name, parameter in problem.params.items()},
        rates=rates,
        query_loss=_joined([part["query_loss"] for part in parts]),
        query_accuracy=_accuracy(parts),
        support_loss=_joined([part["support_loss"] for part in parts], dim=1),
        nonfinite=_joined([part["nonfinite"] for part in parts]),
        live_tasks=live_tasks,
    )


def _mean_of_chunks(
    problem: Problem, spec: Spec, native: ModuleType, call: Call[Spec], size: int, table: Tensor, learned: int
) -> tuple[list[Tensor], Tensor, list[dict[str, Tensor]]]:
    """The mean gradient `[P]`, then that of rates that learn; the number of tasks in it; the other results by chunk.

    Args:
        size: P.
        table: The rates at every step.
        learned: Their number if they have gradients, else 0.
    """
    chunk = max(1, CHUNK_BYTES // ((size + learned) * problem.dtype.itemsize))
    parts, means, lives = [], [], []
    for first in range(0, problem.tasks, chunk):
        tasks = min(chunk, problem.tasks - first)
        rows = {"grads": torch.empty(tasks, size, dtype=problem.dtype, device=problem.device)}
        if learned:
            rows["rate_grads"] = torch.empty(tasks, learned, dtype=problem.dtype, device=problem.device)
        whole = tasks == problem.tasks
        part = _run(problem if whole else _tasks(problem, first, tasks), spec, native, call, rows, table.detach())
        of_chunk = []
        for of_tasks in rows.values():
            of_chunk.append(torch.zeros(of_tasks.shape[1], dtype=problem.dtype, device=problem.device))
            ops.meta_accumulate_(
                of_chunk[-1], of_tasks, nonfinite=part["nonfinite"], skip_nonfinite=problem.nonfinite == "skip"
            )
        parts.append(part)
        means.append(of_chunk)
        lives.append(_live(problem, part["nonfinite"]))
    if len(parts) == 1:
        return means[0], lives[0], parts
    live_tasks = torch.stack(lives).sum()
    joined = [
        torch.stack([m * live for m, live in zip(of_chunks, lives, strict=True)]).sum(0) / live_tasks.clamp(min=1)
        for of_chunks in zip(*means, strict=True)
    ]
    return joined, live_tasks, parts


def _live(problem: Problem, flags: Tensor) -> Tensor:
    """How many tasks count, `[]` int64."""
    if problem.nonfinite == "skip":
        return (~flags).sum()
    return torch.full((), flags.numel(), dtype=torch.int64, device=flags.device)


def adapt(problem: Problem, spec: Spec | str, native: ModuleType, call: Call[Spec]) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    if problem.method == "maml":
        problem = problem.replace(method="fo-maml")  # they differ only in the meta-gradient
    assert not isinstance(spec, str), "why_not has a reason for this problem"
    _check(problem, spec, native)
    part = _run(problem, spec, native, call, None)
    sizes = [parameter.numel() for parameter in _parameters(problem, spec.names)]
    counted = problem.task_state == "int8"
    by_name = dict(zip(spec.names, part["counts" if counted else "adapted"].split(sizes, dim=1), strict=True))
    params = {name: by_name[name].reshape(-1, *problem.params[name].shape) for name in problem.adapted}
    return Adaptation(
        params=CompactParams(params, problem.params, problem.rates) if counted else params,
        support_loss=part["support_loss"],
        query_loss=part.get("query_loss"),
        query_accuracy=_accuracy([part]),
        logits=part.get("logits"),
        nonfinite=part["nonfinite"],
    )


def _check(problem: Problem, spec: AnySpec, native: ModuleType) -> None:
    if not on_cuda(problem, native):
        check_classes(problem, spec)


def check_classes(problem: Problem, spec: AnySpec) -> None:
    """Refuses labels that the network has no output for, where they are in the host's memory."""
    if problem.loss == "cross_entropy":
        check_labels(problem, spec.outputs)


def _tasks(problem: Problem, first: int, count: int) -> Problem:
    """The problem of some of the tasks."""
    data = ("support_x", "support_y", "query_x", "query_y")
    return replace(problem, **{name: getattr(problem, name)[first : first + count] for name in data})


def _accuracy(parts: list[dict[str, Tensor]]) -> Tensor | None:
    if "query_accuracy" not in parts[0]:
        return None
    return _joined([part["query_accuracy"] for part in parts]).to(torch.float32)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rate_gradients(
    leaves: Mapping[str, Tensor], table: Tensor, gradient: Tensor, moving: Sequence[str]
) -> dict[str, Tensor | None]:
    """The gradients of learnable rates; None for those that move nothing.

    Args:
        leaves: The rates by key.
        table: What `_rates` made of them.
        gradient: The table's gradient, by the native call.
        moving: Parameters that the steps move.
    """
    if not leaves or not table.requires_grad or not moving:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(table, list(leaves.values()), gradient, allow_unused=True)
    return {key: value if key in ("", *moving) else None for key, value in zip(leaves, found, strict=True)}


def _run(
    problem: Problem,
    spec: Spec,
    native: ModuleType,
    call: Call[Spec],
    gradients: dict[str, Tensor] | None,
    rates: Tensor | None = None,
) -> dict[str, Tensor]:
    """Makes one native call for the tasks of the problem; returns the results by name.

    Args:
        rates: What `_rates` gives; None: made here.
        gradients: The buffer that a meta-step fills, `mean` `[P]` or `grads` `[T, P]`; None: returns the adapted
            parameters, or the counts of their steps, and the predictions instead.
    """
    tasks, dtype, device = problem.tasks, problem.dtype, problem.device
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in _parameters(problem, spec.names)])
    classifies = problem.loss == "cross_entropy"

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    results = {
        "support_loss": empty(problem.steps, tasks),
        "nonfinite": torch.zeros(tasks, dtype=torch.bool, device=device),
    }
    if problem.query_x is not None:
        results["query_loss"] = empty(tasks)
        if classifies:
            results["query_accuracy"] = empty(tasks)
    if gradients is None:
        if problem.task_state == "int8":
            results["counts"] = torch.empty(tasks, theta.numel(), dtype=torch.int8, device=device)
        else:
            results["adapted"] = empty(tasks, theta.numel())
        if problem.query_x is not None:
            results["logits"] = empty(tasks, only(problem.query_x).shape[1], spec.outputs)
    arguments = {
        **(gradients or {}),
        "theta": theta,
        "lr": _rates(problem, spec.names, {}, native) if rates is None else rates,
        "adapt": constant(tuple(name in problem.adapted for name in spec.names), torch.bool, device),
        **_set("support", problem.support_x, problem.support_y, classifies),
        **_set("query", problem.query_x, problem.query_y, classifies),
    }
    call(problem, {**arguments, **results}, spec, native)
    return results


def _rates(problem: Problem, names: tuple[str, ...], leaves: Mapping[str, Tensor], native: ModuleType) -> Tensor:
    """The rates of every tensor of the network; 0 for those that do not adapt.

    There is a row for each of the K steps, or, on the CPU, one for all steps if they share their rates.

    Args:
        problem: The call.
        names: The tensors, in the order of theta.
        leaves: Learnable rates by key, to which the result has a graph.
        native: The module of the kernels.

    Returns:
        `[rows * tensors]`, or `[rows * P]` where the elements of a parameter have rates of their own.
    """
    by_step = on_cuda(problem, native) or problem.rates.vary_by_step(problem.params)
    rows = problem.steps if by_step else min(problem.steps, 1)
    if rows == 0:
        return constant((), problem.dtype, problem.device)
    if not problem.rates.tensors():
        once = tuple(problem.rates.number(name) if name in problem.adapted else 0.0 for name in names)
        return constant(once * rows, problem.dtype, problem.device)
    if "" in problem.rates.values:
        adapts = constant(tuple(float(name in problem.adapted) for name in names), problem.dtype, problem.device)
        rate = problem.rates.at_all_steps("", 1, leaves)
        assert isinstance(rate, Tensor)
        return (rate.to(problem.dtype).expand(rows, 1) * adapts).reshape(-1)
    by_element = varies_within(problem)
    columns = []
    for name, parameter in zip(names, _parameters(problem, names), strict=True):
        shape = parameter.shape if by_element else [1] * parameter.ndim
        value = problem.rates.at_all_steps(name, parameter.ndim, leaves) if name in problem.adapted else 0.0
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=problem.dtype, device=problem.device)
        columns.append(value.to(problem.dtype).expand(rows, *shape).reshape(rows, -1))
    return torch.cat(columns, 1).reshape(-1)


def _set(which: str, x: Inputs | None, y: Tensor | None, classifies: bool) -> dict[str, Tensor]:
    if x is None or y is None:
        return {}
    return {f"{which}_x": only(x).contiguous(), f"{which}_{'labels' if classifies else 'target'}": y.contiguous()}


def addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Addresses as the native calls take them; empty tensors are left out."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor.numel()}


def sizes_of(problem: Problem) -> dict[str, int]:
    """Tasks and examples of a call, by the names of the native arguments."""
    query = 0 if problem.query_y is None else problem.query_y.shape[1]
    return {"tasks": problem.tasks, "support": problem.support_y.shape[1], "query": query}


@contextlib.contextmanager
def memory_on_cpu(tensors: dict[str, Tensor], workspace: int, mean_rows: int) -> Iterator[dict[str, int]]:
    """The addresses for a native call on the CPU, including those of scratch memory for its duration.

    Args:
        tensors: Arguments and results by name.
        workspace: Size in bytes.
        mean_rows: Number of gradients `[P]` that it holds at once if it computes their mean.
    """
    rows = (mean_rows, tensors["mean"].numel()) if "mean" in tensors else (0,)
    dtype = tensors["theta"].dtype
    with WORKSPACE.of((workspace,), torch.uint8) as own, MEAN_ROWS.of(rows, dtype) as of_mean:
        yield addresses({**tensors, "workspace": own, "mean_rows": of_mean})


def stream_of(device: torch.device) -> int:
    """The current stream's handle; 0 on the emulated GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
