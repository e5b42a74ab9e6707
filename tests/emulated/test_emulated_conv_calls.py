"""The Python side of Conv-N on CUDA, run on the emulated GPU: names, layouts and memory of the native call."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from helpers.cases import libraries, nets
from helpers.cases.perceptrons import problem_of
from helpers.devices import emulated
from signmaml.models import Conv4
from signmaml_ext import conv, reference


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


NETS = {
    "Conv4": (lambda: Conv4(3, 1, 8, 6, layers=2), 1, 6),
    "strided": (lambda: Conv4(3, 2, 8, 5, pooling="stride", layers=2), 2, 5),
    "learn2learn": (lambda: libraries.MiniImagenetCNN(layers=2, side=1), 3, 5),
    "without biases": (lambda: libraries.one_sequence(layers=1, side=2), 1, 4),
}


@pytest.mark.parametrize("name", NETS)
def test_gradients_arrive_under_their_names(native, name):
    """No inner step, so no sign can flip; float32 against float64."""
    native.configure(seed=1, multiprocessors=1)
    make, channels, size = NETS[name]
    model = make()
    data = nets.image_tasks(2, 3, 1, 1, channels, size, torch.float32)
    problem = problem_of(model, data, loss="cross_entropy", inner_steps=0)
    assert conv.why_not(problem) is None
    found, expected = conv.meta_gradients(problem, native), reference.meta_gradients(problem)
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-5, atol=1e-5)
    for key, gradient in expected.params.items():
        torch.testing.assert_close(found.params[key], gradient, rtol=1e-3, atol=1e-4)


def test_a_step_and_its_results(native):
    native.configure(seed=2, multiprocessors=1)
    model = Conv4(3, 1, 8, 6, layers=2)
    data = nets.image_tasks(2, 3, 1, 1, 1, 6, torch.float32)
    rates = {name: 0.01 * (1 + i) for i, (name, _) in enumerate(model.named_parameters())}
    problem = problem_of(model, data, loss="cross_entropy", inner_steps=2, inner_lr=rates, method="fo-maml")
    found, expected = conv.adapt(problem, native), reference.adapt(problem)
    assert found.params.keys() == expected.params.keys()
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.support_loss, expected.support_loss, rtol=1e-4, atol=1e-4)
