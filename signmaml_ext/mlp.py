"""The MLP family: multilayer perceptrons, a whole meta-step of all tasks in one kernel launch and one fixed-order mean.

A team of threads owns a task, whose weights and activations stay on the chip through all inner steps and the query
pass.
Definition: reference.py. Kernel: csrc/kernels/mlp_meta_step.cuh.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from . import _loader, ops, spec
from .checks import Problem
from .flat import constant
from .reference import Adaptation, MetaGradients

WIDEST = 256  # kMlpWidth
MOST_HIDDEN_LAYERS = 4  # kMlpLayers - 1
# Gradients of so many bytes are held at once; more tasks run in several launches.
CHUNK_BYTES = 256 * 2**20


def why_not(problem: Problem) -> str | None:
    """None if the MLP kernel serves this problem on a CUDA device, else the reason."""
    found = spec.mlp_from_module(problem.model)
    if isinstance(found, str):
        return found
    if problem.method == "maml":
        return "maml is second order"
    if problem.loss not in ("mse", "cross_entropy"):
        return "the loss is a callable"
    if problem.precision != "fp32":
        return f"it computes in full precision, and precision is {problem.precision!r}"
    if max(found.widths[1:-1]) > WIDEST or len(found.layers) - 1 > MOST_HIDDEN_LAYERS:
        return (
            f"it serves up to {MOST_HIDDEN_LAYERS} hidden layers of up to {WIDEST}, and the widths are {found.widths}"
        )
    used = {id(problem.model.get_parameter(name)) for name in found.names}
    if len(used) < len(found.names):
        return "its layers share parameters"
    if any(id(parameter) not in used for parameter in problem.params.values()):
        return "it has trainable parameters that its layers do not use"
    if problem.loss == "mse" and not _targets_fit(problem, found.widths[-1]):
        return f"the targets are not [T, S, {found.widths[-1]}]"
    dtypes = {parameter.dtype for parameter in problem.model.parameters()}
    if len(dtypes) > 1 or problem.support_x.dtype not in dtypes:
        return "parameters and inputs have several dtypes"
    if problem.rates.learnable():
        return "inner_lr requires grad, which the pure PyTorch backend serves"
    for name in problem.adapted if problem.steps else ():
        rate = problem.rates.at(0, name, problem.params[name][None], {})
        if isinstance(rate, Tensor) and rate.numel() != 1:
            return f"inner_lr varies within parameter {name!r}"
    if problem.support_x[0, 0].numel() != found.widths[0]:
        return f"its first layer takes {found.widths[0]} features"
    if not spec.verified(found, problem.model, problem.support_x[0]):
        return "it does not compute what its structure says"
    return None


def _targets_fit(problem: Problem, outputs: int) -> bool:
    targets = [y for y in (problem.support_y, problem.query_y) if y is not None]
    return all(tuple(y.shape[2:]) == (outputs,) for y in targets)


def _rates(problem: Problem, found: spec.MlpSpec) -> Tensor:
    """`[K * tensors]`: the rate of every tensor of the network at every step; 0 for those that stay."""
    values = [
        problem.rates.at(step, name, problem.params[name][None], {}) if name in problem.adapted else 0.0
        for step in range(problem.steps)
        for name in found.names
    ]
    if not any(isinstance(value, Tensor) for value in values):
        return constant(tuple(values), problem.dtype, problem.device)
    zero = torch.zeros((), dtype=problem.dtype, device=problem.device)
    return torch.stack([(zero + value).reshape(()) for value in values])


def meta_gradients(problem: Problem, native: ModuleType = _loader.C) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    names = _spec_of(problem).names
    parameters = [problem.model.get_parameter(name) for name in names]
    sizes = [parameter.numel() for parameter in parameters]
    size = sum(sizes)
    chunk = max(1, CHUNK_BYTES // (size * problem.dtype.itemsize))
    skip = problem.nonfinite == "skip"
    mean = parameters[0].new_zeros(size)
    parts, lives = [], []
    for first in range(0, problem.tasks, chunk):
        part = _launch(_tasks(problem, first, chunk), native, wants_grads=True)
        of_chunk = torch.zeros_like(mean)
        ops.meta_accumulate_(of_chunk, part["grads"], nonfinite=part["nonfinite"], skip_nonfinite=skip)
        live = (~part["nonfinite"] if skip else torch.ones_like(part["nonfinite"])).sum()
        mean += of_chunk * live
        parts.append(part)
        lives.append(live)
    live_tasks = torch.stack(lives).sum()
    # With one chunk its mean is the answer, unrounded by a product and a quotient.
    mean = mean / live_tasks.clamp(min=1) if len(parts) > 1 else of_chunk
    by_name = dict(zip(names, mean.split(sizes), strict=True))
    return MetaGradients(
        params={name: by_name[name].view(parameter.shape) for name, parameter in problem.params.items()},
        rates={},
        query_loss=torch.cat([part["query_loss"] for part in parts]),
        query_accuracy=_accuracy(parts),
        support_loss=torch.cat([part["support_loss"] for part in parts], dim=1),
        nonfinite=torch.cat([part["nonfinite"] for part in parts]),
        live_tasks=live_tasks,
    )


def adapt(problem: Problem, native: ModuleType = _loader.C) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    found = _spec_of(problem)
    part = _launch(problem, native, wants_grads=False)
    sizes = [problem.model.get_parameter(name).numel() for name in found.names]
    by_name = dict(zip(found.names, part["adapted"].split(sizes, dim=1), strict=True))
    has_query = problem.query_x is not None
    return Adaptation(
        params={name: by_name[name].reshape(-1, *problem.params[name].shape) for name in problem.adapted},
        support_loss=part["support_loss"],
        query_loss=part["query_loss"] if has_query else None,
        query_accuracy=_accuracy([part]) if has_query else None,
        logits=part["predictions"] if has_query else None,
        nonfinite=part["nonfinite"],
    )


def _spec_of(problem: Problem) -> spec.MlpSpec:
    found = spec.mlp_from_module(problem.model)
    assert not isinstance(found, str), "why_not has a reason for this problem"
    return found


def _tasks(problem: Problem, first: int, count: int) -> Problem:
    """The problem of some of the tasks."""
    data = ("support_x", "support_y", "query_x", "query_y")
    return replace(problem, **{name: getattr(problem, name)[first : first + count] for name in data})


def _accuracy(parts: list[dict[str, Tensor]]) -> Tensor | None:
    if "query_accuracy" not in parts[0]:
        return None
    return torch.cat([part["query_accuracy"] for part in parts]).to(torch.float32)


def _launch(problem: Problem, native: ModuleType, *, wants_grads: bool) -> dict[str, Tensor]:
    """One launch; the results by name, of the tasks of the problem."""
    found = _spec_of(problem)
    tasks, steps, dtype, device = problem.tasks, problem.steps, problem.dtype, problem.device
    support = problem.support_x.shape[1]
    query = 0 if problem.query_x is None else problem.query_x.shape[1]
    classifies = problem.loss == "cross_entropy"
    theta = torch.cat([problem.model.get_parameter(name).detach().reshape(-1) for name in found.names])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    results = {
        "support_loss": empty(steps, tasks),
        "nonfinite": torch.zeros(tasks, dtype=torch.bool, device=device),
    }
    if query:
        results["query_loss"] = empty(tasks)
        if classifies:
            results["query_accuracy"] = empty(tasks)
    if wants_grads:
        results["grads"] = empty(tasks, theta.numel())
    else:
        results["adapted"] = empty(tasks, theta.numel())
        if query:
            results["predictions"] = empty(tasks, query, found.widths[-1])
    index = device.index or 0
    plan = native.plan_mlp_meta_step(found.widths, tasks, support, query, dtype.itemsize, native.multiprocessors(index))
    arguments = {
        "theta": theta,
        "lr": _rates(problem, found),
        "adapt": constant(tuple(name in problem.adapted for name in found.names), torch.bool, device),
        "workspace": empty(plan["workspace_scalars"]),
        **_set("support", problem.support_x, problem.support_y, classifies),
        **_set("query", problem.query_x, problem.query_y, classifies),
        **results,
    }
    addresses = {name: tensor.data_ptr() for name, tensor in arguments.items() if tensor.numel()}
    native.mlp_meta_step_cuda(
        addresses,
        found.widths,
        found.activation,
        str(problem.loss),
        tasks=tasks,
        support=support,
        query=query,
        steps=steps,
        by_sign=problem.method == "sign-maml",
        is_double=dtype == torch.float64,
        device=index,
        stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
    )
    return results


def _set(which: str, x: Tensor | None, y: Tensor | None, classifies: bool) -> dict[str, Tensor]:
    if x is None or y is None:
        return {}
    return {f"{which}_x": x.contiguous(), f"{which}_{'labels' if classifies else 'target'}": y.contiguous()}
