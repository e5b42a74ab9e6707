"""Few-shot tasks that something else makes: a list, a generator, learn2learn's or torchmeta's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data.arguments import check_integer
from .episodes import Episodes, checked_device

# Names of the two sets of a task in a mapping.
_PAIRS = (("support", "query"), ("train", "test"), ("context", "target"))


class _Drawn(NamedTuple):
    iteration: int
    episodes: Episodes


class TaskSampler:
    """Meta-batches of tasks that something else makes.

    A task is one of

    - `(support_x, support_y, query_x, query_y)`;
    - a mapping with the keys "support" and "query", or "train" and "test" as torchmeta has them, and pairs (x, y);
    - with `shots`, one pair (x, y) as learn2learn's `TaskDataset` makes it: of each label the first `shots` examples
      are the support set and all others the query set, ordered by label, and the labels become 0, 1, ... in the order
      of their values.

    x and y are tensors or arrays. Integer labels become int64. All tasks of a meta-batch have the same sizes.

    Args:
        source: Where tasks come from. A sequence (with a length and numbered items): meta-batch i takes the tasks
            ``i * tasks`` and following, around and around. Any other iterable: tasks are taken as they come; when it
            ends, or an earlier meta-batch is asked for, it is iterated again from its beginning.
        tasks: Tasks per meta-batch, at least 1; None with `batched`.
        shots: Support examples per class, for tasks that are pairs.
        batched: Whether each item is a meta-batch already, with the tasks along the first axis of its tensors, as
            torchmeta's `BatchMetaDataLoader` makes them.
        device: Where meta-batches are put. Default ``"cpu"``.
        name: The set's name in reports.
        split: The split's name in reports.

    Raises:
        TypeError, ValueError: An argument does not fit; on `draw`, an item is no task, or tasks differ in size, or a
            generator has ended or is asked for an earlier meta-batch.

    Determinism: that of the source. A run resumes exactly if `source[i]` is always the same task.

    Example:
        >>> tasks = [(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), torch.randn(6, 3), torch.arange(6) % 2)] * 5
        >>> TaskSampler(tasks, tasks=2).draw(0)
        Episodes(2 tasks: support_x [2, 4, 3], query_x [2, 6, 3])
    """

    def __init__(
        self,
        source: Any,
        *,
        tasks: int | None = None,
        shots: int | None = None,
        batched: bool = False,
        device: torch.device | str = "cpu",
        name: str = "tasks",
        split: str = "own",
    ) -> None:
        if not isinstance(source, Iterable) and not _is_sequence(source):
            raise TypeError(f"source: expected an iterable of tasks, found {type(source).__name__}")
        if not isinstance(batched, bool):
            raise TypeError(f"batched: expected True or False, found {batched!r}")
        if batched and tasks is not None:
            raise ValueError(f"tasks: expected None with batched, whose items are meta-batches, found {tasks!r}")
        if batched and shots is not None:
            raise ValueError(f"shots: expected None with batched, whose items have two sets, found {shots!r}")
        if _is_sequence(source) and len(source) == 0:
            raise ValueError("source: expected at least one task, found none")
        self.tasks = None if batched else check_integer("tasks", tasks, 1)
        self.shots = None if shots is None else check_integer("shots", shots, 1)
        self.device = checked_device(device)
        self.name, self.split = name, split
        self._source = source
        self._numbered = _is_sequence(source)
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0  # meta-batches that the iterator has given
        self._last: _Drawn | None = None

    def draw(self, iteration: int) -> Episodes:
        """The meta-batch of an iteration; see the class."""
        iteration = check_integer("iteration", iteration, 0)
        if self._last is None or self._last.iteration != iteration:
            items = self._numbered_items(iteration) if self._numbered else self._next_items(iteration)
            self._last = _Drawn(iteration, self._episodes(items))
        return self._last.episodes

    def _numbered_items(self, iteration: int) -> list[Any]:
        count, each = len(self._source), self.tasks or 1
        return [self._source[number % count] for number in range(iteration * each, (iteration + 1) * each)]

    def _next_items(self, iteration: int) -> list[Any]:
        if self._iterator is None or iteration < self._drawn:
            self._restart(f"meta-batch {iteration} after {self._drawn - 1}" if self._drawn else "")
            self._drawn = 0
        items: list[Any] = []
        while self._drawn <= iteration:
            items = [self._next() for _ in range(self.tasks or 1)]
            self._drawn += 1
        return items

    def _next(self) -> Any:
        assert self._iterator is not None
        for item in self._iterator:
            return item
        self._restart("more tasks after its end")
        for item in self._iterator:
            return item
        raise ValueError("source: expected at least one task, found none")

    def _restart(self, why: str) -> None:
        fresh = iter(self._source)
        # torch's loader with persistent workers restarts one iterator.
        same = fresh is self._iterator and not isinstance(self._source, DataLoader)
        if why and (fresh is self._source or same):
            raise ValueError(
                f"source: expected an iterable that can be iterated again, such as a list, for {why}, found "
                f"{type(self._source).__name__}"
            )
        self._iterator = fresh

    def _episodes(self, items: list[Any]) -> Episodes:
        found = [Episodes(*(part.to(self.device) for part in _parts(item, self.shots))) for item in items]
        if self.tasks is None:
            (batch,) = found
            if len({len(part) for part in batch}) != 1:
                sizes = ", ".join(str(len(part)) for part in batch)
                raise ValueError(f"source: expected as many tasks in each tensor of a meta-batch, found {sizes}")
            return batch
        for task in found:
            for name, part, first in zip(Episodes._fields, task, found[0], strict=True):
                if part.shape != first.shape or part.dtype != first.dtype:
                    shapes = f"{first.dtype} {list(first.shape)} and {part.dtype} {list(part.shape)}"
                    raise ValueError(f"source: expected tasks of one size, found {name} of {shapes}")
        return Episodes(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _is_sequence(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping)


def _parts(task: Any, shots: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if isinstance(task, Mapping):
        for names in _PAIRS:
            if all(name in task for name in names):
                task = [part for name in names for part in _pair(task[name], f"a pair (x, y) under {name!r}")]
                break
        else:
            raise TypeError(
                f"source: expected the keys 'support' and 'query', or 'train' and 'test', found {list(task)}"
            )
    values = list(task) if isinstance(task, Sequence) else [task]
    if len(values) == 2 and shots is not None:
        return _divided(_tensor(values[0], "x"), _labels(_tensor(values[1], "y")), shots)
    if len(values) != 4:
        pair = " (shots= divides a pair (x, y))" if len(values) == 2 else ""
        found = f"{len(values)} values" if isinstance(task, Sequence) else type(task).__name__
        raise TypeError(f"source: expected tasks (support_x, support_y, query_x, query_y){pair}, found {found}")
    named = [_tensor(value, name) for name, value in zip(Episodes._fields, values, strict=True)]
    return named[0], _labels(named[1]), named[2], _labels(named[3])


def _pair(value: Any, expected: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"source: expected {expected}, found {type(value).__name__}")
    return value


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"source: expected {name} as a tensor or an array, found {type(value).__name__}")
    return value.detach()


def _labels(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else y.to(torch.int64)


def _divided(x: Tensor, y: Tensor, shots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support and query sets of one pair, both ordered by label."""
    if y.ndim != 1 or len(x) != len(y) or y.is_floating_point():
        raise ValueError(f"source: expected examples and as many labels, found {list(x.shape)} and {list(y.shape)}")
    values, numbers = y.cpu().unique(return_inverse=True)
    support, query = [], []
    for label in range(len(values)):
        rows = (numbers == label).nonzero().flatten()
        if len(rows) <= shots:
            raise ValueError(
                f"shots: expected fewer than the {len(rows)} examples of label {int(values[label])}, found {shots}"
            )
        support.append(rows[:shots])
        query.append(rows[shots:])
    parts = []
    for rows in (torch.cat(support), torch.cat(query)):
        parts += [x[rows.to(x.device)], numbers[rows]]
    return parts[0], parts[1], parts[2], parts[3]
