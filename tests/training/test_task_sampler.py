"""Tasks that something else makes: lists, generators, and the shapes of learn2learn's and torchmeta's data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from signmaml import Episodes, TaskSampler, evaluate
from signmaml_ext import meta_step

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def task(number: int, ways: int = 3, shots: int = 1) -> Task:
    support, query = torch.full((ways * shots, 2), float(number)), torch.full((2 * ways, 2), float(number))
    return support, torch.arange(ways).repeat(shots), query, torch.arange(ways).repeat(2)


def numbers(batch: Episodes) -> list[int]:
    """Which tasks a meta-batch holds."""
    assert (batch.support_x[:, :1] == batch.query_x[:, :1]).all()
    return batch.support_x[:, 0, 0].int().tolist()


class Endless:
    """An iterable that begins anew each time."""

    def __iter__(self) -> Iterator[Task]:
        return map(task, range(5))


def test_a_sequence_goes_around() -> None:
    sampler = TaskSampler([task(i) for i in range(5)], tasks=2)
    assert [numbers(sampler.draw(i)) for i in (0, 1, 2, 0, 7)] == [[0, 1], [2, 3], [4, 0], [0, 1], [4, 0]]
    batch = sampler.draw(0)
    assert batch.support_x.shape == (2, 3, 2) and batch.query_y.dtype == torch.int64
    assert sampler.draw(0) is batch


def test_an_iterable_gives_tasks_as_they_come_and_begins_anew() -> None:
    sampler = TaskSampler(Endless(), tasks=2)
    assert [numbers(sampler.draw(i)) for i in (0, 0, 1, 2)] == [[0, 1], [0, 1], [2, 3], [4, 0]]
    assert numbers(sampler.draw(1)) == [2, 3], "an earlier one: from the beginning"
    assert numbers(sampler.draw(3)) == [1, 2], "later ones: those between are left out"


def test_a_generator_goes_forward_only() -> None:
    sampler = TaskSampler(map(task, range(5)), tasks=2)
    assert [numbers(sampler.draw(i)) for i in (0, 1, 1)] == [[0, 1], [2, 3], [2, 3]]
    with pytest.raises(ValueError, match="can be iterated again, such as a list, for meta-batch 0 after 1, found map"):
        sampler.draw(0)
    with pytest.raises(ValueError, match="can be iterated again, such as a list, for more tasks after its end"):
        sampler.draw(2)


def test_an_iterable_that_keeps_one_generator_goes_forward_only() -> None:
    class Kept:
        def __init__(self) -> None:
            self.kept = map(task, range(9))

        def __iter__(self) -> Iterator[Task]:
            return self.kept

    sampler = TaskSampler(Kept(), tasks=2)
    assert [numbers(sampler.draw(i)) for i in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="can be iterated again, such as a list, for meta-batch 0 after 1, found Kept"):
        sampler.draw(0)


class Stacked(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Task:
        return task(number)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_torchs_loader_begins_anew(persistent: bool) -> None:
    loader = DataLoader(Stacked(), batch_size=2, num_workers=1, persistent_workers=persistent)
    sampler = TaskSampler(loader, batched=True)
    assert [numbers(sampler.draw(i)) for i in (0, 1, 2, 3, 0)] == [[0, 1], [2], [0, 1], [2], [0, 1]]


def test_a_bad_task_leaves_a_generator_where_it_is() -> None:
    sampler = TaskSampler(iter([task(0), (1, 2, 3, 4), task(2)]), tasks=1)
    sampler.draw(0)
    with pytest.raises(TypeError, match="expected support_x as a tensor or an array, found int"):
        sampler.draw(1)
    assert numbers(sampler.draw(2)) == [2]


def test_torchmeta_batches() -> None:
    """What `BatchMetaDataLoader` yields: pairs under "train" and "test" with the tasks in front."""

    class Loader:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for first in (0, 2):
                stacked = [torch.stack(parts) for parts in zip(task(first), task(first + 1), strict=True)]
                yield {"train": stacked[:2], "test": tuple(stacked[2:])}

    sampler = TaskSampler(Loader(), batched=True)
    assert [numbers(sampler.draw(i)) for i in (0, 1, 2)] == [[0, 1], [2, 3], [0, 1]]
    for x, y in (("support", "query"), ("context", "target")):
        one = TaskSampler([{x: task(7)[:2], y: task(7)[2:], "name": "seven"}], tasks=1)
        assert numbers(one.draw(0)) == [7]


class TaskDataset:
    """learn2learn's: a length, and numbered pairs of examples and labels, in any order."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0, 2]) + 10 * number
        examples = torch.stack((labels.float(), torch.arange(9.0)), 1)
        return examples, labels


