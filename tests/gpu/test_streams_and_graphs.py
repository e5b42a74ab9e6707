"""Meta-steps on streams, on another device and in the caller's CUDA graph give the same bits every time."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.cases import nets
from signmaml_ext import adapt, evaluate, meta_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("deterministic_cudnn"),  # bits are compared
]

STEP = {"inner_lr": 0.02, "inner_steps": 3}
# name -> model, tasks, options: every family of the backend
CASES = {
    "MLP kernel": (nets.mlp, nets.vector_tasks, {}),
    "flat buffers": (nets.Tied, nets.vector_tasks, {}),
    "flat buffers, int8": (nets.Tied, nets.vector_tasks, {"task_state": "int8"}),
    "convolutions": (nets.conv4, nets.image_tasks, {}),
}


@pytest.fixture(params=CASES)
def case(request):
    """A model with zero gradients, its tasks and options, on the GPU, after one warm-up call."""
    make, draw, options = CASES[request.param]
    model = make().cuda()
    data = tuple(value.cuda() for value in draw(dtype=torch.float32))
    meta_step(model, *data, **STEP, **options)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    torch.cuda.synchronize()
    return model, data, {**STEP, **options}


def taken(model):
    """Returns copies of the gradients and zeroes them."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return grads


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_work_goes_to_the_current_stream(case):
    """The stream is kept busy before it copies the data, so work on another stream would run too early."""
    model, data, options = case
    meta_step(model, *data, **options)
    expected = taken(model)
    late = tuple(torch.zeros_like(value) for value in data)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, value in zip(late, data, strict=True):
            target.copy_(value)
        meta_step(model, *late, **options)
    assert not stream.query(), "the call must not wait for the device"
    stream.synchronize()
    assert_same(taken(model), expected)


def test_capture_by_the_caller_and_replay_on_other_data(case):
    model, data, options = case
    others = tuple(value.flip(0).contiguous() for value in data)
    meta_step(model, *others, **options)
    expected = taken(model)
    static = tuple(value.clone() for value in data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = meta_step(model, *static, **options)
    assert all(not gradient.any() for gradient in taken(model).values()), "capturing runs nothing"
    for target, value in zip(static, others, strict=True):
        target.copy_(value)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(taken(model), expected)
    assert result.query_loss.isfinite().all() and not result.nonfinite.any()


def test_same_bits_every_time(case):
    model, data, options = case
    runs = []
    for _ in range(3):
        meta_step(model, *data, **options)
        runs.append(taken(model))
    for other in runs[1:]:
        assert_same(other, runs[0])
    first, second = (evaluate(model, *data, **options).logits for _ in range(2))
    assert torch.equal(first, second)


def test_mlp_kernel_gives_a_task_the_same_bits_in_any_batch():
    model = nets.mlp().cuda()
    data = tuple(value.cuda() for value in nets.vector_tasks(tasks=50, dtype=torch.float32))
    whole = evaluate(model, *data, **STEP)
    assert whole.backend == "cuda"
    for tasks in (slice(7, 8), slice(3, 20)):
        part = evaluate(model, *(value[tasks] for value in data), **STEP)
        assert torch.equal(part.logits, whole.logits[tasks])
        assert torch.equal(part.support_loss, whole.support_loss[:, tasks])


def test_device_that_is_not_the_current_one(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    model, data, options = case
    meta_step(model, *data, **options)
    expected = taken(model)
    there = copy.deepcopy(model).to("cuda:1")
    moved = tuple(value.to("cuda:1") for value in data)
    with torch.cuda.device(0):
        meta_step(there, *moved, **options)
        adapted = adapt(there, *moved[:2], **options)
        assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in adapted.values())
    found = {name: gradient.to("cuda:0") for name, gradient in taken(there).items()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_hundred_thousand_tasks():
    model = nets.mlp(1, 1).cuda()
    data = tuple(value.cuda() for value in nets.regression_tasks(tasks=100_000, dtype=torch.float32))
    result = meta_step(model, *data, **STEP, loss="mse")
    few = meta_step(model, *(value[-5:] for value in data), **STEP, loss="mse")
    assert result.backend == "cuda" and result.query_loss.shape == (100_000,)
    assert torch.equal(result.query_loss[-5:], few.query_loss)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
