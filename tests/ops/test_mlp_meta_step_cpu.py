"""mlp_meta_step on the CPU: equal to the reference in float64, precise in float32, bitwise reproducible."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases.perceptrons import assert_same, network, problem_of, tasks_for
from signmaml_ext import fused, mlp, reference
from signmaml_ext._loader import C

SHAPES = [
    # widths, tasks, support, query: every depth, odd widths, tiles and their tails, one of everything
    ((1, 40, 40, 1), 33, 5, 10),
    ((1, 1, 1), 1, 1, 1),
    ((3, 7, 5, 2, 4), 15, 3, 9),
    ((2, 3, 3, 3, 3, 2), 16, 4, 1),
    ((5, 256, 3), 2, 3, 25),
    ((19, 17, 2), 17, 13, 12),
    ((64, 256, 256, 5), 3, 14, 7),
    ((2, 9, 1), 2, 100, 1),
]


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), SHAPES)
def test_equals_the_reference(widths, tasks, support, query, activation, loss, method):
    """Whole trajectories in float64."""
    model = network(widths, activation).double()
    data = tasks_for(widths, loss, tasks, support, query, torch.float64)
    problem = problem_of(model, data, loss=loss, method=method, inner_lr=0.02)
    assert mlp.why_not(problem) is None
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-12)
    found, expected = mlp.adapt(problem), reference.adapt(problem)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_of_tasks(tasks, dtype):
    """Full groups, groups with empty lanes, and the narrow groups used for few tasks."""
    widths = (2, 11, 6, 3)
    model = network(widths, nn.ReLU).to(dtype)
    data = tasks_for(widths, "cross_entropy", tasks, 4, 5, dtype)
    problem = problem_of(model, data, loss="cross_entropy", inner_steps=0 if dtype == torch.float32 else 4)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), tolerance)


@pytest.mark.parametrize("widths", [(3, 40, 40, 5), (784, 64, 5), (8, 256, 256, 256, 256, 5)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_float32_gradients_before_the_sign(widths, activation, loss):
    """At most twice torch's own error against float64, per tensor: no inner step, so no sign can flip.

    Errors are summed over six draws, because the error of five numbers is a matter of luck.
    """
    ours, theirs = {}, {}  # name -> sum of squared errors
    for _ in range(6):
        model, data = network(widths, activation), tasks_for(widths, loss, 3, 5, 25, torch.float32)
        exact = copy.deepcopy(model).double()
        wide = tuple(value.double() if value.is_floating_point() else value for value in data)
        options = {"loss": loss, "inner_steps": 0}
        truth = reference.meta_gradients(problem_of(exact, wide, **options)).params
        for errors, family in ((ours, mlp), (theirs, reference)):
            found = family.meta_gradients(problem_of(model, data, **options)).params
            for name, gradient in truth.items():
                error = float((found[name].double() - gradient).square().sum() / gradient.square().sum())
                errors[name] = errors.get(name, 0.0) + error
    for name, error in ours.items():
        assert error**0.5 <= 2 * theirs[name] ** 0.5, (name, error**0.5, theirs[name] ** 0.5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_float32_tasks_without_a_flipped_sign_are_close(activation):
    """Five steps in float32 against float64; a flipped sign moves a weight by 2 * inner_lr, and then all the others."""
    widths = (1, 40, 40, 1)
    model, data = network(widths, activation), tasks_for(widths, "mse", 100, 10, 10, torch.float32)
    exact = network(widths, activation).double()
    exact.load_state_dict(model.state_dict())
    wide = tuple(value.double() for value in data)
    ours = mlp.adapt(problem_of(model, data, inner_lr=1e-3, inner_steps=5))
    truth = reference.adapt(problem_of(exact, wide, inner_lr=1e-3, inner_steps=5))
    flipped = torch.stack(
        [(ours.params[n].double() - value).abs().flatten(1).amax(1) > 1e-4 for n, value in truth.params.items()]
    ).any(0)
    assert flipped.float().mean() < 0.5
    difference = (ours.logits.double() - truth.logits).abs().flatten(1).amax(1)
    assert (difference[~flipped] < 1e-4).all()


@pytest.mark.parametrize("values", [torch.linspace(-30, 30, 20001), torch.linspace(-0.7, 0.7, 20001)])
def test_tanh_to_two_units(values):
    """A network with one hidden unit whose output is tanh itself."""
    model = network((1, 1, 1), nn.Tanh)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(1.0 if name.endswith("weight") else 0.0)
    x = values.reshape(1, -1, 1)
    shown = mlp.adapt(problem_of(model, (x, x, x, x), inner_steps=0)).logits
    exact = x.double().tanh()
    assert (((shown.double() - exact).abs() / exact.abs().clamp(min=1e-30)) < 2.5 * 2**-23).all()


def test_cross_entropy_of_large_and_tiny_scores():
    """Scores far apart: exponentials that underflow, and the loss of a confident mistake."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    x = torch.tensor([[[1.0, 0.0], [300.0, 0.0], [1e4, 1.0]]])
    y = torch.tensor([[0, 1, 2]])
    exact = reference.meta_gradients(problem_of(model, (x.double(), y) * 2, loss="cross_entropy", inner_steps=0))
    single = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    single.load_state_dict(model.state_dict())
    found = mlp.meta_gradients(problem_of(single, (x, y) * 2, loss="cross_entropy", inner_steps=0))
    torch.testing.assert_close(found.query_loss.double(), exact.query_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in exact.params.items():
        assert (found.params[name].double() - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("repeats", [1, 9])  # few tasks for narrow groups, many for wide ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sign_of_every_kind_of_gradient(threads, dtype, repeats):
    """Three-valued, with zeros of both signs, subnormals, infinities, NaN: the gradient of the output bias is -2 y."""
    tiny = torch.finfo(dtype).smallest_normal / 8
    kinds = [0.0, -0.0, 1.0, -1.0, tiny, -tiny, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]
    gradients = torch.tensor(kinds, dtype=dtype).repeat(repeats)
    model = network((1, 1, 1), nn.ReLU).to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    x, y = torch.ones(len(gradients), 1, 1, dtype=dtype), (gradients / -2).reshape(-1, 1, 1)
    name = list(model.state_dict())[-1]
    torch.set_num_threads(4)
    found = mlp.adapt(problem_of(model, (x, y, x, y), loss="mse", inner_lr=0.5, inner_steps=1))
    expected = torch.where(gradients.isnan(), gradients, -0.5 * gradients.sign())
    torch.testing.assert_close(found.params[name].flatten(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.nonfinite, ~gradients.square().isfinite())


OPTIONS = {
    "no steps": {"inner_steps": 0},
    "head only": {"adapt": ["3.*"]},
    "weights only": {"adapt": ["*.weight"]},
    "rate a step": {"inner_lr": torch.tensor([0.1, 0.0, 0.05])},
    "rate a tensor": {"inner_lr": {"1.weight": 0.1, "1.bias": 0.2, "3.weight": torch.tensor(0.3), "3.bias": 0.0}},
    "rate a tensor and step": {
        "inner_lr": {
            n: 0.1 * torch.rand(3, *[1] * (1 + n.endswith("t"))) for n in ("1.weight", "1.bias", "3.weight", "3.bias")
        }
    },
}


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, method):
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    problem = problem_of(model, data, method=method, **OPTIONS[case])
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-12)
    found, expected = mlp.adapt(problem), reference.adapt(problem)
    assert found.params.keys() == expected.params.keys()
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_stay_and_get_no_gradient():
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 5, 4, 3, torch.float64)
    model[1].weight.requires_grad_(False)
    problem = problem_of(model, data)
    assert mlp.why_not(problem) is None
    found = mlp.meta_gradients(problem)
    assert "1.weight" not in found.params
    assert_same(found, reference.meta_gradients(problem), 1e-12)
    assert "1.weight" not in mlp.adapt(problem).params


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_nonfinite_tasks(where, policy, bad, activation):
    """Only the task that meets a NaN or an Inf is flagged, and only its numbers are affected."""
    widths = (3, 6, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    data[where][13, 0, 0] = bad
    problem = problem_of(model, data, nonfinite=policy)
    found, expected = mlp.meta_gradients(problem), reference.meta_gradients(problem)
    assert torch.equal(found.nonfinite, expected.nonfinite)
    assert int(found.live_tasks) == int(expected.live_tasks)
    for name, gradient in expected.params.items():
        torch.testing.assert_close(found.params[name].isnan(), gradient.isnan())
        if policy == "skip":
            torch.testing.assert_close(found.params[name], gradient, rtol=1e-12, atol=1e-12)
    healthy = [task for task in range(18) if task != 13]
    torch.testing.assert_close(found.query_loss[healthy], expected.query_loss[healthy], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_label_out_of_range_is_refused_before_any_work(label):
    widths = (3, 6, 3)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "cross_entropy", 3, 4, 3, torch.float32)
    data[3][1, 2] = label
    with pytest.raises(ValueError, match=r"query_y: expected labels in 0\.\.2 .* in task 1, example 2"):
        signmaml_ext.meta_step(model, *data, inner_lr=0.1, inner_steps=1)
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(model: nn.Module, data, **options):
    problem = problem_of(model, data, **options)
    meta, adapted = mlp.meta_gradients(problem), mlp.adapt(problem)
    return [*meta.params.values(), meta.support_loss, meta.query_loss, adapted.logits, *adapted.params.values()]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("widths", "tasks"), [((3, 33, 20, 5), 37), ((16, 256, 256, 5), 3), ((16, 256, 256, 5), 9)])
