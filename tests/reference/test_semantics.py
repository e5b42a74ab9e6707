"""What a user expects of losses, inputs, outputs, statistics and odd modules."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import signmaml_ext
from helpers.cases import definition, nets
from signmaml.models import Conv4
from signmaml_ext import adapt, evaluate, meta_step

OPTIONS = {"inner_lr": 0.02, "inner_steps": 3}
METHODS = ("sign-maml", "fo-maml", "maml")


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_torchs_cross_entropy_is_the_named_one(loss):
    model, data = Conv4(3, 1, 8, 16), nets.image_tasks(dtype=torch.float32)
    meta_step(model, *data, **OPTIONS)
    expected = nets.grads(model)
    assert signmaml_ext.explain(model, *data, **OPTIONS, loss=loss).family == "conv"
    assert meta_step(model, *data, **OPTIONS, loss=loss).backend == "cpu"
    for name, gradient in nets.grads(model).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss()], ids=["function", "module"])
def test_torchs_mse_is_the_named_one(loss):
    model, data = nets.mlp(1, 1), nets.regression_tasks(dtype=torch.float32)
    assert signmaml_ext.explain(model, *data, **OPTIONS, loss=loss).family == "mlp"


OTHER_LOSSES = {
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "a label left out": nn.CrossEntropyLoss(ignore_index=2),
    "a label left out, by partial": functools.partial(F.cross_entropy, ignore_index=2),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_other_settings_of_cross_entropy(name, batching):
    loss, (model, data) = OTHER_LOSSES[name], (nets.mlp().double(), nets.vector_tasks())
    result = meta_step(model, *data, **OPTIONS, loss=loss, batching=batching, backend="torch")
    found = nets.grads(model)
    expected, *_ = definition.meta_gradient(model, data, **OPTIONS, method="sign-maml", loss=loss)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-12)
    logits, labels = evaluate(model, *data, **OPTIONS, loss=loss, batching=batching).logits, data[3]
    counts = labels != 2 if "left out" in name else torch.ones_like(labels, dtype=torch.bool)
    shares = [(logits[t].argmax(-1) == labels[t])[counts[t]].float().mean() for t in range(3)]
    torch.testing.assert_close(result.query_accuracy, torch.stack(shares))


def test_labels_that_the_default_leaves_out_are_no_named_loss():
    model, (x, y, qx, qy) = nets.mlp().double(), nets.vector_tasks()
    qy = qy.clone()
    qy[:, 1:] = -100
    qy[2] = -100
    result = evaluate(model, x, y, qx, qy, **OPTIONS, loss=F.cross_entropy)
    right = result.logits[:2, 0].argmax(-1) == qy[:2, 0]
    assert torch.equal(result.query_accuracy[:2], right.float()) and result.query_accuracy[2].isnan()
    with pytest.raises(ValueError, match=r"query_y: expected labels in 0..2 .*found -100"):
        evaluate(model, x, y, qx, qy, **OPTIONS)


def test_soft_labels_and_subclasses_stay_callables():
    model, (x, y, qx, qy) = nets.mlp().double(), nets.vector_tasks()
    soft = evaluate(model, x, F.one_hot(y).double(), qx, F.one_hot(qy).double(), **OPTIONS, loss=F.cross_entropy)
    torch.testing.assert_close(soft.query_loss, evaluate(model, x, y, qx, qy, **OPTIONS).query_loss)

    class Doubled(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    doubled = evaluate(model, x, y, qx, qy, **OPTIONS, loss=Doubled())
    torch.testing.assert_close(doubled.query_loss, 2 * soft.query_loss)


def test_a_loss_with_parameters_is_refused():
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, p: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(p * self.scale, y)

    model, data, loss = nets.mlp(), nets.vector_tasks(dtype=torch.float32), Temperature()
    with pytest.raises(ValueError, match=r"loss: expected a loss without trainable parameters .*'scale'"):
        meta_step(model, *data, **OPTIONS, loss=loss)
    loss.requires_grad_(False)
    meta_step(model, *data, **OPTIONS, loss=loss)


# ---------------------------------------------------------------------------------------------------------------------
# Losses of the prediction alone, and complex numbers inside a model


def entropy(prediction: Tensor) -> Tensor:
    """Mean entropy of the predicted classes, as test-time adaptation minimises it."""
    return -(prediction.softmax(-1) * prediction.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_loss_of_the_prediction_alone(backend, batching, method):
    model, (x, y, qx, qy) = nets.mlp().double(), nets.vector_tasks()
    options = {**OPTIONS, "method": method, "batching": batching, "backend": backend}
    expected = meta_step(model, x, y, qx, qy, **options, loss=lambda prediction, target: entropy(prediction))
    gradients = nets.grads(model)
    found = meta_step(model, x, None, qx, None, **options, loss=entropy)
    assert torch.equal(found.query_loss, expected.query_loss) and found.query_accuracy is None
    assert torch.equal(found.support_loss, expected.support_loss)
    for name, gradient in nets.grads(model).items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[name]), name
    evaluated = evaluate(model, x, None, qx, None, **options, loss=entropy)
    torch.testing.assert_close(evaluated.query_loss, found.query_loss, rtol=1e-12, atol=0)
    assert evaluated.query_accuracy is None and evaluated.logits.shape == (3, 9, 3)
    adapted = adapt(model, x, None, **options, loss=entropy)
    of_task = {name: value[1] for name, value in adapted.items()}
    loss = entropy(torch.func.functional_call(model, of_task, (qx[1],)))
    torch.testing.assert_close(loss, found.query_loss[1], rtol=1e-12, atol=0)
    explained = signmaml_ext.explain(model, x, None, qx, None, **options, loss=entropy)
    assert "a callable" in explained.families["cpu"]["mlp"]


def test_a_loss_of_the_prediction_alone_with_counted_steps():
    model, (x, _, qx, _) = nets.mlp().double(), nets.vector_tasks()
    full, counted = (
        meta_step(model, x, None, qx, None, **OPTIONS, loss=entropy, task_state=state) for state in ("full", "int8")
    )
    torch.testing.assert_close(counted.query_loss, full.query_loss, rtol=1e-12, atol=0)


class Waves(nn.Module):
    """Predicts by interference; complex numbers are in a buffer, on the way, and maybe in what it returns."""

    def __init__(self, returns: str, counts: bool = False) -> None:
        super().__init__()
        self.phases = nn.Linear(4, 6)
        self.register_buffer("mixing", torch.randn(6, 3, dtype=torch.complex128))
        self.register_buffer("phase", torch.ones((), dtype=torch.complex128))
        self.returns, self.counts = returns, counts

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:  # a buffer that a forward writes to, so that each task needs its own
            self.phase *= 1j
        amplitude = self.phase * torch.polar(torch.ones_like(angle := self.phases(x)), angle) @ self.mixing
        return amplitude if self.returns == "amplitudes" else torch.view_as_real(amplitude).square().sum(-1)


class RealWaves(nn.Module):
    """The same in real arithmetic."""

    def __init__(self, like: Waves) -> None:
        super().__init__()
        self.phases, self.real, self.imag = like.phases, like.mixing.real.clone(), like.mixing.imag.clone()

    def forward(self, x: Tensor) -> Tensor:
        cosine, sine = self.phases(x).cos(), self.phases(x).sin()
        return (cosine @ self.real - sine @ self.imag).square() + (cosine @ self.imag + sine @ self.real).square()


@pytest.mark.parametrize("counts", [False, True], ids=["read", "written"])
@pytest.mark.parametrize("returns", ["intensities", "amplitudes"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_complex_buffers(backend, batching, method, returns, counts):
    model, data = Waves(returns, counts), nets.vector_tasks()
    model.phases.double()
    expected, query_loss, _ = definition.meta_gradient(RealWaves(model), data, **OPTIONS, method=method)
    options = {**OPTIONS, "method": method, "batching": batching, "backend": backend}

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        assert prediction.is_complex() == (returns == "amplitudes")
        return F.cross_entropy(prediction.abs().square() if prediction.is_complex() else prediction, target)

    result = meta_step(model, *data, **options, loss=loss)
    torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-10, atol=0)
    for name, gradient in nets.grads(model).items():
        assert gradient.abs().max() > 0.01
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    evaluated = evaluate(model, *data, **options, loss=loss)
    assert evaluated.logits.is_complex() == (returns == "amplitudes")
    assert (evaluated.query_accuracy is None) == (returns == "amplitudes")
    assert torch.equal(model.phase, torch.ones((), dtype=torch.complex128))


def test_bfloat16_keeps_the_imaginary_part():
    model, (x, _, qx, _) = Waves("amplitudes").float(), nets.vector_tasks(dtype=torch.float32)
    model.mixing, model.phase = model.mixing.cfloat(), model.phase.cfloat()
    options = {**OPTIONS, "inner_steps": 0, "backend": "torch"}
    found, exact = (
        evaluate(model, x, None, qx, None, **options, loss=lambda p: p.imag.square().mean(), precision=precision)
        for precision in ("bf16", "fp32")
    )
    torch.testing.assert_close(found.query_loss, exact.query_loss, rtol=0.1, atol=0)
    assert exact.query_loss.min() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Several inputs and outputs


class TwoInputs(nn.Module):
    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.returns = returns

    def forward(self, x: Tensor, tokens: Tensor) -> object:
        hidden = torch.tanh(self.body(x) + self.words(tokens).mean(1))
        logits = self.head(hidden)
        kinds = {
            "tensor": logits,
            "tuple": (hidden, logits),
            "dict": {"hidden": hidden, "logits": logits},
            "object": SimpleNamespace(hidden=hidden, logits=logits),
        }
        return kinds[self.returns]


class OneInput(nn.Module):
    """The same with both inputs in one tensor."""

    def __init__(self, like: TwoInputs) -> None:
        super().__init__()
        self.words, self.body, self.head = like.words, like.body, like.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x[:, :4]) + self.words(x[:, 4:].long()).mean(1)))


def two_inputs() -> tuple[TwoInputs, list[tuple[Tensor, Tensor]], list[Tensor], tuple[Tensor, ...]]:
    model, (x, y, qx, qy) = TwoInputs().double(), nets.vector_tasks()
    tokens, q_tokens = torch.randint(9, (3, 6, 5)), torch.randint(9, (3, 9, 5))
    joined = (torch.cat([x, tokens.double()], -1), y, torch.cat([qx, q_tokens.double()], -1), qy)
    return model, [(x, tokens), (qx, q_tokens)], [y, qy], joined


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs(kind, batching, method):
    model, (support, query), (y, qy), joined = two_inputs()
    expected, query_loss, _ = definition.meta_gradient(OneInput(model), joined, **OPTIONS, method=method)
    if kind == "dict":
        support, query = ({"tokens": tokens, "x": x} for x, tokens in (support, query))
    for backend in ("torch", "auto"):
        options = {**OPTIONS, "method": method, "batching": batching, "backend": backend}
        result = meta_step(model, support, y, query, qy, **options)
        torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-10, atol=0)
        for name, gradient in nets.grads(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    reasons = signmaml_ext.explain(model, support, y, query, qy, **OPTIONS).families["cpu"]
    assert set(reasons) >= {"conv", "mlp"}


OUTPUTS = {
    "tuple": (1, lambda returned: returned[1]),
    "dict": ("logits", lambda returned: returned["logits"]),
    "object": ("logits", lambda returned: returned.logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_the_prediction_among_several_outputs(kind, batching):
    model, (support, query), (y, qy), _ = two_inputs()
    options = {**OPTIONS, "batching": batching}
    expected = evaluate(model, support, y, query, qy, **options)
    model.returns = kind
    for output in OUTPUTS[kind]:
        found = evaluate(model, support, y, query, qy, **options, output=output)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.query_accuracy, expected.query_accuracy)
    whole = evaluate(model, support, y, query, qy, **options, loss=lambda r, y: F.cross_entropy(OUTPUTS[kind][1](r), y))
    torch.testing.assert_close(whole.query_loss, expected.query_loss, rtol=1e-12, atol=0)
    assert whole.logits.shape == (3, 0) and whole.query_accuracy is None
    with pytest.raises(TypeError, match=r"model: expected a forward that returns one tensor, or `output=`"):
        evaluate(model, support, y, query, qy, **OPTIONS)


def test_an_output_of_a_recognised_model_is_not_left_out():
    model, data = nets.mlp().double(), nets.vector_tasks()
    plain, tripled = (evaluate(model, *data, **OPTIONS, output=o) for o in (None, lambda returned: 3 * returned))
    assert plain.backend == "cpu" and not torch.allclose(plain.query_loss, tripled.query_loss)


BAD_INPUTS = {
    "a list": (lambda x, t: [x, t], r"support_x: .*one call a task with `first_task`.*found a list of 2"),
    "no tensor": (lambda x, t: (x, 3), r"support_x\[1\]: expected a tensor, found int 3"),
    "empty": (lambda x, t: (), "support_x: expected at least one tensor"),
    "another number of tasks": (
        lambda x, t: (x, t[:2]),
        r"support_x\[1\]: expected \[T, S\] = \[3, 6\] as in support_x",
    ),
    "other inputs": (
        lambda x, t: {"x": x, "tokens": t},
        r"query_x: expected inputs as in support_x \(support_x\['x'\]",
    ),
    "another dtype": (lambda x, t: (x.float(), t), r"support_x\[0\]: expected torch.float64"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_named(name):
    change, message = BAD_INPUTS[name]
    model, (support, query), (y, qy), _ = two_inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        meta_step(model, change(*support), y, query, qy, **OPTIONS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tasks_of_different_sizes_add_up():
    """Adds tasks up as the error message about lists and the docstring show."""
    model = nets.mlp(activation=nn.Softplus).double()
    tasks = [nets.vector_tasks(tasks=1, shots=shots) for shots in (1, 2, 4)]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for task in tasks:
        expected, *_ = definition.meta_gradient(model, task, **OPTIONS, method="sign-maml")
        total = {name: value + expected[name] / 3 for name, value in total.items()}
    for number, task in enumerate(tasks):
        meta_step(model, *task, **OPTIONS, first_task=number)
    for parameter in model.parameters():
        parameter.grad /= len(tasks)
    for name, gradient in nets.grads(model).items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm on the support set's statistics, and running ones


class ByHand(nn.Module):
    """A BatchNorm network that normalises `x[n:]` by the statistics of `x[:n]`, written out."""

    def __init__(self, body: nn.Linear, norm: nn.BatchNorm1d, head: nn.Linear, count: int) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.count = body, norm, head, count

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        s = z[: self.count]
        mean, var = s.mean(0), s.var(0, unbiased=False)
        y = (z - mean) / torch.sqrt(var + self.norm.eps) * self.norm.weight + self.norm.bias
        return self.head(torch.tanh(y))[self.count if len(x) > self.count else 0 :]


def normalised() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_queries_by_the_statistics_of_the_support_set(batching, method):
    model, (x, y, qx, qy) = normalised(), nets.vector_tasks()
    options = {**OPTIONS, "method": method, "batching": batching, "batch_norm": "support", "backend": "torch"}
    result = meta_step(model, x, y, qx, qy, **options)
    found = nets.grads(model)
    by_hand = ByHand(model[0], model[1], model[3], x.shape[1])
    together = (x, y, torch.cat([x, qx], 1), qy)
    expected, query_loss, _ = definition.meta_gradient(by_hand, together, **OPTIONS, method=method)
    torch.testing.assert_close(result.query_loss, query_loss, rtol=1e-10, atol=0)
    for (name, gradient), value in zip(found.items(), expected.values(), strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


@pytest.mark.parametrize("make", [normalised, lambda: Conv4(3, 1, 8, 16).double()], ids=["vectors", "images"])
def test_inductive_predictions_do_not_depend_on_other_queries(make):
    """Both in `evaluate` and in the documented call on the result of `adapt`."""
    model = make()
    x, y, qx, qy = nets.vector_tasks() if isinstance(model, nn.Sequential) else nets.image_tasks()
    options = {**OPTIONS, "batch_norm": "support"}
    together = evaluate(model, x, y, qx, qy, **options).logits
    alone = [evaluate(model, x, y, qx[:, i : i + 1], qy[:, i : i + 1], **options).logits for i in range(qx.shape[1])]
    torch.testing.assert_close(torch.cat(alone, 1), together, rtol=1e-9, atol=1e-11)
    transductive = evaluate(model, x, y, qx, qy, **OPTIONS).logits
    assert (transductive - together).abs().max() > 1e-3
    adapted, before = adapt(model, x, y, **options), {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    for task in range(3):
        own = {name: value[task] for name, value in adapted.items()}
        for i in range(qx.shape[1]):
            predicted = torch.func.functional_call(model, own, (qx[task, i : i + 1],))
            torch.testing.assert_close(predicted[0], together[task, i], rtol=1e-9, atol=1e-11)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with pytest.raises(ValueError, match="task_state: expected 'full' with batch_norm 'support'"):
        adapt(model, x, y, **options, task_state="int8")


def test_running_statistics_that_nobody_wrote_are_told_once():
    model, data = normalised(), nets.vector_tasks()
    options = {**OPTIONS, "batch_norm": "running"}
    with pytest.warns(UserWarning, match=r"running statistics of '1' were never written.*batch_norm='support'"):
        evaluate(model, *data, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, *data, **options)
        written = normalised()
        written(data[0][0])
        evaluate(written, *data, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Odd modules and numbers


def test_sparse_embeddings():
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(11, 6, sparse=sparse), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.words(x).mean(1)))

    x, y = torch.randint(11, (3, 6, 5)), torch.randint(3, (3, 6))
    dense, sparse = Words(False).double(), Words(True).double()
    sparse.load_state_dict(dense.state_dict())
    for method in ("sign-maml", "fo-maml"):
        for model in (dense, sparse):
            meta_step(model, x, y, x, y, **OPTIONS, method=method)
        expected = nets.grads(dense)
        for name, gradient in nets.grads(sparse).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)


def test_extra_state_is_no_obstacle():
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 3}

    model, data = nn.Sequential(Extra(4, 8), nn.Softplus(), nn.Linear(8, 3)).double(), nets.vector_tasks()
    assert meta_step(model, *data, **OPTIONS).query_loss.isfinite().all()


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numpy_scalars_are_rates(rate):
    model, data = nets.mlp().double(), nets.vector_tasks()
    options = {"inner_steps": 3}
    names = [name for name, _ in model.named_parameters()]
    for given in (rate, dict.fromkeys(names, rate)):
        found = evaluate(model, *data, inner_lr=given, **options).query_loss
        assert torch.equal(found, evaluate(model, *data, inner_lr=float(rate), **options).query_loss)


def test_batching_is_checked():
    model, data = nets.mlp().double(), nets.vector_tasks()
    with pytest.raises(ValueError, match="batching: expected one of 'auto', 'together', 'one-by-one', found 'all'"):
        meta_step(model, *data, **OPTIONS, batching="all")
    model = nets.Recurrent().double()
    with pytest.raises(ValueError, match=r"batching: .*found 'together': vmap refused it"):
        meta_step(model, *nets.image_tasks(), **OPTIONS, batching="together")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_learnable_rate_and_a_parameter_without_axes(shape, backend):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x * self.scale))

    model, data = Scaled().double(), nets.vector_tasks()
    found = []
    for which in ("torch", backend):
        rate = torch.full(shape, 0.01, dtype=torch.float64, requires_grad=True)
        meta_step(model, *data, inner_lr=rate, inner_steps=3, backend=which)
        found.append(rate.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_what_one_call_made_impossible_the_next_may_do():
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()

    def looking(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) * (1.0 if float(prediction.sum()) < 1e9 else 2.0)

    evaluate(model, *data, **OPTIONS, loss=looking)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        evaluate(model, *data, **OPTIONS)
    assert signmaml_ext.explain(model, *data, **OPTIONS).how == "all tasks together"
    evaluate(model, *data, **OPTIONS, batching="together")
    assert "vmap refused it" in signmaml_ext.explain(model, *data, **OPTIONS, loss=looking).how


class TwiceNormed(nn.Module):
    """BatchNorm in two places, the second optionally checkpointed; one shared module or two separate ones."""

    def __init__(self, saves: bool, shares: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.first = self.norm if shares else nn.BatchNorm1d(6)
        self.saves = saves

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.a(x)))
        return self.head(checkpoint(self.inner, h, use_reentrant=False) if self.saves else self.inner(h))


def test_support_statistics_with_a_norm_used_twice_and_checkpointed():
    plain, saving = TwiceNormed(False, shares=False).double(), TwiceNormed(True, shares=False).double()
    data = nets.vector_tasks()
    saving.load_state_dict(plain.state_dict())
    options = {**OPTIONS, "batch_norm": "support"}
    for model in (plain, saving):
        meta_step(model, *data, **options)
    expected = nets.grads(plain)
    for name, gradient in nets.grads(saving).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    plain, saving = TwiceNormed(False).double(), TwiceNormed(True).double()
    assert evaluate(plain, *data, **options).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"batch_norm: .*'norm' more than once, checkpointed, found 'support'"):
        meta_step(saving, *data, **options)
    with pytest.raises(ValueError, match="batch_norm: expected 'batch' for a model that uses 'norm' more than once"):
        adapt(plain, *data[:2], **options)


def test_biases_in_front_of_a_norm_are_dead_with_support_statistics_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    for batching in ("together", "one-by-one"):
        meta_step(model, *nets.vector_tasks(), **OPTIONS, batch_norm="support", batching=batching)
        found = nets.grads(model)
        assert not found["0.bias"].any() and found["0.weight"].any()


def test_a_norm_with_a_forward_of_its_own_has_no_support_statistics():
    class NormAndActivation(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    model = nn.Sequential(nn.Linear(4, 6), NormAndActivation(6), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match=r"batch_norm: .*torch's own forward, found NormAndActivation \(module '1'\)"):
        evaluate(model, *nets.vector_tasks(), **OPTIONS, batch_norm="support")


def test_counts_keep_the_rates_that_they_were_made_with():
    model, data = nets.mlp().double(), nets.vector_tasks()
    rate = torch.tensor(0.02, dtype=torch.float64)
    adapted = adapt(model, *data[:2], inner_lr=rate, inner_steps=3, task_state="int8")
    before = {name: value.clone() for name, value in adapted.items()}
    rate.mul_(10)
    assert all(torch.equal(adapted[name], value) for name, value in before.items())


def test_inputs_by_name_have_no_order():
    model, ((x, tokens), (qx, q_tokens)), (y, qy), _ = two_inputs()
    found = evaluate(model, {"x": x, "tokens": tokens}, y, {"tokens": q_tokens, "x": qx}, qy, **OPTIONS).logits
    assert torch.equal(found, evaluate(model, (x, tokens), y, (qx, q_tokens), qy, **OPTIONS).logits)


def test_the_inner_steps_of_maml_are_those_of_fo_maml_whatever_serves_them():
    model, data = Conv4(3, 1, 8, 16), nets.image_tasks(dtype=torch.float32)
    second, first = (evaluate(model, *data, **OPTIONS, method=method) for method in ("maml", "fo-maml"))
    assert second.backend == first.backend == "cpu"
    assert torch.equal(second.logits, first.logits)


def test_the_name_of_a_module_stands_for_its_parameters():
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()
    found = [adapt(model, *data[:2], **OPTIONS, adapt=which) for which in ("4", ["4.*"], ["4.weight", "4.bias"])]
    assert found[0].keys() == found[1].keys() == found[2].keys() == {"4.weight", "4.bias"}
    with pytest.raises(ValueError, match="adapt: expected patterns that match"):
        adapt(model, *data[:2], **OPTIONS, adapt="4.wei")
