"""One whole training iteration (draw, meta-step, Adam, metrics), launched step by step or replayed as a CUDA graph.

As a graph nothing of it touches the host: the iteration's number, the learning rates of the whole run, Adam's
state and the metrics lie on the device, and the host only launches the graph. Both forms launch the same kernels on the
same values, so a run may change between them at any iteration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from signmaml_ext import graphs
from signmaml_ext.checks import check_problem

from .config import TrainConfig
from .distributed import Group
from .evaluation import Sampler
from .pieces import MetaStep, draw_share
from .rates import InnerRates
from .schedule import learning_rate, step_seed


def why_no_graph(
    config: TrainConfig,
    model: nn.Module,
    rates: InnerRates,
    sampler: Sampler,
    arguments: Mapping[str, Any],
    group: Group,
) -> str | None:
    """None if iterations can be replayed as CUDA graphs, else the reason; tried out with a meta-step of one task."""
    if config.graph is False:
        return "the configuration says no"
    device = next(model.parameters()).device
    if device.type not in graphs.RECORDERS:
        return f"graphs are for CUDA devices, and the model is on {device}"
    if group.size > 1:
        return f"{group.size} processes train together"
    if not hasattr(sampler, "draw_at"):
        return f"{type(sampler).__name__} draws on the host (it has no draw_at)"
    one_task = (part[:1] for part in sampler.draw(0))
    problem = check_problem(
        model,
        *one_task,
        inner_lr=rates.values(),
        inner_steps=config.inner_steps,
        seed=0,
        zero_dead_bias=True,
        **arguments,
    )
    return graphs.why_not_graph(problem)


def outer_adam(parameters: Iterator[Tensor] | list[Tensor], lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam whose learning rate is a tensor, so that the schedule can run on the device.

    On a CUDA device it is torch's fused kernel, with its whole state there; it takes a rate in float32. Elsewhere it is
    the plain one, with the rate in float64, which gives the bits of a Python float.
    """
    fused = device.type == "cuda"
    dtype = torch.float32 if fused else torch.float64
    return torch.optim.Adam(parameters, lr=torch.tensor(lr, dtype=dtype, device=device), fused=fused)


