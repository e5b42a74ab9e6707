"""compact_sign_step_ against the plain torch expression and the readable twin, on every device that is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases.flat_buffers import DTYPES, SIZES, TASKS, assert_same_bits, by_column, flags, gradients, shifted
from signmaml_ext import compact_sign_step_, reference, sign_step_

FORMS = ["one rate", "rate each", "rate a segment"]
NAN = -128


def tables(form: str, parameters: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """lr and segment_offsets; segments include empty ones at the start, inside and at the end."""
    cuts = sorted(torch.randint(0, parameters + 1, (2,)).tolist())
    offsets = torch.tensor([0, 0, cuts[0], cuts[0], cuts[1], parameters, parameters])
    entries = {"one rate": 1, "rate each": parameters, "rate a segment": len(offsets) - 1}[form]
    return {
        "lr": torch.rand(entries, dtype=dtype) + 0.5,
        "segment_offsets": offsets if form == "rate a segment" else None,
    }


def any_counts(tasks: int, parameters: int) -> Tensor:
    """Any int8 value, including NaN and the ends of the range."""
    return torch.randint(-128, 128, (tasks, parameters)).to(torch.int8)


def expected(counts: Tensor, theta: Tensor, grads: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, parameters and flags, with counts computed in int64."""
    after = counts.long() + (grads > 0).long() - (grads < 0).long()
    after[(counts == NAN) | grads.isnan() | (after.abs() > 127)] = NAN
    params = theta - rates * torch.where(after == NAN, torch.nan, after.to(theta.dtype))
    return after.to(torch.int8), params, ((after == NAN) | ~grads.isfinite()).any(1)


def check(counts: Tensor, grads: Tensor, lr: Tensor, segment_offsets: Tensor | None, shift: int = 0) -> None:
    """Steps and compares; all tensors on one device."""
    tasks, parameters = grads.shape
    theta = torch.randn(parameters, dtype=grads.dtype, device=grads.device)
    rates = by_column(lr, parameters, segment_offsets)
    wanted, wanted_params, raised = expected(counts, theta, grads, rates)
    params = shifted(torch.full_like(grads, 7.0), shift)
    nonfinite, kept = flags(tasks, grads.device), [value.clone() for value in (grads, theta, lr)]
    twin_counts, twin_params = reference.compact_sign_step(counts, theta, grads, rates)
    compact_sign_step_(counts, params, theta, grads, lr, segment_offsets=segment_offsets, nonfinite=nonfinite)
    assert torch.equal(counts, wanted)
    assert_same_bits(params, wanted_params)
    assert torch.equal(nonfinite, raised)
    assert torch.equal(twin_counts, wanted)
    assert_same_bits(twin_params, wanted_params)
    for found, before in zip((grads, theta, lr), kept, strict=True):
        assert_same_bits(found, before)


