"""The Conv-N kernels on the emulated GPU against the definition in plain PyTorch."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

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
    "stride": Net(halving="stride"),
    "one block": Net(blocks=1, height=8, width=11),
    "one block, stride, mean": Net(blocks=1, halving="stride", readout="mean", height=6, width=8, channels=2),
    "three blocks, odd": Net(blocks=3, height=15, width=9, channels=2, support=2, query=3),
    "colour, mean": Net(channels=3, readout="mean", conv_bias=False),
    "colour, stride": Net(blocks=3, channels=3, halving="stride", height=11, width=9),
    "six blocks": Net(blocks=6, halving="stride", height=9, width=8, query=24),
    "24 filters": Net(filters=24, height=6, width=5, tasks=1),
    "32 filters, bf16 depth": Net(filters=32, height=5, width=5, tasks=1, conv_bias=False),
    "many ways": Net(ways=100, height=5, width=4, query=2),
    "two ways, eps": Net(ways=2, eps=1e-3),
    "wide": Net(height=4, width=37, support=2, query=2),
    "tall": Net(height=41, width=4, channels=3, support=2, query=2),
    "many images": Net(blocks=2, height=5, width=5, support=2, query=70, tasks=1),
}
# Block 1 via the covariance of its patches, or computed like the other blocks.
FORMS = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("by_covariance", FORMS, ids=["covariance", "direct"])
@pytest.mark.parametrize("name", NETS)
def test_gradients_before_the_sign(native, name, by_covariance):
    net = NETS[name]
    by_seed(native, list(NETS).index(name))
    apart = []
    for data in conv_cases.draw_tasks(net, seed=3):
        found = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
        exact, peer = conv_cases.peers(net, data)
        apart.append(conv_cases.task_errors(net, found, exact, peer))
        torch.testing.assert_close(found.query_loss.double(), exact.query_loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.query_accuracy, exact.query_accuracy)
        assert not found.nonfinite.any()
    conv_cases.assert_within_twice_torch(net, torch.cat(apart))


@pytest.mark.slow
@pytest.mark.parametrize("by_covariance", FORMS, ids=["covariance", "direct"])
def test_more_tiles_than_slices(native, by_covariance):
    """A thread block processes several tiles in turn and merges their statistics.

    The bound does not depend on torch's error: torch sums BatchNorm's many values in double on a CPU, in float32 on a
    GPU.
    """
    by_seed(native, 15)
    net = Net(halving="stride", height=20, width=22, readout="mean", tasks=1, support=2, query=66)
    assert max(one["grid"][0] for one in native.plan_conv_meta_step(net.shape, 1, 2, 66, 0, "fp32", 1)["launches"]) > 30
    data = conv_cases.draw(net, seed=3)
    found = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
    exact = conv_cases.definition(net, data, steps=0)
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("filters", [40, 72])
def test_several_chunks_of_channels_and_columns(native, filters):
    """72 filters make two blocks of columns and three chunks of depth."""
    by_seed(native, 1)
    net = Net(blocks=2, filters=filters, height=4, width=4, tasks=1, support=2, query=2)
    conv_cases.assert_within_twice_torch(net, conv_cases.errors_of_tasks(native, net, conv_cases.draw_tasks(net)))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 128.0])
def test_images_far_from_zero(native, offset):
    """Pixel values as in files with 0..255: the covariance must not suffer from cancellation."""
    by_seed(native, 2)
    net = Net(channels=3, height=10, width=9)
    draws = [conv_cases.draw(net, seed, offset) for seed in range(6)]
    for by_covariance in (True, False):
        apart = conv_cases.errors_of_tasks(native, net, draws, by_covariance=by_covariance)
        conv_cases.assert_within_twice_torch(net, apart)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_the_step_is_exact_given_the_gradient(native, method):
    """With the same data as query set of no step and as support set of one, the step uses exactly that gradient."""
    by_seed(native, 4)
    emulated_cases.conv_step_is_exact(native, method)


def test_a_nan_of_any_bits_stays_one(native):
    """Splitting a float in two halves for the tensor cores must not turn a NaN into a number."""
    by_seed(native, 6)
    emulated_cases.conv_nan_of_any_bits(native)


@pytest.mark.parametrize("halving", ["max", "stride"])
def test_whole_meta_step_of_tasks_without_a_flipped_sign(native, halving):
    by_seed(native, 5)
    net = Net(halving=halving, channels=3, tasks=4)
    data = conv_cases.draw(net, seed=1)
    found, exact = conv_cases.run(native, net, data, steps=2), conv_cases.definition(net, data, steps=2)
    same = (found.adapted.double() - exact.adapted).abs().amax(1) < 1e-4
    assert same.sum() >= 2, "too many signs flipped to say anything"
    for t in same.nonzero()[:, 0].tolist():
        rows = slice(t, t + 1)
        assert max(conv_cases.errors(net, found.grads[rows], exact.grads[rows])) < 5e-6
        torch.testing.assert_close(found.query_loss[t].double(), exact.query_loss[t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.support_loss[:, t].double(), exact.support_loss[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "rates", "head only", "body only", "some"])
def test_plain_gradient_steps_and_options(native, case):
    """Plain gradient steps are smooth, so whole trajectories can be compared with float64."""
    by_seed(native, 6)
    net = Net(channels=2, tasks=2)
    data = conv_cases.draw(net)
    count = len(net.tensors)
    options = {
        "plain": {},
        "rates": {"lr": torch.rand(3, count, generator=torch.Generator().manual_seed(1)) * 0.1},
        "head only": {"adapt": [False] * (count - 2) + [True] * 2},
        "body only": {"adapt": [True] * (count - 2) + [False] * 2},
        "some": {"adapt": [i % 3 != 1 for i in range(count)]},
    }[case]
    options = {"lr": 0.05, "steps": 3, "method": "fo-maml", **options}
    found, exact = conv_cases.run(native, net, data, **options), conv_cases.definition(net, data, **options)
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 5e-6
    assert max(conv_cases.errors(net, found.adapted, exact.adapted)) < 1e-6
    torch.testing.assert_close(found.support_loss.double(), exact.support_loss, rtol=1e-5, atol=1e-5)
    for tensor, before, moves in zip(
        conv_cases.split(net, found.adapted), data.params, options.get("adapt", [True] * count), strict=True
    ):
        assert moves or torch.equal(tensor, before.expand_as(tensor))


@pytest.mark.slow
def test_forward_only_and_without_a_query_set(native):
    by_seed(native, 7)
    emulated_cases.conv_branches(native, Net())


@pytest.mark.slow
@pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_task_does_not_depend_on_its_neighbours_or_the_schedule(native, steps, by_covariance):
    net = Net(tasks=5, height=6, width=7)
    data = conv_cases.draw(net)
    results = []
    for seed, chosen, limit in ((0, slice(0, 5), 0), (1, slice(2, 3), 0), (2, slice(1, 4), 0), (3, slice(0, 5), 1)):
        by_seed(native, seed)
        part = conv_cases.run(
            native, net, data.tasks(chosen), steps=steps, by_covariance=by_covariance, workspace_limit=limit
        )
        row = 2 - chosen.start
        results.append((part.grads[row], part.adapted[row], part.logits[row], part.support_loss[:, row]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_chunks_of_tasks_give_the_same(native):
    net = Net(tasks=5, height=6, width=7)
    data = conv_cases.draw(net)
    plans = [native.plan_conv_meta_step(net.shape, 5, 3, 4, 1, "fp32", 2, workspace_limit=limit) for limit in (0, 1)]
    limit = plans[1]["workspace_bytes"] * 2
    assert [plan["chunk"] for plan in plans] == [5, 1]
    whole, ones, pairs = (conv_cases.run(native, net, data, workspace_limit=each) for each in (0, 1, limit))
    for name in ("grads", "adapted", "logits", "support_loss", "query_loss", "query_accuracy"):
        assert torch.equal(getattr(whole, name), getattr(ones, name)), name
        assert torch.equal(getattr(whole, name), getattr(pairs, name)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    ["nan in support", "label in query", "nan in query", "inf in support", "label in support", "negative label"],
)
def test_nonfinite_tasks(native, fault):
    by_seed(native, 8)
    net = Net(tasks=3, channels=2)
    data = conv_cases.draw(net)
    healthy = conv_cases.run(native, net, data, steps=2)
    if "label" in fault:
        (data.query_y if "query" in fault else data.support_y)[1, 0] = -1 if "negative" in fault else net.ways
    else:
        x = data.query_x if "query" in fault else data.support_x
        x[1, 0, 0, 3, 2] = torch.nan if "nan" in fault else torch.inf
    found, exact = conv_cases.run(native, net, data, steps=2), conv_cases.definition(net, data, steps=2)
    assert found.nonfinite.tolist() == exact.nonfinite.tolist() == [False, True, False]
    for name in ("query_loss", "support_loss"):
        assert torch.equal(getattr(found, name).isnan(), getattr(exact, name).isnan()), name
    for of_found, of_exact in zip(conv_cases.split(net, found.grads), conv_cases.split(net, exact.grads), strict=True):
        assert torch.equal(of_found.isfinite(), of_exact.isfinite())
    for row in (0, 2):
        assert torch.equal(found.grads[row], healthy.grads[row])
        assert torch.equal(found.adapted[row], healthy.adapted[row])
    # The flagged task is left out of the mean.
    mean, flags = torch.zeros(found.grads.shape[1]), found.nonfinite.clone()
    emulated.meta_accumulate_(native, mean, found.grads, nonfinite=flags, skip_nonfinite=True)
    assert torch.equal(mean, (found.grads[0] + found.grads[2]) / 2)


@pytest.mark.parametrize("by_covariance", FORMS, ids=["covariance", "direct"])
def test_ties_in_pooling_take_the_first(native, by_covariance):
    """Equal values are common in drawings; torch sends the gradient to the first of them."""
    by_seed(native, 9)
    net = Net(tasks=1, height=8, width=8, support=2, query=2, conv_bias=False)
    data = conv_cases.with_ties(conv_cases.draw(net))
    found = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
    exact = conv_cases.definition(net, data, steps=0)
    windows = F.conv2d(data.query_x[0], data.params[0], padding=1).unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert ((windows == windows.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() > 0.3, "hardly any tie"
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 2e-6


@pytest.mark.parametrize("by_covariance", FORMS, ids=["covariance", "direct"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_relu_at_zero_and_a_dead_filter(native, beta, by_covariance):
    """With gamma = 0 a filter's outputs all equal beta. ReLU passes nothing at 0; above, pooling takes the first."""
    by_seed(native, 10)
    net = Net(tasks=1, conv_bias=False)
    data = conv_cases.draw(net)
    for block in range(net.blocks):
        data.params[3 * block + 1][3] = 0.0
        data.params[3 * block + 2][3] = beta
    found = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
    exact = conv_cases.definition(net, data, steps=0)
    assert max(conv_cases.errors(net, found.grads, exact.grads)) < 2e-6
    of_beta = conv_cases.split(net, found.grads)[2][0, 3]
    assert (of_beta == 0) == (beta == 0)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precisions_do_whole_meta_steps(native, precision):
    by_seed(native, 13)
    net = Net(tasks=2)
    data = conv_cases.draw(net)
    runs = [conv_cases.run(native, net, data, steps=2, precision=precision) for _ in range(2)]
    assert torch.equal(runs[0].grads, runs[1].grads) and not runs[0].nonfinite.any()
    exact = conv_cases.definition(net, data, steps=2)
    torch.testing.assert_close(runs[0].support_loss[0].double(), exact.support_loss[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", ["sign-maml", pytest.param("fo-maml", marks=pytest.mark.slow)])
def test_through_the_python_call(native, method):
    """A learn2learn-style module, with parameters in a different order than in theta, against the float64 reference."""
    by_seed(native, 14)
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = nets.image_tasks(3, 3, 1, 2, 2, 9, dtype=torch.float32)
    options = {
        "inner_lr": 0.01, "inner_steps": 2, "method": method, "loss": "cross_entropy",
        "adapt": None, "backend": "torch", "precision": "fp32", "nonfinite": "propagate", "batch_norm": "batch",
        "seed": 0, "zero_dead_bias": True,
    }  # fmt: skip
    problem = check_problem(model, *data, **options)
    assert conv.why_not(problem) is None
    found = conv.meta_gradients(problem, native)
    wide = tuple(value.double() if value.is_floating_point() else value for value in data)
    exact = reference.meta_gradients(check_problem(copy.deepcopy(model).double(), *wide, **options))
    torch.testing.assert_close(found.support_loss.double(), exact.support_loss, rtol=1e-4, atol=1e-4)
    if method == "fo-maml":  # no sign can flip
        for name, gradient in exact.params.items():
            error = (found.params[name].double() - gradient).norm()
            assert error <= 1e-5 * gradient.norm(), (name, float(error))
        torch.testing.assert_close(found.query_loss.double(), exact.query_loss, rtol=1e-5, atol=1e-5)
    adapted = conv.adapt(problem, native)
    assert torch.equal(adapted.query_loss, found.query_loss)
    assert adapted.params["0.0.conv.bias"].equal(model[0][0].conv.bias.detach().expand(3, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision: expected 'fp32', 'tf32' or 'bf16', found 'fp16'"),
        ({"filters": 12}, "filters: expected a multiple of 8, found 12"),
        ({"height": 3}, "height, width: expected an image that 2 halvings leave something of"),
    ],
)
def test_refused(native, change, message):
    net = Net(**{name: value for name, value in change.items() if name != "precision"})
    with pytest.raises(ValueError, match=message):
        conv_cases.run(native, net, conv_cases.draw(Net()), precision=change.get("precision", "fp32"))
