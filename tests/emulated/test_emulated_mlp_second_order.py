"""maml of multilayer perceptrons on the emulated GPU: steps differentiated by mlp_second_order_kernel."""

from __future__ import annotations

import copy
import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from helpers.cases.perceptrons import assert_same, network, overflowing, problem_of, rows, tasks_for
from helpers.devices import emulated
from signmaml_ext import fused, mlp, reference
from signmaml_ext.problem import Problem


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


def maml(model: nn.Module, data: tuple[Tensor, ...], **options: object) -> Problem:
    problem = problem_of(model, data, **{"method": "maml", **options})
    assert mlp.why_not(problem) is None
    return problem


SHAPES = [
    # widths, tasks, support, query: warp and block teams, shared memory and workspace, odd sizes, one of everything
    ((1, 40, 40, 1), 3, 5, 5),
    ((1, 1, 1), 1, 1, 1),
    ((3, 7, 5, 2, 4), 5, 3, 9),
    ((2, 3, 3, 3, 3, 2), 2, 4, 1),
    ((5, 256, 3), 2, 3, 11),
    ((64, 96, 96, 5), 12, 2, 3),
]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), SHAPES)
def test_meta_step_equals_the_reference(native, widths, tasks, support, query, activation, loss, steps):
    native.configure(seed=1, blocks_alive=2, multiprocessors=1)
    model = network(widths, activation).double()
    data = tasks_for(widths, loss, tasks, support, query, torch.float64)
    problem = maml(model, data, loss=loss, inner_lr=0.1, inner_steps=steps)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-10)


def test_plans_of_the_cases_differ(native):
    """The shapes above reach all four kinds of kernel, and teams of every size."""
    plans = [native.plan_mlp_meta_step(*shape, 8, 1, 3, "maml") for shape in SHAPES]
    assert {(plan["threads"] > 32, plan["in_shared"]) for plan in plans} == set(
        itertools.product([False, True], repeat=2)
    )
    assert {plan["threads"] for plan in plans} == {32, 64, 128, 256}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_bits_do_not_depend_on_the_team(native, activation, loss):
    """The same tasks with so few and so many others that a task gets 8, 4, 2 and 1 warps."""
    widths = (3, 20, 30, 4)
    model, data = network(widths, activation), tasks_for(widths, loss, 12, 40, 35, torch.float32)
    found = {}
    for tasks in (1, 4, 6, 12):
        native.configure(seed=tasks, multiprocessors=1)
        problem = maml(model, tuple(tensor[:tasks] for tensor in data), loss=loss, inner_steps=2)
        threads = native.plan_mlp_meta_step(widths, tasks, 40, 35, 4, 1, 2, "maml")["threads"]
        found[threads] = rows(problem, native)[0]
    assert found.keys() == {32, 64, 128, 256}
    for gradients in found.values():
        assert torch.equal(gradients[:1], found[256][:1])
    assert torch.equal(found[64][:4], found[32][:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_in_shared_memory(native, dtype):
    """Many examples in float32 only are small enough for this kind."""
    native.configure(seed=2, multiprocessors=1)
    widths = (2, 65, 1)
    model, data = network(widths, nn.Tanh).to(dtype), tasks_for(widths, "mse", 2, 33, 30, dtype)
    plan = native.plan_mlp_meta_step(widths, 2, 33, 30, dtype.itemsize, 1, 2, "maml")
    assert (plan["threads"], plan["in_shared"]) == (256, dtype == torch.float32)
    problem = maml(model, data, inner_steps=2, inner_lr=0.1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), tolerance)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_many_examples_take_a_block_and_workspace(native, loss):
    native.configure(seed=2, multiprocessors=1)
    widths = (3, 40, 40, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, loss, 2, 70, 65, torch.float64)
    plan = native.plan_mlp_meta_step(widths, 2, 70, 65, 8, 1, 2, "maml")
    assert (plan["threads"], plan["in_shared"]) == (256, False)
    problem = maml(model, data, loss=loss, inner_steps=2)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-10)


def test_more_tasks_than_teams_and_chunks(native, monkeypatch):
    """A team uses its memory for several tasks, one after the other."""
    native.configure(seed=3, multiprocessors=1)
    widths = (1, 4, 1)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 70, 2, 2, torch.float64)
    assert native.plan_mlp_meta_step(widths, 70, 2, 2, 8, 1, 2, "maml")["teams"] == 16
    problem = maml(model, data, inner_steps=2)
    expected = reference.meta_gradients(problem)
    assert_same(mlp.meta_gradients(problem, native), expected, 1e-10)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 30 * 13 * 8)
    assert_same(mlp.meta_gradients(problem, native), expected, 1e-10)


NAMES = ("1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias")
OPTIONS = {
    "head only": {"adapt": ["5.*"]},
    "body only": {"adapt": ["1.*", "3.*"]},
    "weights only": {"adapt": ["*.weight"]},
    **{f"{name} alone": {"adapt": [name]} for name in NAMES},
    "rate a step": {"inner_lr": torch.tensor([0.1, 0.0, 0.05])},
    "rate a tensor": {"inner_lr": dict(zip(NAMES, (0.1, 0.2, 0.0, 0.3, torch.tensor(0.15), 0.25), strict=True))},
    "rate a tensor and step": {
        "inner_lr": {n: (0.05 + 0.05 * torch.arange(3)).reshape(3, *[1] * (1 + n.endswith("t"))) for n in NAMES}
    },
}


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(native, case, activation, loss):
    native.configure()
    widths = (3, 6, 5, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, loss, 3, 4, 3, torch.float64)
    problem = maml(model, data, loss=loss, **OPTIONS[case])
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-10)


