"""Exact MAML of Conv-N networks on the CPU: against the reference, which is torch's double backward, and by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.test_conv_meta_step_cpu import (
    ISAS,
    OFFICIAL,
    SHAPES,
    Data,
    assert_as_exact_as_torchs,
    both,
    data,
    distance,
    make_ties_and_zeros,
    net,
    on,
    same_for_any_number_of_threads,
)
from torch import Tensor, nn

from signmaml_ext import adapt, evaluate, explain
from signmaml_ext._loader import C

MAML: dict[str, Any] = {"method": "maml", "inner_lr": 0.1, "inner_steps": 2}


@pytest.fixture(params=[*(pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS[:-1]), ISAS[-1]])
def isa(isas: list[str], request: pytest.FixtureRequest) -> str:
    C.select_cpu_isa(request.param)  # `isas` restores the choice
    return str(request.param)


def assert_equal_to_the_reference(model: nn.Module, batch: Data, tolerance: float = 1e-10, **arguments: Any) -> None:
    native, own, reference, expected = both(model, batch, **(MAML | arguments))
    assert native.backend == "cpu"
    torch.testing.assert_close(native.support_loss, reference.support_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-11, atol=1e-12)
    assert native.nonfinite.tolist() == reference.nonfinite.tolist()
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < tolerance or (own[name] - gradient).norm() < 1e-13, name


def sizes_of(shape: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shape.items() if key in ("channels", "size", "ways")}


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=lambda shape: "-".join(str(value) for value in shape.values()))
def test_float64_gradients_are_those_of_the_reference(isa: str, shape: dict[str, Any]) -> None:
    assert_equal_to_the_reference(net(**shape), data(**sizes_of(shape)))


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("pooling", ["max", "stride", "mean"])
def test_any_number_of_steps(steps: int, pooling: str) -> None:
    model, batch = net(size=13, pooling=pooling, layers=3), data(size=13)
    assert_equal_to_the_reference(model, batch, inner_lr=0.05, inner_steps=steps)


@pytest.mark.parametrize(("support", "query"), [(1, 1), (2, 17), (31, 3), (40, 2)])
@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_sets_of_any_size(support: int, query: int, pooling: str) -> None:
    """More examples than a weight gradient takes at once, and one."""
    model, batch = net(size=26, filters=40, pooling=pooling), data(size=26, support=support, query=query)
    assert_equal_to_the_reference(model, batch)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 14, 31, 62, 64])
def test_strided_blocks_of_any_size(size: int) -> None:
    """Outputs of an axis share products in threes and twos, except those left over at the border or in a chunk."""
    assert_equal_to_the_reference(net(size=2 * size, pooling="stride"), data(size=2 * size, support=3, query=3))


@pytest.mark.parametrize(
    "patterns",
    [
        ["classifier.*"],
        ["features.*"],
        ["features.1.conv.weight"],
        ["*.normalize.*"],
        ["features.0.*"],
        ["*.conv.bias"],
    ],
)
@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_what_does_not_adapt_has_a_gradient_through_what_does(isa: str, patterns: list[str], pooling: str) -> None:
    assert_equal_to_the_reference(net(layers=3, pooling=pooling), data(), adapt=patterns, inner_steps=3)


def test_frozen_parameters() -> None:
    model, batch = net(layers=3), data()
    model.features[1].conv.weight.requires_grad_(False)
    model.features[0].normalize.bias.requires_grad_(False)
    assert_equal_to_the_reference(model, batch)


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_rates_by_tensor_and_step(pooling: str) -> None:
    model, batch = net(pooling=pooling), data()
    rates: dict[str, float | Tensor] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        by_step = torch.tensor([0.01, 0.0, 0.03], dtype=torch.float64) * (number + 1)
        rates[name] = by_step.reshape(3, *[1] * parameter.ndim)
    assert_equal_to_the_reference(model, batch, inner_lr=rates, inner_steps=3)


def test_the_gradient_is_the_slope_of_the_query_loss() -> None:
    """By central differences, which share no formula with any backend."""
    model, batch = net(layers=2, filters=16), data(tasks=2)
    _, own = on("cpu", model, batch, MAML)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    step, losses = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(direction[name], alpha=sign * step)
            losses.append(evaluate(model, *batch, inner_lr=0.1, inner_steps=2, method="maml").query_loss.mean())
            for name, p in parameters.items():
                p.sub_(direction[name], alpha=sign * step)
    slope = float(losses[0] - losses[1]) / (2 * step)
    assert float(sum((own[name] * direction[name]).sum() for name in own)) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_without_a_rate_it_is_the_query_gradient(isa: str, pooling: str) -> None:
    model, batch = net(pooling=pooling, layers=3), data()
    _, exact = on("cpu", model, batch, MAML | {"inner_lr": 0.0})
    _, first_order = on("cpu", model, batch, MAML | {"inner_lr": 0.0, "method": "fo-maml"})
    for name, gradient in first_order.items():
        # The networks keep other activations, not other sums.
        assert torch.equal(exact[name], gradient), name


def test_adaptation_is_that_of_fo_maml() -> None:
    model, batch = net(layers=3), data()
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 3, "backend": "cpu"}
    exact, first_order = (adapt(model, *batch[:2], method=method, **options) for method in ("maml", "fo-maml"))
    assert all(torch.equal(exact[name], value) for name, value in first_order.items())
    exact, first_order = (evaluate(model, *batch, method=method, **options) for method in ("maml", "fo-maml"))
    assert torch.equal(exact.logits, first_order.logits)


@pytest.mark.parametrize("pooling", ["max", "stride", "mean"])
@pytest.mark.parametrize(("support", "query"), [(4, 5), (13, 2)])
def test_bitwise_the_same_for_any_number_of_threads(isa: str, pooling: str, support: int, query: int) -> None:
    model = net(size=33, filters=64, layers=3, pooling=pooling).float()
    same_for_any_number_of_threads(
        model, data(size=33, tasks=3, support=support, query=query), (1, 2, 3, 7), method="maml"
    )


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_a_task_has_the_same_bits_whatever_shares_its_batch(isa: str, pooling: str) -> None:
    """The first task leaves NaN in all memory that it used, and is left out of the mean; one thread takes both."""
    model, batch = net(size=19, filters=24, layers=3, pooling=pooling).float(), data(size=19, tasks=2)
    batch = tuple(value.float() if value.is_floating_point() else value for value in batch)
    broken = batch[0].clone()
    broken[0, 0, 0, 4, 4] = torch.nan
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        result, together = on("cpu", model, (broken, *batch[1:]), MAML | {"nonfinite": "skip"})
        _, alone = on("cpu", model, tuple(value[1:] for value in batch), MAML)
    finally:
        torch.set_num_threads(before)
    assert result.nonfinite.tolist() == [True, False]
    assert all(torch.equal(together[name], gradient) for name, gradient in alone.items())


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_a_broken_task_is_flagged_and_can_be_left_out(isa: str, pooling: str) -> None:
    model, batch = net(pooling=pooling), data(tasks=3)
    batch[2][1, 0, 0, 0, 0] = torch.inf
    native, own, reference, expected = both(model, batch, **MAML, nonfinite="skip")
    assert native.nonfinite.tolist() == reference.nonfinite.tolist() == [False, True, False]
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-11, name
    result, own = on("cpu", model, batch, MAML)
    assert result.nonfinite.tolist() == [False, True, False]
    assert bool(own["classifier.weight"].isnan().any())


def test_a_gradient_that_overflows_on_the_way_back_is_flagged(isa: str) -> None:
    """Steps so long that the derivative in theta exceeds float32, while losses and their own gradients do not."""
    model, batch = net(layers=2).float(), data()
    batch = tuple(value.float() if value.is_floating_point() else value for value in batch)
    long: dict[str, Any] = {"inner_lr": 10.0, "inner_steps": 40}
    first_order, _ = on("cpu", model, batch, long | {"method": "fo-maml"})
    exact, _ = on("cpu", model, batch, long | {"method": "maml"})
    assert first_order.nonfinite.tolist() == [False, False]
    assert exact.nonfinite.tolist() == [True, True]


@pytest.mark.parametrize("case", ["constant images", "scale 0", "all dead", "sparse"])
@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_ties_and_zeros(isa: str, case: str, pooling: str) -> None:
    model, batch = net(channels=1, pooling=pooling), data()
    make_ties_and_zeros(case, model, batch, constant=batch[0])
    assert_equal_to_the_reference(model, batch, inner_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[11], SHAPES[12]])
def test_float32_gradients_are_as_exact_as_torchs(isa: str, shape: dict[str, Any]) -> None:
    model = net(**shape)
    batches = [data(**sizes_of(shape), query=10) for _ in range(11)]
    assert_as_exact_as_torchs(model, batches, method="maml", inner_lr=0.02, inner_steps=1)


def test_explain_names_the_family() -> None:
    model, batch = net(), data()
    found = explain(model, *batch, **MAML)
    assert (found.backend, found.family) == ("cpu", "conv")


def test_memory_grows_with_steps_by_the_parameters_before_each() -> None:
    def room(steps: int, method: str = "maml", tasks: int = 8) -> int:
        plan = C.plan_conv_meta_step_cpu(OFFICIAL, tasks, 5, 5, 4, 2, steps=steps, method=method)
        return int(plan["workspace_bytes"])

    parameters = C.plan_conv_meta_step_cpu(OFFICIAL, 8, 5, 5, 4, 2)["parameters"]
    per_step = (room(11) - room(1)) / 10
    of_biases = 4 * OFFICIAL["filters"]  # the convolutions', which no step moves
    assert per_step == pytest.approx(2 * 4 * (parameters - of_biases), rel=1e-3), "two tasks are in memory at once"
    assert room(3) == room(3, tasks=8000)
    assert room(3, "fo-maml") == room(0, "fo-maml") < room(1) < 2.2 * room(0)
    with pytest.raises(ValueError, match=r"steps: expected sizes whose memory can be counted"):
        C.plan_conv_meta_step_cpu(
            OFFICIAL | {"height": 2**14, "width": 2**14}, 1, 5, 5, 4, 1, steps=2**31 - 1, method="maml"
        )
