"""mlp_meta_step on the emulated GPU against the reference, in float64 and float32."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import nn

from helpers.cases import nets
from helpers.cases.perceptrons import assert_same, network, problem_of, tasks_for
from helpers.devices import emulated
from signmaml_ext import fused, mlp, reference


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


SHAPES = [
    # widths, tasks, support, query: warp and block teams, shared memory and workspace, odd sizes, one of everything
    ((1, 40, 40, 1), 3, 5, 5),
    ((1, 1, 1), 1, 1, 1),
    ((3, 7, 5, 2, 4), 5, 3, 9),
    ((2, 3, 3, 3, 3, 2), 2, 4, 1),
    ((5, 256, 3), 2, 3, 11),
    ((64, 96, 96, 5), 12, 2, 3),
]


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), SHAPES)
def test_meta_step_equals_the_reference(native, widths, tasks, support, query, activation, loss, method):
    native.configure(seed=1, blocks_alive=2, multiprocessors=1)
    model = network(widths, activation).double()
    data = tasks_for(widths, loss, tasks, support, query, torch.float64)
    problem = problem_of(model, data, loss=loss, method=method)
    assert mlp.why_not(problem) is None
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-11)


def test_plans_of_the_cases_differ(native):
    """The shapes above reach all four kinds of kernel, and teams of every size."""
    plans = [native.plan_mlp_meta_step(*shape, 8, 1) for shape in SHAPES]
    assert {(plan["threads"] > 32, plan["in_shared"]) for plan in plans} == set(
        itertools.product([False, True], repeat=2)
    )
    assert {plan["threads"] for plan in plans} == {32, 64, 128, 256}


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_bits_do_not_depend_on_the_team(native, loss):
    """The same tasks with so few and so many others that a task gets 8, 4, 2 and 1 warps."""
    widths = (3, 20, 30, 4)
    model, data = network(widths, nn.Tanh), tasks_for(widths, loss, 12, 40, 35, torch.float32)
    found = {}
    for tasks in (1, 4, 6, 12):
        native.configure(seed=tasks, multiprocessors=1)
        problem = problem_of(model, tuple(tensor[:tasks] for tensor in data), loss=loss)
        step, adapted = mlp.meta_gradients(problem, native), mlp.adapt(problem, native)
        threads = native.plan_mlp_meta_step(widths, tasks, 40, 35, 4, 1)["threads"]
        found[threads] = {
            "query_loss": step.query_loss, "query_accuracy": step.query_accuracy, "support_loss": step.support_loss.T,
            **adapted.params,
        }  # fmt: skip
    assert found.keys() == {32, 64, 128, 256}
    for result in found.values():
        for name, expected in found[256].items():
            assert (result[name] is None) == (expected is None)
            if expected is not None:
                assert result[name][:1].equal(expected[:1]), name


def test_block_in_shared_memory(native):
    """Only float32 is small enough for this kind. Plain gradient steps: a flipped sign would hide other errors."""
    native.configure(seed=2, multiprocessors=1)
    widths = (2, 65, 1)
    model, data = network(widths, nn.Tanh), tasks_for(widths, "mse", 2, 33, 30, torch.float32)
    plan = native.plan_mlp_meta_step(widths, 2, 33, 30, 4, 1)
    assert (plan["threads"], plan["in_shared"]) == (256, True)
    problem = problem_of(model, data, inner_steps=2, method="fo-maml")
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-5)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_many_examples_take_a_block_and_workspace(native, loss):
    native.configure(seed=2, multiprocessors=1)
    widths = (3, 40, 40, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, loss, 2, 70, 65, torch.float64)
    plan = native.plan_mlp_meta_step(widths, 2, 70, 65, 8, 1)
    assert (plan["threads"], plan["in_shared"]) == (256, False)
    problem = problem_of(model, data, loss=loss, inner_steps=2)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-11)


def test_more_tasks_than_teams_and_chunks(native, monkeypatch):
    native.configure(seed=3, multiprocessors=1)
    widths = (1, 4, 1)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 70, 2, 2, torch.float64)
    problem = problem_of(model, data, inner_steps=2)
    expected = reference.meta_gradients(problem)
    assert_same(mlp.meta_gradients(problem, native), expected, 1e-11)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 30 * 13 * 8)
    assert_same(mlp.meta_gradients(problem, native), expected, 1e-11)


@pytest.mark.parametrize("tasks", [1, 2, 31, 32, 33, 100])
def test_any_number_of_tasks(native, tasks):
    """Fewer and more tasks than the device has teams: one multiprocessor is configured, which has 32 warps."""
    native.configure(seed=tasks, multiprocessors=1)
    widths = (2, 3, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", tasks, 2, 1, torch.float64)
    problem = problem_of(model, data, inner_steps=2)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-11)


@pytest.mark.slow
def test_a_hundred_thousand_tasks(native):
    """The largest number of tasks that is promised, in one launch; the smallest network keeps the test short."""
    native.configure(multiprocessors=1)
    widths, tasks = (1, 1, 1), 100_000
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", tasks, 1, 1, torch.float64)
    assert tasks * 4 * 8 < fused.CHUNK_BYTES, "one launch"
    problem = problem_of(model, data, inner_steps=1)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-10)


@pytest.mark.parametrize("tasks", [1, 10, 1000, 100_000])
@pytest.mark.parametrize(("widths", "count"), [((1, 40, 40, 1), 10), ((784, 256, 256, 256, 256, 100), 500)])
def test_plans_up_to_a_hundred_thousand_tasks(native, widths, count, tasks):
    """The number of teams, and with it the workspace, is limited to what is resident. Offsets into the workspace and
    the results may exceed 32 bits."""
    plan = native.plan_mlp_meta_step(widths, tasks, count, count, 4, 132)
    assert 1 <= plan["teams"] <= min(tasks, 132 * 32 * 32 // plan["threads"])
    assert plan["shared_bytes"] <= 48 * 1024
    row = sum((i + 1) * o for i, o in itertools.pairwise(widths))
    assert plan["parameters"] == row
    if not plan["in_shared"]:
        assert plan["workspace_scalars"] % plan["teams"] == 0
        assert plan["workspace_scalars"] // plan["teams"] >= row
        if tasks == 100_000:
            assert plan["workspace_scalars"] > 2**28 and tasks * row > 2**31


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 0},
        {"adapt": ["3.*"]},
        {"adapt": ["*.weight"]},
        {"inner_lr": torch.tensor([0.1, 0.0, 0.05])},
        {"inner_lr": {"1.weight": 0.1, "1.bias": 0.2, "3.weight": torch.tensor(0.3), "3.bias": 0.0}},
        {
            "inner_lr": {
                n: torch.rand(3, *[1] * (1 + n.endswith("t"))) for n in ("1.weight", "1.bias", "3.weight", "3.bias")
            }
        },
    ],
    ids=["no steps", "head only", "weights only", "rate a step", "rate a tensor", "rate a tensor and step"],
)
def test_options(native, options):
    native.configure()
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "mse", 3, 4, 3, torch.float64)
    problem = problem_of(model, data, **options)
    assert_same(mlp.meta_gradients(problem, native), reference.meta_gradients(problem), 1e-11)
    found, expected = mlp.adapt(problem, native), reference.adapt(problem)
    assert found.params.keys() == expected.params.keys()
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_nonfinite_tasks(native, where, policy, activation):
    native.configure()
    widths = (3, 6, 2)
    model, data = network(widths, activation).double(), tasks_for(widths, "mse", 3, 4, 3, torch.float64)
    data[where][1, 0, 0] = torch.nan
    problem = problem_of(model, data, nonfinite=policy)
    found, expected = mlp.meta_gradients(problem, native), reference.meta_gradients(problem)
    assert found.nonfinite.tolist() == [False, True, False]
    assert int(found.live_tasks) == (2 if policy == "skip" else 3)
    for name, gradient in expected.params.items():
        torch.testing.assert_close(found.params[name].isnan(), gradient.isnan())
        if policy == "skip":
            torch.testing.assert_close(found.params[name], gradient, rtol=1e-11, atol=1e-11)


def test_label_out_of_range_flags_its_task(native):
    native.configure()
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "cross_entropy", 3, 4, 3, torch.float64)
    data[1][2, 0] = 2
    found = mlp.meta_gradients(problem_of(model, data, loss="cross_entropy", nonfinite="skip"), native)
    assert found.nonfinite.tolist() == [False, False, True]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(
    ("widths", "tasks", "query"),
    [((3, 40, 40, 5), 4, 25), ((1, 40, 40, 2), 1, 10), ((5, 256, 3), 3, 9), ((2, 8, 8, 8, 8, 4), 33, 3)],
)
def test_float32_gradients_before_the_sign(native, widths, tasks, query, loss, activation):
    """At most twice torch's own error against float64: no inner step, so no sign can flip."""
    native.configure(multiprocessors=1)
    model, data = network(widths, activation), tasks_for(widths, loss, tasks, 5, query, torch.float32)
    exact = network(widths, activation).double()
    exact.load_state_dict(model.state_dict())
    wide = tuple(value.double() if value.is_floating_point() else value for value in data)
    options = {"loss": loss, "inner_steps": 0}
    truth = reference.meta_gradients(problem_of(exact, wide, **options)).params
    ours = mlp.meta_gradients(problem_of(model, data, **options), native).params
    theirs = reference.meta_gradients(problem_of(model, data, **options)).params
    errors = {n: [(found[n].double() - g).flatten() for found in (ours, theirs)] for n, g in truth.items()}
    error, peer = (torch.cat(of_all).norm() for of_all in zip(*errors.values(), strict=True))
    assert error <= 2 * peer, (float(error), float(peer))
    if tasks > 4:
        return  # the mean adds tasks in order, torch pairwise: where many tasks cancel, this difference dominates
    for name, (error, peer) in errors.items():
        # For a tensor of a few numbers torch's error may be small by luck: allow one rounding of the result.
        rounding = torch.finfo(torch.float32).eps * truth[name].norm()
        assert error.norm() <= 2 * peer.norm() + rounding, (name, float(error.norm()), float(peer.norm()))


