"""The meta-gradient against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import definition, nets
from signmaml_ext import meta_step

METHODS = ["sign-maml", "fo-maml", "maml"]


def assert_equal_to_definition(model, data, result, *, atol=1e-10, **options):
    expected, query_loss, support_loss = definition.meta_gradient(model, data, **options)
    torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.support_loss, support_loss, rtol=1e-10, atol=1e-10)
    found = nets.grads(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("zero_dead_bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "channels", "layers"), [(16, 1, 4), (21, 3, 4), (11, 2, 3)])
def test_conv4_equals_definition(method, size, channels, layers, zero_dead_bias):
    """Odd sizes drop rows in pooling; the official code moves dead biases by noise, which changes nothing else."""
    model = nets.conv4(channels=channels, size=size, layers=layers).double()
    data = nets.image_tasks(channels=channels, size=size)
    options = {"inner_lr": 0.01, "inner_steps": 3, "method": method}
    result = meta_step(model, *data, **options, backend="torch", zero_dead_bias=zero_dead_bias)
    assert_equal_to_definition(model, data, result, **options)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tasks", [1, 5])
def test_mlp_equals_definition(backend, method, activation, tasks):
    model = nets.mlp(activation=activation).double()
    data = nets.vector_tasks(tasks)
    options = {"inner_lr": 0.05, "inner_steps": 4, "method": method}
    reason = signmaml_ext.explain(model, *data, **options).reasons[backend]
    if reason is not None:
        assert method != "sign-maml", reason
        pytest.skip(reason)
    result = meta_step(model, *data, **options, backend=backend)
    assert result.backend == backend
    assert_equal_to_definition(model, data, result, **options)


@pytest.mark.parametrize("method", METHODS)
def test_regression_equals_definition(method):
    model = nets.mlp(1, 1, nn.Tanh).double()
    data = nets.regression_tasks()
    options = {"inner_lr": 0.02, "inner_steps": 3, "method": method, "loss": "mse"}
    result = meta_step(model, *data, **options, backend="torch")
    assert result.query_accuracy is None
    assert_equal_to_definition(model, data, result, **options)


def test_callable_loss_equals_the_named_one(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 3, "backend": backend}
    named = meta_step(model, *data, **options)
    expected = nets.grads(model)
    result = meta_step(model, *data, **options, loss=lambda p, y: torch.nn.functional.cross_entropy(p, y))
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.query_accuracy, named.query_accuracy)


@pytest.mark.parametrize(("make", "data"), [(nets.conv4, nets.image_tasks), (nets.mlp, nets.vector_tasks)])
def test_first_and_second_order_coincide_for_sign_steps(make, data):
    """d sign / dx = 0: differentiating through the steps adds nothing at all."""
    model, tasks = make().double(), data()
    options = {"inner_lr": 0.01, "inner_steps": 3, "method": "sign-maml"}
    first, *_ = definition.meta_gradient(model, tasks, **options)
    second, *_ = definition.meta_gradient(model, tasks, **options, second_order_sign=True)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    meta_step(model, *tasks, **options)
    for name, gradient in nets.grads(model).items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-10, atol=1e-10)


def directional_difference(model, data, direction, step=1e-6, **options):
    """Central finite difference of the mean query loss along `direction`."""
    losses = []
    for side in (step, -step):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += side * d
        losses.append(signmaml_ext.evaluate(model, *data, **options).query_loss.mean())
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= side * d
    return (losses[0] - losses[1]) / (2 * step)


def test_maml_meta_gradient_equals_finite_differences():
    model, data = nets.mlp(1, 1, nn.Tanh).double(), nets.regression_tasks()
    options = {"inner_lr": 0.1, "inner_steps": 4, "loss": "mse"}
    meta_step(model, *data, **options, method="maml")
    gradients = list(nets.grads(model).values())
    for _ in range(5):
        direction = [torch.randn_like(p) for p in model.parameters()]
        expected = directional_difference(model, data, direction, **options, method="maml")
        found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # The first-order gradient is different, so the check above can fail.
    meta_step(model, *data, **options, method="fo-maml")
    first_order = sum((g * d).sum() for g, d in zip(nets.grads(model).values(), direction, strict=True))
    assert abs(first_order - expected) > 1e-3 * abs(expected)


def test_sign_maml_meta_gradient_equals_finite_differences():
    """Exact although it is first order: the loss is a smooth function of theta as long as no sign flips."""
    model, data = nets.mlp(1, 1, nn.Tanh).double(), nets.regression_tasks()
    options = {"inner_lr": 0.01, "inner_steps": 3, "loss": "mse"}
    meta_step(model, *data, **options)
    gradients = list(nets.grads(model).values())
    direction = [torch.randn_like(p) for p in model.parameters()]
    expected = directional_difference(model, data, direction, 1e-7, **options)
    found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_adapt_and_evaluate_agree_with_the_definition(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 3, "backend": backend}
    adapted = signmaml_ext.adapt(model, *data[:2], **options)
    result = signmaml_ext.evaluate(model, *data, **options)
    assert result.backend == backend
    for task in range(3):
        params = {name: value[task] for name, value in adapted.items()}
        logits = torch.func.functional_call(model, params, (data[2][task],))
        torch.testing.assert_close(result.logits[task], logits, rtol=1e-12, atol=1e-12)
    _, query_loss, support_loss = definition.meta_gradient(
        model, data, inner_lr=0.05, inner_steps=3, method="sign-maml"
    )
    torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.support_loss, support_loss, rtol=1e-12, atol=1e-12)
    expected = (result.logits.argmax(-1) == data[3]).float().mean(1)
    assert torch.equal(result.query_accuracy, expected)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_add_up_like_backward(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 2, "backend": backend}
    meta_step(model, *data, **options)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    meta_step(model, *data, **options)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_float32_gradients_are_close_where_no_sign_flips(backend):
    """One inner step in float32 against float64; a flipped sign moves a weight by 2 * inner_lr, so forbid flips."""
    model, data = nets.mlp(), nets.vector_tasks(tasks=8, dtype=torch.float32)
    exact = nets.mlp().double()
    exact.load_state_dict(model.state_dict())
    wide = [value.double() if value.is_floating_point() else value for value in data]
    options = {"inner_lr": 0.01, "inner_steps": 1, "backend": backend}
    single, double = (signmaml_ext.adapt(m, *d[:2], **options) for m, d in ((model, data), (exact, wide)))
    same = torch.stack([(single[n].double() - double[n]).abs().flatten(1).amax(1) < 1e-3 for n in single]).all(0)
    assert same.sum() >= 6
    kept = [value[same] for value in data]
    kept_wide = [value[same] for value in wide]
    meta_step(model, *kept, **options)
    meta_step(exact, *kept_wide, **options)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 1e-5 * q.grad.norm()
