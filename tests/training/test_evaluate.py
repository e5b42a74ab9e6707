"""evaluate(): the mean, its interval, and the protocol that belongs to them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import signmaml_ext
from helpers.cases.toy_images import toy_images
from signmaml.episodes import EpisodeSampler, SinusoidSampler
from signmaml.evaluation import Evaluation, evaluate
from signmaml.models import MLP, Conv4

STEP = {"inner_lr": 0.01, "inner_steps": 2}


@pytest.fixture
def model() -> nn.Module:
    return Conv4(ways=3, channels=1, filters=4, image_size=16)


def test_mean_and_interval_are_those_of_the_tasks(model: nn.Module) -> None:
    images = toy_images("test")
    found = evaluate(model, images, ways=3, shots=2, queries=4, tasks=30, seed=5, chunk=7, **STEP)
    episodes = EpisodeSampler(images, ways=3, shots=2, queries=4, tasks=30, seed=5).draw(0)
    result = signmaml_ext.evaluate(model, *episodes, **STEP)
    assert result.query_accuracy is not None
    accuracies = result.query_accuracy.double()
    assert found.mean == pytest.approx(float(accuracies.mean()), abs=1e-6)
    half = 2.04523 * float(accuracies.std()) / math.sqrt(30)
    assert found.ci95 == pytest.approx(half, rel=1e-4)
    assert found.loss == pytest.approx(float(result.query_loss.mean()), rel=1e-5)


def test_chunks_do_not_change_the_tasks(model: nn.Module) -> None:
    images = toy_images("test")
    results = [evaluate(model, images, ways=3, tasks=11, queries=3, chunk=chunk, **STEP) for chunk in (1, 4, 11, 100)]
    assert len({round(r.mean, 6) for r in results}) == 1


def test_the_whole_protocol_is_told(model: nn.Module) -> None:
    found = evaluate(
        model, toy_images("val"), ways=3, shots=2, queries=4, tasks=6, seed=9, method="fo-maml", inner_lr=0.25,
        inner_steps=3,
    )  # fmt: skip
    text = str(found)
    for words in (
        "val accuracy", "+-", "95% t-interval", "3-way 2-shot", "4 queries a class", "toy/val", "fo-maml",
        "3 test steps", "inner_lr 0.25", "BatchNorm on batch statistics (transductive)", "6 tasks", "seed 9", "fp32",
    ):  # fmt: skip
        assert words in text, words
    stored = json.loads(json.dumps(found.to_dict()))
    assert Evaluation(**stored) == found


def test_one_task_has_no_interval(model: nn.Module) -> None:
    found = evaluate(model, toy_images(), ways=3, queries=3, tasks=1, **STEP)
    assert math.isnan(found.ci95) and found.to_dict()["ci95"] is None
    assert "it takes at least two tasks" in str(found)


def test_regression_is_a_mean_squared_error() -> None:
    model = MLP(1, 1)
    found = evaluate(model, SinusoidSampler(shots=5, queries=7, tasks=4, seed=3), tasks=10, **STEP)
    episodes = SinusoidSampler(shots=5, queries=7, tasks=10, seed=3).draw(0)
    result = signmaml_ext.evaluate(model, *episodes, loss="mse", **STEP)
    assert found.mean == pytest.approx(float(result.query_loss.mean()), rel=1e-5)
    assert (found.metric, found.ways, found.shots, found.queries) == ("mse", None, 5, 7)
    assert "mean squared error" in str(found) and "5 support and 7 query points" in str(found)


class PlainSampler:
    """A minimal sampler: no draw_tasks, plain tuples."""

    def __init__(self, tasks: int) -> None:
        self.episodes = EpisodeSampler(toy_images(), ways=3, shots=1, queries=2, tasks=tasks)
        self.calls = 0

    def draw(self, iteration: int) -> tuple[Tensor, ...]:
        self.calls += 1
        return tuple(self.episodes.draw(iteration))


def test_a_plain_sampler_is_enough(model: nn.Module) -> None:
    sampler = PlainSampler(4)
    found = evaluate(model, sampler, tasks=10, **STEP)
    expected = evaluate(model, toy_images(), ways=3, shots=1, queries=2, tasks=10, **STEP)
    assert sampler.calls == 3
    assert found.mean == pytest.approx(expected.mean, abs=1e-6)
    assert (found.ways, found.shots, found.queries, found.seed) == (3, 1, 2, None)


def test_a_sampler_that_runs_dry_is_an_error(model: nn.Module) -> None:
    class Empty(PlainSampler):
        def draw(self, iteration: int) -> tuple[Tensor, ...]:
            return tuple(part[:0] for part in super().draw(iteration))

    with pytest.raises(ValueError, match="at least one task, found none in draw"):
        evaluate(model, Empty(4), tasks=10, **STEP)


class Poisoned(PlainSampler):
    """Every fifth task holds a NaN."""

    def draw(self, iteration: int) -> tuple[Tensor, ...]:
        support_x, support_y, query_x, query_y = super().draw(iteration)
        query_x = query_x.clone()
        query_x[::5, 0] = math.nan
        return support_x, support_y, query_x, query_y


def test_nonfinite_tasks_are_counted_and_can_be_left_out(model: nn.Module) -> None:
    clean = evaluate(model, PlainSampler(10), tasks=10, **STEP)
    left_out = evaluate(model, Poisoned(10), tasks=10, nonfinite="skip", **STEP)
    kept = evaluate(model, Poisoned(10), tasks=10, **STEP)
    assert (clean.nonfinite, left_out.nonfinite, kept.nonfinite) == (0, 2, 2)
    assert math.isfinite(left_out.loss) and math.isnan(kept.loss)
    assert "2 of 10 tasks met a NaN or an Inf (left out of the mean)" in str(left_out)
    assert "(part of the mean)" in str(kept)
    with pytest.raises(FloatingPointError):
        evaluate(model, Poisoned(10), tasks=10, nonfinite="raise", **STEP)


def test_nothing_of_the_model_changes_and_dropout_is_off() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[2].eval()
    before = [p.clone() for p in model.parameters()]
    results = {evaluate(model, toy_images(), ways=3, queries=3, tasks=5, **STEP).loss for _ in range(2)}
    assert len(results) == 1
    assert model.training and model[1].training and not model[2].training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_progress_counts_tasks(model: nn.Module) -> None:
    seen: list[int] = []
    evaluate(model, toy_images(), ways=3, queries=3, tasks=10, chunk=4, progress=seen.append, **STEP)
    assert seen == [4, 4, 2]


@pytest.mark.parametrize("tasks", [0, -1, 2.5, True])
def test_bad_tasks(model: nn.Module, tasks: object) -> None:
    with pytest.raises(ValueError, match="tasks: expected an integer >= 1"):
        evaluate(model, toy_images(), ways=3, tasks=tasks, **STEP)  # type: ignore[arg-type]


def test_learned_rates_are_reported_as_such(model: nn.Module) -> None:
    rates = {name: torch.full((), 0.01) for name, _ in model.named_parameters()}
    found = evaluate(model, toy_images(), ways=3, queries=3, tasks=4, inner_lr=rates, inner_steps=2)
    assert found.inner_lr == "learned" and "inner_lr learned" in str(found)


@pytest.mark.parametrize("change", ["three", "a list inside", "one tensor"])
def test_a_sampler_that_gives_something_else_is_refused(model: nn.Module, change: str) -> None:
    class Wrong(PlainSampler):
        def draw(self, iteration: int) -> Any:
            parts = super().draw(iteration)
            return {"three": parts[:3], "a list inside": (*parts[:3], [1, 2]), "one tensor": parts[0]}[change]

    found = {"three": "3 of Tensor, Tensor, Tensor", "a list inside": "4 of .*, list", "one tensor": "1 of Tensor"}
    with pytest.raises(TypeError, match=f"sampler: expected .* four tensors, found {found[change]} from Wrong"):
        evaluate(model, Wrong(4), tasks=10, **STEP)
