"""Which arguments the operators refuse, with which messages, and that a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from signmaml_ext import meta_accumulate_, sign_step_

T, P, G = 3, 8, 2


def step_arguments() -> dict[str, Any]:
    return {
        "params": torch.randn(T, P),
        "grads": torch.randn(T, P),
        "lr": torch.ones(1),
        "nonfinite": torch.zeros(T, dtype=torch.bool),
    }


def accumulate_arguments() -> dict[str, Any]:
    return {"out": torch.zeros(P), "grads": torch.randn(T, P), "nonfinite": torch.zeros(T, dtype=torch.bool)}


OFFSETS = torch.tensor([0, 5, P])
BOOLS = torch.ones(P, dtype=torch.bool)

BAD_STEPS = {
    "params of integers": (
        {"params": torch.zeros(T, P, dtype=torch.int64)},
        TypeError,
        "params: .*float64, found torch.int64",
    ),
    "params in half": ({"params": torch.zeros(T, P, dtype=torch.float16)}, TypeError, "params: .*found torch.float16"),
    "params of one task": ({"params": torch.zeros(P)}, ValueError, r"params: expected \[T, P\], found shape \[8\]"),
    "params transposed": ({"params": torch.zeros(P, T).T}, ValueError, r"params: .*contiguous.*strides \(1, 3\)"),
    "grads double": ({"grads": torch.zeros(T, P).double()}, TypeError, "grads: .*float32, found torch.float64"),
    "grads of another shape": (
        {"grads": torch.zeros(T, P + 1)},
        ValueError,
        r"grads: .*\[3, 8\].*found shape \[3, 9\]",
    ),
    "grads strided": ({"grads": torch.zeros(T, 2 * P)[:, ::2]}, ValueError, "grads: .*contiguous"),
    "grads elsewhere": (
        {"grads": torch.zeros(T, P, device="meta")},
        ValueError,
        "grads: expected device cpu.*found meta",
    ),
    "lr a number": ({"lr": 0.1}, TypeError, "lr: expected a tensor, found float"),
    "lr double": ({"lr": torch.ones(1).double()}, TypeError, "lr: .*float32, found torch.float64"),
    "lr without dimension": (
        {"lr": torch.tensor(0.1)},
        ValueError,
        r"lr: expected \[1\] = \[1\] or \[P\] = \[8\], found shape \[\]",
    ),
    "lr of another length": ({"lr": torch.ones(G)}, ValueError, r"lr: .*\[P\] = \[8\], found shape \[2\]"),
    "lr a segment of another number": (
        {"lr": torch.ones(3), "segment_offsets": OFFSETS},
        ValueError,
        r"lr: .*\[G\] = \[2\], found shape \[3\]",
    ),
    "mask of floats": ({"mask": torch.ones(P)}, TypeError, "mask: .*bool, found torch.float32"),
    "mask of another length": (
        {"mask": BOOLS[:1].clone()},
        ValueError,
        r"mask: expected \[P\] = \[8\], found shape \[1\]",
    ),
    "mask strided": ({"mask": torch.ones(2 * P, dtype=torch.bool)[::2]}, ValueError, "mask: .*contiguous"),
    "nonfinite of bytes": (
        {"nonfinite": torch.zeros(T, dtype=torch.uint8)},
        TypeError,
        "nonfinite: .*bool, found torch.uint8",
    ),
    "nonfinite too short": (
        {"nonfinite": BOOLS[: T - 1].clone()},
        ValueError,
        r"nonfinite: .*\[3\], found shape \[2\]",
    ),
    "offsets in int32": ({"segment_offsets": OFFSETS.int()}, TypeError, "segment_offsets: .*int64, found torch.int32"),
    "offsets of no segment": (
        {"segment_offsets": OFFSETS[:1].clone()},
        ValueError,
        r"segment_offsets: .*found shape \[1\]",
    ),
    "offsets late": ({"segment_offsets": torch.tensor([1, 5, P])}, ValueError, "segment_offsets: .*found 1 first"),
    "offsets short": (
        {"segment_offsets": torch.tensor([0, 5, 7])},
        ValueError,
        "segment_offsets: .*found 7 last with P = 8",
    ),
    "offsets long": ({"segment_offsets": torch.tensor([0, 5, 99])}, ValueError, "segment_offsets: .*found 99 last"),
    "offsets falling": (
        {"segment_offsets": torch.tensor([0, 9, P])},
        ValueError,
        "segment_offsets: .*found 8 after 9 at index 2",
    ),
}

BAD_ACCUMULATIONS = {
    "grads of integers": ({"grads": torch.zeros(T, P, dtype=torch.int64)}, TypeError, "grads: .*found torch.int64"),
    "grads of one task": ({"grads": torch.zeros(P)}, ValueError, r"grads: expected \[T, P\], found shape \[8\]"),
    "grads strided": ({"grads": torch.zeros(T, 2 * P)[:, ::2]}, ValueError, "grads: .*contiguous"),
    "out double": ({"out": torch.zeros(P).double()}, TypeError, "out: .*float32, found torch.float64"),
    "out of another length": ({"out": torch.zeros(P + 1)}, ValueError, r"out: .*\[8\], found shape \[9\]"),
    "out elsewhere": ({"out": torch.zeros(P, device="meta")}, ValueError, "grads: expected device meta.*found cpu"),
    "nonfinite too long": ({"nonfinite": BOOLS.clone()}, ValueError, r"nonfinite: .*\[3\], found shape \[8\]"),
}


@pytest.mark.parametrize("change, error, message", BAD_STEPS.values(), ids=BAD_STEPS)
def test_sign_step_refuses(change, error, message):
    arguments = step_arguments() | change
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        sign_step_(arguments.pop("params"), arguments.pop("grads"), arguments.pop("lr"), **arguments)
    unchanged(before, step_arguments() | change, arguments)


@pytest.mark.parametrize("change, error, message", BAD_ACCUMULATIONS.values(), ids=BAD_ACCUMULATIONS)
def test_meta_accumulate_refuses(change, error, message):
    arguments = accumulate_arguments() | change
    before = {name: value.clone() for name, value in arguments.items()}
    out, grads = arguments["out"], arguments["grads"]
    with pytest.raises(error, match=message):
        meta_accumulate_(out, grads, nonfinite=arguments["nonfinite"])
    for name, value in before.items():
        if value.device.type != "meta":
            assert torch.equal(arguments[name], value)


def unchanged(before: dict[str, Any], names: dict[str, Any], after: dict[str, Any]) -> None:
    for name in names:
        if name in after and isinstance(after[name], torch.Tensor) and after[name].device.type != "meta":
            assert torch.equal(after[name], before[name])


def test_refusal_leaves_params_alone():
    """The fault is only in the offsets' values, which are checked after everything else has been accepted."""
    arguments = step_arguments()
    params = arguments["params"].clone()
    with pytest.raises(ValueError, match="segment_offsets"):
        sign_step_(**arguments, segment_offsets=torch.tensor([0, 9, P]))
    assert torch.equal(arguments["params"], params)


