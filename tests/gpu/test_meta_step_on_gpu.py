"""Whole meta-steps on a CUDA device against the reference on the CPU, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import emulated_cases, nets
from signmaml_ext import Sharpness, meta_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CASES = {
    "MLP kernel, ReLU": (lambda: nets.mlp(), nets.vector_tasks),
    "MLP kernel, tanh": (lambda: nets.mlp(activation=nn.Tanh), nets.vector_tasks),
    "flat buffers, Conv4": (nets.conv4, nets.image_tasks),
    "flat buffers, tied": (nets.Tied, nets.vector_tasks),
}


def on_device(model: nn.Module, data, device: str):
    return copy.deepcopy(model).to(device), tuple(value.to(device) for value in data)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_on_the_cpu(case, method):
    make, draw = CASES[case]
    model, data = make().double(), draw()
    options = {"inner_lr": 0.02, "inner_steps": 3, "method": method}
    expected = meta_step(model, *data, **options, backend="torch")
    gradients = nets.grads(model)
    there, moved = on_device(model, data, "cuda")
    result = meta_step(there, *moved, **options)
    torch.testing.assert_close(result.query_loss.cpu(), expected.query_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.support_loss.cpu(), expected.support_loss, rtol=1e-9, atol=1e-9)
    for name, gradient in nets.grads(there).items():
        torch.testing.assert_close(gradient.cpu(), gradients[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("kind", ["step", "tensor", "element and step"])
def test_rates_learn(kind, method):
    model, data = nets.mlp().double(), nets.vector_tasks()
    there, moved = on_device(model, data, "cuda")
    drawn = emulated_cases.rates_of(model, kind, 3)
    gradients = []
    for net, inputs, backend in ((model, data, "torch"), (there, moved, "auto")):
        device = inputs[0].device
        if isinstance(drawn, dict):
            rates = {name: r.detach().double().to(device).requires_grad_() for name, r in drawn.items()}
            leaves = list(rates.values())
        else:
            rates = drawn.detach().double().to(device).requires_grad_()
            leaves = [rates]
        options = {"inner_lr": rates, "inner_steps": 3, "method": method}
        assert device.type == "cpu" or signmaml_ext.explain(net, *inputs, **options).family == "mlp"
        meta_step(net, *inputs, **options, backend=backend)
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fo-maml", "sharpness": Sharpness(0.05)},
        {"method": "sign-maml", "sharpness": Sharpness(0.2, "l2", adaptive=True)},
        {"method": "sign-maml", "sharpness": Sharpness(0.01, "linf"), "task_state": "int8"},
        {"method": "sign-maml", "task_state": "int8"},
    ],
    ids=["l2", "l2 adaptive", "linf, int8", "int8"],
)
def test_sharp_and_counted_steps(options):
    model, data = nets.mlp().double(), nets.vector_tasks()
    there, moved = on_device(model, data, "cuda")
    options = {"inner_lr": 0.1, "inner_steps": 3, **options}
    assert signmaml_ext.explain(there, *moved, **options).family == "mlp"
    meta_step(model, *data, **options, backend="torch")
    meta_step(there, *moved, **options)
    gradients = nets.grads(model)
    for name, gradient in nets.grads(there).items():
        torch.testing.assert_close(gradient.cpu(), gradients[name], rtol=1e-9, atol=1e-9)
    expected = signmaml_ext.adapt(model, *data[:2], **options, backend="torch")
    for name, value in signmaml_ext.adapt(there, *moved[:2], **options).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_does_not_make_the_host_wait(case):
    """Watches the second call only: the first one checks the module and loads kernels."""
    make, draw = CASES[case]
    model, data = on_device(make(), draw(dtype=torch.float32), "cuda")
    options = {"inner_lr": 0.02, "inner_steps": 2}
    meta_step(model, *data, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta_step(model, *data, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic_cudnn")
@pytest.mark.parametrize("case", ["MLP kernel, ReLU", "flat buffers, Conv4"])
def test_on_another_stream_and_bitwise_repeatable(case):
    make, draw = CASES[case]
    model, data = on_device(make(), draw(dtype=torch.float32), "cuda")
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            meta_step(model, *data, inner_lr=0.02, inner_steps=3)
        stream.synchronize()
        runs.append(nets.grads(model))
    for name, gradient in runs[0].items():
        assert torch.equal(gradient, runs[1][name]), name


def test_strict_float32_is_put_back():
    before = torch.backends.cudnn.conv.fp32_precision if hasattr(torch.backends.cudnn, "conv") else None
    model, data = on_device(nets.conv4(), nets.image_tasks(dtype=torch.float32), "cuda")
    for precision in ("fp32", "tf32", "bf16"):
        result = meta_step(model, *data, inner_lr=0.02, inner_steps=1, precision=precision)
        assert result.query_loss.isfinite().all()
    if before is not None:
        assert torch.backends.cudnn.conv.fp32_precision == before


def test_label_out_of_range_flags_its_task_and_leaves_the_device_usable():
    model, data = on_device(nets.conv4(), nets.image_tasks(dtype=torch.float32), "cuda")
    data[1][1, 0] = 7
    result = meta_step(model, *data, inner_lr=0.02, inner_steps=1, nonfinite="skip")
    assert result.nonfinite.tolist() == [False, True, False]
    assert "cuda" in signmaml_ext.dispatch.backend_status()
