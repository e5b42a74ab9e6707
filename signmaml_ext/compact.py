"""Tasks whose state is int8 step counts: chunks of tasks, one after the other.

A task keeps one byte per parameter; its parameters and gradients exist in full precision only while its chunk runs.
Definition: `inner_loop` in reference.py. Kernel: csrc/kernels/compact_sign_step.cuh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import take
from .problem import Problem
from .results import Adaptation, CompactParams, MetaGradients

# At most this many bytes of parameters are in full precision at once; their gradients take as much again, twice as much
# while they are gathered.
CHUNK_BYTES = 32 * 2**20


def chunks(problem: Problem) -> list[Problem]:
    """The problem cut along the tasks."""
    of_task = sum(parameter.numel() for parameter in problem.params.values()) * problem.dtype.itemsize
    size = max(1, CHUNK_BYTES // of_task)
    return [_tasks(problem, slice(first, first + size)) for first in range(0, problem.tasks, size)]


def _tasks(problem: Problem, tasks: slice) -> Problem:
    data = {name: getattr(problem, name) for name in ("support_x", "support_y", "query_x", "query_y")}
    of_tasks = {name: None if value is None else take(value, tasks) for name, value in data.items()}
    return problem.replace(**of_tasks, first_task=problem.first_task + tasks.start)


def meta_gradients(problem: Problem, compute: Callable[[Problem], MetaGradients]) -> MetaGradients:
    """The meta-step of all tasks from those of the chunks: means weighted by the number of live tasks."""
    sums: dict[str, Tensor | None] = dict.fromkeys(problem.params)
    parts = []
    for chunk in chunks(problem):
        part = compute(chunk)
        parts.append(part)
        for name, gradient in part.params.items():
            if gradient is not None:
                weighted = gradient * part.live_tasks
                previous = sums[name]
                sums[name] = weighted if previous is None else previous.add_(weighted)
    if len(parts) == 1:
        return parts[0]  # without the rounding of a product and a quotient
    live_tasks = torch.stack([part.live_tasks for part in parts]).sum()
    return MetaGradients(
        params={name: None if total is None else total / live_tasks.clamp(min=1) for name, total in sums.items()},
        rates={key: _mean(parts, key, live_tasks) for key in problem.rates.learnable()},
        query_loss=torch.cat([part.query_loss for part in parts]),
        query_accuracy=_cat([part.query_accuracy for part in parts]),
        support_loss=torch.cat([part.support_loss for part in parts], dim=1),
        nonfinite=torch.cat([part.nonfinite for part in parts]),
        live_tasks=live_tasks,
    )


def _mean(parts: list[MetaGradients], key: str, live_tasks: Tensor) -> Tensor | None:
    """The gradient of a learnable rate."""
    found = [part.rates[key] * part.live_tasks for part in parts if part.rates[key] is not None]  # type: ignore[operator]
    return torch.stack(found).sum(0) / live_tasks.clamp(min=1) if found else None


def adapt(problem: Problem, compute: Callable[[Problem], Adaptation]) -> Adaptation:
    """The inner loop of all tasks from those of the chunks; of the parameters only the counts are kept."""
    parts = [compute(chunk) for chunk in chunks(problem)]
    counts: dict[str, list[Tensor]] = {name: [] for name in problem.adapted}
    for part in parts:
        assert isinstance(part.params, CompactParams)
        for name, of_chunk in part.params.counts.items():
            counts[name].append(of_chunk)
    joined = {name: torch.cat(of_chunks) for name, of_chunks in counts.items()}
    return Adaptation(
        params=CompactParams(joined, problem.params, problem.rates),
        support_loss=torch.cat([part.support_loss for part in parts], dim=1),
        query_loss=_cat([part.query_loss for part in parts]),
        query_accuracy=_cat([part.query_accuracy for part in parts]),
        logits=_cat([part.logits for part in parts]),
        nonfinite=torch.cat([part.nonfinite for part in parts]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