class Window:
    """What the next record of metrics is made of: one row for each iteration since the last, on the device.

    Args:
        capacity: Rows to make room for; it grows when needed.
        device: Where the rows lie.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, 3, dtype=torch.float64, device=device)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0  # what `filled` holds, as the host knows it

    def __len__(self) -> int:
        return self._count

    def make_room(self) -> None:
        """Before an iteration: at least one row is free after it."""
        if self._count == len(self.rows):
            self.rows = torch.cat((self.rows, torch.zeros_like(self.rows)))

    def append(self, row: Tensor) -> None:
        """Adds a row `[3]` on the device, where a graph does it; the host counts in `appended`."""
        self.rows.index_copy_(0, self.filled.view(1), row[None])
        self.filled += 1

    def appended(self) -> None:
        """The host takes note of a row."""
        self._count += 1

    def present(self) -> Tensor:
        """`[rows, 3]`, a view."""
        return self.rows[: self._count]

    def fill(self, rows: Tensor) -> None:
        """Holds these rows and no others from now on."""
        self._count = len(rows)
        if self._count > len(self.rows):
            self.rows = self.rows.new_zeros(2 * self._count, 3)
        self.rows[: self._count].copy_(rows)
        self.filled.fill_(self._count)


class Iteration:
    """Runs the iterations of a training.

    Args:
        config: The configuration.
        model: Module to train, in the mode it is trained in.
        rates: Its inner rates.
        sampler: Training episodes.
        optimizer: What `outer_adam` gave.
        trained: Everything it trains.
        step: The meta-step.
        arguments: What it passes on to `signmaml_ext.meta_step`, besides rates, steps and seed.
        group: The processes that train together.
        why_no_graph: None to replay iterations as graphs, else why not.

    Attributes:
        window: Query loss, query accuracy (or loss again) and non-finite tasks of each iteration since the last record.
        why_no_graph: As given; also set when recording turned out not to work.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        rates: InnerRates,
        sampler: Sampler,
        optimizer: torch.optim.Adam,
        trained: list[Tensor],
        step: MetaStep,
        arguments: Mapping[str, Any],
        group: Group,
        why_no_graph: str | None,
    ) -> None:
        self._config, self._model, self._rates, self._sampler = config, model, rates, sampler
        self._optimizer, self._trained = optimizer, trained
        self._step, self._arguments, self._group = step, arguments, group
        self.why_no_graph = why_no_graph
        self._device = next(model.parameters()).device
        self.window = Window(min(config.log_every, config.iterations), self._device)
        self._lr: Tensor = optimizer.param_groups[0]["lr"]
        schedule = [
            learning_rate(config.schedule, config.outer_lr, iteration, config.iterations)
            for iteration in range(config.iterations)
        ]
        self._learning_rates = torch.tensor(schedule, dtype=torch.float64).to(self._lr)
        self._number = torch.zeros((), dtype=torch.int64, device=self._device)
        self._next = 0  # what `_number` holds, as the host knows it
        self._recording: graphs.Recording | None = None
        self._recorded_for: tuple[object, ...] = ()

    def run(self, number: int) -> None:
        """One iteration; nothing in it waits for the device but the recording of a graph.

        Args:
            number: Of the iteration, 0-based.

        Raises:
            GraphRefused: The configuration says that there must be a graph, and it cannot be recorded.
        """
        self.window.make_room()
        if self.why_no_graph is None:
            self._record_if_new()
        if self._recording is None:
            # Where the whole is no graph, the meta-step may still be one.
            graph = False if self._config.graph is False else None
            seed = step_seed(self._config.seed, number)
            share = draw_share(self._sampler, number, self._group)
            self._train(*share, self._learning_rates[number], seed, graph)
        else:
            with self._recording.in_turn():
                if self._next != number:
                    self._number.fill_(number)
                self._recording.replay()
            self._next = number + 1
        self.window.appended()

    def _train(
        self, episodes: Sequence[Tensor], first: int, tasks: int, lr: Tensor, seed: int, graph: bool | None
    ) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        result = self._step(
            episodes,
            first,
            tasks,
            self._rates.values,
            inner_steps=self._config.inner_steps,
            seed=seed,
            graph=graph,
            **self._arguments,
        )
        self._lr.copy_(lr)
        self._optimizer.step()
        accuracy = result.query_loss if result.query_accuracy is None else result.query_accuracy
        numbers = (result.query_loss.double().mean(), accuracy.double().mean(), result.nonfinite.double().sum())
        self.window.append(torch.stack(numbers))

    # -----------------------------------------------------------------------------------------------------------
    # As a graph

    def _whole(self) -> tuple[Tensor, ...]:
        """An iteration whose number lies on the device. The model draws nothing, so the seed does not matter."""
        episodes = self._sampler.draw_at(self._number)  # type: ignore[attr-defined]
        lr = self._learning_rates.index_select(0, self._number.view(1)).view(())
        self._train(episodes, 0, len(episodes[0]), lr, seed=0, graph=False)
        self._number += 1
        return ()

    def _record_if_new(self) -> None:
        """Records the iteration unless that is done; anew if a tensor that the graph reads lies elsewhere now."""
        if self._recording is not None and self._recorded_for == self._places():
            return
        self._recording = None
        try:
            recorder = graphs.RECORDERS[self._device.type](self._device)
            with self._unchanged():
                recorder.warm_up(self._whole)
            # Not before: torch warns of capturable steps that are not captured.
            self._optimizer.param_groups[0]["capturable"] = self._device.type == "cuda"
            self._recording = recorder.record(self._whole)
        except graphs.GraphRefused as error:
            if self._config.graph:
                raise
            self.why_no_graph = str(error)
            self._optimizer.param_groups[0]["capturable"] = False
            return
        self._recorded_for = self._places()
        self._next = -1  # whatever lies in `_number` now

    def _places(self) -> tuple[object, ...]:
        """Addresses of what the graph reads and writes, and what else it depends on."""
        states = (value for p in self._trained for value in self._optimizer.state.get(p, {}).values())
        tensors = (*self._trained, *self._model.buffers(), *states, self.window.rows)
        return (self._model.training, *(tensor.data_ptr() for tensor in tensors))

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Puts weights, Adam's state and metrics back in place, as if nothing had been trained meanwhile."""
        state = self._optimizer.state
        undo: list[Callable[[], object]] = []
        for tensor in (*self._trained, self.window.rows, self.window.filled):
            undo.append(_putting_back(tensor))
        known = {parameter: set(state.get(parameter, {})) for parameter in self._trained}
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
                            value.zero_()  # how all of Adam's state begins


def _putting_back(tensor: Tensor) -> Callable[[], object]:
    before = tensor.detach().clone()
    return lambda: tensor.copy_(before)
