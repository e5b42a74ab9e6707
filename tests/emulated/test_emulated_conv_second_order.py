"""maml of Conv-N networks on the emulated GPU, against torch's double backward."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch

from helpers.cases import conv_cases, emulated_cases, nets
from helpers.cases.conv_cases import Net
from helpers.devices import emulated
from helpers.devices.emulated import by_seed
from signmaml_ext import conv, reference
from signmaml_ext.checks import check_problem


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


NETS = {
    "max": Net(),
    "stride": Net(halving="stride", query=3),
    "one block": Net(blocks=1, height=8, width=11),
    "one block, stride, mean": Net(blocks=1, halving="stride", readout="mean", height=6, width=8, channels=2),
    "three blocks, odd": Net(blocks=3, height=15, width=9, channels=2, support=2, query=3),
    "colour, mean": Net(channels=3, readout="mean", conv_bias=False),
    "colour, stride": Net(blocks=3, channels=3, halving="stride", height=11, width=9),
    "24 filters": Net(filters=24, height=6, width=5),
    "32 filters": Net(filters=32, height=5, width=5, conv_bias=False),
    "many ways": Net(ways=100, height=5, width=4, query=2),
    "wide": Net(height=4, width=37, support=2, query=2),
}
FORMS = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])
@pytest.mark.parametrize("name", NETS)
def test_as_exact_as_torchs_double_backward(native, name, by_covariance):
    net, options = NETS[name], {"steps": 2, "lr": 0.02, "method": "maml"}
    by_seed(native, list(NETS).index(name))
    apart = []
    for data in conv_cases.draw_tasks(net, seed=3):
        found = conv_cases.run(native, net, data, by_covariance=by_covariance, **options)
        exact, peer = conv_cases.peers(net, data, **options)
        apart.append(conv_cases.task_errors(net, found, exact, peer))
        first_order = conv_cases.definition(net, data, **{**options, "method": "fo-maml"})
        assert max(conv_cases.errors(net, first_order.grads, exact.grads)) > 1e-3, "the second order is in doubt"
        torch.testing.assert_close(found.query_loss.double(), exact.query_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.support_loss.double(), exact.support_loss, rtol=1e-5, atol=1e-5)
        assert not found.nonfinite.any()
    conv_cases.assert_within_twice_torch(net, torch.cat(apart))


@pytest.mark.parametrize(
    "case",
    ["some", *(pytest.param(case, marks=pytest.mark.slow) for case in ("rates", "head only", "body only", "nothing"))],
)
def test_rates_and_what_adapts(native, case):
    """What does not adapt has a gradient through the steps, too."""
    by_seed(native, 6)
    net = Net(channels=2, tasks=2)
    data = conv_cases.draw(net)
    count = len(net.tensors)
    rates = torch.rand(3, count, generator=torch.Generator().manual_seed(1)) * 0.1
    options = {
        "rates": {"lr": rates},
        "head only": {"adapt": [False] * (count - 2) + [True] * 2},
        "body only": {"adapt": [True] * (count - 2) + [False] * 2},
        "some": {"lr": rates, "adapt": [i % 3 != 1 for i in range(count)]},
        "nothing": {"adapt": [False] * count},
    }[case]
    options = {"lr": 0.05, "steps": 3, "method": "maml", **options}
    found, exact = conv_cases.run(native, net, data, **options), conv_cases.definition(net, data, **options)
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 5e-6
    assert max(conv_cases.errors(net, found.adapted, exact.adapted)) < 1e-6


@pytest.mark.slow
def test_without_a_rate_it_is_the_query_gradient(native):
    by_seed(native, 2)
    net = Net(tasks=2)
    data = conv_cases.draw(net)
    exact, first_order = (
        conv_cases.run(native, net, data, lr=0.0, steps=2, method=method) for method in ("maml", "fo-maml")
    )
    assert torch.equal(exact.grads, first_order.grads)
    still = conv_cases.run(native, net, data, steps=0, method="maml")
    assert torch.equal(still.grads, first_order.grads)


@pytest.mark.slow
def test_what_is_not_asked_for(native):
    """Everything but the gradient is that of fo-maml, bit for bit; without gradients there is no way back."""
    by_seed(native, 4)
    net = Net(tasks=2, height=6, width=7)
    data = conv_cases.draw(net)
    whole, first_order = (
        conv_cases.run(native, net, data, steps=2, lr=0.05, method=method) for method in ("maml", "fo-maml")
    )
    for options in ({}, {"wants_grads": False}, {"with_query": False}):
        part = conv_cases.run(native, net, data, steps=2, lr=0.05, method="maml", **options)
        for name in ("support_loss", "query_loss", "query_accuracy", "logits", "adapted", "nonfinite"):
            found = getattr(part, name)
            assert found is None or torch.equal(found, getattr(first_order, name)), (options, name)
        assert part.grads is None or torch.equal(part.grads, whole.grads)


@pytest.mark.slow
@pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])
def test_a_task_does_not_depend_on_its_neighbours_or_the_schedule(native, by_covariance):
    net = Net(tasks=4, height=6, width=7)
    data = conv_cases.draw(net)
    rows = []
    for seed, chosen, limit in ((0, slice(0, 4), 0), (1, slice(2, 3), 0), (3, slice(0, 4), 1)):
        by_seed(native, seed)
        part = conv_cases.run(
            native, net, data.tasks(chosen), steps=2, lr=0.05, method="maml", by_covariance=by_covariance,
            workspace_limit=limit,
        )  # fmt: skip
        rows.append(part.grads[2 - chosen.start])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


@pytest.mark.slow
def test_nonfinite_tasks(native):
    """Faults of the support set, of the query set, and of the second order alone, whose neighbour keeps every bit."""
    by_seed(native, 8)
    emulated_cases.conv_second_order_faults(native)


@pytest.mark.parametrize("by_covariance", FORMS, ids=["covariance", "direct"])
def test_ties_and_dead_filters(native, by_covariance):
    """Winners among equal values, and ReLU at 0, are constants of the second order: torch's choices."""
    by_seed(native, 9)
    net = Net(tasks=1, height=8, width=8, support=2, query=2, conv_bias=False)
    data = conv_cases.with_ties(conv_cases.draw(net))
    data.support_x, data.support_y = data.query_x, data.query_y
    for block in range(net.blocks):
        data.params[3 * block + 1][3] = 0.0
        data.params[3 * block + 2][3] = 0.5 * block
    options = {"steps": 1, "lr": 0.02, "method": "maml"}
    found = conv_cases.run(native, net, data, by_covariance=by_covariance, **options)
    exact = conv_cases.definition(net, data, **options)
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 5e-6


