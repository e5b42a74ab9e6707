"""Few-shot tasks from labelled tensors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from helpers.cases.images import random_set
from signmaml import EpisodeSampler, TensorSampler, evaluate
from signmaml_ext import explain, meta_step

OPTIONS: dict[str, Any] = {"ways": 3, "shots": 2, "queries": 3, "tasks": 4}


def series(classes: int = 6, each: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples whose first number is their class, and whose second one is their row; classes alternate."""
    x, y = torch.randn(classes * each, 2, 5), torch.arange(classes * each) % classes
    x[:, 0, 0], x[:, 0, 1] = y.float(), torch.arange(len(y)).float()
    return x, y


def test_tasks_have_different_classes_and_examples_of_each() -> None:
    x, y = series()
    sampler = TensorSampler(x, y, **OPTIONS)
    batch = sampler.draw(3)
    assert batch.support_x.shape == (4, 6, 2, 5) and batch.query_x.shape == (4, 9, 2, 5)
    for task in range(4):
        of_class = {}
        seen = []
        for examples, labels in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
            for example, label in zip(examples[task], labels[task].tolist(), strict=True):
                row = int(example[0, 1])
                assert torch.equal(example, x[row]), "an example is as it was"
                assert of_class.setdefault(label, int(y[row])) == int(y[row])
                seen.append(row)
        assert len(set(seen)) == len(seen), "no example twice in a task"
        assert sorted(of_class) == [0, 1, 2] and len(set(of_class.values())) == 3


def test_it_draws_as_the_sampler_of_images_does() -> None:
    images = random_set([7, 9, 8, 7], channels=2)
    labels = torch.arange(4).repeat_interleave(images.class_sizes)
    theirs = EpisodeSampler(images, **OPTIONS, seed=5, normalize="raw").draw(2)
    places = torch.cat([torch.arange(int(size)) for size in images.class_sizes])
    for order in (torch.arange(len(labels)), torch.argsort(places, stable=True)):  # by class; one of each in turn
        ours = TensorSampler(images.images[order], labels[order], **OPTIONS, seed=5).draw(2)
        assert ours.support_x.dtype == torch.uint8
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine.to(its.dtype), its)


def test_calls_and_devices_do_not_change_the_tasks() -> None:
    sampler = TensorSampler(*series(), **OPTIONS, seed=1)
    whole = sampler.draw(2)
    parts = [sampler.draw_tasks(8, 1), sampler.draw_tasks(9, 3)]
    for i, tensor in enumerate(whole):
        assert torch.equal(tensor, torch.cat([part[i] for part in parts]))
        assert torch.equal(tensor, sampler.draw_at(torch.tensor(2))[i])
    assert not torch.equal(whole.support_x, TensorSampler(*series(), **OPTIONS, seed=2).draw(2).support_x)


@pytest.mark.parametrize(
    "x",
    [torch.arange(24), np.arange(48.0).reshape(24, 2), torch.arange(24) > 3, np.arange(24, dtype=np.int16)[:, None]],
    ids=["numbers", "float64", "bool", "int16"],
)
def test_values_and_dtypes_stay(x: Any) -> None:
    batch = TensorSampler(x, np.arange(24) % 4, ways=4, shots=2, queries=4, tasks=1).draw(0)
    expected = torch.as_tensor(x)
    assert batch.support_x.dtype == expected.dtype and batch.support_x.shape == (1, 8, *expected.shape[1:])
    together = torch.cat([batch.support_x[0], batch.query_x[0]])
    assert torch.equal(together.flatten().sort().values, expected.flatten().sort().values)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([f"kind {i % 4}" for i in range(24)], ("kind 0", "kind 1", "kind 2", "kind 3")),
        (np.array(["d", "b", "c", "a"] * 6), ("a", "b", "c", "d")),
        ([torch.tensor(9 - i % 4) for i in range(24)], (6, 7, 8, 9)),
        (range(24), tuple(range(24))),
    ],
    ids=["strings", "array of strings", "tensors", "range"],
)
def test_labels_of_many_kinds(labels: Any, names: tuple[Any, ...]) -> None:
    each = 24 // len(names)
    if each < 2:
        with pytest.raises(
            ValueError, match=r"needs at least 2 examples in every class of tensors/own, found fewer in"
        ):
            TensorSampler(torch.arange(24), labels, ways=2, shots=1, queries=1, tasks=1)
        return
    sampler = TensorSampler(torch.arange(24), labels, ways=4, shots=1, queries=1, tasks=1)
    assert sampler.class_names == names
    assert sampler.describe()["labels"] == [str(name) for name in names]


