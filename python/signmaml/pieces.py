"""A meta-step in pieces: tasks are split over processes, and further into smaller batches if memory is short.

Let G_i be the mean meta-gradient over the n_i live tasks of piece i. The meta-batch's gradient is
sum_i n_i G_i / sum_i n_i, so each live task has the same weight, whatever the sizes of the pieces and whichever tasks
were left out as non-finite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import signmaml_ext

from .distributed import Group
from .episodes import Episodes, Sampler, draw, draw_tasks
from .evaluation import Rates, StepArguments, fewer_tasks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MetaStepArguments(StepArguments):
    """Arguments passed on to `signmaml_ext.meta_step`; see there."""

    inner_steps: int
    seed: int
    graph: bool | None


class Share(NamedTuple):
    """The tasks of a meta-batch that one process computes.

    Attributes:
        episodes: The tasks; may be empty.
        first: Index of the first one in the meta-batch.
        of: Number of tasks in the whole meta-batch.
    """

    episodes: Episodes
    first: int
    of: int


def draw_share(sampler: Sampler, iteration: int, group: Group) -> Share:
    """This process's share of an iteration's meta-batch.

    Draws only these tasks if the sampler has `draw_tasks` and `tasks`; otherwise draws all and drops the others.
    """
    tasks = getattr(sampler, "tasks", None)
    if group.size == 1 or tasks is None or not hasattr(sampler, "draw_tasks"):
        episodes = draw(sampler, iteration)
        share = group.share_of(episodes.tasks)
        return Share(episodes.part(share.start, share.stop), share.start, episodes.tasks)
    share = group.share_of(tasks)
    episodes = draw_tasks(sampler, iteration * tasks + share.start, max(1, len(share)))
    return Share(episodes.part(0, len(share)), share.start, tasks)


class StepNumbers(NamedTuple):
    """Results of every task of a meta-batch after a step, the same in every process.

    Attributes:
        query_loss: `[T]`.
        query_accuracy: `[T]`, or None in regression.
        nonfinite: `[T]` bool.
    """

    query_loss: Tensor
    query_accuracy: Tensor | None
    nonfinite: Tensor


class MetaStep:
    """`signmaml_ext.meta_step` on a meta-batch of which this process computes a share.

    With one process, and while all tasks fit in memory, it is exactly one call of `meta_step`.

    Args:
        model: The model.
        trained: Everything that receives a gradient, by name: parameters of the model and learned inner rates.
        group: The processes.
        classification: Whether tasks have an accuracy.
        unreached: Names in `trained` that got no gradient in a trial task. Unless a task does reach them, their
            `.grad` stays None and the optimizer skips them, as after a single call of `meta_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, Tensor],
        group: Group,
        classification: bool,
        unreached: Collection[str] = (),
    ) -> None:
        self._model, self._trained, self._group = model, list(trained.values()), group
        self._unreached = [name in unreached for name in trained]
        self._classification = classification
        self.at_once: int | None = None  # tasks that fit in memory together; None: no limit met so far

    def __call__(self, share: Share, rates: Callable[[], Rates], **arguments: Unpack[MetaStepArguments]) -> StepNumbers:
        """Adds the meta-gradient of the whole meta-batch to `.grad`, which must be None.

        Args:
            share: The tasks of this process.
            rates: Returns `inner_lr`; called again for every piece, because the backward pass frees its graph.
            **arguments: For `signmaml_ext.meta_step`.

        Raises:
            FloatingPointError: With nonfinite="raise" and a non-finite task, in every process.
            torch.OutOfMemoryError: One task alone does not fit in memory.
            ProcessLost: See `Group.add`.
        """
        if self._group.size == 1 and self.at_once is None:
            try:
                result = signmaml_ext.meta_step(
                    self._model,
                    *share.episodes,
                    inner_lr=rates(),
                    **arguments,  # type: ignore[arg-type]
                )
                return StepNumbers(result.query_loss, result.query_accuracy, result.nonfinite)
            except torch.OutOfMemoryError as error:
                self.at_once = fewer_tasks(share.of, share.episodes, error)
                self._drop_gradients()
        raising = arguments["nonfinite"] == "raise"
        if raising:  # raise after the exchange, so that all processes do
            arguments["nonfinite"] = "propagate"
        sums = self._sums(share, rates, arguments)
        self._group.add(sums)
        gradients, live, numbers = sums.split([len(sums) - 1 - 3 * share.of, 1, 3 * share.of])
        loss, accuracy, flags = numbers.view(3, share.of)
        nonfinite = flags > 0
        self._drop_gradients()
        if raising and bool(nonfinite.any()):
            found = nonfinite.nonzero().flatten().tolist()
            raise FloatingPointError(f"a NaN or an Inf in the losses or gradients of tasks {found} (nonfinite='raise')")
        gradients /= live.clamp(min=1)
        parts = gradients.split([p.numel() for p in self._trained])
        for parameter, part, unreached in zip(self._trained, parts, self._unreached, strict=True):
            if not unreached or bool(part.any()):
                parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        return StepNumbers(loss, accuracy if self._classification else None, nonfinite)

    def _sums(self, share: Share, rates: Callable[[], Rates], arguments: MetaStepArguments) -> Tensor:
        """One flat tensor: sum of the live tasks' meta-gradients, their number, then loss, accuracy and flag per task.

        The last three are kept per task: only one process fills each entry and the others add 0, so the records do not
        depend on the number of processes.
        """
        size = sum(p.numel() for p in self._trained)
        dtype = max((p.dtype for p in self._trained), key=lambda dtype: dtype.itemsize)
        sums = torch.zeros(size + 1 + 3 * share.of, dtype=dtype, device=self._trained[0].device)
        gradients, live, numbers = sums[:size], sums[size], sums[size + 1 :].view(3, share.of)
        tasks, done = share.episodes.tasks, 0
        while done < tasks:
            piece = share.episodes.part(done, done + (self.at_once or tasks))
            self._drop_gradients()
            try:
                result = signmaml_ext.meta_step(
                    self._model,
                    *piece,
                    inner_lr=rates(),
                    first_task=share.first + done,
                    **arguments,  # type: ignore[arg-type]
                )
            except torch.OutOfMemoryError as error:
                self.at_once = fewer_tasks(piece.tasks, share.episodes, error)
                continue
            flat = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in self._trained]
            gradients += torch.cat(flat) * result.live_tasks
            live += result.live_tasks
            place = slice(share.first + done, share.first + done + piece.tasks)
            numbers[0, place] = result.query_loss
            if result.query_accuracy is not None:
                numbers[1, place] = result.query_accuracy
            numbers[2, place] = result.nonfinite
            done += piece.tasks
        return sums

    def _drop_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None
