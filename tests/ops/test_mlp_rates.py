"""Rates of multilayer perceptrons that are learnable or vary within a tensor, on the CPU: against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.test_conv_rates import KINDS, METHODS, STEPS, Rates, draw, leaves_of
from ops.test_mlp_second_order import SHAPES
from torch import Tensor, nn

from helpers.cases.perceptrons import network, problem_of, tasks_for
from signmaml_ext import Sharpness, adapt, evaluate, explain, mlp, reference
from signmaml_ext._loader import C
from signmaml_ext.problem import Problem
from signmaml_ext.results import MetaGradients


def assert_equal(found: MetaGradients, expected: MetaGradients) -> None:
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.support_loss, expected.support_loss, rtol=1e-11, atol=1e-12)
    assert found.nonfinite.tolist() == expected.nonfinite.tolist()
    for own, others in ((found.params, expected.params), (found.rates, expected.rates)):
        assert own.keys() == others.keys()
        for key, value in others.items():
            assert (own[key] is None) == (value is None), key
            if value is not None:
                torch.testing.assert_close(
                    own[key], value, rtol=1e-10, atol=1e-12, msg=lambda text, k=key: f"{k} {text}"
                )


def check(model: nn.Module, data: tuple[Tensor, ...], rates: Rates, **options: Any) -> Problem:
    problem = problem_of(model, data, **{"inner_lr": rates, "inner_steps": STEPS, **options})
    assert mlp.why_not(problem) is None
    assert_equal(mlp.meta_gradients(problem), reference.meta_gradients(problem))
    return problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("widths", "tasks", "support", "query"), [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_learnable_rates(widths, tasks, support, query, activation, loss, method, kind):
    model, data = network(widths, activation).double(), tasks_for(widths, loss, tasks, support, query, torch.float64)
    rates = draw(model, kind)
    problem = check(model, data, rates, method=method, loss=loss)
    if widths[-1] > 1:  # there is something to learn
        assert all(gradient is not None and gradient.any() for gradient in mlp.meta_gradients(problem).rates.values())


@pytest.mark.parametrize("kind", ["element", "element and step", "filter"])
@pytest.mark.parametrize("method", METHODS)
def test_constant_rates_that_vary_within_a_tensor(kind, method):
    widths = (3, 7, 5, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 18, 4, 3, torch.float64)
    rates = draw(model, kind, learnable=False)
    check(model, data, rates, method=method)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": STEPS, "method": method, "loss": "mse"}
    assert explain(model, *data, **options).family == "mlp"
    own, expected = (adapt(model, *data[:2], **options, backend=backend) for backend in ("cpu", "torch"))
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        evaluate(model, *data, **options, backend="cpu").logits,
        evaluate(model, *data, **options, backend="torch").logits,
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("patterns", [["5.*"], ["1.*"], ["*.bias"], ["3.weight"]])
@pytest.mark.parametrize("kind", ["scalar", "tensor and step", "element"])
@pytest.mark.parametrize("method", METHODS)
def test_rates_of_what_adapts(patterns, kind, method):
    widths = (3, 7, 5, 2)
    model, data = network(widths, nn.ReLU).double(), tasks_for(widths, "cross_entropy", 9, 4, 3, torch.float64)
    rates = draw(model, kind)
    if isinstance(rates, dict):
        adapted = adapt(model, *data[:2], inner_lr=0.1, inner_steps=1, adapt=patterns)
        rates = {name: rate for name, rate in rates.items() if name in adapted}
    check(model, data, rates, method=method, loss="cross_entropy", adapt=patterns)


@pytest.mark.parametrize("method", METHODS)
def test_one_rate_learns_and_the_others_stay_and_no_step_learns_nothing(method):
    widths = (3, 7, 5, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 5, 4, 3, torch.float64)
    rates = draw(model, "tensor", learnable=False)
    assert isinstance(rates, dict)
    rates["3.weight"].requires_grad_()
    check(model, data, rates, method=method)
    problem = check(model, data, draw(model, "scalar"), method=method, inner_steps=0)
    assert mlp.meta_gradients(problem).rates == {"": None}


@pytest.mark.parametrize("kind", ["step", "element"])
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_with_sharpness(kind, method):
    widths = (3, 7, 5, 2)
    model, data = network(widths, nn.Tanh).double(), tasks_for(widths, "mse", 9, 4, 3, torch.float64)
    check(model, data, draw(model, kind), method=method, sharpness=Sharpness(0.2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tensor and step", "element"])
def test_bitwise_the_same_for_any_number_of_threads(method, kind):
    widths = (3, 250, 200, 4)  # wide enough that threads share the work of a group
    model, data = network(widths, nn.ReLU), tasks_for(widths, "mse", 5, 30, 10, torch.float32)
    rates = draw(model, kind)
    leaves = leaves_of(rates)
    rates = {key: value.float().detach().requires_grad_() for key, value in leaves.items()}
    problem = problem_of(model, data, inner_lr=rates, inner_steps=STEPS, method=method)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(mlp.meta_gradients(problem))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for own, first in ((other.params, found[0].params), (other.rates, found[0].rates)):
            assert all(torch.equal(own[key], first[key]) for key in first)


def test_memory_for_rates():
    """Sign steps that share their rates share a row of directions too. Sums of gradients would round."""

    def room(steps: int, **options: Any) -> int:
        plan = C.plan_mlp_meta_step_cpu([1, 40, 40, 1], 16, 10, 10, 4, 1, steps=steps, **options)
        return int(plan["workspace_scalars"]) // int(plan["lanes"])

    row, tensors = 1761, 6
    assert room(11) == room(1)
    assert room(11, learns_rates=True, rates_by_step=False) == room(1, learns_rates=True, rates_by_step=False)
    assert room(11, learns_rates=True) - room(1, learns_rates=True) == 10 * (row + tensors)
    for_elements = {"learns_rates": True, "rates_by_element": True}
    assert room(11, **for_elements) - room(11, **for_elements, rates_by_step=False) == 20 * row
    for method, path in (("fo-maml", 0), ("maml", 10 * row)):
        of_method = {"method": method, "learns_rates": True, "rates_by_step": False}
        assert room(11, **of_method) - room(1, **of_method) == path + 10 * row


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_float32_error(method):
    """At most twice that of the reference, against float64, per tensor.

    Errors are summed over many draws, because the error of one number is a matter of luck.
    """
    widths, ours, theirs = (1, 40, 40, 5), {}, {}
    for _ in range(60):
        model, data = network(widths, nn.Tanh), tasks_for(widths, "mse", 3, 5, 25, torch.float32)
        exact = network(widths, nn.Tanh).double()
        exact.load_state_dict(model.state_dict())
        wide = tuple(value.double() for value in data)
        rates = {name: torch.tensor(0.02, dtype=torch.float64) for name, _ in model.named_parameters()}
        rates = {name: rate.requires_grad_() for name, rate in rates.items()}
        narrow = {name: rate.detach().float().requires_grad_() for name, rate in rates.items()}
        truth = reference.meta_gradients(problem_of(exact, wide, inner_lr=rates, method=method)).rates
        for errors, family in ((ours, mlp), (theirs, reference)):
            found = family.meta_gradients(problem_of(model, data, inner_lr=narrow, method=method)).rates
            for name, gradient in truth.items():
                error = float((found[name].double() - gradient).square())
                errors[name] = errors.get(name, 0.0) + error
    for name, error in ours.items():
        assert error <= 4 * theirs[name], name