def to(device: torch.device, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parameters", SIZES)
def test_compact_sign_step_sizes_and_forms(device, parameters, form):
    for tasks in TASKS:
        for dtype in DTYPES:
            grads = gradients(tasks, parameters, dtype, device)
            check(any_counts(tasks, parameters).to(device), grads, **to(device, tables(form, parameters, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts_shift", range(4))
@pytest.mark.parametrize("shift", range(3))
def test_compact_sign_step_alignments(device, dtype, counts_shift, shift):
    for parameters in (3, 1024, 1025, 1027):
        for form in FORMS:
            grads = shifted(gradients(3, parameters, dtype, device), shift)
            counts = shifted(any_counts(3, parameters).to(device), counts_shift)
            check(counts, grads, **to(device, tables(form, parameters, dtype)), shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_count_meets_every_kind_of_gradient(device, dtype):
    info = torch.finfo(dtype)
    kinds = [0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 4, 1.0, -1.0, info.max]
    kinds += [float("inf"), float("-inf"), float("nan"), -float("nan")]
    counts = torch.arange(-128, 128).repeat(len(kinds), 1).to(torch.int8).to(device)
    grads = torch.tensor(kinds, dtype=dtype, device=device)[:, None].expand(-1, 256).contiguous()
    check(counts, grads, torch.tensor([0.3], dtype=dtype, device=device), None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_as_sign_steps_up_to_the_documented_rounding(device, dtype):
    """K steps of both operators from one theta: sign_step_ rounds once per step, compact_sign_step_ twice in all."""
    steps, parameters = 127, 1027
    theta, lr = torch.randn(parameters, dtype=dtype, device=device), torch.full((1,), 0.01, dtype=dtype, device=device)
    moved = theta.expand(2, -1).contiguous()
    counts, params = torch.zeros(2, parameters, dtype=torch.int8, device=device), torch.empty_like(moved)
    nonfinite = flags(2, device)
    for _ in range(steps):
        grads = gradients(2, parameters, dtype, device)
        sign_step_(moved, grads, lr, nonfinite=nonfinite)
        compact_sign_step_(counts, params, theta, grads, lr, nonfinite=nonfinite)
    bound = (steps + 2) * torch.finfo(dtype).eps * (theta.abs().max() + steps * 0.01)
    assert not nonfinite.any()
    assert (params - moved).abs().max() <= bound
    exact = theta.double() - lr.double() * counts.double()
    assert ((params.double() - exact).abs() <= torch.finfo(dtype).eps * (theta.abs() + 127 * 0.01)).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_compact_sign_step_of_nothing(device, shape):
    counts, params = torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape, device=device)
    theta, lr, nonfinite = torch.zeros(shape[1], device=device), torch.ones(1, device=device), flags(shape[0], device)
    compact_sign_step_(counts, params, theta, params.clone(), lr, nonfinite=nonfinite)
    assert not nonfinite.any()


@pytest.mark.slow
def test_compact_sign_step_is_bitwise_the_same_for_any_number_of_threads(threads):
    counts, grads = any_counts(3, 200_003), gradients(3, 200_003, torch.float32)
    arguments = tables("rate a segment", 200_003, torch.float32)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        check(counts.clone(), grads, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_sign_step_is_bitwise_the_same_on_every_instruction_set(isas, dtype):
    from signmaml_ext._loader import C

    for parameters in (1, 17, 63, 64, 65, 1027):
        for form in FORMS:
            counts, grads = any_counts(2, parameters), gradients(2, parameters, dtype)
            for isa in isas:
                C.select_cpu_isa(isa)
                check(counts.clone(), grads, **tables(form, parameters, dtype))


def arguments() -> dict[str, Any]:
    return {
        "counts": torch.zeros(3, 8, dtype=torch.int8),
        "params": torch.zeros(3, 8),
        "theta": torch.zeros(8),
        "grads": torch.ones(3, 8),
        "lr": torch.ones(1),
        "nonfinite": flags(3),
    }


BAD = {
    "counts of int16": (
        {"counts": torch.zeros(3, 8, dtype=torch.int16)},
        TypeError,
        "counts: .*int8, found torch.int16",
    ),
    "counts too few": ({"counts": torch.zeros(3, 7, dtype=torch.int8)}, ValueError, r"counts: .*found shape \[3, 7\]"),
    "counts elsewhere": (
        {"counts": torch.zeros(3, 8, dtype=torch.int8, device="meta")},
        ValueError,
        "counts: expected device cpu.*found meta",
    ),
    "theta of tasks": (
        {"theta": torch.zeros(3, 8)},
        ValueError,
        r"theta: expected \[P\] = \[8\], found shape \[3, 8\]",
    ),
    "theta double": ({"theta": torch.zeros(8).double()}, TypeError, "theta: .*float32, found torch.float64"),
    "grads strided": ({"grads": torch.zeros(3, 16)[:, ::2]}, ValueError, "grads: .*contiguous"),
    "lr of another length": ({"lr": torch.ones(2)}, ValueError, r"lr: .*found shape \[2\]"),
    "offsets falling": (
        {"segment_offsets": torch.tensor([0, 9, 8]), "lr": torch.ones(2)},
        ValueError,
        "segment_offsets: .*found 8 after 9",
    ),
    "a number for theta": ({"theta": 1.0}, TypeError, "theta: expected a tensor, found float"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_compact_sign_step_refuses(change, error, message):
    given = arguments() | change
    with pytest.raises(error, match=message):
        compact_sign_step_(**given)
    for name in ("counts", "params"):
        if name not in change:
            assert not given[name].any(), "nothing is changed"


@pytest.mark.parametrize("name", ["theta", "grads", "lr", "params"])
def test_compact_sign_step_refuses_memory_shared_with_what_is_written(name):
    given = arguments()
    memory = torch.zeros(4096, dtype=torch.uint8)
    given["counts"] = memory[:24].view(torch.int8).view(3, 8)
    size = given[name].numel() * 4
    given[name] = memory[16 : 16 + size].view(torch.float32).view(given[name].shape)
    with pytest.raises(ValueError, match="expected memory of its own, found that it overlaps"):
        compact_sign_step_(**given)


def test_compact_sign_step_refuses_what_autograd_would_record():
    given = arguments()
    given["theta"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"compact_sign_step_: .*theta requires grad"):
        compact_sign_step_(**given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_sign_step_passes_opcheck(device, dtype):
    counts = torch.zeros(3, 7, dtype=torch.int8, device=device)
    scalars = [torch.randn(*shape, dtype=dtype, device=device) for shape in ((3, 7), (7,), (3, 7), (1,))]
    op = torch.ops.signmaml_ext.compact_sign_step_.default
    torch.library.opcheck(op, (counts, *scalars, None, flags(3, device)))