def test_bitwise_whatever_shares_the_batch(native):
    widths = (3, 6, 2)
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 5, 4, 3, torch.float32)
    results = []
    for seed, tasks in ((0, slice(0, 5)), (1, slice(2, 3)), (2, slice(1, 4))):
        native.configure(seed=seed, blocks_alive=1 + seed, multiprocessors=1)
        part = mlp.adapt(problem_of(model, tuple(value[tasks] for value in data)), native)
        results.append(part.logits[2 - tasks.start])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + x


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 2)
        self.hidden = nn.Linear(3, 6)

    def forward(self, x):
        return self.out(nn.functional.relu(self.hidden(x.flatten(1))))


def test_recognised_by_structure():
    found = mlp.read(Functional())
    assert found == mlp.MlpSpec((("hidden.weight", "hidden.bias"), ("out.weight", "out.bias")), (3, 6, 2), "relu")
    from signmaml.models import MLP

    assert isinstance(mlp.read(MLP(1, 1, hidden=(40, 40))), mlp.MlpSpec)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual(), "no plain chain"),
        (nn.Sequential(nn.Linear(3, 2)), "not linear layers with one kind of activation"),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), "more than linear layers and act"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)),
            "more than linear layers and act",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "no activation before layer"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
            "one kind of activation",
        ),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)), "no bias"),
        (nets.conv4(), "it has convolutions"),
        (nets.Recurrent(), "torch.fx cannot trace it|it uses|no plain chain|it flattens other axes"),
    ],
)
def test_refused_with_a_reason(model, reason):
    import re

    found = mlp.read(model)
    assert isinstance(found, str) and re.search(reason, found), found


