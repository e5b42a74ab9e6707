"""Behaviour that needs a GPU: streams, capture, devices, bits equal to the CPU's, sizes beyond 32 bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helpers.cases.flat_buffers import assert_same_bits, device_or_skip, expected_step, flags, gradients
from signmaml_ext import compact_sign_step_, meta_accumulate_, sign_step_

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    return device_or_skip("cuda")


def test_work_goes_to_the_current_stream(cuda):
    """The stream is kept busy first, so work on another stream would run too early."""
    stream = torch.cuda.Stream()
    params, grads, source = (
        torch.zeros(4, 100_003, device=cuda),
        torch.zeros(4, 100_003, device=cuda),
        torch.randn(4, 100_003, device=cuda),
    )
    out, nonfinite, lr = torch.zeros(100_003, device=cuda), flags(4, cuda), torch.ones(1, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grads.copy_(source)
        sign_step_(params, grads, lr, nonfinite=nonfinite)
        meta_accumulate_(out, params, nonfinite=nonfinite, skip_nonfinite=True)
    assert not stream.query(), "the operators must not wait for the device"
    stream.synchronize()
    assert torch.equal(params, -source.sign())
    torch.testing.assert_close(out, params.mean(0))


def capture_and_replay(cuda: torch.device) -> None:
    params, grads = torch.zeros(3, 1027, device=cuda), torch.randn(3, 1027, device=cuda)
    out, nonfinite, lr = torch.zeros(1027, device=cuda), flags(3, cuda), torch.full((1,), 0.5, device=cuda)
    counts, counted = torch.zeros(3, 1027, dtype=torch.int8, device=cuda), torch.zeros(3, 1027, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sign_step_(params, grads, lr, nonfinite=nonfinite)
        compact_sign_step_(counts, counted, torch.zeros_like(out), grads, lr, nonfinite=nonfinite)
        meta_accumulate_(out, params, nonfinite=nonfinite, skip_nonfinite=True)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(params, -1.5 * grads.sign())
    assert torch.equal(counts, (3 * grads.sign()).to(torch.int8))
    assert torch.equal(counted, params)
    # 0.5, then 1.0, then 1.5 of the mean sign
    torch.testing.assert_close(out, -3.0 * grads.sign().mean(0))
    grads[1, 5] = float("nan")
    graph.replay()
    torch.cuda.synchronize()
    assert nonfinite.tolist() == [False, True, False]


def test_capture_in_a_graph(cuda):
    capture_and_replay(cuda)


def test_capture_of_the_first_launch_of_a_process(cuda):
    """Kernels are loaded lazily, and not everything that loading does is allowed in a capture."""
    code = "import torch; from test_on_gpu import capture_and_replay; capture_and_replay(torch.device('cuda'))"
    folder, helpers = __file__.rsplit("/", 1)[0], __file__.rsplit("/", 2)[0]
    code = f"import sys; sys.path[:0] = [{folder!r}, {helpers!r}]; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_device_that_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    params, grads = torch.zeros(2, 1027, device="cuda:1"), torch.randn(2, 1027, device="cuda:1")
    with torch.cuda.device(0):
        sign_step_(params, grads, torch.ones(1, device="cuda:1"), nonfinite=flags(2, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert torch.equal(params, -grads.sign())


def test_tensors_of_two_devices_are_refused(cuda):
    params, grads = torch.zeros(2, 3, device=cuda), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"grads: expected device cuda:0.*found cpu"):
        sign_step_(params, grads, torch.ones(1, device=cuda), nonfinite=flags(2, cuda))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [False, True])
def test_same_bits_as_the_cpu_and_every_time(cuda, dtype, skip):
    grads = gradients(13, 100_003, dtype)
    grads[7, 12_345] = float("inf")
    out, lr, params = torch.randn(100_003, dtype=dtype), torch.rand(100_003, dtype=dtype), torch.randn_like(grads)
    results = []
    for where in ("cpu", cuda, cuda):
        moved, total, nonfinite = params.to(where, copy=True), out.to(where, copy=True), flags(13, where)
        sign_step_(moved, grads.to(where), lr.to(where), nonfinite=nonfinite)
        counts, counted = torch.zeros(grads.shape, dtype=torch.int8, device=where), torch.empty_like(moved)
        for _ in range(2):
            gradient, theta = grads.to(where), params[0].to(where)
            compact_sign_step_(counts, counted, theta, gradient, lr.to(where), nonfinite=nonfinite)
        meta_accumulate_(total, grads.to(where), nonfinite=nonfinite, skip_nonfinite=skip)
        results.append([tensor.cpu() for tensor in (moved, counts, counted, total, nonfinite)])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert_same_bits(a, b)


def test_wrong_segment_offsets_stay_in_bounds(cuda):
    """Values are not checked on the device, but wrong ones never touch other memory."""
    memory = torch.zeros(3, 4096, device=cuda)
    params, grads = memory[1:2], torch.ones(1, 4096, device=cuda)
    offsets = torch.tensor([5, -100, 10**12, 3], device=cuda)
    lr, mask = torch.ones(3, device=cuda), torch.ones(3, dtype=torch.bool, device=cuda)
    sign_step_(params, grads, lr, segment_offsets=offsets, mask=mask, nonfinite=flags(1, cuda))
    torch.cuda.synchronize()
    assert memory[0].eq(0).all() and memory[2].eq(0).all()
    assert params.eq(-1).all()


@pytest.mark.slow
def test_more_elements_than_32_bits_count(cuda):
    tasks, parameters = 3, 2**30 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 4 * tasks * parameters:
        pytest.skip(f"needs {4 * 4 * tasks * parameters / 2**30:.0f} GiB of free GPU memory, found {free / 2**30:.0f}")
    params = torch.zeros(tasks, parameters, device=cuda)
    grads = torch.full_like(params, 2.0)
    nonfinite, lr = flags(tasks, cuda), torch.full((1,), 0.5, device=cuda)
    sign_step_(params, grads, lr, nonfinite=nonfinite)
    for row in params:
        assert row.eq(-0.5).all()
    grads[2, -1] = float("nan")
    out = torch.zeros(parameters, device=cuda)
    meta_accumulate_(out, grads, nonfinite=nonfinite, skip_nonfinite=True)
    assert out.eq(2.0).all()
    assert nonfinite.tolist() == [False, False, True]


def test_expected_step_is_the_same_expression_on_both_devices(cuda):
    """The oracle of the shared cases does not itself depend on the device."""
    params, grads, lr = torch.randn(2, 1027), gradients(2, 1027, torch.float32), torch.tensor([0.3])
    on_gpu, _ = expected_step(params.to(cuda), grads.to(cuda), lr.to(cuda))
    assert_same_bits(on_gpu.cpu(), expected_step(params, grads, lr)[0])
