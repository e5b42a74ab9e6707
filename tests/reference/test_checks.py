"""Bad input raises an error that names the argument, what was expected and what was found; the model is unchanged."""

# ruff: noqa: E501 (a table reads better with one line per case)
from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import nets


def call(model=None, data=None, *, data_kind=nets.vector_tasks, **changes):
    """A good `meta_step` call with some arguments replaced; returns the model."""
    model = nets.mlp().double() if model is None else model
    names = ("support_x", "support_y", "query_x", "query_y")
    arguments = dict(zip(names, data_kind(), strict=True)) | {"inner_lr": 0.05, "inner_steps": 2} | changes
    random_state = torch.get_rng_state()
    try:
        signmaml_ext.meta_step(model, **arguments)
    finally:
        assert torch.equal(torch.get_rng_state(), random_state)
    return model


def labels(value: int) -> torch.Tensor:
    y = nets.vector_tasks()[1].clone()
    y[1, 2] = value
    return y


BAD = {
    "model": ({"model": 3}, TypeError, "model: expected a torch.nn.Module, found int 3"),
    "method": ({"method": "reptile"}, ValueError, "method: expected one of 'sign-maml', 'fo-maml', 'maml', found 'reptile'"),
    "method type": ({"method": None}, TypeError, "method: expected one of .* found NoneType"),
    "loss": ({"loss": "hinge"}, ValueError, "loss: expected one of 'cross_entropy', 'mse', found 'hinge'"),
    "loss type": ({"loss": 1}, TypeError, "loss: expected .* callable"),
    "precision": ({"precision": "fp16"}, ValueError, "precision: expected one of"),
    "tf32 on a CPU": ({"precision": "tf32", "model": nets.mlp(), "data_kind": lambda: nets.vector_tasks(dtype=torch.float32)}, ValueError, "precision: expected 'fp32' or 'bf16' on cpu"),
    "bf16 of float64": ({"precision": "bf16"}, ValueError, "precision: expected 'fp32' .* for a float64 model"),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of"),
    "batch_norm": ({"batch_norm": "none"}, ValueError, "batch_norm: expected one of"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of 'auto', 'torch', 'cpu', 'cuda', found 'gpu'"),
    "backend cuda": ({"backend": "cuda"}, ValueError, "backend: expected one that serves this call, found 'cuda': "),
    "inner_lr negative": ({"inner_lr": -0.1}, ValueError, "inner_lr: expected a finite float >= 0"),
    "inner_lr nan": ({"inner_lr": math.nan}, ValueError, "inner_lr: expected a finite float"),
    "inner_lr beyond float32": ({"inner_lr": 3.402823466385289e+38, "model": nets.mlp(), "data_kind": lambda: nets.vector_tasks(dtype=torch.float32)}, ValueError, r"inner_lr: expected at most 3.4028234663852886e\+38, the largest torch.float32 .* found 3.402823466385289e\+38"),
    "inner_lr type": ({"inner_lr": "0.1"}, TypeError, "inner_lr: expected .* found str '0.1'"),
    "inner_lr bool": ({"inner_lr": True}, TypeError, "inner_lr: expected"),
    "inner_lr dtype": ({"inner_lr": torch.tensor(1)}, TypeError, "inner_lr: expected .* found a int64 tensor"),
    "inner_lr shape": ({"inner_lr": torch.tensor([0.1, 0.1, 0.1])}, ValueError, r"inner_lr: expected a tensor of shape \[\] or \[2\] .* found shape \[3\]"),
    "inner_lr missing name": ({"inner_lr": {"0.weight": 0.1}}, ValueError, "inner_lr: expected a rate for every adapted parameter, found none for '0.bias'"),
    "inner_lr wrong name": ({"inner_lr": {n: 0.1 for n, _ in nets.mlp().named_parameters()} | {"head": 0.1}}, ValueError, "inner_lr: expected names of adapted parameters .* found 'head'"),
    "inner_lr named shape": ({"inner_lr": {n: torch.ones(7) for n, _ in nets.mlp().named_parameters()}}, ValueError, r"inner_lr\['0.weight'\]: expected a shape that broadcasts to \[8, 4\]"),
    "inner_steps negative": ({"inner_steps": -1}, ValueError, "inner_steps: expected an integer >= 0, found -1"),
    "inner_steps float": ({"inner_steps": 2.0}, TypeError, "inner_steps: expected an integer >= 0, found float 2.0"),
    "inner_steps bool": ({"inner_steps": True}, TypeError, "inner_steps: expected an integer"),
    "inner_rule type": ({"inner_rule": "adam"}, TypeError, r"inner_rule: expected None or a rule of signmaml_ext \(Plain, Signum, .*found str 'adam'"),
    "inner_rule of another method": ({"inner_rule": signmaml_ext.Adam()}, ValueError, r"inner_rule: expected one of Plain, Signum, Lion for method 'sign-maml', found Adam\("),
    "seed": ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
    "zero_dead_bias": ({"zero_dead_bias": 1}, TypeError, "zero_dead_bias: expected True or False"),
    "adapt": ({"adapt": ["classifier.*"]}, ValueError, r"adapt: expected patterns that match trainable parameters \(0.weight, .*found 'classifier"),
    "adapt empty": ({"adapt": []}, ValueError, "adapt: expected at least one name pattern"),
    "adapt type": ({"adapt": [1]}, TypeError, "adapt: expected None or a list of name patterns"),
    "support_x type": ({"support_x": [[1.0]]}, TypeError, r"support_x: expected a tensor .*one call a task with `first_task`.*found a list of 1"),
    "support_x ndim": ({"support_x": torch.zeros(3)}, ValueError, r"support_x: expected a shape \[T, S, ...\], found shape \[3\]"),
    "support_x dtype": ({"support_x": nets.vector_tasks(dtype=torch.float32)[0]}, TypeError, "support_x: expected torch.float64 like the model's parameters, found torch.float32"),
    "support_x complex": ({"support_x": nets.vector_tasks()[0] * 1j}, TypeError, "support_x: expected real values"),
    "support_x empty": ({"support_x": torch.zeros(3, 0, 4).double(), "support_y": torch.zeros(3, 0).long()}, ValueError, "support_x: expected at least one task and one example"),
    "no tasks": ({"support_x": torch.zeros(0, 6, 4).double()}, ValueError, "support_x: expected at least one task"),
    "query empty": ({"query_x": torch.zeros(3, 0, 4).double()}, ValueError, "query_x: expected at least one task and one example"),
    "support_x device": ({"support_x": nets.vector_tasks()[0].to("meta")}, ValueError, "support_x: expected a tensor on cpu like the model, found one on meta"),
    "support_y length": ({"support_y": nets.vector_tasks()[1][:, :-1]}, ValueError, r"support_y: expected \[T, S\] = \[3, 6\] as in support_x, found \[3, 5\]"),
    "support_y dtype": ({"support_y": nets.vector_tasks()[1].int()}, TypeError, "support_y: expected torch.int64 labels .* found torch.int32"),
    "support_y ndim": ({"support_y": nets.vector_tasks()[1][..., None]}, ValueError, r"support_y: expected labels \[T, S\]"),
    "label too large": ({"support_y": labels(3)}, ValueError, r"support_y: expected labels in 0..2 .* found 3 in task 1, example 2"),
    "label negative": ({"support_y": labels(-100)}, ValueError, r"support_y: expected labels in 0..2 .* found -100 in task 1"),
    "query tasks": ({"query_x": nets.vector_tasks(2)[2], "query_y": nets.vector_tasks(2)[3]}, ValueError, "query_x: expected 3 tasks as in support_x, found 2 tasks"),
    "query shape": ({"query_x": torch.zeros(3, 9, 5).double()}, ValueError, r"query_x: expected examples of shape \[4\] as in support_x, found shape \[5\]"),
    "mse dtype": ({"loss": "mse", "data_kind": nets.vector_tasks}, TypeError, "support_y: expected torch.float64 targets"),
    "loss not scalar": ({"loss": lambda p, t: nn.functional.cross_entropy(p, t, reduction="none")}, ValueError, r"loss: expected a callable that returns a scalar tensor .* found shape \[6\]"),
    "loss not tensor": ({"loss": lambda p, t: 1.0}, ValueError, "loss: expected a callable that returns a scalar tensor"),
    "loss complex": ({"loss": lambda p, t: p.mean() * 1j}, ValueError, "loss: expected a callable that returns a real scalar .* found a complex128 tensor"),
    "no targets": ({"support_y": None, "query_y": None}, TypeError, "support_y: expected a tensor of targets for loss 'cross_entropy', found NoneType"),
    "no targets for mse": ({"support_y": None, "query_y": None, "loss": "mse"}, TypeError, "support_y: expected a tensor of targets for loss 'mse'"),
    "no targets for torch's loss": ({"support_y": None, "query_y": None, "loss": nn.functional.cross_entropy}, TypeError, "support_y: expected a tensor of targets for loss 'cross_entropy'"),
    "no query targets": ({"query_y": None, "loss": lambda p, t: p.mean()}, ValueError, "query_y: expected a tensor like support_y, found None"),
    "no support targets": ({"support_y": None, "loss": lambda p: p.mean()}, ValueError, "query_y: expected None like support_y, found a tensor"),
    "a loss of two without targets": ({"support_y": None, "query_y": None, "loss": lambda p, t: p.mean()}, TypeError, "missing 1 required positional argument: 't'"),
    "no running statistics": ({"batch_norm": "running", "model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()}, ValueError, "batch_norm: expected 'batch' .* found 'running' with none in '1'"),
    "lazy": ({"model": nn.LazyLinear(3)}, ValueError, "model: expected initialised parameters"),
    "nothing trainable": ({"model": nn.Linear(4, 3).requires_grad_(False)}, ValueError, "model: expected at least one parameter that requires grad"),
    "half": ({"model": nn.Linear(4, 3).half()}, TypeError, "model: expected parameters in torch.float32 or torch.float64, found torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case):
    changes, error, message = BAD[case]
    changes = dict(changes)
    model = changes.get("model", nets.mlp().double())
    if not isinstance(model, nn.Module):
        with pytest.raises(error, match=message):
            call(**changes)
        return
    changes["model"] = model
    state = {} if case == "lazy" else {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        call(**changes)
    assert all(p.grad is None for p in model.parameters())
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_good_call_is_good():
    """Otherwise every refusal above could have another reason."""
    assert call()[0].weight.grad is not None


@pytest.mark.parametrize("target", [(3, 5), (3, 5, 2)])
def test_mse_does_not_broadcast(target):
    """[5] against a prediction [5, 1] would silently become a [5, 5] difference."""
    model = nets.mlp(1, 1).double()
    x, y = torch.randn(3, 5, 1, dtype=torch.float64), torch.randn(*target, dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape("model: expected a prediction of the targets' shape")):
        signmaml_ext.meta_step(model, x, y, x, y, inner_lr=0.1, inner_steps=1, loss="mse")


def test_prediction_of_the_wrong_shape_or_type():
    class Wrong(nn.Module):
        def __init__(self, output) -> None:
            super().__init__()
            self.layer, self.output = nn.Linear(4, 3).double(), output

        def forward(self, x):
            return self.output(self.layer(x))

    with pytest.raises(ValueError, match=r"model: expected a prediction \[6, classes\] .* found shape \[3\]"):
        call(Wrong(lambda z: z.mean(0)))
    with pytest.raises(
        TypeError, match=r"model: expected a forward that returns one tensor, or `output=` .*found tuple"
    ):
        call(Wrong(lambda z: (z, z)))


def test_adapt_and_explain_check_too():
    model, (x, y, *_) = nets.mlp().double(), nets.vector_tasks()
    with pytest.raises(ValueError, match="inner_steps: expected"):
        signmaml_ext.adapt(model, x, y, inner_lr=0.1, inner_steps=-1)
    with pytest.raises(ValueError, match="method: expected"):
        signmaml_ext.explain(model, method="sgd")
    with pytest.raises(TypeError, match="query_x: expected a tensor, found NoneType"):
        signmaml_ext.explain(model, x, y)


def test_cross_entropy_with_a_wrong_label_is_nan_where_looking_would_synchronise():
    """On a CUDA device this replaces a device assertion; here the loss function itself is tested."""
    prediction = torch.randn(4, 3, requires_grad=True)
    loss = signmaml_ext.reference.cross_entropy(prediction, torch.tensor([0, 1, 2, 3]))
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.isnan().all()
