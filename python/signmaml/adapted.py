"""One task's adapted model: its parameters in full, or as int8 step counts beside a learner that it shares."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import signmaml_ext
from signmaml_ext import CompactParams
from signmaml_ext.results import from_counts

from .evaluation import EvaluationArguments
from .heads import no_loss, predictions, sharing_copy, with_head
from .learner import Learner

TASK_STATES = ("full", "int8")
# Queries that are computed together where they do not depend on each other.
CHUNK = 256
_STATISTICS = ("running_mean", "running_var")


def check_task_state(task_state: str) -> None:
    """Raises ValueError unless `task_state` is one of `TASK_STATES`."""
    if task_state not in TASK_STATES:
        raise ValueError(f"task_state: expected 'full' or 'int8', found {task_state!r}")


class Adapted:
    """A model adapted to one task.

    Attributes:
        arguments: How the model is run.
        transductive: Whether examples that are predicted together are normalised by their own statistics.
        prototypes: Whether the head began at prototypes.
    """

    def __init__(self, arguments: EvaluationArguments, transductive: bool) -> None:
        self.arguments, self.transductive = arguments, transductive
        self.prototypes = False

    def module(self) -> nn.Module:
        """The adapted model as a plain module in evaluation mode: `module(x)` is its prediction.

        It may share tensors with this object and with the learner. If inductive, its BatchNorms hold the statistics of
        the support set as running ones.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that `FewShotClassifier.save` stores."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """The predictions `[n, ...]` for inputs `[n, ...]`."""
        model = self.module()
        together = len(x) if self.transductive and _norms(model) else CHUNK
        found = torch.cat([self._predict(model, part) for part in x.split(together)])
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found

    def _predict(self, model: nn.Module, x: Tensor) -> Tensor:
        mode = "batch" if self.transductive or not _norms(model) else "running"
        return predictions(model, x, mode, self.arguments["precision"])


class FullState(Adapted):
    """Holds the adapted module."""

    def __init__(self, model: nn.Module, arguments: EvaluationArguments, transductive: bool) -> None:
        super().__init__(arguments, transductive)
        self._model = model

    def module(self) -> nn.Module:
        return self._model

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._model.state_dict())


@dataclass(frozen=True)
class Counts:
    """A task as one byte a parameter.

    Attributes:
        steps: Name -> `[*shape]` int8: how many inner steps a parameter has gone down, less those up.
        statistics: Buffer name -> `[C]`: the support set's, of BatchNorms.
        head: Parameter name -> where the head of a task began that has one of its own.
    """

    steps: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    head: Mapping[str, Tensor]

    def bytes(self) -> int:
        """Its size."""
        parts = (self.steps, self.statistics, self.head)
        return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())


class CountedState(Adapted):
    """Holds step counts; the module is made for each prediction, from the learner that all such tasks share."""

    def __init__(self, learner: Learner, counts: Counts, transductive: bool, rates: Any, head: str | None) -> None:
        super().__init__(learner.arguments, transductive)
        self.learner, self.counts, self.head, self._rates = learner, counts, head, rates

    def module(self) -> nn.Module:
        model = self.learner.model
        if self.head is not None:
            model = with_head(model, self.head, layer_of(self.counts.head, self.head))
        theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
        rates = self._rates
        moved = {}
        for name, steps in self.counts.steps.items():
            rate = rates[name] if isinstance(rates, Mapping) else rates
            moved[name] = from_counts(steps, theta[name], rate)
        return normalised(with_parameters(model, moved), self.counts.statistics, self.transductive)

    def tensors(self) -> dict[str, Tensor]:
        parts = {"steps": self.counts.steps, "statistics": self.counts.statistics, "head": self.counts.head}
        return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def adapt_tasks(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    *,
    ways: int | None,
    head: str,
    transductive: bool,
    task_state: str,
) -> list[Adapted]:
    """Adapts a learner to tasks of one size.

    Args:
        learner: The learner.
        x: `[T, S, ...]`, the inputs of the support sets.
        y: `[T, S]` int64 in 0..ways-1, each of them in every task; or targets `[T, S, ...]`.
        ways: Classes of a task; None: regression.
        head: As in `Learner.start`.
        transductive: See `Adapted`.
        task_state: "full" or "int8".

    Raises:
        ValueError: The learner cannot be adapted so; the message says why.
        FloatingPointError: A task met a NaN or an Inf.
    """
    check_task_state(task_state)
    if ways is None:
        return _adapt(learner, x, y, (learner.model, learner.arguments["inner_lr"], None), transductive, task_state)
    if not learner.takes_prototypes(x[0], ways, head):  # all tasks start alike
        return _adapt(learner, x, y, learner.start(x[0], y[0], ways, head), transductive, task_state)
    tasks = []
    for i in range(len(x)):
        start = learner.start(x[i], y[i], ways, head)
        tasks += _adapt(learner, x[i : i + 1], y[i : i + 1], start, transductive, task_state)
    for task in tasks:
        task.prototypes = True
    return tasks


def _adapt(
    learner: Learner, x: Tensor, y: Tensor, start: tuple[nn.Module, Any, str | None], transductive: bool, state: str
) -> list[Adapted]:
    model, rates, head = start
    own = learner.arguments
    if transductive and own["batch_norm"] == "running":
        raise ValueError("transductive: expected False for a learner with batch_norm 'running', found True")
    inductive = not transductive and own["batch_norm"] != "running"
    arguments: dict[str, Any] = {**own, "inner_lr": rates, "nonfinite": "raise"}
    if arguments["batch_norm"] == "support":
        arguments["batch_norm"] = "batch"  # the same inner steps
    params = signmaml_ext.adapt(model, x, y, task_state=state, **arguments)
    own_head = {} if head is None else _tensors_of(model, head)
    measures = inductive and bool(_norms(model))
    tasks: list[Adapted] = []
    for i in range(len(x)):
        of_task = params.task(i) if isinstance(params, CompactParams) else {name: p[i] for name, p in params.items()}
        if isinstance(params, CompactParams):
            statistics = _support_statistics(with_parameters(model, of_task), x[i], own) if measures else {}
            steps = {name: steps[i] for name, steps in params.counts.items()}
            tasks.append(CountedState(learner, Counts(steps, statistics, own_head), transductive, rates, head))
        else:
            # The head too where the inner loop does not move it: the learner makes the next task's in its place.
            moved = with_parameters(model, {**own_head, **of_task})
            statistics = _support_statistics(moved, x[i], own) if measures else {}
            tasks.append(FullState(normalised(moved, statistics, transductive), own, transductive))
    return tasks


def _support_statistics(model: nn.Module, x: Tensor, arguments: EvaluationArguments) -> dict[str, Tensor]:
    """BatchNorm's statistics of a support set, buffer name -> `[C]`."""
    found = signmaml_ext.adapt(
        model,
        x[None],
        None,
        inner_lr=0.0,
        inner_steps=0,
        loss=no_loss,
        batch_norm="support",
        precision=arguments["precision"],
    )
    return {name: value[0] for name, value in found.items() if name.rpartition(".")[2] in _STATISTICS}


