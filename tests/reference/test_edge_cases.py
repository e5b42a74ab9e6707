"""Every rule about signs, NaNs, dead biases, BatchNorm, dropout and odd parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import nets
from signmaml_ext import adapt, evaluate, meta_step, reference


def unchanged_state(model: nn.Module):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- sign -------------------------------------------------------------------------------------------------------


def test_sign_has_three_values_and_keeps_nan():
    tiny = torch.tensor([1e-45, -1e-45, 0.0, -0.0, 3.0, -3.0, torch.inf, -torch.inf, torch.nan])
    expected = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0, torch.nan])
    torch.testing.assert_close(reference.sign(tiny), expected, equal_nan=True)


def test_zero_gradient_moves_nothing(backend):
    """Inputs that are 0 give their weights a gradient of exactly 0."""
    model, data = nn.Linear(4, 3).double(), nets.vector_tasks()
    data[0][:, :, 1] = 0.0
    adapted = adapt(model, *data[:2], inner_lr=0.1, inner_steps=3, backend=backend)
    weight = model.weight.detach()
    assert torch.equal(adapted["weight"][:, :, 1], weight[:, 1].expand(3, -1))
    assert not torch.equal(adapted["weight"][:, :, 0], weight[:, 0].expand(3, -1))


def test_every_step_is_alpha_times_an_integer(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    adapted = adapt(model, *data[:2], inner_lr=0.125, inner_steps=5, backend=backend)
    for name, value in adapted.items():
        counts = (value - model.get_parameter(name).detach()) / 0.125
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-12)
        assert counts.abs().max() <= 5


def test_loss_scale_has_no_effect_on_sign_steps(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 3, "backend": backend}
    mean = adapt(model, *data[:2], **options)
    total = adapt(model, *data[:2], **options, loss=lambda p, t: nn.functional.cross_entropy(p, t, reduction="sum"))
    torch.testing.assert_close(mean, total, rtol=0, atol=0)


# --- not finite -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_nonfinite_policies(backend, bad, where):
    """A NaN or Inf in the support set (0) or the query set (2) of task 1 of 3."""
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 2, "backend": backend}
    meta_step(model, *[value[[0, 2]] for value in data], **options)
    healthy = nets.grads(model)
    data[where][1, 0, 0] = bad

    result = meta_step(model, *data, **options)
    assert result.nonfinite.tolist() == [False, True, False]
    assert int(result.live_tasks) == 3
    assert not any(gradient.isfinite().all() for gradient in list(nets.grads(model).values())[:1])

    result = meta_step(model, *data, **options, nonfinite="skip")
    assert result.nonfinite.tolist() == [False, True, False]
    assert int(result.live_tasks) == 2
    torch.testing.assert_close(nets.grads(model), healthy, rtol=1e-12, atol=1e-14)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(FloatingPointError, match=r"tasks \[1\]"):
        meta_step(model, *data, **options, nonfinite="raise")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    model.zero_grad()
    assert evaluate(model, *data, **options).nonfinite.tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match=r"tasks \[1\]"):
        evaluate(model, *data, **options, nonfinite="raise")


def test_nan_propagates_into_the_adapted_parameters(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    data[0][1, 0, 0] = torch.nan
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=1, backend=backend)
    assert adapted["0.weight"][1].isnan().any()
    assert adapted["0.weight"][[0, 2]].isfinite().all()


def test_all_tasks_skipped_gives_zero(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    data[0][:] = torch.nan
    result = meta_step(model, *data, inner_lr=0.05, inner_steps=2, backend=backend, nonfinite="skip")
    assert int(result.live_tasks) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in nets.grads(model).values())


# --- dead biases ------------------------------------------------------------------------------------------------


class BiasReadTwice(nn.Module):
    """A bias in front of a BatchNorm that is also read elsewhere, so it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.normalize = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.normalize(self.conv(x)).relu().mean((2, 3)) + self.conv.bias)


