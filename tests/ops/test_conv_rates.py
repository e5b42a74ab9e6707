"""Rates of Conv-N networks that are learnable or vary within a tensor, on the CPU: against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.test_conv_meta_step_cpu import OFFICIAL, Data, data, distance, net, on
from torch import Tensor, nn

from signmaml_ext import adapt, evaluate, explain
from signmaml_ext._loader import C

METHODS = ("sign-maml", "fo-maml", "maml")
STEPS = 3
# By name: the shape of a parameter's rate, from the parameter's own.
BY_PARAMETER: dict[str, Any] = {
    "tensor": lambda shape: (),
    "tensor and step": lambda shape: (STEPS, *[1] * len(shape)),
    "element": lambda shape: shape,
    "element and step": lambda shape: (STEPS, *shape),
    "filter": lambda shape: (shape[0], *[1] * (len(shape) - 1)),
}
KINDS = ("scalar", "step", *BY_PARAMETER)
Rates = Tensor | dict[str, Tensor]


def draw(model: nn.Module, kind: str, *, learnable: bool = True) -> Rates:
    def rate(shape: tuple[int, ...]) -> Tensor:
        return (torch.rand(shape, dtype=torch.float64) * 0.1).requires_grad_(learnable)

    if kind in BY_PARAMETER:
        return {name: rate(BY_PARAMETER[kind](tuple(p.shape))) for name, p in model.named_parameters()}
    return rate((STEPS,) if kind == "step" else ())


def leaves_of(rates: Rates) -> dict[str, Tensor]:
    return rates if isinstance(rates, dict) else {"": rates}


def outcome(backend: str, model: nn.Module, batch: Data, rates: Rates, **arguments: Any) -> Any:
    """The result, the meta-gradients, and the gradients of the rates."""
    leaves = leaves_of(rates)
    for leaf in leaves.values():
        leaf.grad = None
    options = {"inner_lr": rates, "inner_steps": STEPS} | arguments
    result, found = on(backend, model, batch, options)
    return result, found, {key: leaf.grad for key, leaf in leaves.items()}


def assert_equal_to_the_reference(model: nn.Module, batch: Data, rates: Rates, **arguments: Any) -> None:
    native, own, own_rates = outcome("cpu", model, batch, rates, **arguments)
    reference, expected, expected_rates = outcome("torch", model, batch, rates, **arguments)
    assert native.backend == "cpu"
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-11, atol=1e-12)
    assert native.nonfinite.tolist() == reference.nonfinite.tolist()
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name
    for key, gradient in expected_rates.items():
        assert (own_rates[key] is None) == (gradient is None), key
        if gradient is not None:
            assert distance(own_rates[key], gradient) < 1e-10 or own_rates[key].norm() + gradient.norm() < 1e-13, key


def assert_adapts_as_the_reference(model: nn.Module, batch: Data, options: dict[str, Any]) -> None:
    """`adapt` and `evaluate`."""
    own, expected = (adapt(model, *batch[:2], **options, backend=backend) for backend in ("cpu", "torch"))
    for name, value in expected.items():
        assert distance(own[name], value) < 1e-11, name
    torch.testing.assert_close(
        evaluate(model, *batch, **options, backend="cpu").logits,
        evaluate(model, *batch, **options, backend="torch").logits,
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", ["max", "stride", "mean"])
def test_learnable_rates(kind: str, method: str, pooling: str) -> None:
    model, batch = net(size=13, channels=2, filters=24, pooling=pooling), data(size=13, channels=2, tasks=3)
    rates = draw(model, kind)
    found = explain(model, *batch, inner_lr=rates, inner_steps=STEPS, method=method)
    assert (found.backend, found.family) == ("cpu", "conv")
    assert_equal_to_the_reference(model, batch, rates, method=method)


@pytest.mark.parametrize("kind", ["element", "element and step", "filter"])
@pytest.mark.parametrize("method", METHODS)
def test_constant_rates_that_vary_within_a_tensor(kind: str, method: str) -> None:
    model, batch = net(layers=3), data()
    rates = draw(model, kind, learnable=False)
    assert_equal_to_the_reference(model, batch, rates, method=method)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": STEPS, "method": method}
    assert_adapts_as_the_reference(model, batch, options)


@pytest.mark.parametrize("patterns", [["classifier.*"], ["features.0.*"], ["*.normalize.*"], ["*conv.bias"]])
@pytest.mark.parametrize("kind", ["scalar", "tensor and step", "element"])
@pytest.mark.parametrize("method", METHODS)
def test_rates_of_what_adapts(patterns: list[str], kind: str, method: str) -> None:
    model, batch = net(layers=3), data()
    rates = draw(model, kind)
    if isinstance(rates, dict):
        adapted = adapt(model, *batch[:2], inner_lr=0.1, inner_steps=1, adapt=patterns)
        rates = {name: rate for name, rate in rates.items() if name in adapted}
    assert_equal_to_the_reference(model, batch, rates, method=method, adapt=patterns)


def test_one_rate_learns_and_the_others_stay() -> None:
    model, batch = net(), data()
    rates = draw(model, "tensor", learnable=False)
    assert isinstance(rates, dict)
    rates["features.1.conv.weight"].requires_grad_()
    for method in METHODS:
        assert_equal_to_the_reference(model, batch, rates, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_gives_no_gradient(method: str) -> None:
    model, batch = net(), data()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert_equal_to_the_reference(model, batch, rate, method=method, inner_steps=0)
    assert rate.grad is None


def test_the_graph_of_a_rate_receives_its_gradient() -> None:
    """In float32, with rates in float64 behind an exponential."""
    model = net().float()
    batch = tuple(value.float() if value.is_floating_point() else value for value in data())
    log = torch.full((STEPS,), 0.05, dtype=torch.float64).log().requires_grad_()
    found = []
    for backend in ("cpu", "torch"):
        log.grad = None
        on(backend, model, batch, {"inner_lr": log.exp(), "inner_steps": STEPS, "method": "maml"})
        assert log.grad is not None
        found.append(log.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tensor and step", "element"])
def test_bitwise_the_same_for_any_number_of_threads(method: str, kind: str) -> None:
    model = net(size=19, filters=24, layers=3).float()
    batch = tuple(v.float() if v.is_floating_point() else v for v in data(size=19, tasks=3))
    drawn = draw(model, kind)
    assert isinstance(drawn, dict)
    rates = {name: rate.detach().float().requires_grad_() for name, rate in drawn.items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            _, own, own_rates = outcome("cpu", model, batch, rates, method=method)
            found.append([*own.values(), *(rate for rate in own_rates.values() if rate is not None)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["scalar", "element"])
def test_a_broken_task_is_left_out_of_the_rates_gradients_too(method: str, kind: str) -> None:
    """One thread takes both tasks, so the second one finds the first one's NaN in memory."""
    model, batch = net(layers=3), data(tasks=2)
    broken = batch[0].clone()
    broken[0, 0, 0, 4, 4] = torch.nan
    rates, before = draw(model, kind), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        result, together, of_rates = outcome("cpu", model, (broken, *batch[1:]), rates, method=method, nonfinite="skip")
        _, alone, alone_rates = outcome("cpu", model, tuple(value[1:] for value in batch), rates, method=method)
    finally:
        torch.set_num_threads(before)
    assert result.nonfinite.tolist() == [True, False]
    assert all(torch.equal(together[name], gradient) for name, gradient in alone.items())
    assert all(gradient is None or torch.equal(of_rates[key], gradient) for key, gradient in alone_rates.items())


def test_memory_for_rates() -> None:
    """One direction a step where rates learn; else no more than three rows."""

    def room(steps: int, **rates: bool) -> int:
        plan = C.plan_conv_meta_step_cpu(OFFICIAL, 1, 5, 5, 4, 1, steps=steps, **rates)
        return int(plan["workspace_bytes"])

    row = 4 * int(C.plan_conv_meta_step_cpu(OFFICIAL, 1, 5, 5, 4, 1)["parameters"])
    assert (room(11, learns_rates=True) - room(1, learns_rates=True)) / 10 == pytest.approx(row, rel=1e-3)
    assert room(11, rates_by_element=True) == room(1, rates_by_element=True)
    assert room(1, rates_by_element=True) - room(1) == pytest.approx(3 * row, rel=1e-2)
