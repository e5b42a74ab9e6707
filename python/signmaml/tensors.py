"""Few-shot tasks from labelled tensors: time series, tables, embeddings, token numbers, anything that stacks."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import numpy as np
import torch

from .data.arguments import a_few, check_integer, plain_label
from .episodes import MAX_SEED, ClassDraw, Episodes, NumberedSampler, check_class_sizes, checked_device


class TensorSampler(NumberedSampler):
    """Draws few-shot classification tasks from labelled examples of any shape and dtype.

    Each task takes ``ways`` different classes and ``shots + queries`` different examples of each. All classes are
    equally likely, and so are all examples of a class. The label of a class is its position in the draw.

    Args:
        x: The examples, ``[M, ...]``: a tensor, or a numpy array. Values and dtype stay as they are; the examples move
            once to `device`.
        y: Their labels, ``[M]``: a tensor or an array of integers, or any sequence of labels such as strings.
        ways: Classes per task, at least 2.
        shots: Support examples per class, at least 1.
        queries: Query examples per class, at least 1.
        tasks: Tasks per meta-batch (`draw`), at least 1.
        classes: The labels to draw from, such as those for training; None: all. Examples of others are left out.
        seed: 0 to 2**63 - 1. Default 0.
        device: Where the examples are stored and tasks are drawn. Default ``"cpu"``.
        name: The set's name in reports.
        split: The split's name in reports.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range; `x` and `y` have different lengths; a class of `classes` has no
            example; a class has fewer than ``shots + queries`` (the message names it).

    Determinism: as for `EpisodeSampler`, with the classes in the order of their labels.

    Example:
        >>> series, labels = torch.randn(60, 2, 50), torch.arange(60) % 6
        >>> sampler = TensorSampler(series, labels, ways=3, shots=1, queries=4, tasks=8, classes=range(4))
        >>> batch = sampler.draw(iteration=0)
        >>> batch.support_x.shape, batch.query_x.shape, batch.query_y.shape
        (torch.Size([8, 3, 2, 50]), torch.Size([8, 12, 2, 50]), torch.Size([8, 12]))
    """

    def __init__(
        self,
        x: torch.Tensor | np.ndarray,
        y: Iterable[Any],
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        classes: Collection[Hashable] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        name: str = "tensors",
        split: str = "own",
    ) -> None:
        examples, labels = _checked_examples(x), _checked_labels(y)
        if len(examples) != len(labels):
            raise ValueError(f"y: expected {len(examples)} labels, one for each example of x, found {len(labels)}")
        rows = _rows_by_class(labels, classes)
        self.class_names = tuple(rows)
        self.classes = len(rows)
        self.ways = check_integer("ways", ways, 2, self.classes, f"classes in {name}/{split}")
        self.shots = check_integer("shots", shots, 1)
        self.queries = check_integer("queries", queries, 1)
        self.tasks = check_integer("tasks", tasks, 1)
        self.seed = check_integer("seed", seed, 0, MAX_SEED)
        self.device = checked_device(device)
        self.name, self.split = name, split
        counts = [len(of_class) for of_class in rows.values()]
        check_class_sizes(self.class_names, counts, self.shots, self.queries, "examples", f"{name}/{split}")
        order = torch.tensor([row for of_class in rows.values() for row in of_class], device=examples.device)
        self._examples = examples.index_select(0, order).to(self.device)
        sizes, each = torch.tensor(counts, device="cpu"), self.shots + self.queries
        self._chances = ClassDraw(sizes, ways=self.ways, each=each, seed=self.seed, device=self.device)

    @classmethod
    def from_dataset(cls, dataset: Any, **options: Any) -> TensorSampler:
        """A sampler of a map-style dataset, such as torchvision's, all of whose examples are read once.

        Args:
            dataset: Has a length, and item i is ``(example, label)`` or begins so. Examples are tensors, arrays or
                numbers of one shape.
            **options: For `TensorSampler`: ``ways``, ``shots`` and so on.

        Raises:
            TypeError: An item is no pair, or an example is nothing that stacks, such as a PIL image (give the dataset
                a transform).
            ValueError: As `TensorSampler`, or the dataset is empty, or examples differ in shape.
        """
        count = len(dataset)
        if count == 0:
            raise ValueError("dataset: expected at least one example, found none")
        examples: list[torch.Tensor] = []
        labels = []
        for i in range(count):
            item = dataset[i]
            if not isinstance(item, (tuple, list)) or len(item) < 2:
                raise TypeError(f"dataset: expected items (example, label), found {type(item).__name__} at {i}")
            try:
                given = item[0]
                examples.append(given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu"))
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"dataset: expected examples that are tensors, arrays or numbers, found {type(item[0]).__name__} "
                    f"at {i}; a transform may convert it"
                ) from error
            if examples[-1].shape != examples[0].shape:
                shapes = f"{list(examples[0].shape)} and, at {i}, {list(examples[-1].shape)}"
                raise ValueError(f"dataset: expected examples of one shape, found {shapes}")
            labels.append(item[1])
        return cls(torch.stack(examples), labels, **options)

    def __repr__(self) -> str:
        task = f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class"
        shape = " x ".join(map(str, self._examples.shape[1:]))
        examples = f"{len(self._examples):,} examples" + (f" of {shape}" if shape else "")
        return f"TensorSampler({self.name}/{self.split}: {self.classes:,} classes, {examples}; {task})"

    def describe(self) -> dict[str, Any]:
        """Everything that determines the tasks drawn but the examples, for a run's records (JSON types only)."""
        counts = {name: getattr(self, name) for name in ("classes", "ways", "shots", "queries", "tasks", "seed")}
        return {"set": self.name, "split": self.split, "labels": [str(label) for label in self.class_names], **counts}

    def _draw(self, numbers: torch.Tensor) -> Episodes:
        tasks, (_, rows) = len(numbers), self._chances.indices(numbers)
        labels = torch.arange(self.ways, device=self.device)

        def part(of_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            each = of_class.shape[2]
            x = self._examples.index_select(0, of_class.reshape(-1))
            return x.view(tasks, self.ways * each, *x.shape[1:]), labels.repeat_interleave(each).repeat(tasks, 1)

        return Episodes(*part(rows[:, :, : self.shots]), *part(rows[:, :, self.shots :]))


def _checked_examples(x: Any) -> torch.Tensor:
    if isinstance(x, np.ndarray) and x.dtype != object:
        try:
            x = torch.from_numpy(np.ascontiguousarray(x))
        except TypeError as error:
            raise TypeError(f"x: expected numbers, found an array of {x.dtype}") from error
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor or an array of numbers, found {type(x).__name__}")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"x: expected examples [M, ...], at least one, found shape {list(x.shape)}")
    return x.detach()


def _checked_labels(y: Any) -> list[Any]:
    if isinstance(y, (torch.Tensor, np.ndarray)):
        if y.ndim != 1:
            raise ValueError(f"y: expected labels [M], found shape {list(y.shape)}")
        if y.is_floating_point() if isinstance(y, torch.Tensor) else np.issubdtype(y.dtype, np.inexact):
            raise TypeError(f"y: expected labels, found {y.dtype}")
        return list(y.tolist())
    if isinstance(y, (str, bytes)) or not isinstance(y, Iterable):
        raise TypeError(f"y: expected labels, one for each example, found {type(y).__name__}")
    labels = [plain_label(label) for label in y]
    for label in labels:
        if not isinstance(label, (int, str, tuple)):
            raise TypeError(f"y: expected labels that are integers or strings, found {type(label).__name__}")
    return labels


def _rows_by_class(labels: list[Any], wanted: Collection[Hashable] | None) -> dict[Any, list[int]]:
    """The rows of each class, with the classes in the order of their labels."""
    rows: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    if wanted is not None:
        chosen = [plain_label(label) for label in wanted]
        absent = [repr(label) for label in chosen if label not in rows]
        if absent:
            raise ValueError(f"classes: expected labels that y has, found {a_few(absent)}")
        rows = {label: rows[label] for label in dict.fromkeys(chosen)}
    try:
        return dict(sorted(rows.items(), key=lambda of_class: of_class[0]))
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in rows})
        raise TypeError(f"y: expected labels of one kind, found {', '.join(kinds)}") from error
