"""The Conv-N kernels on a CUDA device: the cases of the emulated GPU, and cases that need a device.

`tests/gpu/gpu_cases.py` has the cases for compute-sanitizer.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

import signmaml_ext
from helpers.cases import conv_cases, emulated_cases, nets
from helpers.cases.conv_cases import Data, Net, Result
from signmaml_ext import Sharpness
from signmaml_ext._loader import C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OFFICIAL = Net(blocks=4, channels=3, filters=32, height=84, width=84, ways=5, tasks=8, support=5, query=5)
OMNIGLOT = Net(blocks=4, filters=64, height=28, width=28, ways=5, tasks=32, support=5, query=75)
NETS = {
    "official": OFFICIAL,
    "omniglot": OMNIGLOT,
    "omniglot, stride": replace(OMNIGLOT, halving="stride", readout="mean"),
    "128 filters, odd": Net(blocks=3, channels=2, filters=128, height=31, width=23, support=7, query=9),
    "72 filters": Net(blocks=2, channels=3, filters=72, height=17, width=19),
    "six blocks": Net(blocks=6, channels=3, filters=32, height=96, width=84, tasks=3, support=10, query=10),
    "one block, many images": Net(blocks=1, filters=8, height=11, width=9, support=1000, query=1000),
}


@cache
def references(name: str) -> list[tuple[Data, Result, Result]]:
    """Draws, and PyTorch's results on the CPU in float64 and float32; the slow part, so tests share it."""
    net = NETS[name]
    return [(data, *conv_cases.peers(net, data)) for data in conv_cases.draw_tasks(net, seed=3)]


@pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])
@pytest.mark.parametrize("name", NETS)
def test_gradients_before_the_sign(name, by_covariance):
    """At most twice as far from float64 as PyTorch's own float32, tensor by tensor."""
    net, apart = NETS[name], []
    for data, exact, peer in references(name):
        found = conv_cases.run(C, net, data.to("cuda"), steps=0, by_covariance=by_covariance)
        torch.testing.assert_close(found.query_loss.cpu().double(), exact.query_loss, rtol=1e-5, atol=1e-5)
        apart.append(conv_cases.task_errors(net, found, exact, peer))
    conv_cases.assert_within_twice_torch(net, torch.cat(apart))


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 0.05), ("bf16", 0.3)])
def test_lower_precisions(precision, bound):
    data, exact, _ = references("official")[0]
    found = conv_cases.run(C, OFFICIAL, data.to("cuda"), steps=0, precision=precision)
    assert max(conv_cases.errors(OFFICIAL, found.grads, exact.grads)) < bound


@pytest.mark.parametrize("method", ["fo-maml", "maml"])
@pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])
def test_small_cases_of_the_emulator(by_covariance, method):
    """Whole trajectories of plain gradient steps, with one rate per tensor and step, and a mask."""
    for net in (
        Net(channels=2, height=9, width=11),
        Net(channels=3, halving="stride", readout="mean", conv_bias=False),
        Net(blocks=3, height=11, width=9, halving="stride"),
        Net(filters=40, height=4, width=5, tasks=1, support=2, query=2),
    ):
        count = len(net.tensors)
        options = {
            "steps": 2,
            "method": method,
            "lr": torch.rand(2, count, generator=torch.Generator().manual_seed(1)) * 0.1,
            "adapt": [i % 4 != 2 for i in range(count)],
        }
        data = conv_cases.draw(net)
        found = conv_cases.run(C, net, data.to("cuda"), by_covariance=by_covariance, **options)
        exact = conv_cases.definition(net, data, **options)
        assert max(conv_cases.errors(net, found.grads, exact.grads)) < 1e-5
        assert max(conv_cases.errors(net, found.adapted, exact.adapted)) < 1e-5


def test_the_emulated_gpu_and_this_one_agree_on_faults():
    emulated_cases.conv_faults(C, "cuda")
    emulated_cases.conv_second_order_faults(C, "cuda")


@pytest.mark.parametrize("name", ["official", "128 filters, odd", "72 filters"])
def test_exact_maml_is_as_exact_as_torchs_double_backward(name):
    net, options = NETS[name], {"steps": 1, "lr": 0.01, "method": "maml"}
    apart = []
    for data in conv_cases.draw_tasks(net):
        found = conv_cases.run(C, net, data.to("cuda"), **options)
        apart.append(conv_cases.task_errors(net, found, *conv_cases.peers(net, data, **options)))
    conv_cases.assert_within_twice_torch(net, torch.cat(apart))