class Residual(nn.Module):
    """A convolution whose output also bypasses the BatchNorm, so its bias is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.normalize = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        z = self.conv(x)
        return self.head((self.normalize(z) + z).relu().mean((2, 3)))


def dead_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        (nets.conv4, {f"0.{i}.conv.bias" for i in range(4)}),
        (dead_linear, {"1.bias"}),
        (BiasReadTwice, set()),
        (Residual, set()),
    ],
)
def test_dead_bias_has_gradient_zero(make, dead):
    model, data = make().double(), nets.image_tasks()
    adapted = adapt(model, *data[:2], inner_lr=0.01, inner_steps=3)
    meta_step(model, *data, inner_lr=0.01, inner_steps=3)
    for name, p in model.named_parameters():
        moved = not torch.equal(adapted[name], p.detach().expand_as(adapted[name]))
        assert moved == (name not in dead), name
        assert bool((p.grad == 0).all()) == (name in dead), name


def test_official_behaviour_moves_dead_biases_by_noise():
    model, data = nets.conv4().double(), nets.image_tasks()
    adapted = adapt(model, *data[:2], inner_lr=0.01, inner_steps=3, zero_dead_bias=False)
    moved = adapted["0.0.conv.bias"] - model.get_parameter("0.0.conv.bias").detach()
    assert (moved.abs() > 0.005).any()
    # No prediction changes, because BatchNorm cancels the bias.
    with_noise = evaluate(model, *data, inner_lr=0.01, inner_steps=3, zero_dead_bias=False)
    without = evaluate(model, *data, inner_lr=0.01, inner_steps=3)
    torch.testing.assert_close(with_noise.logits, without.logits, rtol=1e-9, atol=1e-9)


def test_dead_bias_is_looked_at_again_when_the_model_changes():
    model, data = dead_linear().double(), nets.image_tasks()
    meta_step(model, *data, inner_lr=0.01, inner_steps=1)
    assert nets.grads(model)["1.bias"].abs().max() == 0
    model[2] = nn.Identity()
    meta_step(model, *data, inner_lr=0.01, inner_steps=1)
    assert nets.grads(model)["1.bias"].abs().max() > 0


# --- BatchNorm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_batch_norm_uses_the_batch_and_leaves_buffers_alone(training, method):
    model, data = nets.conv4().double().train(training), nets.image_tasks()
    options = {"inner_lr": 0.01, "inner_steps": 2, "method": method}
    bare = copy.deepcopy(model)
    for module in bare.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.num_batches_tracked = None
    before, flags = unchanged_state(model), [m.training for m in model.modules()]
    meta_step(model, *data, **options)
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == flags
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    meta_step(bare.train(), *data, **options)
    torch.testing.assert_close(nets.grads(model), nets.grads(bare))


def test_batch_norm_with_running_statistics():
    model, data = nets.conv4().double(), nets.image_tasks()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    before = unchanged_state(model)
    result = evaluate(model, *data, inner_lr=0.01, inner_steps=0, batch_norm="running")
    assert_same_state(model, before)
    with torch.no_grad():
        expected = model.eval()(data[2][1])
    torch.testing.assert_close(result.logits[1], expected)


def test_tasks_do_not_see_each_other():
    """Batch statistics are per task: a task's result does not depend on its neighbours."""
    model, data = nets.conv4().double(), nets.image_tasks()
    options = {"inner_lr": 0.01, "inner_steps": 2}
    together = evaluate(model, *data, **options)
    alone = evaluate(model, *[value[1:2] for value in data], **options)
    torch.testing.assert_close(together.logits[1], alone.logits[0], rtol=1e-12, atol=1e-12)


def test_other_buffers_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.head(x)

    model = Counting().double()
    meta_step(model, *nets.vector_tasks(), inner_lr=0.1, inner_steps=2)
    assert model.calls == 0


def test_one_value_a_channel_is_torchs_error():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    data = nets.vector_tasks(ways=1, shots=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        meta_step(model, *data, inner_lr=0.1, inner_steps=1)
    assert all(p.grad is None for p in model.parameters())


# --- randomness -------------------------------------------------------------------------------------------------


# The definition, and native code with the same masks.
DRAWN_BY = pytest.mark.parametrize("drawn_by", ["torch", "cpu"])


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3))


@DRAWN_BY
@pytest.mark.parametrize("make", [dropout_net, nets.FunctionalDropout])
def test_dropout_is_keyed_by_seed_task_and_step(make, drawn_by):
    model, data = make().double(), nets.vector_tasks(tasks=4)
    options = {"inner_lr": 0.05, "inner_steps": 3, "backend": drawn_by}
    before = torch.get_rng_state()
    first = evaluate(model, *data, **options, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = evaluate(model, *data, **options, seed=7)
    assert torch.equal(first.logits, again.logits)
    other = evaluate(model, *data, **options, seed=8)
    assert not torch.equal(first.logits, other.logits)
    # The same task gets the same masks, whichever tasks follow it.
    fewer = evaluate(model, *[value[:2] for value in data], **options, seed=7)
    assert torch.equal(first.logits[:2], fewer.logits)
    # Two tasks with equal data get different masks, and so do two steps.
    twins = [value[:1].repeat(2, *[1] * (value.ndim - 1)) for value in data]
    result = evaluate(model, *twins, inner_lr=0.0, inner_steps=2, seed=7, backend=drawn_by)
    assert not torch.equal(result.logits[0], result.logits[1])
    assert result.support_loss[0, 0] != result.support_loss[1, 0]


@DRAWN_BY
def test_without_a_seed_torchs_generator_decides_and_advances_only_for_random_models(drawn_by):
    model, data = dropout_net().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 1, "backend": drawn_by}
    torch.manual_seed(3)
    first = evaluate(model, *data, **options)
    second = evaluate(model, *data, **options)
    assert not torch.equal(first.logits, second.logits)
    torch.manual_seed(3)
    assert torch.equal(evaluate(model, *data, **options).logits, first.logits)
    before = torch.get_rng_state()
    evaluate(model.eval(), *data, **options)
    meta_step(nets.conv4().double(), *nets.image_tasks(), **options)
    torch.set_rng_state(before)
    evaluate(model.eval(), *data, **options)
    assert torch.equal(torch.get_rng_state(), before)