def test_classes_of_a_split() -> None:
    x, y = series()
    train = TensorSampler(x, y, **OPTIONS, classes=range(3), name="waves", split="train")
    test = TensorSampler(x, y, **OPTIONS, classes=torch.tensor([5, 3, 4]), name="waves", split="test")
    assert train.class_names == (0, 1, 2) and test.class_names == (3, 4, 5)
    assert set(train.draw(0).support_x[:, :, 0, 0].unique().tolist()) == {0.0, 1.0, 2.0}
    assert repr(test) == ("TensorSampler(waves/test: 3 classes, 24 examples of 2 x 5; 3-way 2-shot, 3 queries a class)")


def test_a_dataset_of_pairs() -> None:
    x, y = series()
    ours = TensorSampler.from_dataset(TensorDataset(x, y), **OPTIONS, seed=7).draw(1)
    assert all(torch.equal(a, b) for a, b in zip(ours, TensorSampler(x, y, **OPTIONS, seed=7).draw(1), strict=True))


class Items:
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "dataset: expected at least one example, found none"),
        ([torch.zeros(2)], TypeError, r"dataset: expected items \(example, label\), found Tensor at 0"),
        (
            [("text", 1)],
            TypeError,
            "expected examples that are tensors, arrays or numbers, found str at 0; a transform",
        ),
        ([(torch.zeros(2), 0), (torch.zeros(3), 1)], ValueError, r"of one shape, found \[2\] and, at 1, \[3\]"),
    ],
)
def test_datasets_that_do_not_fit(items: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorSampler.from_dataset(Items(*items), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1, 2]}, TypeError, "x: expected a tensor or an array of numbers, found list"),
        ({"x": np.array(["a"] * 48)}, TypeError, "x: expected numbers, found an array of <U1"),
        ({"x": torch.zeros(0, 2)}, ValueError, r"x: expected examples \[M, ...\], at least one, found shape \[0, 2\]"),
        ({"y": torch.zeros(48)}, TypeError, "y: expected labels, found torch.float32"),
        ({"y": torch.zeros(48, 1, dtype=torch.int64)}, ValueError, r"y: expected labels \[M\], found shape \[48, 1\]"),
        ({"y": [0, 1]}, ValueError, "y: expected 48 labels, one for each example of x, found 2"),
        ({"y": "abc"}, TypeError, "y: expected labels, one for each example, found str"),
        ({"y": [0.5] * 48}, TypeError, "labels that are integers or strings, found float"),
        ({"y": [0, "a"] * 24}, TypeError, "y: expected labels of one kind, found int, str"),
        ({"classes": [0, 1, 2, 77]}, ValueError, "classes: expected labels that y has, found 77"),
        ({"classes": [0]}, ValueError, r"ways: expected an integer in 2..1 \(classes in tensors/own\), found 3"),
        ({"ways": 7}, ValueError, r"ways: expected an integer in 2..6 \(classes in tensors/own\), found 7"),
        ({"queries": 7}, ValueError, r"2 \+ 7 needs at least 9 examples in every class of tensors/own, .* 0 \(8\), 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer in 0"),
        ({"device": "gpu"}, ValueError, "device: expected a torch device such as 'cpu' or 'cuda', found 'gpu'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = series()
    arguments = {"x": x, "y": y, **OPTIONS, **change}
    with pytest.raises(error, match=message):
        TensorSampler(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.slow
def test_a_sampler_of_series_trains_a_convolution_of_series() -> None:
    """Forms in noise, told apart by a network that native code serves: the example of docs/howto/own_data.md."""
    torch.manual_seed(0)
    labels = torch.arange(40).repeat_interleave(20)
    x = torch.randn(40, 1, 8).repeat_interleave(8, dim=2)[labels] + 1.5 * torch.randn(800, 1, 64)
    sampler = {
        name: TensorSampler(x, labels, ways=3, shots=2, queries=5, tasks=8, classes=classes)
        for name, classes in (("train", range(30)), ("test", range(30, 40)))
    }
    layers = nn.Conv1d(1, 16, 5, 2, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv1d(16, 16, 5, 2, 2), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3))
    options = {"inner_lr": 0.01, "inner_steps": 5}
    assert explain(model, *sampler["train"].draw(0), **options).family == "layers"
    before = evaluate(model, sampler["test"], tasks=200, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for iteration in range(100):
        optimizer.zero_grad()
        meta_step(model, *sampler["train"].draw(iteration), **options)
        optimizer.step()
    after = evaluate(model, sampler["test"], tasks=200, **options)
    assert after.mean > before.mean + 0.15, (before.mean, after.mean)
    assert re.match("3-way 2-shot, 5 queries a class, tensors/own", after.protocol())