@pytest.mark.parametrize("options", [{"inner_lr": 0.0}, {"inner_steps": 0}])
def test_steps_that_move_nothing_leave_the_query_gradient(native, options):
    native.configure()
    widths = (3, 9, 8, 4)
    model, data = network(widths, nn.Tanh), tasks_for(widths, "cross_entropy", 3, 4, 5, torch.float32)
    found, _ = rows(maml(model, data, loss="cross_entropy", **options), native)
    expected, _ = rows(problem_of(model, data, loss="cross_entropy", method="fo-maml", **options), native)
    assert torch.equal(found, expected)


def test_adaptation_is_that_of_fo_maml(native):
    native.configure()
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 3, 4, 3, torch.float32)
    found, expected = (mlp.adapt(problem_of(model, data, method=method), native) for method in ("maml", "fo-maml"))
    assert torch.equal(found.logits, expected.logits)
    for name, value in expected.params.items():
        assert torch.equal(found.params[name], value)


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_nonfinite_tasks(native, where, policy, activation):
    native.configure(multiprocessors=1)
    widths = (3, 6, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    data[where][1, 0, 0] = torch.nan
    problem = maml(model, data, nonfinite=policy)
    found, expected = mlp.meta_gradients(problem, native), reference.meta_gradients(problem)
    assert found.nonfinite.tolist() == [task == 1 for task in range(18)] == expected.nonfinite.tolist()
    assert int(found.live_tasks) == (17 if policy == "skip" else 18)
    for name, gradient in expected.params.items():
        assert found.params[name].isfinite().all() == gradient.isfinite().all()
        if policy == "skip":
            torch.testing.assert_close(found.params[name], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tensor", ["1.weight", "1.bias"])
def test_what_only_the_second_order_makes_infinite_is_flagged(native, tensor):
    """The step has no length, and the product with the Hessian overflows in one tensor."""
    native.configure()
    model, data, options = overflowing(tensor)
    assert rows(problem_of(model, data, method="fo-maml", **options), native)[1].tolist() == [False, False]
    gradients, flags = rows(problem := maml(model, data, **options), native)
    assert flags.tolist() == [False, True] == reference.meta_gradients(problem).nonfinite.tolist()
    assert gradients[1].isfinite().sum() == 3


@pytest.mark.parametrize("where", [1, 3])
@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_label_out_of_range_flags_its_task(native, label, where):
    native.configure()
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "cross_entropy", 3, 4, 3, torch.float64)
    data[where][2, 0] = label
    gradients, flags = rows(maml(model, data, loss="cross_entropy"), native)
    assert flags.tolist() == [False, False, True]
    assert gradients[2].isnan().any() and gradients[:2].isfinite().all()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("widths", "tasks"), [((3, 40, 40, 5), 4), ((1, 40, 40, 5), 3), ((2, 8, 8, 8, 8, 5), 4)])
def test_float32_error(native, widths, tasks, loss, activation):
    """At most twice that of torch's double backward, against float64, per tensor, over four draws."""
    native.configure(multiprocessors=1)
    ours, theirs = {}, {}  # name -> sum of squared errors
    for _ in range(4):
        model, data = network(widths, activation), tasks_for(widths, loss, tasks, 5, 15, torch.float32)
        exact = copy.deepcopy(model).double()
        wide = tuple(value.double() if value.is_floating_point() else value for value in data)
        truth = reference.meta_gradients(maml(exact, wide, loss=loss)).params
        problem = maml(model, data, loss=loss)
        found = ((ours, mlp.meta_gradients(problem, native)), (theirs, reference.meta_gradients(problem)))
        for errors, gradients in found:
            for name, gradient in truth.items():
                error = float((gradients.params[name].double() - gradient).square().sum() / gradient.square().sum())
                errors[name] = errors.get(name, 0.0) + error
    for name, error in ours.items():
        assert error**0.5 <= 2 * theirs[name] ** 0.5, (name, error**0.5, theirs[name] ** 0.5)


def test_bitwise_whatever_shares_the_batch(native):
    widths = (3, 6, 2)
    model, data = network(widths, nn.Tanh), tasks_for(widths, "mse", 5, 4, 3, torch.float32)
    results = []
    for seed, tasks in ((0, slice(0, 5)), (1, slice(2, 3)), (2, slice(1, 4))):
        native.configure(seed=seed, blocks_alive=1 + seed, multiprocessors=1)
        found, _ = rows(maml(model, tuple(value[tasks] for value in data)), native)
        results.append(found[2 - tasks.start])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("tasks", [1, 1000, 100_000])
@pytest.mark.parametrize(("widths", "count"), [((1, 40, 40, 1), 10), ((784, 256, 256, 256, 256, 100), 500)])
def test_plans(native, widths, count, tasks):
    """A team's memory grows by the parameters of every step; threads and shared memory are those of the first order."""
    first = native.plan_mlp_meta_step(widths, tasks, count, count, 4, 132, 5, "fo-maml")
    plans = [native.plan_mlp_meta_step(widths, tasks, count, count, 4, 132, steps, "maml") for steps in (0, 5, 6)]
    assert plans[0] == first == native.plan_mlp_meta_step(widths, tasks, count, count, 4, 132)
    for plan in plans:
        assert [plan[name] for name in ("threads", "in_shared", "shared_bytes")] == [
            first[name] for name in ("threads", "in_shared", "shared_bytes")
        ]
    of_step = plans[2]["workspace_scalars"] - plans[1]["workspace_scalars"]
    assert of_step % plans[1]["teams"] == 0 and of_step // plans[1]["teams"] >= plans[1]["parameters"]
    assert plans[1]["teams"] == min(tasks, 132 * 16 * 32 // plans[1]["threads"])
