"""`task_state="int8"` of the networks that native code serves as a whole, on the CPU: against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.test_conv_meta_step_cpu import data as images
from ops.test_conv_meta_step_cpu import net
from ops.test_conv_rates import draw
from torch import Tensor, nn

from helpers.cases.perceptrons import network, tasks_for
from signmaml_ext import CompactParams, Sharpness, adapt, evaluate, explain, meta_step
from signmaml_ext._loader import C

Tasks = tuple[Tensor, ...]


def perceptron() -> tuple[nn.Module, Tasks]:
    widths = (3, 7, 5, 4)
    return network(widths, nn.Tanh).double(), tasks_for(widths, "cross_entropy", 11, 4, 3, torch.float64)


CASES: dict[str, Any] = {
    "conv": lambda: (net(size=13, channels=2, layers=3), images(size=13, channels=2, tasks=3)),
    "strided conv": lambda: (net(pooling="stride"), images(tasks=3)),
    "mlp": perceptron,
}
cases = pytest.mark.parametrize("case", CASES)
INT8: dict[str, Any] = {"inner_steps": 5, "inner_lr": 0.02, "task_state": "int8"}


def check(model: nn.Module, batch: Tasks, **options: Any) -> CompactParams:
    """Counts, evaluations and meta-gradients of both backends; returns the counts."""
    options = INT8 | options
    found = explain(model, *batch, **options)
    assert found.backend == "cpu" and found.family in ("conv", "mlp")
    own, expected = (adapt(model, *batch[:2], **options, backend=backend) for backend in ("cpu", "torch"))
    assert isinstance(own, CompactParams) and isinstance(expected, CompactParams)
    assert own.counts.keys() == expected.counts.keys()
    assert all(torch.equal(own.counts[name], counts) for name, counts in expected.counts.items())
    a, b = (evaluate(model, *batch, **options, backend=backend) for backend in ("cpu", "torch"))
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-9, atol=1e-10)
    learnable = options["inner_lr"] if isinstance(options["inner_lr"], dict) else {"": options["inner_lr"]}
    gradients = []
    for backend in ("cpu", "torch"):
        model.zero_grad()
        leaves = {key: rate for key, rate in learnable.items() if isinstance(rate, Tensor) and rate.requires_grad}
        for rate in leaves.values():
            rate.grad = None
        meta_step(model, *batch, **options, backend=backend)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        gradients[-1] |= {f"rate {key}": rate.grad.clone() for key, rate in leaves.items() if rate.grad is not None}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-9, atol=1e-11, msg=lambda t, n=name: f"{n} {t}"
        )
    return own


@cases
def test_equals_the_reference(case: str) -> None:
    model, batch = CASES[case]()
    counts = check(model, batch).counts
    assert any(((value != 0) & (value.abs() < 5)).any() for value in counts.values())  # steps in both directions
    full = adapt(model, *batch[:2], **INT8 | {"task_state": "full"})
    for name, value in adapt(model, *batch[:2], **INT8).items():
        torch.testing.assert_close(value, full[name], rtol=1e-12, atol=1e-13)


@cases
@pytest.mark.parametrize("kind", ["scalar", "tensor", "element"])
@pytest.mark.parametrize("learnable", [False, True])
def test_rates_of_every_kind(case: str, kind: str, learnable: bool) -> None:
    model, batch = CASES[case]()
    check(model, batch, inner_lr=draw(model, kind, learnable=learnable))


@cases
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_sharpness_aware_steps(case: str, norm: str) -> None:
    model, batch = CASES[case]()
    check(model, batch, sharpness=Sharpness(0.1, norm))


@cases
@pytest.mark.parametrize("which", [slice(-2, None), slice(0, 1), slice(1, 3)])
@pytest.mark.parametrize("steps", [0, 1, 127])
def test_what_adapts_and_for_how_long(case: str, which: slice, steps: int) -> None:
    model, batch = CASES[case]()
    names = [name for name, _ in model.named_parameters()][which]
    found = check(model, batch, adapt=names, inner_steps=steps, inner_lr=1e-4)
    assert set(found.counts) == set(names)
    assert steps < 127 or max(int(value.abs().max()) for value in found.counts.values()) > 50 or "bias" in names[-1]


@cases
def test_a_nan_is_a_count_of_its_own(case: str) -> None:
    model, batch = CASES[case]()
    batch[0][1] = torch.nan
    options = INT8 | {"inner_lr": 0.01}
    own, expected = (adapt(model, *batch[:2], **options, backend=backend) for backend in ("cpu", "torch"))
    assert isinstance(own, CompactParams) and isinstance(expected, CompactParams)
    for name, counts in expected.counts.items():
        assert torch.equal(own.counts[name], counts), name
    assert any((counts[1] == -128).any() for counts in own.counts.values())
    assert not any((counts[0] == -128).any() for counts in own.counts.values())


@cases
def test_bitwise_the_same_for_any_number_of_threads(case: str) -> None:
    model, batch = CASES[case]()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(adapt(model, *batch[:2], **INT8))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other.counts[name], counts) for name, counts in found[0].counts.items())


def test_the_native_calls_refuse_what_int8_does_not_count() -> None:
    shape = {
        "blocks": 1, "channels": 1, "filters": 8, "height": 8, "width": 8, "ways": 2, "halving": "max",
        "readout": "flatten", "conv_bias": True, "eps": [1e-5],
    }  # fmt: skip
    with pytest.raises(ValueError, match="steps: expected at most 127 that are counted, found 128"):
        C.plan_conv_meta_step_cpu(shape, 1, 1, 1, 8, 1, steps=128, counts_steps=True)
    with pytest.raises(ValueError, match="counts_steps: expected false without sign steps"):
        C.plan_mlp_meta_step_cpu([1, 2, 1], 1, 1, 1, 8, 1, steps=1, method="maml", counts_steps=True)
