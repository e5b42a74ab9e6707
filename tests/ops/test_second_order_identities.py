"""Identities of exact MAML on every backend that serves it. None of them needs another backend to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.test_conv_meta_step_cpu import Data, data, distance, net, on
from ops.test_conv_rates import STEPS, draw, leaves_of
from torch import Tensor, nn

from helpers.cases import definition
from helpers.cases.perceptrons import network, tasks_for
from signmaml_ext import evaluate, explain

Case = tuple[nn.Module, Data, dict[str, Any]]  # a float64 network, some tasks, and the options of its family
ANY_RATES = ("torch", "cpu")  # backends with learnable rates and rates of single elements


def perceptron(activation: type[nn.Module], loss: str, tasks: int) -> Case:
    widths = (3, 7, 6, 4)
    model = network(widths, activation).double()
    return model, tasks_for(widths, loss, tasks, 5, 4, torch.float64), {"loss": loss}


def convolutional(pooling: str, tasks: int) -> Case:
    return net(pooling=pooling, layers=2, channels=2, size=9), data(tasks=tasks, channels=2, size=9), {}


NETWORKS: dict[str, Callable[[int], Case]] = {
    "relu": lambda tasks: perceptron(nn.ReLU, "cross_entropy", tasks),
    "tanh": lambda tasks: perceptron(nn.Tanh, "mse", tasks),
    "max": lambda tasks: convolutional("max", tasks),
    "stride": lambda tasks: convolutional("stride", tasks),
    "mean": lambda tasks: convolutional("mean", tasks),
}


def require(backend: str, case: Case, always: tuple[str, ...] = ANY_RATES, **options: Any) -> None:
    """Skips the test if the backend does not serve the call, which only some may refuse."""
    reason = explain(case[0], *case[1], **case[2], **options).reasons[backend]
    if reason is not None:
        assert backend not in always, reason
        pytest.skip(reason)


def of_one(batch: Data, task: int) -> Data:
    support_x, support_y, query_x, query_y = (value[task : task + 1] for value in batch)
    return support_x, support_y, query_x, query_y


def gradient_of(case: Case, batch: Data) -> dict[str, Tensor]:
    """The mean gradient of the query loss, without steps."""
    loss = case[2].get("loss", "cross_entropy")
    found, *_ = definition.meta_gradient(case[0], batch, inner_lr=0.0, inner_steps=0, method="fo-maml", loss=loss)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("kind", NETWORKS)
def test_rates_of_zero_leave_the_query_gradient(backend: str, kind: str) -> None:
    """And no step has moved anything, so the slope in each step's rate is that of the first one."""
    case = NETWORKS[kind](3)
    model, batch, options = case
    rate = torch.zeros(STEPS, dtype=torch.float64, requires_grad=backend in ANY_RATES)
    steps: dict[str, Any] = {"inner_lr": rate, "inner_steps": STEPS, "method": "maml"}
    require(backend, case, **steps)
    result, found = on(backend, model, batch, options | steps)
    assert result.backend == backend
    for name, gradient in gradient_of(case, batch).items():
        assert distance(found[name], gradient) < 1e-11 or (found[name] - gradient).norm() < 1e-14, name
    if backend in ANY_RATES:
        slopes = []
        for task in range(3):
            support_x, support_y, query_x, query_y = of_one(batch, task)
            of_query = gradient_of(case, (query_x, query_y, query_x, query_y))
            of_support = gradient_of(case, (support_x, support_y, support_x, support_y))
            slopes.append(-sum((of_query[name] * of_support[name]).sum() for name in of_query))
        assert rate.grad is not None
        torch.testing.assert_close(rate.grad, torch.stack(slopes).mean().expand(STEPS), rtol=1e-10, atol=0)


# ---- a constant Hessian ---------------------------------------------------------------------------------------------