@DRAWN_BY
@pytest.mark.parametrize("known", [False, True], ids=["first call", "known to draw"])
def test_a_call_that_raises_for_a_nan_leaves_torchs_generator(known, drawn_by):
    model, (x, y, qx, _) = dropout_net().double(), nets.vector_tasks()
    qy = torch.full((*qx.shape[:2], 3), torch.nan, dtype=torch.float64)
    y = torch.zeros(*x.shape[:2], 3, dtype=torch.float64)
    options = {"inner_lr": 0.05, "inner_steps": 1, "loss": "mse", "backend": drawn_by}
    if known:
        evaluate(model, x, y, qx, torch.zeros_like(qy), **options)
    before = torch.get_rng_state()
    for call in (meta_step, evaluate):
        with pytest.raises(FloatingPointError, match=r"tasks \[0, 1"):
            call(model, x, y, qx, qy, **options, nonfinite="raise")
        assert torch.equal(torch.get_rng_state(), before)


def test_what_training_mode_cannot_batch_evaluation_still_may():
    """Results in evaluation mode thus do not depend on whether the model was trained before."""
    model, data = dropout_net().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 2, "backend": "torch"}
    before = evaluate(model.eval(), *data, **options)
    meta_step(model.train(), *data, **options)
    assert "vmap refused it" in signmaml_ext.explain(model, *data, **options).how
    after = evaluate(model.eval(), *data, **options)
    assert signmaml_ext.explain(model, *data, **options).how == "all tasks together"
    assert torch.equal(before.logits, after.logits)


def test_dropout_follows_training_mode():
    model, data = dropout_net().double().eval(), nets.vector_tasks()
    plain = nn.Sequential(model[0], model[2])
    options = {"inner_lr": 0.05, "inner_steps": 2}
    torch.testing.assert_close(evaluate(model, *data, **options).logits, evaluate(plain, *data, **options).logits)


# --- parameters -------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_left_alone(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    model[0].weight.requires_grad_(False)
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=2, backend=backend)
    assert "0.weight" not in adapted
    before = unchanged_state(model)
    meta_step(model, *data, inner_lr=0.05, inner_steps=2, backend=backend)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None
    assert_same_state(model, before)


@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_unused_parameters_get_no_step_and_no_gradient(method):
    model, data = nets.WithUnused().double(), nets.vector_tasks()
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=2, method=method)
    assert torch.equal(adapted["unused.weight"], model.unused.weight.detach().expand(3, -1, -1))
    meta_step(model, *data, inner_lr=0.05, inner_steps=2, method=method)
    assert model.unused.weight.grad is None
    assert model.used.weight.grad is not None