def test_same_bits_for_any_number_of_threads(threads, widths, tasks, dtype):
    """Threads share the groups of tasks, or the work within a group, also for few tasks in one or two groups."""
    model = network(widths, nn.Tanh).to(dtype)
    data = tasks_for(widths, "cross_entropy", tasks, 5, 25, dtype)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(outcome(model, data, loss="cross_entropy"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_whatever_shares_the_batch(loss, dtype):
    widths = (3, 13, 7, 4)
    model, data = network(widths, nn.Tanh).to(dtype), tasks_for(widths, loss, 40, 4, 3, dtype)
    whole = mlp.adapt(problem_of(model, data, loss=loss))
    for part in (slice(21, 22), slice(20, 27), slice(3, 38)):
        found = mlp.adapt(problem_of(model, tuple(value[part] for value in data), loss=loss))
        assert torch.equal(found.logits, whole.logits[part])
        assert torch.equal(found.support_loss, whole.support_loss[:, part])
        for name, value in whole.params.items():
            assert torch.equal(found.params[name], value[part])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_every_instruction_set(isas, activation, loss):
    """All equal the reference; those with fused multiply-adds have the same bits."""
    widths = (3, 21, 14, 5)
    for dtype, steps, tolerance in ((torch.float64, 3, 1e-12), (torch.float32, 0, 1e-5)):
        model, data = network(widths, activation).to(dtype), tasks_for(widths, loss, 19, 13, 12, dtype)
        problem = problem_of(model, data, loss=loss, inner_steps=steps)
        expected, bits = reference.meta_gradients(problem), {}
        for isa in isas:
            C.select_cpu_isa(isa)
            assert_same(mlp.meta_gradients(problem), expected, tolerance)
            bits[isa] = outcome(model, data, loss=loss, inner_steps=3)
        if {"avx2", "avx512"} <= set(isas):
            assert_same_bits(bits["avx512"], bits["avx2"])


def test_all_tasks_go_in_one_call(monkeypatch):
    """Only CUDA splits tasks into chunks: the CPU never stores the gradients of all tasks."""
    widths = (1, 4, 1)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 70, 2, 2, torch.float64)
    problem = problem_of(model, data, inner_steps=2)
    expected = reference.meta_gradients(problem)
    found = mlp.meta_gradients(problem)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 30 * 13 * 8)
    again = mlp.meta_gradients(problem)
    assert_same(again, expected, 1e-12)
    assert all(torch.equal(again.params[name], value) for name, value in found.params.items())


