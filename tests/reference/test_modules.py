"""Networks of many kinds train without special handling."""

from __future__ import annotations

import _thread
import re
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import signmaml_ext
from helpers.cases import nets
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
def test_a_call_equals_its_tasks_by_themselves(make, method):
    """One call for all tasks, batched or not, computes the same as one call per task, in float64."""
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


def test_explain_learns_that_a_module_does_not_batch():
    model, data = nets.Recurrent().double(), nets.image_tasks()
    options = {"inner_lr": 0.01, "inner_steps": 1}
    assert signmaml_ext.explain(model, *data, **options).how == "all tasks together"
    meta_step(model, *data, **options)
    assert "vmap refused it" in signmaml_ext.explain(model, *data, **options).how
    found = nets.grads(model)
    meta_step(model, *data, **options, batching="one-by-one")
    for name, gradient in nets.grads(model).items():
        assert torch.equal(gradient, found[name])


def test_a_backend_that_cannot_serve_says_why():
    data = nets.vector_tasks()
    with pytest.raises(ValueError, match=r"found 'cpu': .*'maml' differentiates through them"):
        meta_step(
            nets.mlp(activation=nn.Softplus).double(), *data, inner_lr=0.01, inner_steps=1, backend="cpu", method="maml"
        )


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@pytest.mark.parametrize("make", [nets.conv4, nets.Attention, nets.Recurrent])
def test_the_number_of_threads_changes_no_bit(make, method, monkeypatch):
    """With tasks one by one, each task is computed by one thread, however many threads there are."""
    from signmaml_ext import batching

    monkeypatch.setattr(batching, "LONG", 0.0)
    model, data = make(), nets.image_tasks(tasks=7, dtype=torch.float32)
    options = {"inner_lr": 0.01, "inner_steps": 2, "method": method, "batching": "one-by-one"}
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = meta_step(model, *data, **options)
            logits = signmaml_ext.evaluate(model, *data, **options).logits
            found.append([*nets.grads(model).values(), result.query_loss, result.support_loss, logits])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_an_error_on_another_thread_reaches_the_caller(monkeypatch):
    from signmaml_ext import threads

    def failing(item: int) -> int:
        if item in (3, 5):
            raise ValueError(f"item {item}")
        return item

    seen = []
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="item 3"):
        for result in threads.map_in_order(failing, range(8), 3, lambda: seen.append("stop")):
            seen.append(result)
    assert seen[:3] == [0, 1, 2] and set(seen[3:]) == {"stop"}
    assert torch.get_num_threads() == before
    doubled = threads.map_in_order(lambda item: item * 2, range(20), 4, lambda: None)
    assert list(doubled) == [2 * item for item in range(20)]


@pytest.mark.parametrize("passes", [0, 1, 2, 3])
def test_an_error_in_the_first_task_ends_those_that_wait_for_it(passes, monkeypatch):
    """The other tasks wait for what the first task's first support pass and query pass find out."""
    from signmaml_ext import batching

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if threading.get_ident() == threading.main_thread().ident:
                done.append(x)
                if len(done) > passes:
                    raise ValueError("the first task")
            return F.softplus(self.head(x))

    monkeypatch.setattr(batching, "LONG", 0.0)
    model, data, done = Fails().double(), nets.vector_tasks(tasks=4), []
    before, alive = torch.get_num_threads(), _thread._count()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="the first task"):
            meta_step(model, *data, inner_lr=0.01, inner_steps=3, batching="one-by-one")
    finally:
        torch.set_num_threads(before)
    assert _thread._count() <= alive


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


def test_small_tasks_go_together_and_large_ones_by_themselves():
    options = {"inner_lr": 0.01, "inner_steps": 2}
    small = signmaml_ext.explain(nets.mlp(activation=nn.Softplus).double(), *nets.vector_tasks(), **options)
    assert small.how == "all tasks together"
    wide = nn.Sequential(
        nn.Linear(64, 1024), nn.Softplus(), nn.Linear(1024, 1024), nn.Softplus(), nn.Linear(1024, 3)
    ).double()
    large = signmaml_ext.explain(wide, *nets.vector_tasks(inputs=64), **options)
    assert re.match(r"task by task \(a task's forward pass calls 5 operators for .* MFLOP", large.how)
