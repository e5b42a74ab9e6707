"""Rates of Conv-N networks that learn, or vary within a tensor, on the emulated GPU: against the float64 reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from helpers.cases import conv_cases, emulated_cases, nets, perceptrons
from helpers.devices import emulated
from helpers.devices.emulated import by_seed
from signmaml_ext import conv

KINDS = ("scalar", "step", "tensor", "tensor and step", "filter", "element", "element and step")
METHODS = ("sign-maml", "fo-maml", "maml")
QUICK = {("step", "sign-maml"), ("tensor", "fo-maml")}
ALL = [(kind, method) for kind in KINDS for method in METHODS]


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


@pytest.mark.parametrize(
    ("kind", "method"), [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in ALL]
)
def test_learnable(native, kind, method):
    by_seed(native, ALL.index((kind, method)))
    emulated_cases.conv_rates(native, kind, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["filter", "element and step"])
def test_constant_ones_that_vary_within_a_tensor(native, kind, method):
    by_seed(native, 3)
    emulated_cases.conv_rates(native, kind, method, learnable=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sign-maml", "maml"])
@pytest.mark.parametrize("kind", ["tensor", "element"])
@pytest.mark.parametrize("part", ["head", "blocks"])
def test_of_what_adapts(native, part, kind, method):
    """Parameters that do not move have rates without a gradient."""
    by_seed(native, 5)
    names = [name for name, _ in nets.conv4(layers=2).named_parameters()]
    emulated_cases.conv_rates(native, kind, method, adapt=names[-2:] if part == "head" else names[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_one_block_and_no_step(native, method):
    by_seed(native, 7)
    emulated_cases.conv_rates(native, "tensor", method, layers=1, size=6, steps=1)
    emulated_cases.conv_rates(native, "scalar", method, layers=1, size=6, steps=0)


@pytest.mark.slow
def test_chunks_and_faults(native, monkeypatch):
    """A broken task is left out of the rates' gradients; tasks in pieces give their mean."""
    by_seed(native, 8)
    torch.manual_seed(0)
    model, data = (
        nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2),
        list(nets.image_tasks(3, 3, 2, 2, 2, 9, dtype=torch.float32)),
    )
    rates = emulated_cases.rates_of(model, "element and step", 2)
    options = {"inner_lr": rates, "inner_steps": 2, "method": "fo-maml", "loss": "cross_entropy"}

    def gradients(data, **more):
        return conv.meta_gradients(perceptrons.problem_of(model, tuple(data), **options, **more), native)

    whole = gradients(data)
    monkeypatch.setattr("signmaml_ext.fused.CHUNK_BYTES", 1)  # one task at a time
    pieces = gradients(data)
    for found, expected in ((pieces.params, whole.params), (pieces.rates, whole.rates)):
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)
    healthy = gradients([value[1:] for value in data])
    data[0] = data[0].clone()
    data[0][0, 0, 0, 1, 1] = torch.nan
    skipped = gradients(data, nonfinite="skip")
    assert skipped.nonfinite.tolist() == [True, False, False]
    for name, value in healthy.rates.items():
        assert value is None or torch.equal(skipped.rates[name], value), name


def test_the_plan(native):
    """One launch behind the query pass, or one a step of maml; room for the directions of every step, and no other."""

    def plan(**options):
        shape = conv_cases.Net().shape
        return native.plan_conv_meta_step(shape, 2, 3, 4, 3, "fp32", 132, **options)

    def names(found):
        return [one["kernel"] for one in found["launches"]]

    for method, count, where in (("sign-maml", 1, -1), ("fo-maml", 1, -1), ("maml", 3, None)):
        plain, learns = plan(method=method), plan(method=method, learns_rates=True)
        added = [one for one in learns["launches"] if one["kernel"] == "conv_rate_grads"]
        assert [name for name in names(learns) if name != "conv_rate_grads"] == names(plain)
        assert len(added) == count and (where is None or learns["launches"][where] == added[0])
        assert [one["grid"][2] for one in added] == ([3] if count == 1 else [1, 1, 1])
        (directions,) = [one for one in learns["workspace"] if one["name"] == "directions"]
        assert learns["workspace_bytes"] - plain["workspace_bytes"] == 2 * directions["stride"]
    assert plan(rates_by_element=True) == plan()
    assert plan(learns_rates=True, wants_grads=False) == plan(wants_grads=False)