def test_plan():
    """Wide groups if every thread gets one, else narrow groups, else threads share the work within a group."""
    widths = (1, 40, 40, 1)
    wide = C.plan_mlp_meta_step_cpu(widths, 1000, 10, 10, 4, 2)
    lanes = wide["lanes"]
    assert wide["groups"] == -(-1000 // lanes) and wide["slots"] == 2 and not wide["within"]
    few = C.plan_mlp_meta_step_cpu(widths, 7, 10, 10, 4, 2)
    assert (few["lanes"], few["groups"], few["within"]) == (4, 2, False)
    lone = C.plan_mlp_meta_step_cpu(widths, 1, 10, 10, 4, 2)
    assert (lone["lanes"], lone["groups"], lone["slots"], lone["within"]) == (4, 1, 1, True)
    with pytest.raises(ValueError, match="scalar_bytes: expected 4 or 8, found 2"):
        C.plan_mlp_meta_step_cpu(widths, 1, 10, 10, 2, 2)


def test_auto_takes_it():
    widths = (1, 40, 40, 1)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 3, 5, 5, torch.float32)
    options = {"inner_lr": 0.01, "inner_steps": 2, "loss": "mse"}
    found = signmaml_ext.explain(model, *data, **options)
    assert (found.backend, found.family) == ("cpu", "mlp")
    assert "all tasks in one native call" in str(found)
    assert signmaml_ext.meta_step(model, *data, **options).backend == "cpu"
    assert signmaml_ext.evaluate(model, *data, **options).backend == "cpu"
