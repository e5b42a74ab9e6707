"""Every model of the zoo against the plain loop on deep copies, in float64: all methods, together and one by one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import signmaml_ext
from helpers.cases import definition, rules
from signmaml_ext import InnerRule, Lion, Momentum, Plain, Signum, compiled
from zoo.cases import CASES, METHODS, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
OPTIONS: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 2}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a call must leave unchanged."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    assert all(now[key] == before[key] for key in ("objects", "modes", "attributes"))
    assert all(torch.equal(now["values"][name], value) for name, value in before["values"].items())


def check(
    case: Case,
    method: str,
    batching: str,
    backend: str,
    sharpness: float = 0.0,
    rule: InnerRule | None = None,
    vector: rules.Vector | None = None,
) -> None:
    model, data = case.model(), case.data()
    like = case.twin(case.model()) if case.twin else model
    expected, query_loss, support_loss = definition.meta_gradient(
        like, data, **OPTIONS, method=method, sharpness=sharpness, vector=vector,
        weight_decay=0.0 if rule is None else rule.weight_decay, **case.options,
    )  # fmt: skip
    before = state_of(model)
    options = {**OPTIONS, "method": method, "batching": batching, "backend": backend, **case.options}
    options |= {"sharpness": sharpness, "inner_rule": rule}
    if batching == "together" and case.together is not None:
        with pytest.raises(ValueError, match=f"batching: .*found 'together': .*{case.together}"):
            signmaml_ext.meta_step(model, *data, **options)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_untouched(model, before)
        return
    result = signmaml_ext.meta_step(model, *data, **options)
    torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.support_loss, support_loss, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or expected[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_untouched(model, before)
    if case.twin is None:
        copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize("name", CASES)
def test_as_it_is_called(name: str) -> None:
    """Sign steps with the default backend and batching."""
    check(CASES[name], "sign-maml", "auto", "auto")


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_every_way(name: str, method: str, batching: str) -> None:
    if method not in CASES[name].methods:
        pytest.skip("torch has no second derivative of it, or a wrong one")
    check(CASES[name], method, batching, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str) -> None:
    """The reference backend, which all others must agree with."""
    check(CASES[name], "sign-maml", "one-by-one", "torch")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_sharpness_aware_steps(number: int) -> None:
    """The methods take turns."""
    case, method = list(CASES.values())[number], METHODS[number % len(METHODS)]
    check(case, method if method in case.methods else "sign-maml", "auto", "auto", sharpness=0.1)


RULES: dict[str, list[tuple[InnerRule, rules.Vector]]] = {
    "sign-maml": [(Signum(0.8), rules.signum(0.8)), (Lion(0.8, 0.6, 0.5), rules.lion(0.8, 0.6))],
    "fo-maml": [(Momentum(0.8), rules.momentum(0.8)), (Plain(0.5), rules.plain())],
    "maml": [(Momentum(0.8, True, 0.5), rules.momentum(0.8, True)), (Plain(0.5), rules.plain())],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_inner_rules(number: int) -> None:
    """The methods and their rules take turns. Adam is left out: it steps along rounding noise."""
    case, method = list(CASES.values())[number], METHODS[number % len(METHODS)]
    method = method if method in case.methods else "sign-maml"
    rule, vector = RULES[method][number // len(METHODS) % 2]
    check(case, method, "auto", "auto", rule=rule, vector=vector)


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that torch.compile serves are exact, and the others are refused."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    served = 0
    for name in list(CASES)[::9]:
        torch._dynamo.reset()
        case = CASES[name]
        model, data = case.model(), case.data()
        like = case.twin(case.model()) if case.twin else model
        expected = definition.meta_gradient(like, data, **OPTIONS, method="sign-maml", **case.options)[0]
        try:
            signmaml_ext.meta_step(model, *data, **OPTIONS, **case.options, compile=True)
        except ValueError as error:
            assert str(error).startswith("compile: expected False for this model"), name
            continue
        served += 1
        for key, parameter in model.named_parameters():
            if expected.get(key) is not None and parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-9, atol=1e-9)
    assert served >= 10


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_way() -> None:
    """`evaluate` gives the same one by one and together, where both work."""
    compared = 0
    for case in CASES.values():
        if case.together is not None:
            continue
        model, data = case.model(), case.data()
        options = {**OPTIONS, **case.options, "method": "fo-maml"}
        found: list[Tensor] = []
        for batching in ("together", "one-by-one"):
            found.append(signmaml_ext.evaluate(model, *data, **options, batching=batching).logits)
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared > 60
