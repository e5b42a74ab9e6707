"""Tasks as int8 step counts: the same results as in full precision, in a quarter of the memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.cases import nets
from signmaml_ext import CompactParams, adapt, compact, evaluate, meta_step

STEP = {"inner_lr": 0.05, "inner_steps": 5}


def both_states(call, model, data, **options):
    return [call(model, *data, **options, task_state=state) for state in ("full", "int8")]


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


MODELS = {
    "MLP": (nets.mlp, nets.vector_tasks),
    "tied": (nets.Tied, nets.vector_tasks),
    "unused layer": (nets.WithUnused, nets.vector_tasks),
}


@pytest.mark.parametrize("case", MODELS)
def test_equal_to_full_precision(backend, case):
    """Float64 trajectories agree to 1e-12: no gradient here is so close to 0 that rounding could flip its sign."""
    make, draw = MODELS[case]
    model, data = make().double(), draw(tasks=7)
    options = {**STEP, "backend": backend}
    full = meta_step(model, *data, **options)
    expected = nets.grads(model)
    found = meta_step(model, *data, **options, task_state="int8")
    assert found.backend == backend
    for name, gradient in nets.grads(model).items():
        assert (gradient is None) == (expected[name] is None)
        if gradient is not None:
            assert_close(gradient, expected[name])
    for name in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        assert_close(getattr(found, name), getattr(full, name))
    full, found = both_states(evaluate, model, data, **options)
    for name in ("query_loss", "query_accuracy", "logits", "support_loss", "nonfinite"):
        assert_close(getattr(found, name), getattr(full, name))


def test_adapt_gives_counts(backend):
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=4)
    full, found = both_states(adapt, model, data[:2], **STEP, backend=backend)
    assert isinstance(found, CompactParams) and len(found) == len(full) and set(found) == set(full)
    for name, value in full.items():
        counts = found.counts[name]
        assert counts.dtype == torch.int8 and counts.shape == value.shape
        assert 0 < counts.abs().max() <= 5
        assert_close(found[name], value)
        assert torch.equal(found[name], model.get_parameter(name).detach() - 0.05 * counts.double())
        assert torch.equal(found.task(2)[name], found[name][2])
    kept = found["0.weight"]
    with torch.no_grad():
        model[0].weight += 1.0
    assert torch.equal(found["0.weight"], kept), "the model may move on"


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 0},
        {"inner_steps": 1, "inner_lr": torch.tensor([0.05])},
        {"adapt": ["4.*"]},
        {"inner_lr": {"weights": 0.05, "biases": torch.tensor(0.02)}},
        {"inner_lr": "one each"},
    ],
    ids=["no step", "rates of one step", "head only", "a rate a tensor", "a rate a parameter"],
)
def test_options(backend, options):
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=3)
    options = {**STEP, **options, "backend": backend}
    if isinstance(options["inner_lr"], dict):
        kinds = options["inner_lr"]
        rates = {n: kinds["biases" if n.endswith("bias") else "weights"] for n, _ in model.named_parameters()}
        options["inner_lr"] = {n: r.double() if isinstance(r, torch.Tensor) else r for n, r in rates.items()}
    if options["inner_lr"] == "one each":
        options["inner_lr"] = {n: torch.rand_like(p) / 10 for n, p in model.named_parameters()}
    if isinstance(options["inner_lr"], torch.Tensor):
        options["inner_lr"] = options["inner_lr"].to(data[0].device)
    elif isinstance(options["inner_lr"], dict):
        rates = options["inner_lr"]
        options["inner_lr"] = {n: r.to(data[0].device) if isinstance(r, torch.Tensor) else r for n, r in rates.items()}
    gradients = []
    for state in ("full", "int8"):
        meta_step(model, *data, **options, task_state=state)
        gradients.append(nets.grads(model))
    assert_close(gradients[1], gradients[0])
    full, found = both_states(adapt, model, data[:2], **options)
    assert_close(dict(found), dict(full))


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_nan_and_inf_follow_the_same_rules(backend, policy):
    """A NaN gradient gives count -128, which stays NaN; an infinite gradient has a sign; both flag their task."""
    for bad in (torch.nan, torch.inf):
        model, data = nets.mlp().double(), nets.vector_tasks()
        data[0][1, 0, 0] = bad
        options = {**STEP, "backend": backend}
        full, found = both_states(adapt, model, data[:2], **options)
        for name, value in full.items():
            torch.testing.assert_close(found[name].isnan(), value.isnan())
            assert torch.equal(found.counts[name] == -128, value.isnan())
            assert_close(found[name], value)
        gradients = []
        for state in ("full", "int8"):
            result = meta_step(model, *data, **options, nonfinite=policy, task_state=state)
            assert result.nonfinite.tolist() == [False, True, False]
            assert int(result.live_tasks) == (2 if policy == "skip" else 3)
            gradients.append(nets.grads(model))
        assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_chunks_change_nothing_but_the_last_bits(backend, policy, monkeypatch):
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=7)
    if policy == "skip":
        data[0][4, 0, 0] = torch.nan
    options = {**STEP, "backend": backend, "nonfinite": policy, "task_state": "int8"}
    whole = meta_step(model, *data, **options)
    expected, adapted = nets.grads(model), adapt(model, *data[:2], **options)
    monkeypatch.setattr(compact, "CHUNK_BYTES", 3 * 8 * sum(p.numel() for p in model.parameters()))
    found = meta_step(model, *data, **options)
    assert_close(nets.grads(model), expected)
    for name in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        assert_close(getattr(found, name), getattr(whole, name))
    again = adapt(model, *data[:2], **options)
    assert all(torch.equal(again.counts[name], adapted.counts[name]) for name in adapted)


def test_exact_gradient_of_a_learnable_rate(monkeypatch):
    """d phi / d alpha = -n on every backend, in either task state, and in chunks."""
    model, data = nets.mlp().double(), nets.vector_tasks()
    rates = []
    for backend, state, chunk in (
        ("torch", "full", 2**30), ("torch", "int8", 2**30), ("cpu", "full", 2**30), ("cpu", "int8", 2**30),
        ("cpu", "int8", 1), ("torch", "int8", 1),
    ):  # fmt: skip
        monkeypatch.setattr(compact, "CHUNK_BYTES", chunk)
        rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        result = meta_step(model, *data, inner_lr=rate, inner_steps=5, task_state=state, backend=backend)
        assert result.backend == backend
        rates.append(rate.grad)
    for found in rates[1:]:
        assert_close(found, rates[0])


def test_task_by_task_on_a_convolutional_network():
    model, data = nets.conv4().double(), nets.image_tasks()
    options = {"inner_lr": 0.01, "inner_steps": 3, "backend": "torch"}
    gradients = []
    for state in ("full", "int8"):
        meta_step(model, *data, **options, task_state=state)
        gradients.append(nets.grads(model))
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_state": "int4"}, "task_state: expected one of 'full', 'int8', found 'int4'"),
        ({"method": "fo-maml"}, r"task_state: expected 'full' for method 'fo-maml' \(int8 counts sign steps\)"),
        ({"method": "maml"}, "task_state: expected 'full' for method 'maml'"),
        ({"inner_steps": 128}, "inner_steps: expected at most 127 with task_state 'int8', found 128"),
        ({"inner_lr": torch.full((5,), 0.1)}, "inner_lr: expected one rate for all steps .* found a rate a step"),
        (
            {"inner_lr": {"weight": torch.full((5, 1, 1), 0.1), "bias": 0.1}},
            r"inner_lr\['weight'\]: expected one rate for all steps",
        ),
    ],
)
def test_what_counts_cannot_hold_is_refused(options, message):
    model, data = nn.Linear(4, 3).double(), nets.vector_tasks()
    with pytest.raises(ValueError, match=message):
        meta_step(model, *data, **{**STEP, "task_state": "int8", **options})
    assert model.weight.grad is None
