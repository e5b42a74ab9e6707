"""sign_step_ against the plain torch expression, on every device that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.cases.flat_buffers import DTYPES, SIZES, TASKS, assert_same_bits, expected_step, flags, gradients, shifted
from signmaml_ext import sign_step_

FORMS = [
    "one rate",
    "rate each",
    "rate a segment",
    "mask each",
    "mask a segment",
    "both each",
    "both a segment",
    "mixed",
]


def tables(form: str, parameters: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """lr, segment_offsets and mask of a form; segments include empty ones at the start, inside and at the end."""
    cuts = sorted(torch.randint(0, parameters + 1, (2,)).tolist())
    offsets = torch.tensor([0, 0, cuts[0], cuts[0], cuts[1], parameters, parameters])
    segments = len(offsets) - 1
    by_segment = "segment" in form or form == "mixed"
    length = {"one rate": 1, "mask each": 1, "rate each": parameters, "both each": parameters, "mixed": parameters}
    mask = None
    if "mask" in form or "both" in form or form == "mixed":
        mask = torch.rand(segments if by_segment else parameters) < 0.5
    return {
        "lr": torch.rand(length.get(form, segments), dtype=dtype) + 0.5,
        "segment_offsets": offsets if by_segment else None,
        "mask": mask,
    }


def check(params: Tensor, grads: Tensor, lr: Tensor, segment_offsets: Tensor | None, mask: Tensor | None) -> None:
    """Steps and compares; all tensors on the CPU or all on a GPU."""
    expected, raised = expected_step(params, grads, lr, segment_offsets, mask)
    nonfinite, kept = flags(len(params), params.device), grads.clone()
    sign_step_(params, grads, lr, segment_offsets=segment_offsets, mask=mask, nonfinite=nonfinite)
    assert_same_bits(params, expected)
    assert_same_bits(grads, kept)
    assert torch.equal(nonfinite, raised)


def to(device: torch.device, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parameters", SIZES)
def test_sign_step_sizes_and_forms(device, parameters, form):
    for tasks in TASKS:
        for dtype in DTYPES:
            params = torch.randn(tasks, parameters, dtype=dtype, device=device)
            check(params, gradients(tasks, parameters, dtype, device), **to(device, tables(form, parameters, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("params_shift", range(4))
@pytest.mark.parametrize("grads_shift", range(4))
def test_sign_step_alignments(device, dtype, params_shift, grads_shift):
    for parameters in (3, 1024, 1025, 1026, 1027):
        for form in ("one rate", "both each", "both a segment"):
            params = shifted(torch.randn(3, parameters, dtype=dtype, device=device), params_shift)
            grads = shifted(gradients(3, parameters, dtype, device), grads_shift)
            check(params, grads, **to(device, tables(form, parameters, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_step_many_segments(device, dtype):
    """More segments than a tile has columns, and segments longer than a tile."""
    parameters = 40_003
    offsets = torch.cat([torch.arange(0, 3000), torch.tensor([3001, 3001, 20_000, parameters])])
    lr, mask = torch.rand(len(offsets) - 1, dtype=dtype), torch.rand(len(offsets) - 1) < 0.7
    params = torch.randn(2, parameters, dtype=dtype, device=device)
    check(params, gradients(2, parameters, dtype, device), lr.to(device), offsets.to(device), mask.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_step_of_hard_numbers(device, dtype):
    """Each number in every position of a vector and of the tail that is shorter than a vector."""
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 8, -info.smallest_normal / 8]
    numbers += [info.max, info.min, float("inf"), float("-inf"), float("nan"), -float("nan")]
    values = torch.tensor(numbers, dtype=dtype)
    grads = torch.stack([values.roll(shift).repeat(3)[:35] for shift in range(len(values))]).to(device)
    params = torch.where(torch.rand_like(grads) < 0.3, -0.0, torch.randn_like(grads))
    check(params, grads, torch.tensor([0.25], dtype=dtype, device=device), None, None)


@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("nan")])
def test_sign_step_of_hard_rates(device, value):
    params, lr = torch.randn(2, 21, device=device), torch.tensor([value], device=device)
    check(params, gradients(2, 21, torch.float32, device), lr, None, None)


def test_sign_step_subnormal_gradients_move_by_a_whole_step():
    """On the CPU even where torch has been told to flush subnormals to zero."""
    params, grads = torch.zeros(1, 5), torch.full((1, 5), 1e-45)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        sign_step_(params, grads, torch.tensor([0.5]), nonfinite=flags(1))
        assert torch.tensor([1e-45]).mul(1.0).item() == 0.0, "the setting of the caller must be as it was"
    finally:
        torch.set_flush_denormal(False)
    assert params.tolist() == [[-0.5] * 5]


def test_sign_step_ors_flags(device):
    nonfinite = torch.tensor([True, False, False], device=device)
    grads = torch.tensor([[1.0], [2.0], [float("inf")]], device=device)
    sign_step_(torch.zeros(3, 1, device=device), grads, torch.ones(1, device=device), nonfinite=nonfinite)
    assert nonfinite.tolist() == [True, False, True]


@pytest.mark.parametrize("by_segment", [False, True])
def test_sign_step_never_looks_behind_the_mask(device, by_segment):
    params = torch.tensor([[1.0, -0.0, 2.0]], device=device)
    grads = torch.tensor([[1.0, float("nan"), float("inf")]], device=device)
    offsets = torch.tensor([0, 1, 3], device=device) if by_segment else None
    mask = torch.tensor([True, False] if by_segment else [True, False, False], device=device)
    nonfinite, lr = flags(1, device), torch.tensor([0.5], device=device)
    sign_step_(params, grads, lr, segment_offsets=offsets, mask=mask, nonfinite=nonfinite)
    assert params.tolist() == [[0.5, 0.0, 2.0]]
    assert params.signbit().tolist() == [[False, True, False]]
    assert not nonfinite.item()


def test_sign_step_of_as_many_segments_as_parameters_goes_by_segment(device):
    """G = P with an empty segment: a table of that length belongs to the segments."""
    params = torch.zeros(1, 2, device=device)
    offsets, lr = torch.tensor([0, 2, 2], device=device), torch.tensor([1.0, 5.0], device=device)
    sign_step_(params, torch.ones(1, 2, device=device), lr, segment_offsets=offsets, nonfinite=flags(1, device))
    assert params.tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_sign_step_of_nothing(device, shape):
    nonfinite = flags(shape[0], device)
    sign_step_(
        torch.zeros(shape, device=device),
        torch.zeros(shape, device=device),
        torch.ones(1, device=device),
        nonfinite=nonfinite,
    )
    assert not nonfinite.any()


@pytest.mark.parametrize("form", FORMS)
def test_sign_step_is_bitwise_the_same_for_any_number_of_threads(threads, form):
    parameters = 200_003
    params, grads = torch.randn(3, parameters), gradients(3, parameters, torch.float32)
    grads[1, -1] = float("nan")
    arguments, results = tables(form, parameters, torch.float32), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        moved, nonfinite = params.clone(), flags(3)
        sign_step_(moved, grads, nonfinite=nonfinite, **arguments)
        results.append((moved, nonfinite))
    expected, raised = expected_step(params, grads, **arguments)
    for moved, nonfinite in results:
        assert_same_bits(moved, expected)
        assert torch.equal(nonfinite, raised)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_step_is_bitwise_the_same_on_every_instruction_set(isas, dtype):
    from signmaml_ext._loader import C

    for parameters in (1, 17, 63, 64, 65, 1027):
        for form in FORMS:
            params, grads = torch.randn(2, parameters, dtype=dtype), gradients(2, parameters, dtype)
            grads[1, parameters // 2] = float("inf")
            arguments = tables(form, parameters, dtype)
            for isa in isas:
                C.select_cpu_isa(isa)
                check(params.clone(), grads, **arguments)
