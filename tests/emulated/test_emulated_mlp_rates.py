"""Rates of perceptrons that learn, or vary within a tensor, on the emulated GPU: against the reference in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from helpers.cases import emulated_cases, perceptrons
from helpers.devices import emulated
from helpers.devices.emulated import by_seed
from signmaml_ext import mlp

KINDS = ("scalar", "step", "tensor", "tensor and step", "filter", "element", "element and step")
METHODS = ("sign-maml", "fo-maml", "maml")
SHAPES = emulated_cases.TEAMS


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("widths", "sizes"), [SHAPES[0], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[1:])]
)
def test_learnable(native, widths, sizes, kind, method):
    by_seed(native, KINDS.index(kind))
    emulated_cases.mlp_rates(native, widths, sizes, kind, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["filter", "element and step"])
def test_constant_ones_that_vary_within_a_tensor(native, kind, method):
    by_seed(native, 3)
    options = {"loss": "cross_entropy", "activation": nn.ReLU}
    emulated_cases.mlp_rates(native, (3, 7, 5, 2), (9, 4, 3), kind, method, learnable=False, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["scalar", "tensor and step", "element"])
@pytest.mark.parametrize("adapt", [["5.weight", "5.bias"], ["1.bias"], ["3.weight"]])
def test_of_what_adapts(native, adapt, kind, method):
    by_seed(native, 5)
    emulated_cases.mlp_rates(native, (3, 7, 5, 2), (9, 4, 3), kind, method, adapt=adapt)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_step(native, method):
    by_seed(native, 6)
    emulated_cases.mlp_rates(native, (3, 7, 5, 2), (9, 4, 3), "scalar", method, steps=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tensor", "element and step"])
def test_a_broken_task_is_left_out(native, kind, method):
    """One team takes all tasks, so the next ones find the broken one's NaN in its memory."""
    native.configure(seed=4, blocks_alive=1, multiprocessors=1)
    model = perceptrons.network((3, 5, 2), nn.Tanh).double()
    data = list(perceptrons.tasks_for((3, 5, 2), "mse", 35, 2, 2, torch.float64))
    rates = emulated_cases.rates_of(model, kind, 2)
    options = {"inner_lr": rates, "inner_steps": 2, "method": method, "nonfinite": "skip"}
    healthy = mlp.meta_gradients(perceptrons.problem_of(model, tuple(v[2:] for v in data), **options), native)
    data[0] = data[0].clone()
    data[0][:2] = torch.nan
    found = mlp.meta_gradients(perceptrons.problem_of(model, tuple(data), **options), native)
    assert found.nonfinite.tolist() == [True, True] + [False] * 33
    for own, others in ((found.params, healthy.params), (found.rates, healthy.rates)):
        for name, value in others.items():
            assert torch.equal(own[name], value), name


def test_the_plan(native):
    """Room for the directions of every step where rates learn; the second-order kernel's teams."""

    def room(steps, **options):
        plan = native.plan_mlp_meta_step([3, 7, 5, 2], 8, 4, 3, 8, 1, steps, **options)
        return plan["workspace_scalars"] // plan["teams"]

    assert room(3) == room(3, rates_by_element=True) == 0
    row = room(1, learns_rates=True)
    assert row > 0 and room(3, learns_rates=True) == 3 * row
    assert room(3, method="maml", learns_rates=True) - room(3, method="maml") == 3 * row
