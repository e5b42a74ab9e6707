"""Every model of the zoo as a recorded graph, on a stand-in for the device that records: the plain call's bits.

What a stand-in cannot show is whether a CUDA device would have to wait for the host.
"""

from __future__ import annotations

import pytest
import torch

import signmaml_ext
from helpers.cases import nets
from helpers.devices.replaying import stand_in
from signmaml_ext import graphs
from zoo.cases import CASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_plain_call(name, monkeypatch):
    cache, case = stand_in(monkeypatch), CASES[name]
    model, plain = case.model(), case.model()
    options = {"inner_lr": 0.01, "inner_steps": 2, **case.options}
    for turn in range(2):
        data = tuple(value.flip(0) for value in case.data()) if turn else case.data()
        expected = signmaml_ext.meta_step(plain, *data, **options, graph=False)
        found = signmaml_ext.meta_step(model, *data, **options, graph=True)
        assert torch.equal(found.query_loss, expected.query_loss)
        gradients = nets.grads(plain)
        for key, gradient in nets.grads(model).items():
            other = gradients[key]
            assert (gradient is None) == (other is None), key
            assert gradient is None or torch.equal(gradient, other), key
    assert cache.info()[:4] == (1, graphs.LIMIT, 1, 2), "recorded once, replayed on other data"
