"""Sharpness-aware steps of multilayer perceptrons in native code on the CPU: against the reference."""

from __future__ import annotations

import pytest
import torch
from ops.test_conv_sharpness import KINDS, kinds, methods
from ops.test_mlp_second_order import OPTIONS, SHAPES
from torch import Tensor, nn

from helpers.cases.perceptrons import assert_same, network, problem_of, tasks_for
from signmaml_ext import Sharpness, adapt, explain, mlp, reference
from signmaml_ext.problem import Problem


def sharp(model: nn.Module, data: tuple[Tensor, ...], **options: object) -> Problem:
    problem = problem_of(model, data, **options)
    assert problem.sharpness is not None and mlp.why_not(problem) is None
    return problem


@kinds
@methods
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), SHAPES[:5])
def test_equals_the_reference(widths, tasks, support, query, activation, loss, method, kind):
    model = network(widths, activation).double()
    data = tasks_for(widths, loss, tasks, support, query, torch.float64)
    problem = sharp(model, data, loss=loss, method=method, sharpness=kind, inner_lr=0.03)
    found = mlp.meta_gradients(problem)
    assert_same(found, reference.meta_gradients(problem), 1e-10)


@kinds
@methods
@pytest.mark.parametrize("case", OPTIONS)
def test_the_norm_is_over_what_adapts(case, method, kind):
    widths = (3, 6, 5, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    problem = sharp(model, data, method=method, sharpness=kind, **OPTIONS[case])
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-10)


@kinds
@methods
def test_it_is_not_a_plain_step(method, kind):
    """And `adapt` takes the same steps."""
    widths = (2, 11, 6, 3)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "cross_entropy", 9, 4, 5, torch.float64)
    options = {"inner_lr": 0.3, "inner_steps": 4, "method": method}
    own, expected = (adapt(model, *data[:2], **options, sharpness=kind, backend=b) for b in ("cpu", "torch"))
    plain = adapt(model, *data[:2], **options)
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-11, atol=1e-12)
    assert any((own[name] - plain[name]).abs().max() > 1e-3 for name in plain)


@kinds
def test_bitwise_the_same_for_any_number_of_threads_and_companions(kind):
    widths = (3, 250, 200, 4)  # wide enough that threads share the work of a group
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 3, 30, 10, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(adapt(model, *data[:2], inner_lr=0.01, inner_steps=2, loss="mse", sharpness=kind))
    finally:
        torch.set_num_threads(before)
    alone = adapt(model, *(d[1:2] for d in data[:2]), inner_lr=0.01, inner_steps=2, loss="mse", sharpness=kind)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:])
        assert torch.equal(alone[name][0], value[1])


@kinds
def test_a_gradient_of_zero_moves_nothing_and_a_bad_one_flags_its_task(kind):
    widths = (2, 5, 3)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 3, 4, 5, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    data[1][0] = 0.0  # task 0 has nothing to learn
    data[0][2, 0, 0] = torch.nan
    problem = sharp(model, data, sharpness=kind)
    found, expected = mlp.meta_gradients(problem), reference.meta_gradients(problem)
    assert found.nonfinite.tolist() == expected.nonfinite.tolist() == [False, False, True]
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_gradient_that_nothing_moves_by_flags_no_task():
    """The first layer's gradient overflows, and only the last layer adapts."""
    widths = (1, 1, 1)
    model = network(widths, nn.ReLU).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[1].weight.fill_(1e-300)
        model[3].weight.fill_(1e10)
    x, y = torch.full((1, 1, 1), 1e300, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    for kind in KINDS:
        problem = sharp(model, (x, y, x * 0, y), sharpness=kind, adapt=["3.*"], inner_steps=1, inner_lr=1e-3)
        found, expected = mlp.meta_gradients(problem), reference.meta_gradients(problem)
        assert found.nonfinite.tolist() == expected.nonfinite.tolist() == [False]


def test_float32_error():
    """At most twice torch's own, per tensor and over six draws, against float64."""
    widths, ours, theirs = (1, 40, 40, 5), {}, {}
    for _ in range(6):
        model, data = network(widths, nn.Tanh), tasks_for(widths, "mse", 3, 5, 25, torch.float32)
        exact = network(widths, nn.Tanh).double()
        exact.load_state_dict(model.state_dict())
        wide = tuple(value.double() for value in data)
        options = {"method": "fo-maml", "sharpness": Sharpness(0.1)}
        truth = reference.meta_gradients(sharp(exact, wide, **options)).params
        for errors, family in ((ours, mlp), (theirs, reference)):
            found = family.meta_gradients(sharp(model, data, **options)).params
            for name, gradient in truth.items():
                error = float((found[name].double() - gradient).square().sum() / gradient.square().sum())
                errors[name] = errors.get(name, 0.0) + error
    for name, error in ours.items():
        assert error <= 4 * theirs[name], name


def test_maml_is_left_to_chains_of_layers():
    widths = (2, 5, 3)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "cross_entropy", 3, 4, 5, torch.float32)
    found = explain(model, *data, method="maml", sharpness=0.1)
    assert (found.backend, found.family) == ("cpu", "layers")
    assert found.families["cpu"]["mlp"] == "its kernels do not differentiate through sharpness-aware steps"
    problem = problem_of(model, data, loss="cross_entropy", sharpness=0.1, method="maml")
    assert mlp.why_not(problem, on_cuda=True) == found.families["cpu"]["mlp"]
