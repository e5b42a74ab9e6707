"""The mean that fused families compute on the CPU while tasks run, against `meta_accumulate_` on the tasks' rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.cases.perceptrons import problem_of
from signmaml.models import Conv4
from signmaml_ext import conv, fused, mlp, ops
from signmaml_ext._loader import C
from signmaml_ext.problem import Problem

DTYPES = (torch.float32, torch.float64)
SKIPPING = ("propagate", "skip")


def problem(family: str, tasks: int, dtype: torch.dtype, **options: object) -> Problem:
    """Gradients of very different magnitudes, so that another order of additions would round differently."""
    torch.manual_seed(tasks)
    scale = torch.logspace(-2, 2, tasks, dtype=dtype)
    if family == "conv":
        model: nn.Module = Conv4(ways=3, channels=1, filters=8, image_size=6, pooling="stride", layers=2).to(dtype)
        x = torch.rand(2, tasks, 6, 1, 6, 6, dtype=dtype) * scale.view(-1, 1, 1, 1, 1)
        y = torch.arange(6).remainder(3).repeat(tasks, 1)
        return problem_of(model, (x[0], y, x[1], y), loss="cross_entropy", **options)
    model = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1)).to(dtype)
    x = torch.randn(2, tasks, 6, 1, dtype=dtype)
    return problem_of(model, (x[0], x[0].sin(), x[1], x[1].sin() * scale.view(-1, 1, 1)), **options)


def mean_of(problem: Problem, family: str) -> tuple[Tensor, Tensor, Tensor]:
    found = {"conv": conv, "mlp": mlp}[family].meta_gradients(problem)
    return torch.cat([grad.flatten() for grad in found.params.values()]), found.nonfinite, found.live_tasks


def mean_of_rows(problem: Problem, family: str) -> tuple[Tensor, Tensor]:
    """The same via a `[T, P]` matrix, whose rows have the family's order of parameters."""
    module, recognise = {"conv": (conv, conv.read), "mlp": (mlp, mlp.read)}[family]
    found = recognise(problem.model)
    size = sum(problem.params[name].numel() for name in found.names if name in problem.params)
    rows = torch.empty(problem.tasks, size, dtype=problem.dtype)
    part = fused._run(problem, found, C, module.call.native_call, {"grads": rows})
    out, flags = torch.zeros(size, dtype=problem.dtype), part["nonfinite"]
    ops.meta_accumulate_(out, rows, nonfinite=flags, skip_nonfinite=problem.nonfinite == "skip")
    sizes = [problem.model.get_parameter(name).numel() for name in found.names]
    by_name = dict(zip(found.names, out.split(sizes), strict=True))
    return torch.cat([by_name[name] for name in problem.params]), flags


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 16, 40, 150])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["conv", "mlp"])
def test_same_bits_as_the_mean_of_rows(family, dtype, tasks, threads):
    for steps in (0, 2):
        call = problem(family, tasks, dtype, inner_steps=steps)
        mean, flags, live = mean_of(call, family)
        expected, raised = mean_of_rows(call, family)
        assert torch.equal(mean, expected) and mean.abs().sum() > 0
        assert torch.equal(flags, raised) and live == tasks


@pytest.mark.parametrize("nonfinite", SKIPPING)
@pytest.mark.parametrize("family", ["conv", "mlp"])
def test_broken_tasks(family, nonfinite, threads):
    """Some tasks break in the inner loop, others in the query set alone."""
    call = problem(family, 21, torch.float32, nonfinite=nonfinite)
    call.support_x[3], call.query_x[8], call.query_x[20] = torch.nan, torch.inf, torch.nan
    mean, flags, live = mean_of(call, family)
    expected, raised = mean_of_rows(call, family)
    assert flags.nonzero().flatten().tolist() == [3, 8, 20] and torch.equal(flags, raised)
    assert torch.equal(mean.nan_to_num(7), expected.nan_to_num(7))
    assert live == (18 if nonfinite == "skip" else 21)
    assert bool(mean.isfinite().all()) == (nonfinite == "skip")


@pytest.mark.parametrize("family", ["conv", "mlp"])
def test_without_a_task_that_counts_it_is_zero(family, threads):
    call = problem(family, 4, torch.float32, nonfinite="skip")
    call.support_x.fill_(torch.nan)
    mean, _, live = mean_of(call, family)
    assert live == 0 and torch.equal(mean, torch.zeros_like(mean))


def test_memory_does_not_grow_with_tasks():
    few, many = (C.plan_mlp_meta_step_cpu((1, 40, 40, 1), tasks, 10, 10, 4, 2)["mean_rows"] for tasks in (100, 10**6))
    assert few == many < 100


def test_refusals():
    call = problem("mlp", 2, torch.float32)
    found = mlp.read(call.model)
    mean, rows = torch.empty(16), torch.empty(2, 16)
    with pytest.raises(ValueError, match="addresses: expected 'mean' or 'grads', found both"):
        fused._run(call, found, C, mlp.call.native_call, {"mean": mean, "grads": rows})
