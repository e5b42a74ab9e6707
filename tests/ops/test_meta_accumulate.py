"""meta_accumulate_ against the plain torch expression, on every device that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.cases.flat_buffers import (
    DTYPES,
    SIZES,
    TASKS,
    assert_same_bits,
    expected_accumulation,
    flags,
    gradients,
    shifted,
)
from signmaml_ext import meta_accumulate_


def check(out: Tensor, grads: Tensor, nonfinite: Tensor, skip: bool) -> None:
    expected, raised = expected_accumulation(out, grads, nonfinite, skip)
    kept = grads.clone()
    meta_accumulate_(out, grads, nonfinite=nonfinite, skip_nonfinite=skip)
    assert_same_bits(out, expected)
    assert_same_bits(grads, kept)
    assert torch.equal(nonfinite, raised)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("parameters", SIZES[1:])
def test_meta_accumulate_sizes(device, parameters, skip):
    for tasks in (*TASKS, 8, 9, 33):
        for dtype in DTYPES:
            out = torch.randn(parameters, dtype=dtype, device=device)
            check(out, gradients(tasks, parameters, dtype, device), flags(tasks, device), skip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_shift", range(4))
@pytest.mark.parametrize("grads_shift", range(4))
def test_meta_accumulate_alignments(device, dtype, out_shift, grads_shift):
    for parameters in (3, 1024, 1025, 1026, 1027):
        out = shifted(torch.randn(parameters, dtype=dtype, device=device), out_shift)
        grads = shifted(gradients(3, parameters, dtype, device), grads_shift)
        check(out, grads, flags(3, device), skip=True)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 4, 1025])
def test_meta_accumulate_of_a_broken_task(device, number, column, skip):
    for task in (0, 3, 8):
        grads = gradients(9, 1026, torch.float32, device)
        grads[task, column] = number
        check(torch.randn(1026, device=device), grads, flags(9, device), skip)


def test_meta_accumulate_counts_tasks_flagged_before(device):
    """With `skip_nonfinite`, a task that an inner step flagged is left out although its meta-gradient is finite."""
    out, grads = torch.zeros(2, device=device), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    nonfinite = torch.tensor([False, True, False], device=device)
    meta_accumulate_(out, grads, nonfinite=nonfinite.clone(), skip_nonfinite=True)
    assert out.tolist() == [3.0, 4.0]
    meta_accumulate_(out.zero_(), grads, nonfinite=nonfinite, skip_nonfinite=False)
    assert out.tolist() == [3.0, 4.0]
    assert nonfinite.tolist() == [False, True, False]


def test_meta_accumulate_without_a_live_task_changes_nothing(device):
    out = torch.tensor([1.0, -0.0], device=device)
    meta_accumulate_(
        out, torch.full((3, 2), float("nan"), device=device), nonfinite=flags(3, device), skip_nonfinite=True
    )
    assert_same_bits(out, torch.tensor([1.0, -0.0], device=device))


def test_meta_accumulate_adds_tasks_in_order(device):
    """A sum in another order would lose the 1."""
    out, grads = torch.zeros(1, device=device), torch.tensor([[2.0**25], [-(2.0**25)], [1.0]], device=device)
    meta_accumulate_(out, grads, nonfinite=flags(3, device))
    assert out.item() == pytest.approx(1 / 3)
    meta_accumulate_(out.zero_(), grads.flip(0), nonfinite=flags(3, device))
    assert out.item() == 0.0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("skip", [False, True])
def test_meta_accumulate_of_nothing(device, shape, skip):
    out = torch.ones(shape[1], device=device)
    meta_accumulate_(out, torch.zeros(shape, device=device), nonfinite=flags(shape[0], device), skip_nonfinite=skip)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("skip", [False, True])
def test_meta_accumulate_is_bitwise_the_same_for_any_number_of_threads(threads, skip):
    grads = gradients(7, 100_003, torch.float32)
    grads[2, 99_999] = float("nan")
    start, results = torch.randn(100_003), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        out, nonfinite = start.clone(), flags(7)
        meta_accumulate_(out, grads, nonfinite=nonfinite, skip_nonfinite=skip)
        results.append(out)
        assert nonfinite.tolist() == [task == 2 for task in range(7)]
    for out in results:
        assert_same_bits(out, expected_accumulation(start, grads, flags(7), skip)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_accumulate_is_bitwise_the_same_on_every_instruction_set(isas, dtype):
    from signmaml_ext._loader import C

    for parameters in (1, 17, 65, 1027, 2049):
        out, grads = torch.randn(parameters, dtype=dtype), gradients(6, parameters, dtype)
        grads[4, parameters // 2] = float("inf")
        for isa in isas:
            C.select_cpu_isa(isa)
            for skip in (False, True):
                check(out.clone(), grads, flags(6), skip)