class Quadratic:
    """The mean squared error of a linear layer as a function of its weight and bias.

    They are one row here: the weight's columns, then the bias. Loss = row H row / 2 - b row + constant.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        count, outputs = targets.shape
        inputs = torch.cat([features, torch.ones(count, 1, dtype=features.dtype)], 1)
        one = torch.eye(outputs, dtype=features.dtype)
        self.hessian = torch.kron(inputs.T @ inputs, one) * (2 / (count * outputs))
        self.b = (inputs.T @ targets).reshape(-1) * (2 / (count * outputs))

    def gradient(self, row: Tensor) -> Tensor:
        return self.hessian @ row - self.b


def as_row(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight.T.reshape(-1), bias])


def parts_of(row: Tensor, layer: nn.Linear) -> dict[str, Tensor]:
    size = layer.weight.numel()
    return {"weight": row[:size].view(layer.in_features, layer.out_features).T, "bias": row[size:]}


LINEAR: dict[str, Callable[[], Case]] = {
    "alone": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).double(), *perceptron(nn.Tanh, "mse", 2)[1:]),
    "after relu": lambda: perceptron(nn.ReLU, "mse", 2),
    "after tanh": lambda: perceptron(nn.Tanh, "mse", 2),
}


@pytest.mark.parametrize("elements", [False, True], ids=["rates of tensors", "rates of elements"])
@pytest.mark.parametrize("adapt", ["weight and bias", "weight", "bias"])
@pytest.mark.parametrize("kind", LINEAR)
def test_a_linear_layer_has_the_closed_form(backend: str, kind: str, adapt: str, elements: bool) -> None:
    """Steps of a linear layer with squared error go down one quadratic function, whose Hessian H never changes.

    So its meta-gradient is (I - H A_0) .. (I - H A_K-1) g, where A_k are a step's rates on the diagonal, 0 for what
    does not adapt, and g is the query gradient after the steps.
    """
    case = LINEAR[kind]()
    model, batch, options = case
    layer, prefix = model[-1], f"{len(model) - 1}."
    rates = {}
    for name in ("weight", "bias"):
        if name in adapt:
            shape = getattr(layer, name).shape
            rate = 0.1 + 0.4 * torch.rand(STEPS, *(shape if elements else [1] * len(shape)), dtype=torch.float64)
            rates[name] = rate.requires_grad_(backend in ANY_RATES)
    steps: dict[str, Any] = {
        "inner_lr": {prefix + name: rate for name, rate in rates.items()},
        "inner_steps": STEPS,
        "method": "maml",
        "adapt": [prefix + name for name in rates],
    }
    require(backend, case, ("torch",) if kind == "alone" else ANY_RATES, **steps)
    result, found = on(backend, model, batch, options | steps)
    assert result.backend == backend

    with torch.no_grad():
        theta, tasks = as_row(layer.weight, layer.bias), len(batch[0])
        one = torch.eye(len(theta), dtype=torch.float64)
        scales = []
        for step in range(STEPS):
            scale = {name: torch.zeros_like(getattr(layer, name)) for name in ("weight", "bias")}
            scales.append(as_row(**(scale | {name: scale[name] + rate[step] for name, rate in rates.items()})))
        expected, slopes = torch.zeros_like(theta), torch.zeros(STEPS, len(theta), dtype=torch.float64)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            support, query = Quadratic(model[:-1](support_x), support_y), Quadratic(model[:-1](query_x), query_y)
            row, gradients = theta, []
            for scale in scales:
                gradients.append(support.gradient(row))
                row = row - scale * gradients[-1]
            product = one  # of the factors of the steps after this one
            for step in reversed(range(STEPS)):
                slopes[step] -= (product @ query.gradient(row)) * gradients[step] / tasks
                product = (one - support.hessian * scales[step]) @ product
            expected += product @ query.gradient(row) / tasks
        for name, gradient in parts_of(expected, layer).items():
            assert distance(found[prefix + name], gradient) < 1e-12, name
        for name, rate in rates.items():
            for step in range(STEPS if backend in ANY_RATES else 0):
                slope = parts_of(slopes[step], layer)[name]
                assert rate.grad is not None
                assert distance(rate.grad[step], slope if elements else slope.sum()) < 1e-11, (name, step)


# ---- symmetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["adapt", "rates"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_hessian_is_symmetric(backend: str, kind: str, by: str) -> None:
    """<u, H w> = <w, H u> for u and w of every two parameters.

    One step of maml subtracts H w from the query gradient of fo-maml, where w is rate times query gradient of what the
    step moves. Here it moves a single parameter: the others do not adapt, or their rates are 0.
    """
    case = NETWORKS[kind](1)
    model, batch, options = case
    shapes = {name: p.shape for name, p in model.named_parameters()}
    moves, products = {}, {}
    for moving, shape in shapes.items():
        rates = {name: torch.zeros(shape if name == moving else (), dtype=torch.float64) for name in shapes}
        rates[moving] = 0.1 + torch.rand(shape if backend in ANY_RATES else (), dtype=torch.float64)
        step: dict[str, Any] = {"inner_lr": rates, "inner_steps": 1}
        if by == "adapt":
            step = {"inner_lr": {moving: rates[moving]}, "inner_steps": 1, "adapt": [moving]}
        require(backend, case, method="maml", **step)
        _, exact = on(backend, model, batch, options | step | {"method": "maml"})
        _, first_order = on(backend, model, batch, options | step | {"method": "fo-maml"})
        moves[moving] = rates[moving] * first_order[moving]
        products[moving] = {name: first_order[name] - exact[name] for name in shapes}
    matrix = torch.stack([torch.stack([(moves[u] * products[w][u]).sum() for u in shapes]) for w in shapes])
    of_moving = [i for i, name in enumerate(shapes) if not name.endswith("conv.bias")]  # BatchNorm takes these back
    off_diagonal = (matrix - matrix.diag().diag()).abs().amax(1)
    assert off_diagonal[of_moving].amin() > 1e-6, "the products are not trivial"
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-14)


# ---- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapts", ["all", "last layer"])
@pytest.mark.parametrize("rates_of", ["step", "tensor and step", "element and step"])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("backend", ANY_RATES)
def test_the_gradient_of_a_rate_is_the_slope_of_the_query_loss(
    backend: str, kind: str, rates_of: str, adapts: str
) -> None:
    """By central differences, in each step's rate that matters most, and for all rates of a parameter at once."""
    case = NETWORKS[kind](2)
    model, batch, options = case
    names = [name for name, _ in model.named_parameters()][0 if adapts == "all" else -2 :]
    rates = draw(model, rates_of)
    if isinstance(rates, dict):
        rates = {name: rates[name] for name in names}
    steps: dict[str, Any] = {"inner_lr": rates, "inner_steps": STEPS, "method": "maml", "adapt": names}
    require(backend, case, **steps)
    on(backend, model, batch, options | steps)
    size, trivial = 1e-6, 0
    for key, rate in leaves_of(rates).items():
        gradient = torch.zeros_like(rate) if rate.grad is None else rate.grad
        directions = [torch.randn_like(rate)]
        for step in range(STEPS):
            directions.append(torch.zeros_like(rate))
            directions[-1][step].view(-1)[gradient[step].abs().argmax()] = 1
        for direction in directions:
            losses = []
            for sign in (1, -1):
                moved = leaves_of(rates) | {key: rate + sign * size * direction}
                moved = {name: value.detach() for name, value in moved.items()}
                inner_lr = moved if isinstance(rates, dict) else moved[""]
                losses.append(evaluate(model, *batch, **(options | steps | {"inner_lr": inner_lr})).query_loss.mean())
            slope = float(losses[0] - losses[1]) / (2 * size)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), key
            trivial += abs(slope) < 1e-6
    dead = sum(key.endswith("conv.bias") for key in leaves_of(rates))  # BatchNorm takes them back
    assert trivial == dead * (1 + STEPS)