def test_learn2learn_pairs_are_divided_by_shots() -> None:
    batch = TaskSampler(TaskDataset(), tasks=2, shots=2).draw(0)
    assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 and batch.query_y.tolist() == [[0, 1, 2]] * 2
    for number in range(2):
        assert batch.support_x[number, :, 0].tolist() == [10 * number + label for label in (0, 0, 1, 1, 2, 2)]
        assert batch.support_x[number, :, 1].tolist() == [1, 3, 2, 5, 0, 4], "the first ones of each label"
        assert batch.query_x[number, :, 1].tolist() == [7, 6, 8]
    with pytest.raises(ValueError, match="shots: expected fewer than the 3 examples of label 0, found 3"):
        TaskSampler(TaskDataset(), tasks=2, shots=3).draw(0)


def test_arrays_targets_and_devices() -> None:
    parts = [np.random.default_rng(0).normal(size=(4, 1)).astype(np.float32) for _ in range(4)]
    batch = TaskSampler([tuple(parts)], tasks=3, device="cpu").draw(0)
    assert batch.support_y.dtype == torch.float32 and batch.query_x.shape == (3, 4, 1)
    small = tuple(part.astype(np.int32) if i % 2 else part for i, part in enumerate(parts))
    assert TaskSampler([small], tasks=1).draw(0).query_y.dtype == torch.int64


def test_training_and_evaluation_take_it() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    sampler = TaskSampler([task(i, shots=2) for i in range(6)], tasks=3)
    result = meta_step(model, *sampler.draw(1), inner_lr=0.01, inner_steps=2)
    assert result.query_loss.shape == (3,)
    found = evaluate(model, sampler, tasks=5, inner_lr=0.01, inner_steps=1)
    assert (found.tasks, found.data, found.split, found.ways) == (5, "tasks", "own", 3)
    again = evaluate(model, sampler, tasks=5, inner_lr=0.01, inner_steps=1)
    assert again.loss == found.loss


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3, {"tasks": 1}, TypeError, "source: expected an iterable of tasks, found int"),
        ([], {"tasks": 1}, ValueError, "source: expected at least one task, found none"),
        ([task(0)], {}, TypeError, "tasks: expected an integer"),
        ([task(0)], {"tasks": 0}, ValueError, "tasks: expected an integer, 1 or more, found 0"),
        ([task(0)], {"tasks": 1, "batched": True}, ValueError, "tasks: expected None with batched"),
        ([task(0)], {"shots": 1, "batched": True}, ValueError, "shots: expected None with batched"),
        ([task(0)], {"tasks": 1, "shots": 0}, ValueError, "shots: expected an integer, 1 or more, found 0"),
        ([task(0)], {"tasks": 1, "batched": 1}, TypeError, "batched: expected True or False"),
        ([task(0)], {"tasks": 1, "device": "moon"}, ValueError, "device: expected a torch device"),
    ],
)
def test_arguments_that_do_not_fit(source: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskSampler(source, **options)


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([task(0)[:2]], {"tasks": 1}, TypeError, r"\(shots= divides a pair \(x, y\)\), found 2 values"),
        ([task(0)[:3]], {"tasks": 1}, TypeError, "found 3 values"),
        ([torch.zeros(3)], {"tasks": 1}, TypeError, "found Tensor"),
        ([{"a": 1}], {"tasks": 1}, TypeError, r"expected the keys 'support' and 'query', or .* found \['a'\]"),
        ([{"train": task(0)[:2], "test": 5}], {"tasks": 1}, TypeError, r"a pair \(x, y\) under 'test', found int"),
        ([task(0), task(0, ways=4)], {"tasks": 2}, ValueError, "expected tasks of one size, found support_x of"),
        ([(torch.zeros(3, 2), torch.zeros(2))], {"tasks": 1, "shots": 1}, ValueError, "examples and as many labels"),
        ([tuple(torch.zeros(n, 2) for n in (2, 2, 3, 3))], {"batched": True}, ValueError, "found 2, 2, 3, 3"),
    ],
)
def test_items_that_are_no_tasks(items: list, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskSampler(items, **options).draw(0)


def test_an_iterable_without_tasks() -> None:
    class Empty:
        def __iter__(self) -> Iterator[Task]:
            return iter(())

    with pytest.raises(ValueError, match="expected at least one task, found none"):
        TaskSampler(Empty(), tasks=1).draw(0)
