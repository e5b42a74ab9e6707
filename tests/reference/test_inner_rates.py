"""Learnable inner rates: exact gradients for every shape that a rate can have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import nets
from signmaml_ext import meta_step

STEPS = 3


def shapes_of(model: nn.Module, kind: str):
    """A float64 inner rate of the given kind; every tensor in it requires grad."""

    def rate(*shape: int) -> torch.Tensor:
        return (0.02 + 0.01 * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    named = dict(model.named_parameters())
    return {
        "scalar": lambda: rate(),
        "per step": lambda: rate(STEPS),
        "per tensor": lambda: {name: rate() for name in named},
        "per parameter": lambda: {name: rate(*p.shape) for name, p in named.items()},
        "per row": lambda: {name: rate(p.shape[0], *[1] * (p.ndim - 1)) for name, p in named.items()},
        "per tensor and step": lambda: {name: rate(STEPS, *[1] * p.ndim) for name, p in named.items()},
        "per parameter and step": lambda: {name: rate(STEPS, *p.shape) for name, p in named.items()},
    }[kind]()


KINDS = [
    "scalar",
    "per step",
    "per tensor",
    "per parameter",
    "per row",
    "per tensor and step",
    "per parameter and step",
]


def leaves(rates):
    return list(rates.values()) if isinstance(rates, dict) else [rates]


@pytest.mark.parametrize("method", ["sign-maml", "maml"])
@pytest.mark.parametrize("kind", KINDS)
def test_rate_gradient_equals_finite_differences(kind, method):
    model, data = nets.mlp(1, 1, nn.Tanh).double(), nets.regression_tasks()
    rates = shapes_of(model, kind)
    options = {"inner_lr": rates, "inner_steps": STEPS, "loss": "mse", "method": method}
    meta_step(model, *data, **options)
    directions = [torch.randn_like(rate) for rate in leaves(rates)]
    found = sum((rate.grad * d).sum() for rate, d in zip(leaves(rates), directions, strict=True))
    losses, step = [], 1e-7
    for side in (step, -step):
        with torch.no_grad():
            for rate, d in zip(leaves(rates), directions, strict=True):
                rate += side * d
            losses.append(signmaml_ext.evaluate(model, *data, **options).query_loss.mean())
            for rate, d in zip(leaves(rates), directions, strict=True):
                rate -= side * d
    torch.testing.assert_close(found, (losses[0] - losses[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_scalar_rate_gradient_equals_the_closed_form(method):
    """d l_Q / d alpha = <g_Q, phi_K - theta> / alpha, per task (the algorithm's first-order formula)."""
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=4)
    alpha = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for task in range(4):
        one = [value[task : task + 1] for value in data]
        options = {"inner_lr": 0.03, "inner_steps": STEPS, "method": method}
        adapted = signmaml_ext.adapt(model, *one[:2], **options)
        meta_step(model, *one, **options)
        for name, gradient in nets.grads(model).items():
            moved = adapted[name][0] - model.get_parameter(name).detach()
            expected += (gradient * moved).sum() / 0.03 / 4
    meta_step(model, *data, inner_lr=alpha, inner_steps=STEPS, method=method)
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_rates_give_the_same_on_every_backend(backend, kind):
    model, data = nets.mlp().double(), nets.vector_tasks()
    rates = shapes_of(model, kind)
    fixed = {k: v.detach() for k, v in rates.items()} if isinstance(rates, dict) else rates.detach()
    meta_step(model, *data, inner_lr=rates, inner_steps=STEPS, backend="torch")
    expected = nets.grads(model)
    meta_step(model, *data, inner_lr=fixed, inner_steps=STEPS, backend=backend)
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-12, atol=1e-14)
    assert all(rate.grad is not None for rate in leaves(rates))


def test_a_rate_that_no_step_takes(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    meta_step(model, *data, inner_lr=0.1, inner_steps=0, backend="torch")
    expected = nets.grads(model)
    meta_step(model, *data, inner_lr=torch.tensor(0.1, dtype=torch.float64), inner_steps=0, backend=backend)
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-12, atol=1e-14)


def test_gradient_flows_through_what_the_rate_was_computed_from():
    model, data = nets.mlp().double(), nets.vector_tasks()
    log_rate = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    meta_step(model, *data, inner_lr=log_rate.exp(), inner_steps=2)
    plain = log_rate.detach().exp().requires_grad_()
    meta_step(model, *data, inner_lr=plain, inner_steps=2)
    torch.testing.assert_close(log_rate.grad, plain.grad * plain.detach())


def test_rate_gradients_add_up_and_skip_nonfinite_tasks():
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=4)
    alpha = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    meta_step(model, *[value[1:] for value in data], inner_lr=alpha, inner_steps=2)
    expected, alpha.grad = alpha.grad, None
    data[0][0, 0, 0] = torch.nan
    meta_step(model, *data, inner_lr=alpha, inner_steps=2, nonfinite="skip")
    torch.testing.assert_close(alpha.grad, expected)
    meta_step(model, *data, inner_lr=alpha, inner_steps=2, nonfinite="skip")
    torch.testing.assert_close(alpha.grad, 2 * expected)


def test_float32_rate_for_a_float64_model_and_back():
    model, data = nets.mlp().double(), nets.vector_tasks()
    rate = torch.tensor([0.01, 0.02], requires_grad=True)
    meta_step(model, *data, inner_lr=rate, inner_steps=2)
    assert rate.grad.dtype == torch.float32
    model = nets.mlp()
    meta_step(
        model, *(v.float() if v.is_floating_point() else v for v in data),
        inner_lr=torch.tensor([0.01, 0.02], dtype=torch.float64), inner_steps=2,
    )  # fmt: skip
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_learning_the_rate_helps():
    """Starting from a rate that is far too small, training the rate alone lowers the query loss."""
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=8, shots=5)
    log_rate = torch.tensor(-8.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_rate], 0.2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        result = meta_step(model, *data, inner_lr=log_rate.exp(), inner_steps=5)
        optimizer.step()
        losses.append(float(result.query_loss.mean()))
    assert losses[-1] < losses[0] - 0.05