@pytest.mark.parametrize("method", ["sign-maml", "maml"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["official", "omniglot"])
def test_bitwise_repeatable_on_any_stream_and_in_any_company(name, precision, method):
    net = NETS[name]
    data = conv_cases.draw(net).to("cuda")
    first = conv_cases.run(C, net, data, steps=3, precision=precision, method=method)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = conv_cases.run(C, net, data, steps=3, precision=precision, method=method)
    stream.synchronize()
    alone = conv_cases.run(C, net, data.tasks(slice(2, 3)), steps=3, precision=precision, method=method)
    chunks = conv_cases.run(C, net, data, steps=3, precision=precision, workspace_limit=1, method=method)
    for field in ("grads", "adapted", "logits", "query_loss"):
        of_first = getattr(first, field)
        assert torch.equal(of_first, getattr(again, field)), field
        assert torch.equal(of_first, getattr(chunks, field)), field
        assert torch.equal(of_first[2], getattr(alone, field)[0]), field


def test_captured_by_the_caller():
    """A meta-step in the caller's own graph, replayed on other tasks, gives the same result as a plain call."""
    net = replace(OMNIGLOT, tasks=4)
    first, second = (conv_cases.draw(net, seed).to("cuda") for seed in (0, 1))
    second.params = first.params
    expected = conv_cases.run(C, net, second, steps=2)
    call = conv_cases.prepare(C, net, first, steps=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch()  # the first launch, so kernels are loaded during the capture
    for name in ("support_x", "support_y", "query_x", "query_y"):
        getattr(first, name).copy_(getattr(second, name))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(call.result().grads, expected.grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_on_another_device_than_the_current_one():
    net = Net()
    data = conv_cases.draw(net)
    expected = conv_cases.run(C, net, data.to("cuda"))
    found = conv_cases.run(C, net, data.to("cuda:1"))
    assert torch.equal(found.grads.cpu(), expected.grads.cpu()) and torch.cuda.current_device() == 0


@pytest.mark.parametrize("method", ["fo-maml", "maml"])
@pytest.mark.parametrize("kind", ["step", "tensor and step", "element"])
def test_rates_learn(kind, method):
    """Their gradients are those of the reference in float64; so no sign, which may flip, is taken."""
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = nets.image_tasks(3, 3, 2, 2, 2, 9, dtype=torch.float32)
    drawn = emulated_cases.rates_of(model, kind, 2)
    gradients = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        net = copy.deepcopy(model).to(device, dtype)
        inputs = tuple(v.to(device, dtype) if v.is_floating_point() else v.to(device) for v in data)
        named = drawn if isinstance(drawn, dict) else {"": drawn}
        leaves = {name: rate.detach().to(device, dtype).requires_grad_() for name, rate in named.items()}
        options = {"inner_lr": leaves.get("", leaves), "inner_steps": 2, "method": method}
        assert device == "cpu" or signmaml_ext.explain(net, *inputs, **options).family == "conv"
        signmaml_ext.meta_step(net, *inputs, **options, backend="torch" if device == "cpu" else "auto")
        gradients.append({name: leaf.grad.double().cpu() for name, leaf in leaves.items() if leaf.grad is not None})
    exact, found = gradients
    assert exact.keys() == found.keys()
    for name, value in exact.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-9, name


@pytest.mark.parametrize("sharpness", [Sharpness(0.05), Sharpness(0.2, "l2", adaptive=True)], ids=["plain", "adaptive"])
def test_sharp_steps(sharpness):
    """Gradients and losses are those of the reference in float64; no sign, which may flip, is taken."""
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = nets.image_tasks(3, 3, 2, 2, 2, 9, dtype=torch.float32)
    options = {"inner_lr": 0.05, "inner_steps": 2, "method": "fo-maml", "sharpness": sharpness}
    wide = tuple(v.double() if v.is_floating_point() else v for v in data)
    exact = copy.deepcopy(model).double()
    expected = signmaml_ext.meta_step(exact, *wide, **options, backend="torch")
    there, moved = model.cuda(), tuple(v.cuda() for v in data)
    assert signmaml_ext.explain(there, *moved, **options).family == "conv"
    found = signmaml_ext.meta_step(there, *moved, **options)
    torch.testing.assert_close(found.support_loss.double().cpu(), expected.support_loss, rtol=1e-4, atol=1e-5)
    gradients = nets.grads(exact)
    for name, gradient in nets.grads(there).items():
        assert (gradient.double().cpu() - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-8, name


def test_counted_steps():
    """The counts of sign steps are the reference's; the rate is so small that a flipped sign hardly matters."""
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = nets.image_tasks(3, 3, 2, 2, 2, 9, dtype=torch.float32)
    options = {"inner_lr": 1e-6, "inner_steps": 4, "task_state": "int8"}
    expected = signmaml_ext.adapt(model, *data[:2], **options, backend="torch")
    there, moved = model.cuda(), tuple(v.cuda() for v in data)
    assert signmaml_ext.explain(there, *moved, **options).family == "conv"
    found = signmaml_ext.adapt(there, *moved[:2], **options)
    for name, counts in found.counts.items():
        if "conv.bias" not in name:
            assert (counts.cpu() != expected.counts[name]).double().mean() < 0.02, name


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_served_by_the_public_call(method):
    """The conv family serves a learn2learn-style Conv4 and gives the same losses as the reference."""
    torch.manual_seed(0)
    model = nets.conv4(ways=5, channels=3, filters=32, size=32).cuda()
    data = tuple(value.cuda() for value in nets.image_tasks(4, 5, 1, 3, 3, 32, dtype=torch.float32))
    assert signmaml_ext.explain(model, *data, method=method).family == "conv"
    options = {"inner_lr": 0.0035, "inner_steps": 1, "method": method}
    result = signmaml_ext.meta_step(model, *data, **options)
    nets.grads(model)
    expected = signmaml_ext.meta_step(model, *data, **options, backend="torch")
    torch.testing.assert_close(result.support_loss, expected.support_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.query_loss, expected.query_loss, rtol=0.05, atol=0.05)