def test_what_the_kernel_would_get_wrong_is_refused():
    """Tied layers, layers that the forward leaves out, and targets of another shape."""
    data = tasks_for((4, 4, 4), "mse", 2, 3, 3, torch.float64)
    tied = network((4, 4, 4), nn.ReLU).double()
    assert mlp.why_not(problem_of(tied, data)) is None
    tied[3].weight = tied[1].weight
    assert mlp.why_not(problem_of(tied, data)) == "layers '1' and '3' share parameters"
    unused = Functional().double()
    unused.extra = nn.Linear(2, 2).double()
    few = tasks_for((3, 6, 2), "mse", 2, 3, 3, torch.float64)
    assert mlp.why_not(problem_of(unused, few)) == "it has trainable parameters that its layers do not use"
    x, y, query_x, query_y = few
    wrong = problem_of(Functional().double(), (x, y[..., :1], query_x, query_y))
    assert mlp.why_not(wrong) == "the targets are not [T, S, 2]"


def test_a_module_that_computes_something_else_is_found_out():
    """Its structure alone would be accepted, because forward hooks are not traced."""
    model = network((3, 6, 2), nn.ReLU).double()
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    data = tasks_for((3, 6, 2), "mse", 2, 4, 3, torch.float64)
    assert mlp.why_not(problem_of(model, data)) == "module '1' has forward hooks"