def with_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other values of some parameters; it shares all other tensors. Tied ones stay tied."""
    twin = sharing_copy(model)
    new: dict[int, nn.Parameter] = {}
    for name, value in parameters.items():
        old = twin.get_parameter(name)
        new[id(old)] = nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad)
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                module._parameters[name] = new[id(parameter)]
    return twin


def normalised(model: nn.Module, statistics: Mapping[str, Tensor], transductive: bool) -> nn.Module:
    """The same model, in evaluation mode and with BatchNorms that predict as asked; see `Adapted.module`."""
    for path, norm in _norms(model).items():
        if transductive:
            _set_statistics(norm, None, None)
        elif statistics:
            prefix = f"{path}." if path else ""
            mean, variance = (statistics.get(prefix + name) for name in _STATISTICS)
            if mean is not None:  # else the forward does not use it
                _set_statistics(norm, mean, variance)
    return model.eval()


def prepared(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with all tensors of `FullState.tensors`.

    Raises:
        ValueError: They are another model's.
    """
    from .checkpoint import copy_into

    twin = copy.deepcopy(model)
    for path, norm in _norms(twin).items():
        prefix = f"{path}." if path else ""
        mean, variance = (tensors.get(prefix + name) for name in _STATISTICS)
        _set_statistics(norm, mean, variance)
    copy_into(twin.state_dict(), tensors, "the adapted model")
    return twin.eval()


def layer_of(tensors: Mapping[str, Tensor], head: str) -> nn.Linear:
    """A head from its tensors by parameter name."""
    prefix = f"{head}." if head else ""
    weight, bias = tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _tensors_of(model: nn.Module, head: str) -> dict[str, Tensor]:
    prefix = f"{head}." if head else ""
    return {prefix + name: p.detach().clone() for name, p in model.get_submodule(head).named_parameters()}


def _set_statistics(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor | None, variance: Tensor | None) -> None:
    norm.track_running_stats = mean is not None
    scale: Tensor | None = norm._parameters["weight"]
    for name, value in zip(_STATISTICS, (mean, variance), strict=True):
        if value is not None:
            # Under autocast they come in bfloat16, but a norm wants them in the type of its parameters.
            like = scale if scale is not None else value if value.dtype == torch.float64 else value.float()
            value = value.detach().clone().to(like.device, like.dtype)
        norm._buffers[name] = value
    written = None if mean is None else torch.ones((), dtype=torch.int64, device=mean.device)
    norm._buffers["num_batches_tracked"] = written


def _norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    kind = nn.modules.batchnorm._BatchNorm
    return {path: cast(Any, module) for path, module in model.named_modules() if isinstance(module, kind)}
