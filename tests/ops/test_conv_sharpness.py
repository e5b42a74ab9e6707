"""Sharpness-aware steps of Conv-N networks on the CPU: against the reference, and by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.test_conv_meta_step_cpu import Data, both, data, distance, net, on
from ops.test_conv_rates import assert_adapts_as_the_reference, draw
from ops.test_conv_rates import assert_equal_to_the_reference as assert_rates_equal
from torch import nn

from signmaml_ext import Sharpness, adapt, explain
from signmaml_ext._loader import C

METHODS = ("sign-maml", "fo-maml")
KINDS = [Sharpness(0.2, norm, adaptive) for norm in ("l2", "linf") for adaptive in (False, True)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.norm + "-adaptive" * kind.adaptive)
methods = pytest.mark.parametrize("method", METHODS)


def assert_equal_to_the_reference(model: nn.Module, batch: Data, **arguments: Any) -> None:
    native, own, reference, expected = both(model, batch, **({"inner_lr": 0.02, "inner_steps": 3} | arguments))
    assert native.backend == "cpu"
    torch.testing.assert_close(native.support_loss, reference.support_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-11, atol=1e-12)
    assert native.nonfinite.tolist() == reference.nonfinite.tolist()
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name


@methods
@kinds
@pytest.mark.parametrize("pooling", ["max", "stride", "mean"])
def test_steps_are_those_of_the_reference(kind: Sharpness, method: str, pooling: str) -> None:
    model, batch = net(size=13, channels=2, filters=24, pooling=pooling, layers=3), data(size=13, channels=2, tasks=3)
    found = explain(model, *batch, inner_lr=0.02, inner_steps=3, method=method, sharpness=kind)
    assert (found.backend, found.family) == ("cpu", "conv")
    assert_equal_to_the_reference(model, batch, method=method, sharpness=kind)
    plain = on("cpu", model, batch, {"inner_lr": 0.02, "inner_steps": 3, "method": method})
    sharp = on("cpu", model, batch, {"inner_lr": 0.02, "inner_steps": 3, "method": method, "sharpness": kind})
    assert any(distance(sharp[1][name], plain[1][name]) > 1e-4 for name in plain[1])


@methods
@kinds
@pytest.mark.parametrize("patterns", [["classifier.*"], ["features.1.conv.weight"], ["*.normalize.*"], ["*conv.bias"]])
def test_the_norm_is_over_what_adapts(kind: Sharpness, method: str, patterns: list[str]) -> None:
    model, batch = net(layers=3), data()
    assert_equal_to_the_reference(model, batch, method=method, sharpness=kind, adapt=patterns)


@methods
@pytest.mark.parametrize("rates", ["step", "tensor and step", "element"])
def test_with_rates_of_every_kind(method: str, rates: str) -> None:
    model, batch = net(layers=2), data()
    assert_rates_equal(model, batch, draw(model, rates), method=method, sharpness=0.1)


@methods
@kinds
def test_adapt_and_evaluate(kind: Sharpness, method: str) -> None:
    model, batch = net(), data()
    options: dict[str, Any] = {"inner_lr": 0.02, "inner_steps": 4, "method": method, "sharpness": kind}
    assert_adapts_as_the_reference(model, batch, options)


@kinds
@pytest.mark.parametrize("tasks", [1, 5])
def test_bitwise_the_same_for_any_number_of_threads(kind: Sharpness, tasks: int) -> None:
    model, batch = net(size=20, filters=16).float(), data(size=20, tasks=tasks)
    batch = tuple(value.float() if value.is_floating_point() else value for value in batch)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(on("cpu", model, batch, {"inner_lr": 0.02, "inner_steps": 3, "sharpness": kind})[1])
    finally:
        torch.set_num_threads(before)
    for found in outcomes[1:]:
        assert all(torch.equal(found[name], outcomes[0][name]) for name in found)


@kinds
def test_no_step_and_no_query(kind: Sharpness) -> None:
    model, batch = net(), data()
    assert_equal_to_the_reference(model, batch, inner_steps=0, sharpness=kind)
    found = adapt(model, *batch[:2], inner_lr=0.02, inner_steps=0, sharpness=kind)
    assert all(torch.equal(value[1], model.get_parameter(name)) for name, value in found.items())


def test_a_task_that_is_not_finite_is_flagged_and_the_others_are_not() -> None:
    model, batch = net(), data(tasks=3)
    batch[0][1, 0, 0, 0, 0] = torch.nan
    for kind in KINDS:
        native, _, reference, _ = both(model, batch, inner_lr=0.02, inner_steps=2, sharpness=kind, nonfinite="skip")
        assert native.nonfinite.tolist() == reference.nonfinite.tolist() == [False, True, False]


def test_maml_goes_to_chains_of_layers_with_the_reason() -> None:
    found = explain(net(), *data(), method="maml", sharpness=0.1)
    assert (found.backend, found.family) == ("cpu", "layers")
    assert found.families["cpu"]["conv"] == "its kernels do not differentiate through sharpness-aware steps"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharpness_rho": -1.0}, "sharpness_rho: expected a finite number >= 0"),
        ({"sharpness_rho": float("nan")}, "sharpness_rho: expected a finite number >= 0"),
        ({"sharpness_rho": 1.0, "method": "maml"}, "sharpness_rho: expected 0 with method 'maml'"),
    ],
)
def test_the_native_call_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    shape = {
        "blocks": 1, "channels": 1, "filters": 8, "height": 8, "width": 8, "ways": 2, "halving": "max",
        "readout": "flatten", "conv_bias": True, "eps": [1e-5],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        C.plan_conv_meta_step_cpu(shape, 1, 1, 1, 8, 1, steps=1, **arguments)
    with pytest.raises(ValueError, match="sharpness_norm: expected 'l2' or 'linf', found 'l1'"):
        C.conv_meta_step_cpu(
            {}, shape, tasks=1, support=1, query=1, steps=1, method="sign-maml", is_double=True, threads=1,
            sharpness_norm="l1",
        )  # fmt: skip