class TwoNames(nn.Module):
    """One block under two names, as learn2learn's OmniglotCNN has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.features = nn.Sequential(self.base, nn.Softplus())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.features(x))


def test_a_module_under_two_names_stays_itself(backend):
    """torch.func.functional_call leaves such a module with the tensors of its last call."""
    model, data = TwoNames().double(), nets.vector_tasks()
    plain = nn.Sequential(model.base[0], model.base[1], nn.Softplus(), model.head)
    owned = dict(model.named_parameters())
    meta_step(model, *data, inner_lr=0.05, inner_steps=2, backend=backend)
    assert all(model.get_parameter(name) is value for name, value in owned.items())
    found = list(nets.grads(model).values())
    meta_step(plain, *data, inner_lr=0.05, inner_steps=2, backend=backend)
    torch.testing.assert_close(found, list(nets.grads(plain).values()))


def test_tied_parameters_take_one_step_on_the_summed_gradient(backend):
    model, data = nets.Tied().double(), nets.vector_tasks()
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=1, backend=backend)
    assert "second.weight" not in adapted
    loss = nn.functional.cross_entropy(model(data[0][0]), data[1][0])
    (gradient,) = torch.autograd.grad(loss, [model.first.weight])  # autograd sums both uses
    expected = model.first.weight.detach() - 0.05 * gradient.sign()
    torch.testing.assert_close(adapted["first.weight"][0], expected, rtol=1e-12, atol=1e-12)
    meta_step(model, *data, inner_lr=0.05, inner_steps=1, backend=backend, adapt="second.*")
    assert model.first.weight.grad is not None


@pytest.mark.parametrize(("patterns", "moving"), [(["4.*"], {"4.weight", "4.bias"}), ("*.weight", None)])
def test_adapt_patterns(backend, patterns, moving):
    """ANIL: only the head adapts; all parameters get the meta-gradient, equal to the definition's."""
    from helpers.cases import definition

    model, data = nets.mlp().double(), nets.vector_tasks()
    names = [name for name, _ in model.named_parameters()]
    moving = moving or {name for name in names if name.endswith("weight")}
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=3, backend=backend, adapt=patterns)
    assert set(adapted) == moving
    meta_step(model, *data, inner_lr=0.05, inner_steps=3, backend=backend, adapt=patterns)
    options = {"inner_lr": 0.05, "inner_steps": 3, "method": "sign-maml"}
    expected, *_ = definition.meta_gradient(model, data, **options, adapt=list(moving))
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-10, atol=1e-10)


# --- sizes ------------------------------------------------------------------------------------------------------


def test_no_inner_step_is_joint_training(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    result = meta_step(model, *data, inner_lr=0.05, inner_steps=0, backend=backend)
    found = nets.grads(model)
    losses = [nn.functional.cross_entropy(model(x), y) for x, y in zip(*data[2:], strict=True)]
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(found, nets.grads(model))
    assert result.support_loss.shape == (0, 3)
    adapted = adapt(model, *data[:2], inner_lr=0.05, inner_steps=0, backend=backend)
    assert torch.equal(adapted["0.weight"][2], model[0].weight.detach())


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_result_shapes(backend, tasks):
    model, data = nets.mlp().double(), nets.vector_tasks(tasks)
    result = meta_step(model, *data, inner_lr=0.05, inner_steps=4, backend=backend)
    assert result.query_loss.shape == result.query_accuracy.shape == result.nonfinite.shape == (tasks,)
    assert result.support_loss.shape == (4, tasks)
    assert result.live_tasks.shape == () and result.live_tasks.dtype == torch.int64
    assert not result.query_loss.requires_grad
    outcome = evaluate(model, *data, inner_lr=0.05, inner_steps=4, backend=backend)
    assert outcome.logits.shape == (tasks, 9, 3)


def test_works_under_no_grad_and_inference_mode(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_lr": 0.05, "inner_steps": 2, "backend": backend}
    meta_step(model, *data, **options)
    expected = nets.grads(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            meta_step(model, *data, **options)
        torch.testing.assert_close(nets.grads(model), expected, rtol=0, atol=0)


def test_bitwise_repeatable(backend):
    model, data = nets.mlp().double(), nets.vector_tasks()
    runs = []
    for _ in range(2):
        result = meta_step(model, *data, inner_lr=0.05, inner_steps=5, backend=backend)
        runs.append((result.query_loss, nets.grads(model)))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_failing_forward_changes_nothing():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, x):
            if x.shape[0] == 9:  # the query set
                raise RuntimeError("no query today")
            return self.body(x)

    model, data = Failing().double(), nets.vector_tasks()
    before = unchanged_state(model)
    with pytest.raises(RuntimeError, match="no query today"):
        meta_step(model, *data, inner_lr=0.05, inner_steps=2)
    assert all(p.grad is None for p in model.parameters())
    assert_same_state(model, before)
    assert model.body[1].training and model.body[1].track_running_stats


def test_bfloat16_runs_and_keeps_float32_gradients():
    data = nets.vector_tasks(tasks=16, shots=5, dtype=torch.float32)
    model = nets.mlp()
    exact = evaluate(model, *data, inner_lr=0.01, inner_steps=0)
    rough = evaluate(model, *data, inner_lr=0.01, inner_steps=0, precision="bf16")
    assert rough.logits.dtype == torch.float32
    difference = (rough.logits - exact.logits).norm() / exact.logits.norm()
    assert 0 < difference < 0.02
    meta_step(model, *data, inner_lr=0.01, inner_steps=3, precision="bf16")
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_of_the_package_keeps_a_model_alive():
    import gc
    import weakref

    model = nets.conv4().double()
    meta_step(model, *nets.image_tasks(), inner_lr=0.01, inner_steps=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert signmaml_ext.dispatch.backend_status()["torch"] is None
