"""What the fixture `backend` promises for "emulated": the launches of the CUDA families, on the emulated GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import nets
from helpers.devices import backends
from signmaml_ext import meta_step, ops


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Records the names of the emulated module's launches, in order."""
    native, seen = backends.emulated_module(), []

    def watched(name: str):
        original = getattr(native, name)

        def call(*arguments, **named):
            seen.append(name)
            return original(*arguments, **named)

        return call

    for name in ("sign_step", "compact_sign_step", "meta_accumulate", "mlp_meta_step", "conv_meta_step"):
        monkeypatch.setattr(native, f"{name}_cuda", watched(f"{name}_cuda"))
    return seen


@pytest.mark.parametrize(
    ("make", "state", "expected"),
    [
        (nets.mlp, "full", {"mlp_meta_step_cuda", "meta_accumulate_cuda"}),
        (nets.Tied, "full", {"sign_step_cuda", "meta_accumulate_cuda"}),
        (nets.Tied, "int8", {"compact_sign_step_cuda", "meta_accumulate_cuda"}),
    ],
)
def test_every_family_is_launched_on_the_emulated_gpu(launched, make, state, expected):
    model, data = make().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 2, "task_state": state}
    with backends.selected("emulated"):
        assert meta_step(model, *data, **options, backend="emulated").backend == "emulated"
        assert set(launched) == expected
        launched.clear()
        assert meta_step(model, *data, **options).backend != "emulated", "auto never takes it"
        assert launched == []


@pytest.mark.parametrize(("method", "steps"), [("sign-maml", 0), ("maml", 1)])
def test_convolutional_networks_are_served_as_on_cuda(launched, method, steps):
    model, data = nets.conv4(filters=8, size=8, layers=2), nets.image_tasks(tasks=2, size=8, dtype=torch.float32)
    options = {"inner_lr": 0.01, "inner_steps": steps, "method": method}
    with backends.selected("emulated"):
        doubled = [value.double() if value.is_floating_point() else value for value in data]
        families = signmaml_ext.explain(copy.deepcopy(model).double(), *doubled).families["emulated"]
        assert "it computes in float32 on CUDA" in families["conv"]
        found = meta_step(model, *data, **options, backend="emulated")
        gradients = nets.grads(model)
        assert launched == ["conv_meta_step_cuda", "meta_accumulate_cuda"]
    expected = meta_step(model, *data, **options, backend="torch")
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, nets.grads(model), rtol=1e-3, atol=1e-5)


def test_nothing_is_left_behind():
    native = ops.C
    with backends.selected("emulated"), backends.operators_emulated():
        assert ops.C is not native
    assert ops.C is native
    assert "emulated" not in signmaml_ext.dispatch.BACKENDS
    with pytest.raises(ValueError, match="backend: expected one of"):
        meta_step(nn.Linear(4, 3), *nets.vector_tasks(), inner_lr=0.1, inner_steps=1, backend="emulated")


def test_operators_run_their_cuda_kernels(launched):
    grads, nonfinite = torch.ones(1, 3), torch.zeros(1, dtype=torch.bool)
    with backends.operators_emulated():
        signmaml_ext.sign_step_(torch.zeros(1, 3), grads, torch.ones(1), nonfinite=nonfinite)
        signmaml_ext.meta_accumulate_(torch.zeros(3), grads, nonfinite=nonfinite)
    assert launched == ["sign_step_cuda", "meta_accumulate_cuda"]
