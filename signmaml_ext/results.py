"""Results: for callers (`MetaStepResult`, `EvaluateResult`, `CompactParams`) and between modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .problem import Problem, StepRates

TaskParams = dict[str, Tensor]  # name -> [t, *shape]: a parameter of t tasks

# The step count of a parameter that is not a number (kNanCount of csrc/params/compact_sign_step.h).
NAN_COUNT = -128


class CompactParams(Mapping[str, Tensor]):
    """Adapted parameters of T tasks as int8 step counts: theta - inner_lr * counts, one byte per parameter and task.

    A mapping from name to `[T, *shape]`; a parameter is computed on each access, rounded twice (the product, the
    difference), and not cached.

    Attributes:
        counts: Name -> `[T, *shape]` int8; -128 stands for NaN.
    """

    def __init__(self, counts: TaskParams, theta: Mapping[str, Tensor], rates: StepRates) -> None:
        """Copies theta and the rates, because training goes on to change them."""
        self.counts = counts
        self._theta = {name: theta[name].detach().clone() for name in counts}
        values = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in rates.values.items()}
        self._rates = StepRates(values, rates.steps)

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name, self.counts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def task(self, number: int) -> TaskParams:
        """The parameters of one task, name -> `[*shape]`."""
        return {name: self._of(name, counts[number][None])[0] for name, counts in self.counts.items()}

    def _of(self, name: str, counts: Tensor) -> Tensor:
        theta = self._theta[name][None]
        rate = self._rates.at(0, name, theta, {})
        return from_counts(counts, theta, rate.detach() if isinstance(rate, Tensor) else rate)


@dataclass(frozen=True)
class MetaGradients:
    """What a meta-step computed, before anything is written to the model.

    Attributes:
        params: Mean meta-gradient by parameter name; None where the loss does not depend on the parameter.
        rates: Mean gradient by key of `StepRates.learnable()`; None likewise.
        query_loss: `[T]`.
        query_accuracy: `[T]`, None unless the task is a classification.
        support_loss: `[K, T]`, before each inner step.
        nonfinite: `[T]` bool, tasks that met a NaN or an Inf.
        live_tasks: `[]` int64, tasks in the mean.
    """

    params: dict[str, Tensor | None]
    rates: dict[str, Tensor | None]
    query_loss: Tensor
    query_accuracy: Tensor | None
    support_loss: Tensor
    nonfinite: Tensor
    live_tasks: Tensor


@dataclass(frozen=True)
class Adaptation:
    """Tasks after the inner loop, and their results on the query set (None without a query set).

    Attributes:
        params: Adapted parameters, name -> `[T, *shape]`; a `CompactParams` for `task_state="int8"`.
        support_loss: `[K, T]`.
        query_loss: `[T]`.
        query_accuracy: `[T]`, None unless the task is a classification.
        logits: `[T, Q, ...]`, the model's output for the query set.
        nonfinite: `[T]` bool.
        statistics: With ``batch_norm="support"``, BatchNorm's statistics of the support set, buffer name -> `[T, C]`.
    """

    params: Mapping[str, Tensor]
    support_loss: Tensor
    query_loss: Tensor | None
    query_accuracy: Tensor | None
    logits: Tensor | None
    nonfinite: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def raise_if_asked(problem: Problem, nonfinite: Tensor) -> None:
    """With `nonfinite="raise"`, raises FloatingPointError if one of the tasks `[T]` is flagged."""
    if problem.nonfinite == "raise" and nonfinite.any():
        tasks = nonfinite.nonzero().flatten().tolist()
        raise FloatingPointError(f"a NaN or an Inf in the losses or gradients of tasks {tasks} (nonfinite='raise')")


def from_counts(counts: Tensor, theta: Tensor, lr: Tensor | float) -> Tensor:
    """Parameters of tasks that have taken `counts` sign steps of `lr` from `theta`."""
    steps = torch.where(counts == NAN_COUNT, torch.nan, counts.to(theta.dtype))
    return theta - lr * steps


@dataclass(frozen=True)
class MetaStepResult:
    """The result of `meta_step`; all tensors are on the model's device, detached.

    Attributes:
        query_loss: `[T]`, mean loss of each task's query set at its adapted parameters.
        query_accuracy: `[T]` float32 in 0..1; None unless targets are int64 labels and predictions class scores. Labels
            that the loss leaves out (`ignore_index`) do not count; NaN where none counts.
        support_loss: `[K, T]`, loss of each task's support set before each inner step.
        nonfinite: `[T]` bool, tasks that met a NaN or an Inf in a loss or a gradient.
        live_tasks: `[]` int64, tasks in the mean: T, or with `nonfinite="skip"` the finite ones.
        backend: The backend that served the call.
    """

    query_loss: Tensor
    query_accuracy: Tensor | None
    support_loss: Tensor
    nonfinite: Tensor
    live_tasks: Tensor
    backend: str


@dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate`; all tensors are on the model's device, detached.

    Attributes:
        query_loss: `[T]`.
        query_accuracy: `[T]` float32 in 0..1; None unless targets are int64 labels and predictions class scores. Labels
            that the loss leaves out (`ignore_index`) do not count; NaN where none counts.
        logits: `[T, Q, ...]`, the adapted models' output for the query sets; `[T, 0]` if that is several tensors and
            no `output=` names one.
        support_loss: `[K, T]`, loss of each task's support set before each inner step.
        nonfinite: `[T]` bool, tasks that met a NaN or an Inf.
        backend: The backend that served the call.
    """

    query_loss: Tensor
    query_accuracy: Tensor | None
    logits: Tensor
    support_loss: Tensor
    nonfinite: Tensor
    backend: str
