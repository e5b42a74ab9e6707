"""One whole training iteration (draw, meta-step, Adam, metrics), launched step by step or replayed as a CUDA graph.

A replayed iteration needs nothing from the host but the launch: its number, the learning rates of the whole run, Adam's
state and the metrics are stored on the device. Both forms launch the same kernels on the same values, so a run may
switch between them at any iteration.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import signmaml_ext
from signmaml_ext import Sharpness, graphs
from signmaml_ext.checks import check_problem
from signmaml_ext.lazy import cached_property

from . import building
from .averaging import Average
from .config import TrainConfig
from .distributed import Group
from .episodes import Episodes, Sampler
from .evaluation import StepArguments
from .hypergradient import OnlineRates
from .pieces import MetaStep, Share, StepNumbers, draw_share
from .rates import InnerRates
from .schedule import learning_rate, step_seed, step_weights


@dataclass(frozen=True)
class Training:
    """The objects that all iterations of a training share.

    Attributes:
        config: The configuration.
        model: Module to train, on its device.
        rates: Its inner rates.
        sampler: Training episodes.
        arguments: Further arguments of `signmaml_ext.meta_step`, besides rates, steps and seed.
        group: The processes that train together.
    """

    config: TrainConfig
    model: nn.Module
    rates: InnerRates
    sampler: Sampler
    arguments: StepArguments
    group: Group

    @cached_property
    def trained(self) -> dict[str, Tensor]:
        """Everything that receives a gradient, by name: parameters of the model, and rates under `rates.`."""
        found: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return found | {f"rates.{name}": p for name, p in self.rates.named_parameters()}

    @cached_property
    def upper(self) -> Sharpness | None:
        """How the place of the meta-gradient is perturbed (Sharp-MAML's upper step); None: not at all."""
        return building.sharpness(self.config, self.config.sharpness_upper)

    @cached_property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device


class Trial(NamedTuple):
    """Findings of a trial meta-step on one task.

    Attributes:
        classification: Whether tasks have an accuracy.
        unreached: Names of trained tensors that got no gradient.
    """

    classification: bool
    unreached: frozenset[str]


def try_one_task(training: Training, one_task: Episodes) -> Trial:
    """Runs a meta-step and discards it, so that errors are raised before anything is written.

    It also settles which backend serves the model (a module may turn out not to batch), so that the choice does not
    depend on whether a run starts, resumes or only tests.

    Raises:
        ValueError, TypeError: As `signmaml_ext.meta_step`.
    """
    training.model.train()
    result = signmaml_ext.meta_step(
        training.model,
        *one_task,
        inner_lr=training.rates.values(),
        inner_steps=training.config.inner_steps,
        seed=0,
        graph=False,
        **training.arguments,  # type: ignore[arg-type]
    )
    unreached = frozenset(name for name, parameter in training.trained.items() if parameter.grad is None)
    for parameter in training.trained.values():
        parameter.grad = None
    return Trial(result.query_accuracy is not None, unreached)


def why_no_graph(training: Training, one_task: Episodes) -> str | None:
    """None if iterations can be replayed as CUDA graphs, else the reason; tries a meta-step of one task."""
    if training.config.graph is False:
        return "the configuration says no"
    if training.device.type not in graphs.RECORDERS:
        return f"graphs are for CUDA devices, and the model is on {training.device}"
    if training.group.size > 1:
        return f"{training.group.size} processes train together"
    changing = [name for name in ("multi_step_loss", "first_order_for") if getattr(training.config, name) > 0]
    if changing:
        return f"iterations differ, by {' and '.join(changing)}"
    if not hasattr(training.sampler, "draw_at"):
        return f"{type(training.sampler).__name__} draws on the host (it has no draw_at)"
    problem = check_problem(
        training.model,
        *one_task,
        inner_lr=training.rates.values(),
        inner_steps=training.config.inner_steps,
        seed=0,
        zero_dead_bias=True,
        **training.arguments,  # type: ignore[arg-type]
    )
    return graphs.why_not_graph(problem)


def outer_adam(parameters: Iterator[Tensor] | list[Tensor], lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam whose learning rate is a tensor, so that the schedule can run on the device.

    On a CUDA device it is torch's fused Adam, which keeps its whole state there and takes the rate in float32.
    Elsewhere it is the plain one with the rate in float64, which gives the same bits as a Python float.
    """
    fused = device.type == "cuda"
    dtype = torch.float32 if fused else torch.float64
    return torch.optim.Adam(parameters, lr=torch.tensor(lr, dtype=dtype, device=device), fused=fused)


def outer_adamw(
    parameters: list[Tensor], undecayed: list[Tensor], lr: float, device: torch.device, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, as `outer_adam` otherwise; the `undecayed` are trained without weight decay."""
    fused = device.type == "cuda"
    dtype = torch.float32 if fused else torch.float64
    rate = torch.tensor(lr, dtype=dtype, device=device)  # the groups share it
    groups: list[dict[str, Any]] = [{"params": parameters}, {"params": undecayed, "weight_decay": 0.0}]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=rate, weight_decay=weight_decay, fused=fused)


def outer_sgd(parameters: Iterator[Tensor] | list[Tensor], lr: float, device: torch.device) -> torch.optim.SGD:
    """SGD without momentum, as `outer_adam` otherwise: torch's fused one on a CUDA device, whose rate stays there."""
    fused = device.type == "cuda"
    dtype = torch.float32 if fused else torch.float64
    return torch.optim.SGD(parameters, lr=torch.tensor(lr, dtype=dtype, device=device), fused=fused)


def _add_gradients(sums: dict[str, Tensor], trained: Mapping[str, Tensor], weight: float) -> None:
    """Adds the gradients that there are, times a weight, to their sums by name."""
    for name, parameter in trained.items():
        if parameter.grad is not None:
            sums[name] = parameter.grad * weight + sums[name] if name in sums else parameter.grad * weight


class Window:
    """Metrics on the device that the next record is computed from: one row per iteration since the last record.

    Args:
        capacity: Rows to make room for; it grows when needed.
        device: Where the rows are stored.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, 3, dtype=torch.float64, device=device)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0  # the host's copy of `filled`

    def __len__(self) -> int:
        return self._count

    def make_room(self) -> None:
        """Call before an iteration: makes sure that one more row fits."""
        if self._count == len(self.rows):
            self.rows = torch.cat((self.rows, torch.zeros_like(self.rows)))

    def append(self, row: Tensor) -> None:
        """Adds a row `[3]` on the device, possibly inside a graph; the host counts it in `appended`."""
        self.rows.index_copy_(0, self.filled.view(1), row[None])
        self.filled += 1

    def appended(self) -> None:
        """Counts a row on the host."""
        self._count += 1

    def present(self) -> Tensor:
        """The filled rows `[rows, 3]`, a view."""
        return self.rows[: self._count]

    def fill(self, rows: Tensor) -> None:
        """Replaces the content by these rows."""
        self._count = len(rows)
        if self._count > len(self.rows):
            self.rows = self.rows.new_zeros(2 * self._count, 3)
        self.rows[: self._count].copy_(rows)
        self.filled.fill_(self._count)


class Iteration:
    """Runs the iterations of a training.

    Args:
        training: The objects they work on; the model must be in its training mode.
        step: The meta-step.
        optimizer: The result of `outer_adam`, `outer_adamw` or `outer_sgd` for everything that is trained.
        why_no_graph: None to replay iterations as graphs, else the reason not to.
        online: What changes the rates; None: nothing does but the schedule.
        average: The moving average of what is trained; None: there is none.

    Attributes:
        window: Query loss, query accuracy (or loss again) and non-finite tasks of each iteration since the last record.
        why_no_graph: As given; also set when recording fails.
    """

    def __init__(
        self,
        training: Training,
        step: MetaStep,
        optimizer: torch.optim.Optimizer,
        why_no_graph: str | None,
        online: OnlineRates | None = None,
        average: Average | None = None,
    ) -> None:
        self._training, self._step, self._optimizer, self._online = training, step, optimizer, online
        self._average = average
        self.why_no_graph = why_no_graph
        config, device = training.config, training.device
        self.window = Window(min(config.log_every, config.iterations), device)
        self._lr: Tensor = optimizer.param_groups[0]["lr"]
        # Rates that are adapted online are multiplied by the schedule.
        start, like = (config.outer_lr, self._lr) if online is None else (1.0, online.outer_lr)
        schedule = [
            learning_rate(config.schedule, start, iteration, config.iterations, config.warmup)
            for iteration in range(config.iterations)
        ]
        self._learning_rates = torch.tensor(schedule, dtype=torch.float64, device="cpu").to(like)
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._next = 0  # the host's copy of `_number`
        self._recording: graphs.Recording | None = None
        self._recorded_for: tuple[object, ...] = ()

    def run(self, number: int) -> None:
        """Runs one iteration; only the recording of a graph waits for the device.

        Args:
            number: The iteration's number, 0-based.

        Raises:
            GraphRefused: The configuration requires a graph, and it cannot be recorded.
        """
        self.window.make_room()
        if self.why_no_graph is None:
            self._record_if_new()
        if self._recording is None:
            # Even if the whole iteration is not a graph, the meta-step may still be one.
            config = self._training.config
            share = draw_share(self._training.sampler, number, self._training.group)
            graph = False if config.graph is False else None
            self._train(share, number, self._learning_rates[number], step_seed(config.seed, number), graph)
            if self._average is not None:
                self._average.update(self._average.decays[number])
        else:
            with self._recording.in_turn():
                if self._next != number:
                    self._number.fill_(number)
                self._recording.replay()
            self._next = number + 1
        self.window.appended()

    def _train(self, share: Share, number: int | None, lr: Tensor, seed: int, graph: bool | None) -> None:
        """An iteration on its tasks; `number` None: all iterations are alike."""
        self._optimizer.zero_grad(set_to_none=True)
        result = self._meta_gradient(share, number, seed, graph)
        if self._training.upper is not None:
            # The same tasks once more; what is recorded is the loss at the weights themselves.
            with signmaml_ext.perturbed(self._training.model.parameters(), self._training.upper):
                self._training.rates.zero_grad(set_to_none=True)
                nonfinite = self._meta_gradient(share, number, seed, graph).nonfinite
            result = result._replace(nonfinite=result.nonfinite | nonfinite)
        if self._training.config.clip_gradient is not None:
            torch.nn.utils.clip_grad_norm_(self._training.trained.values(), self._training.config.clip_gradient)
        if self._online is None:
            self._lr.copy_(lr)
        else:
            self._online.update(lr)
        self._optimizer.step()
        accuracy = result.query_loss if result.query_accuracy is None else result.query_accuracy
        numbers = (result.query_loss.double().mean(), accuracy.double().mean(), result.nonfinite.double().sum())
        self.window.append(torch.stack(numbers))

    def _meta_gradient(self, share: Share, number: int | None, seed: int, graph: bool | None) -> StepNumbers:
        """Leaves the meta-gradient in `.grad`; the numbers are those after the last inner step."""
        config, arguments = self._training.config, self._training.arguments
        weights = {config.inner_steps: 1.0}
        if number is not None:
            weights = step_weights(config.inner_steps, number, config.multi_step_loss)
            if number < config.first_order_for:
                arguments = {**arguments, "method": "fo-maml"}
        if len(weights) == 1:
            return self._after(config.inner_steps, share, seed, graph, arguments)
        sums: dict[str, Tensor] = {}
        nonfinite = torch.zeros(share.of, dtype=torch.bool, device=self._training.device)
        for steps, weight in weights.items():
            for parameter in self._training.trained.values():
                parameter.grad = None
            # No graph: a recording for each number of steps would push out the others.
            result = self._after(steps, share, seed, False, arguments)
            nonfinite = nonfinite | result.nonfinite
            _add_gradients(sums, self._training.trained, weight)
        for name, gradient in sums.items():
            self._training.trained[name].grad = gradient
        return result._replace(nonfinite=nonfinite)

    def _after(self, steps: int, share: Share, seed: int, graph: bool | None, arguments: StepArguments) -> StepNumbers:
        """Adds the meta-gradient of the query loss after so many inner steps to `.grad`."""
        rates = functools.partial(self._training.rates.values, steps)
        return self._step(share, rates, inner_steps=steps, seed=seed, graph=graph, **arguments)

    # ---- CUDA graph

    def _whole(self) -> tuple[Tensor, ...]:
        """An iteration whose number is on the device. The model draws no random numbers, so the seed is unused."""
        episodes: Episodes = self._training.sampler.draw_at(self._number)  # type: ignore[attr-defined]
        lr = self._learning_rates.index_select(0, self._number.view(1)).view(())
        self._train(Share(episodes, 0, episodes.tasks), None, lr, seed=0, graph=False)
        if self._average is not None:
            self._average.update(self._average.decays.index_select(0, self._number.view(1)).view(()))
        self._number += 1
        return ()

    def _record_if_new(self) -> None:
        """Records the iteration if there is no recording yet, or if a tensor that the graph uses has moved."""
        if self._recording is not None and self._recorded_for == self._places():
            return
        self._recording = None
        try:
            recorder = graphs.RECORDERS[self._training.device.type](self._training.device)
            with self._unchanged():
                recorder.warm_up(self._whole)
            # Set it only now: torch warns about capturable steps outside a capture.
            self._set_capturable(self._training.device.type == "cuda")
            self._recording = recorder.record(self._whole)
        except graphs.GraphRefused as error:
            if self._training.config.graph:
                raise
            self.why_no_graph = str(error)
            self._set_capturable(False)
            return
        self._recorded_for = self._places()
        self._next = -1  # the content of `_number` is now unknown

    def _set_capturable(self, capturable: bool) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = capturable

    def _places(self) -> tuple[object, ...]:
        """Addresses of the tensors that the graph reads and writes, and the model's mode."""
        trained, model = self._training.trained.values(), self._training.model
        states = (value for p in trained for value in self._optimizer.state.get(p, {}).values())
        tensors = (*trained, *model.buffers(), *states, self.window.rows, *self._further_tensors())
        return (model.training, *(tensor.data_ptr() for tensor in tensors))

    def _further_tensors(self) -> Iterable[Tensor]:
        """The state of rates that are adapted online, and of the average."""
        online = () if self._online is None else self._online.tensors().values()
        return (*online, *(() if self._average is None else self._average.tensors.values()))

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Restores all that training changes (weights, rates, moments, metrics) in place afterwards."""
        state, trained = self._optimizer.state, self._training.trained.values()
        undo: list[Callable[[], object]] = []
        for tensor in (*trained, *self._further_tensors(), self.window.rows, self.window.filled):
            undo.append(_putting_back(tensor))
        known = {parameter: set(state.get(parameter, {})) for parameter in trained}
        for parameter, names in known.items():
            undo += [_putting_back(state[parameter][name]) for name in names]
        try:
            yield
        finally:
            with torch.no_grad():
                for put_back in undo:
                    put_back()
                for parameter, names in known.items():
                    for name, value in state.get(parameter, {}).items():
                        if name not in names:
                            value.zero_()  # all of Adam's state starts at zero


def _putting_back(tensor: Tensor) -> Callable[[], object]:
    before = tensor.detach().clone()
    return lambda: tensor.copy_(before)
