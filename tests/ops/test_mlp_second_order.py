"""maml of multilayer perceptrons in native code on the CPU: the steps are differentiated through, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import signmaml_ext
from helpers.cases.perceptrons import assert_same, network, overflowing, problem_of, rows, tasks_for
from signmaml_ext import mlp, reference
from signmaml_ext._loader import C
from signmaml_ext.problem import Problem

SHAPES = [
    # widths, tasks, support, query: every depth, odd widths, tiles and their tails, one of everything
    ((1, 40, 40, 1), 33, 5, 10),
    ((1, 1, 1), 1, 1, 1),
    ((3, 7, 5, 2, 4), 15, 3, 9),
    ((2, 3, 3, 3, 3, 2), 16, 4, 1),
    ((5, 256, 3), 2, 3, 25),
    ((19, 17, 2), 17, 13, 12),
    ((64, 150, 130, 5), 3, 14, 7),
    ((2, 9, 1), 2, 150, 1),
]


def maml(model: nn.Module, data: tuple[Tensor, ...], **options: object) -> Problem:
    problem = problem_of(model, data, **{"method": "maml", **options})
    assert mlp.why_not(problem) is None
    return problem


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), SHAPES)
def test_equals_the_reference(widths, tasks, support, query, activation, loss, steps):
    model = network(widths, activation).double()
    data = tasks_for(widths, loss, tasks, support, query, torch.float64)
    problem = maml(model, data, loss=loss, inner_lr=0.1, inner_steps=steps)
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("tasks", [1, 4, 5, 8, 9, 17, 33])
def test_five_steps_of_every_number_of_tasks(tasks, activation):
    """Full groups, groups with empty lanes, and the narrow groups used for few tasks."""
    widths = (2, 11, 6, 3)
    model = network(widths, activation).double()
    data = tasks_for(widths, "cross_entropy", tasks, 4, 5, torch.float64)
    problem = maml(model, data, loss="cross_entropy", inner_steps=5, inner_lr=0.3)
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-10)


NAMES = ("1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias")
OPTIONS = {
    "head only": {"adapt": ["5.*"]},
    "body only": {"adapt": ["1.*", "3.*"]},
    "middle only": {"adapt": ["3.*"]},
    "weights only": {"adapt": ["*.weight"]},
    "biases only": {"adapt": ["*.bias"]},
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
def test_options(case, activation, loss):
    widths = (3, 6, 5, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, loss, 18, 4, 3, torch.float64)
    problem = maml(model, data, loss=loss, **OPTIONS[case])
    assert_same(mlp.meta_gradients(problem), reference.meta_gradients(problem), 1e-10)


def test_frozen_parameters_stay_and_get_no_gradient():
    widths = (3, 6, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 5, 4, 3, torch.float64)
    model[1].weight.requires_grad_(False)
    found = mlp.meta_gradients(problem := maml(model, data))
    assert "1.weight" not in found.params
    assert_same(found, reference.meta_gradients(problem), 1e-10)


@pytest.mark.parametrize(("widths", "steps"), [((1, 40, 40, 5), 5), ((3, 40, 40, 5), 3), ((784, 64, 5), 1)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_float32_error(widths, steps, activation, loss):
    """At most twice that of torch's double backward, against float64, per tensor.

    Errors are summed over six draws, because the error of five numbers is a matter of luck.
    """
    ours, theirs = {}, {}  # name -> sum of squared errors
    for _ in range(6):
        model, data = network(widths, activation), tasks_for(widths, loss, 3, 5, 25, torch.float32)
        exact = copy.deepcopy(model).double()
        wide = tuple(value.double() if value.is_floating_point() else value for value in data)
        options = {"loss": loss, "inner_steps": steps, "inner_lr": 0.05}
        truth = reference.meta_gradients(maml(exact, wide, **options)).params
        for errors, family in ((ours, mlp), (theirs, reference)):
            found = family.meta_gradients(maml(model, data, **options)).params
            for name, gradient in truth.items():
                error = float((found[name].double() - gradient).square().sum() / gradient.square().sum())
                errors[name] = errors.get(name, 0.0) + error
    for name, error in ours.items():
        assert error**0.5 <= 2 * theirs[name] ** 0.5, (name, error**0.5, theirs[name] ** 0.5)


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"inner_lr": 0.0}, {"inner_steps": 0}])
def test_steps_that_move_nothing_leave_the_query_gradient(options, dtype):
    widths = (3, 9, 8, 4)
    model, data = network(widths, nn.Tanh).to(dtype), tasks_for(widths, "cross_entropy", 19, 4, 5, dtype)
    found, flags = rows(maml(model, data, loss="cross_entropy", **options))
    expected, _ = rows(problem_of(model, data, loss="cross_entropy", method="fo-maml", **options))
    assert torch.equal(found, expected) and not flags.any()


@pytest.mark.parametrize("adapt", [None, ["1.weight"], ["3.*"]])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_hessian_is_symmetric(activation, loss, adapt):
    """One step: what maml subtracts is rate * H u, and u the query gradient of what adapts. <u, H w> = <w, H u>."""
    widths, rate = (3, 7, 6, 4), 0.5
    model = network(widths, activation).double()
    x, y, *first = tasks_for(widths, loss, 6, 5, 4, torch.float64)
    second = tasks_for(widths, loss, 6, 5, 7, torch.float64)[2:]
    options = {"loss": loss, "inner_lr": rate, "inner_steps": 1, "adapt": adapt}
    vectors, products = [], []
    for query in (first, second):
        gradient, _ = rows(problem_of(model, (x, y, *query), method="fo-maml", **options))
        corrected, _ = rows(problem := maml(model, (x, y, *query), **options))
        moves = torch.cat([torch.full((p.numel(),), name in problem.adapted) for name, p in model.named_parameters()])
        vectors.append(gradient * moves)
        products.append((gradient - corrected) / rate)
    left, right = (vectors[0] * products[1]).sum(1), (vectors[1] * products[0]).sum(1)
    assert left.abs().amin() > 1e-6, "the products are not trivial"
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_it_is_the_derivative_of_the_query_loss(loss):
    """By a central difference along a random direction, of the loss after the steps; tanh has no kinks."""
    widths, size = (2, 8, 7, 3), 1e-5
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, loss, 7, 5, 6, torch.float64)
    options = {"loss": loss, "inner_lr": 0.4, "inner_steps": 4}
    gradients = mlp.meta_gradients(maml(model, data, **options)).params
    directions = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in moved.named_parameters():
                value += sign * size * directions[name]
        losses.append(mlp.adapt(maml(moved, data, **options)).query_loss.mean())
    slope = float(losses[0] - losses[1]) / (2 * size)
    assert slope == pytest.approx(float(sum((gradients[n] * d).sum() for n, d in directions.items())), rel=1e-7)


def test_adaptation_and_evaluation_are_those_of_fo_maml():
    widths = (3, 9, 4)
    model, data = network(widths, nn.Tanh), tasks_for(widths, "mse", 7, 4, 5, torch.float32)
    found, expected = mlp.adapt(maml(model, data)), mlp.adapt(problem_of(model, data, method="fo-maml"))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.query_loss, expected.query_loss)
    for name, value in expected.params.items():
        assert torch.equal(found.params[name], value)


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks"), [((3, 33, 20, 5), 37), ((16, 256, 256, 5), 3), ((16, 256, 256, 5), 9)])
def test_same_bits_for_any_number_of_threads(threads, widths, tasks, activation, dtype):
    """Threads share the groups of tasks, or the work within a group, also for few tasks in one or two groups."""
    model = network(widths, activation).to(dtype)
    data = tasks_for(widths, "cross_entropy", tasks, 5, 25, dtype)
    problem = maml(model, data, loss="cross_entropy")
    results = []
    for count in (1, 2, 3, 8, 1):
        torch.set_num_threads(count)
        found = mlp.meta_gradients(problem)
        results.append([*found.params.values(), found.support_loss, found.query_loss])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_whatever_shares_the_batch(loss, dtype):
    widths = (3, 13, 7, 4)
    model, data = network(widths, nn.Tanh).to(dtype), tasks_for(widths, loss, 40, 4, 3, dtype)
    whole, _ = rows(maml(model, data, loss=loss))
    for part in (slice(21, 22), slice(20, 27), slice(3, 38)):
        found, _ = rows(maml(model, tuple(value[part] for value in data), loss=loss))
        assert torch.equal(found, whole[part])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_every_instruction_set(isas, activation, loss):
    """All equal the reference; those with fused multiply-adds have the same bits."""
    widths = (3, 21, 14, 5)
    model, data = network(widths, activation).double(), tasks_for(widths, loss, 19, 13, 12, torch.float64)
    problem = maml(model, data, loss=loss)
    expected, bits = reference.meta_gradients(problem), {}
    for isa in isas:
        C.select_cpu_isa(isa)
        assert_same(mlp.meta_gradients(problem), expected, 1e-10)
        bits[isa] = rows(problem)[0]
    if {"avx2", "avx512"} <= set(isas):
        assert torch.equal(bits["avx512"], bits["avx2"])


# ---- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_nonfinite_tasks(where, policy, bad, activation):
    """Only the task that meets a NaN or an Inf is flagged, and only its numbers are affected."""
    widths = (3, 6, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    data[where][13, 0, 0] = bad
    problem = maml(model, data, nonfinite=policy)
    found, expected = mlp.meta_gradients(problem), reference.meta_gradients(problem)
    assert found.nonfinite.tolist() == [task == 13 for task in range(18)] == expected.nonfinite.tolist()
    assert int(found.live_tasks) == int(expected.live_tasks)
    for name, gradient in expected.params.items():
        assert found.params[name].isfinite().all() == gradient.isfinite().all()
        if policy == "skip":
            torch.testing.assert_close(found.params[name], gradient, rtol=1e-10, atol=1e-10)
    gradients, flags = rows(problem)
    assert torch.equal(flags, found.nonfinite)
    assert gradients[~flags].isfinite().all() and not gradients[13].isfinite().all()


@pytest.mark.parametrize("tensor", ["1.weight", "1.bias"])
def test_what_only_the_second_order_makes_infinite_is_flagged(tensor):
    """The step has no length, and the product with the Hessian overflows in one tensor."""
    model, data, options = overflowing(tensor)
    assert rows(problem_of(model, data, method="fo-maml", **options))[1].tolist() == [False, False]
    gradients, flags = rows(problem := maml(model, data, **options))
    assert flags.tolist() == [False, True] == reference.meta_gradients(problem).nonfinite.tolist()
    assert gradients[1].isfinite().sum() == 3


@pytest.mark.parametrize("where", [1, 3])
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_label_out_of_range_makes_its_task_nan(label, where):
    """The package refuses such labels on the CPU; the native code does not, and keeps the other tasks apart."""
    widths = (3, 6, 3)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "cross_entropy", 5, 4, 3, torch.float32)
    healthy, _ = rows(maml(model, data, loss="cross_entropy"))
    data[where][1, 2] = label
    gradients, flags = rows(maml(model, data, loss="cross_entropy"))
    assert flags.tolist() == [False, True, False, False, False]
    assert gradients[1].isnan().all() and torch.equal(gradients[~flags], healthy[~flags])


# ---- plans and choice -----------------------------------------------------------------------------------------------


def test_plan():
    """Only maml with a query set and steps takes more memory, by the parameters of every step."""
    widths, parameters = (1, 40, 40, 1), 1761

    def scalars(method: str, steps: int, query: int = 10) -> int:
        return C.plan_mlp_meta_step_cpu(widths, 1000, 10, query, 4, 2, steps, method)["workspace_scalars"]

    lanes = C.plan_mlp_meta_step_cpu(widths, 1000, 10, 10, 4, 2)["lanes"]
    first_order = scalars("sign-maml", 5)
    assert first_order == scalars("fo-maml", 99) == scalars("maml", 0)
    assert scalars("maml", 5, query=0) == scalars("fo-maml", 5, query=0)
    assert scalars("maml", 5) > first_order
    assert scalars("maml", 6) - scalars("maml", 5) == 2 * lanes * parameters
    with pytest.raises(ValueError, match="method: expected 'sign-maml', 'fo-maml' or 'maml', found 'reptile'"):
        scalars("reptile", 1)
    with pytest.raises(ValueError, match="tasks, steps, parameters: expected a product of at most"):
        scalars("maml", 2**50)
    with pytest.raises(ValueError, match="tasks, steps, parameters: expected none below 0"):
        scalars("maml", -1)


def test_auto_takes_it():
    widths = (1, 40, 40, 1)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 3, 5, 5, torch.float32)
    options = {"inner_lr": 0.01, "inner_steps": 2, "loss": "mse", "method": "maml"}
    found = signmaml_ext.explain(model, *data, **options)
    assert (found.backend, found.family) == ("cpu", "mlp")
    assert signmaml_ext.meta_step(model, *data, **options).backend == "cpu"
    assert signmaml_ext.evaluate(model, *data, **options).backend == "cpu"