@pytest.mark.parametrize("name", ["grads", "lr", "mask", "segment_offsets", "nonfinite"])
def test_sign_step_refuses_memory_shared_with_params(name):
    arguments = step_arguments()
    # One allocation, seen as bytes, in which params and the other tensor overlap by at most 8 bytes.
    memory = torch.zeros(4096, dtype=torch.uint8)
    arguments["params"] = memory[: T * P * 4].view(torch.float32).view(T, P)
    start = T * P * 4 - 8
    other = memory[start : start + 2048]
    arguments[name] = {
        "grads": lambda: other[: T * P * 4].view(torch.float32).view(T, P),
        "lr": lambda: other[: P * 4].view(torch.float32),
        "mask": lambda: other[:P].view(torch.bool),
        "segment_offsets": lambda: other[:24].view(torch.int64),
        "nonfinite": lambda: other[:T].view(torch.bool),
    }[name]()
    with pytest.raises(ValueError, match=f"expected memory of its own, found that it overlaps (params|{name})"):
        sign_step_(**arguments)


def test_neighbours_in_memory_are_no_overlap():
    memory = torch.randn(2 * T, P)
    arguments = step_arguments() | {"params": memory[:T], "grads": memory[T:]}
    sign_step_(**arguments)


def test_meta_accumulate_refuses_memory_shared_with_out():
    grads = torch.randn(T, P)
    with pytest.raises(ValueError, match="out: expected memory of its own, found that it overlaps grads"):
        meta_accumulate_(grads[1], grads, nonfinite=torch.zeros(T, dtype=torch.bool))


@pytest.mark.parametrize("name", ["params", "grads", "lr"])
def test_sign_step_refuses_what_autograd_would_record(name):
    arguments = step_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"sign_step_: .*{name} requires grad"):
        sign_step_(**arguments)
    with torch.no_grad():
        sign_step_(**arguments)


def test_meta_accumulate_refuses_what_autograd_would_record():
    arguments = accumulate_arguments()
    arguments["grads"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"meta_accumulate_: .*grads requires grad"):
        meta_accumulate_(**arguments)
    with torch.no_grad():
        meta_accumulate_(**arguments)


def test_fake_tensors_are_checked_too():
    with FakeTensorMode():
        arguments = step_arguments()
        sign_step_(**arguments)
        meta_accumulate_(**accumulate_arguments())
        with pytest.raises(ValueError, match="lr: expected"):
            sign_step_(**(arguments | {"lr": torch.ones(G)}))
        with pytest.raises(ValueError, match="out: expected"):
            meta_accumulate_(**(accumulate_arguments() | {"out": torch.zeros(P + 1)}))


def test_meta_device_is_checked_and_computes_nothing():
    arguments = {name: value.to("meta") for name, value in step_arguments().items()}
    sign_step_(**arguments)
    with pytest.raises(ValueError, match="nonfinite: expected device meta"):
        sign_step_(**(arguments | {"nonfinite": torch.zeros(T, dtype=torch.bool)}))
