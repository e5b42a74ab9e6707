"""Networks of many kinds train without special care."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers import nets
from signmaml_ext import meta_step


def without_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def with_frozen_layers() -> nn.Module:
    model = nets.conv4(filters=8)
    for p in model[0][0].parameters():
        p.requires_grad_(False)
    return model


NETS = {
    "learn2learn-style Conv4": lambda: nets.conv4(filters=8),
    "no BatchNorm": without_batch_norm,
    "frozen layers": with_frozen_layers,
    "small ViT": nets.Attention,
    "small ViT with dropout": lambda: nets.Attention(dropout=0.1),
    "GRU": nets.Recurrent,
    "MLP": lambda: nn.Sequential(nn.Flatten(), nets.mlp(256, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_trains(name):
    """A few meta-iterations with Adam lower the query loss of the tasks they see."""
    model = NETS[name]()
    data = nets.image_tasks(tasks=4, shots=2, queries=3, dtype=torch.float32)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(float(meta_step(model, *data, inner_lr=0.003, inner_steps=2).query_loss.mean()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.get_parameter(n), value) for n, value in frozen.items())


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("make", [nets.Attention, nets.Recurrent])
def test_modules_that_do_not_batch_equal_those_that_do(make, method):
    """Task by task and together are the same computation, in float64."""
    model, data = make().double(), nets.image_tasks()
    options = {"inner_lr": 0.003, "inner_steps": 2, "method": method}
    meta_step(model, *data, **options)
    found = nets.grads(model)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for task in range(3):
        meta_step(model, *[value[task : task + 1] for value in data], **options)
        for n, gradient in nets.grads(model).items():
            total[n] += gradient / 3
    torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-10)
    assert "task by task" in signmaml_ext.explain(model, *data, **options).how


def test_explain_learns_that_a_module_does_not_batch():
    model, data = nets.Recurrent().double(), nets.image_tasks()
    before = signmaml_ext.explain(model)
    assert before.backend == "cpu"
    result = meta_step(model, *data, inner_lr=0.01, inner_steps=1)
    after = signmaml_ext.explain(model)
    assert result.backend == after.backend == "torch"
    assert "vmap refused it" in str(after)


def test_backend_that_cannot_serve_says_why():
    model, data = nets.Recurrent().double(), nets.image_tasks()
    with pytest.raises(ValueError, match=r"backend: .*found 'cpu': vmap refused it"):
        meta_step(model, *data, inner_lr=0.01, inner_steps=1, backend="cpu")
    with pytest.raises(ValueError, match=r"found 'cpu': .*batched convolutions"):
        meta_step(nets.conv4().double(), *data, inner_lr=0.01, inner_steps=1, backend="cpu")
    with pytest.raises(ValueError, match=r"found 'cpu': .*its steps are sign steps, and the method is 'maml'"):
        meta_step(nets.mlp().double(), *nets.vector_tasks(), inner_lr=0.01, inner_steps=1, backend="cpu", method="maml")


def test_a_callers_own_error_does_not_count_as_unbatchable():
    model, data = nets.mlp().double(), nets.vector_tasks()

    def failing(prediction, target):
        raise RuntimeError("my loss is broken")

    with pytest.raises(RuntimeError, match="my loss is broken"):
        meta_step(model, *data, inner_lr=0.01, inner_steps=1, loss=failing)
    assert signmaml_ext.explain(model).backend == "cpu"


def test_explain_prints_all_backends():
    text = str(signmaml_ext.explain(nets.mlp()))
    assert text.startswith("backend: ")
    assert all(name in text for name in ("torch", "cpu", "cuda"))
    assert "cpu, flat: it runs all tasks together, but batched convolutions" in str(signmaml_ext.explain(nets.conv4()))