def test_sure_of_a_wrong_answer(native):
    """A share near 1 leaves others that are tiny; their derivatives must not be differences of numbers near 1."""
    by_seed(native, 10)
    net = Net(tasks=3, ways=2, support=2, query=2)
    data = conv_cases.draw(net)
    data.params[-1] += torch.tensor([0.0, 12.0])
    options = {"steps": 1, "lr": 0.02, "method": "maml"}
    data.support_y[:] = 1
    conv_cases.assert_within_twice_torch(net, conv_cases.errors_of_tasks(native, net, [data], **options))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 0.01), ("bf16", 0.15)])
def test_lower_precisions(native, precision, tolerance):
    """As near as rounded operands allow; a first-order gradient is much farther away."""
    by_seed(native, 13)
    net = Net(tasks=2)
    data = conv_cases.draw(net)
    options = {"steps": 2, "lr": 0.1, "method": "maml"}
    runs = [conv_cases.run(native, net, data, precision=precision, **options) for _ in range(2)]
    assert torch.equal(runs[0].grads, runs[1].grads) and not runs[0].nonfinite.any()
    exact = conv_cases.definition(net, data, **options)
    first_order = conv_cases.definition(net, data, **{**options, "method": "fo-maml"})
    found, without = (torch.tensor(conv_cases.errors(net, each.grads, exact.grads)) for each in (runs[0], first_order))
    assert found.median() < tolerance and found.median() < without.median() / 3, (found, without)


@pytest.mark.slow
def test_through_the_python_call(native):
    """A learn2learn-style module, with parameters in a different order than in theta, against the float64 reference."""
    by_seed(native, 14)
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = nets.image_tasks(3, 3, 1, 2, 2, 9, dtype=torch.float32)
    options = {
        "inner_lr": 0.05, "inner_steps": 2, "method": "maml", "loss": "cross_entropy", "adapt": None,
        "backend": "torch", "precision": "fp32", "nonfinite": "propagate", "batch_norm": "batch", "seed": 0,
        "zero_dead_bias": True,
    }  # fmt: skip
    problem = check_problem(model, *data, **options)
    assert conv.why_not(problem, on_cuda=True) is None
    found = conv.meta_gradients(problem, native)
    wide = tuple(value.double() if value.is_floating_point() else value for value in data)
    exact = reference.meta_gradients(check_problem(copy.deepcopy(model).double(), *wide, **options))
    for name, gradient in exact.params.items():
        error = (found.params[name].double() - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), (name, float(error))
    assert torch.equal(conv.adapt(problem, native).query_loss, found.query_loss)
