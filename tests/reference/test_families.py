"""Which family serves a call, why the others do not, and that the caller sees no difference except in time."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from helpers.cases import emulated_cases, libraries, nets, perceptrons
from signmaml.models import MLP, Conv4
from signmaml_ext import Sharpness, Signum, adapt, conv, evaluate, explain, meta_step, mlp

NETS = {
    "Conv4": (lambda: Conv4(3, 1, 8, 16), 1, 16),
    "Conv4, strided": (lambda: Conv4(3, 3, 8, 9, pooling="stride", layers=3), 3, 9),
    "MiniImagenetCNN": (libraries.MiniImagenetCNN, 3, 17),
    "OmniglotCNN": (libraries.OmniglotCNN, 1, 16),
    "torchmeta": (libraries.torchmeta, 3, 16),
    "one sequence": (libraries.one_sequence, 1, 18),
    "functional": (libraries.Functional, 2, 16),
    "pools first": (libraries.PoolsFirst, 1, 10),
}
OPTIONS = {"inner_lr": 0.01, "inner_steps": 3}


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("name", NETS)
def test_other_libraries_networks_as_the_reference(name, method):
    """Values, gradients under the module's own names, and the adapted parameters, in float64."""
    make, channels, size = NETS[name]
    model, data = make().double(), nets.image_tasks(channels=channels, size=size)
    options = {**OPTIONS, "method": method}
    before = copy.deepcopy(model.state_dict())
    found = explain(model, *data, **options)
    assert (found.backend, found.family) == ("cpu", "conv"), found
    ours = meta_step(model, *data, **options)
    gradients = nets.grads(model)
    theirs = meta_step(model, *data, **options, backend="torch")
    assert (ours.backend, theirs.backend) == ("cpu", "torch")
    for attribute in ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks"):
        torch.testing.assert_close(getattr(ours, attribute), getattr(theirs, attribute), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, nets.grads(model), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        adapt(model, *data[:2], **options), adapt(model, *data[:2], **options, backend="torch"), rtol=1e-10, atol=1e-11
    )
    a, b = (evaluate(model, *data, **options, backend=backend) for backend in ("auto", "torch"))
    assert a.backend == "cpu"
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 0},
        {"adapt": ["classifier.*"]},
        {"adapt": ["features.*"]},
        {"inner_lr": torch.tensor([0.01, 0.0, 0.02])},
        {"nonfinite": "skip"},
    ],
    ids=["no steps", "head only", "body only", "rate a step", "skip"],
)
def test_conv_options(options):
    model, data = Conv4(3, 1, 8, 16, layers=3).double(), nets.image_tasks()
    if "nonfinite" in options:
        data[0][1, 0, 0, 3, 3] = torch.nan
    chosen = {**OPTIONS, **options}
    ours = meta_step(model, *data, **chosen)
    gradients = nets.grads(model)
    theirs = meta_step(model, *data, **chosen, backend="torch")
    assert ours.backend == "cpu"
    assert torch.equal(ours.nonfinite, theirs.nonfinite) and torch.equal(ours.live_tasks, theirs.live_tasks)
    torch.testing.assert_close(gradients, nets.grads(model), rtol=1e-9, atol=1e-11)


def test_a_rate_for_every_tensor_and_step_and_frozen_tensors():
    model, data = Conv4(3, 1, 8, 16, layers=2).double(), nets.image_tasks()
    model.features[0].conv.weight.requires_grad_(False)
    model.features[1].normalize.bias.requires_grad_(False)
    rates = {name: 0.02 * torch.rand(3, *[1] * p.ndim) for name, p in model.named_parameters() if p.requires_grad}
    options = {"inner_lr": rates, "inner_steps": 3}
    assert meta_step(model, *data, **options).backend == "cpu"
    gradients = nets.grads(model)
    assert gradients["features.0.conv.weight"] is None
    meta_step(model, *data, **options, backend="torch")
    torch.testing.assert_close(gradients, nets.grads(model), rtol=1e-9, atol=1e-11)


def refusal(model: nn.Module, data, **options) -> str:
    found = explain(model, *data, **{**OPTIONS, **options})
    assert found.family != "conv"
    return found.families["cpu"]["conv"]


class Extra(nn.Module):
    """A network with a parameter that its layers do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = libraries.one_sequence()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x)


CALLS = {
    "a callable loss": (
        lambda: Conv4(3, 1, 8, 16), {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "this is a callable"
    ),
    "an inner rule": (lambda: Conv4(3, 1, 8, 16), {"inner_rule": Signum()}, r"inner_rule is Signum\("),
    "bf16": (lambda: Conv4(3, 1, 8, 16).float(), {"precision": "bf16"}, "computes in fp32 there"),
    "running statistics": (libraries.MiniImagenetCNN, {"batch_norm": "running"}, "batch_norm is 'running'"),
    "noise in dead biases": (lambda: Conv4(3, 1, 8, 16), {"zero_dead_bias": False}, "zero_dead_bias=False"),
    "filters": (lambda: Conv4(3, 1, 12, 16), {}, "a multiple of 8 up to 128 filters, and these are 4 with 12"),
    "many filters": (lambda: Conv4(3, 1, 136, 4, layers=1), {"size": 4}, "these are 1 with 136"),
    "many blocks": (lambda: Conv4(3, 1, 8, 16, "stride", 7), {"size": 16}, "these are 7 with 8"),
    "channels": (lambda: Conv4(3, 4, 8, 16), {"channels": 4}, "up to 3 channels"),
    "other channels": (lambda: Conv4(3, 3, 8, 16), {}, r"the images are not \[T, S, 3, H, W\]"),
    "another size": (lambda: Conv4(3, 1, 8, 16), {"size": 33}, "takes 8 features, and these images give 32"),
    "nothing left": (lambda: Conv4(3, 1, 8, 16), {"size": 7}, "images of 7 x 7 shrink to nothing in 4 blocks"),
    "an unused parameter": (Extra, {}, "trainable parameters that its layers do not use"),
    "no gradient": (lambda: NoGradient(), {}, "it does not compute what its structure says"),
}  # fmt: skip


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = libraries.one_sequence()

    def forward(self, x):
        with torch.no_grad():
            x = self.body[0](x)
        for layer in list(self.body)[1:]:
            x = layer(x)
        return x


@pytest.mark.parametrize("name", CALLS)
def test_what_conv_does_not_serve_it_says(name):
    make, options, reason = CALLS[name]
    options = dict(options)
    size, channels = options.pop("size", 16), options.pop("channels", 1)
    model = make()
    model = model if options.get("precision") else model.double()
    dtype = next(model.parameters()).dtype
    if name == "running statistics":
        channels = 3
    data = nets.image_tasks(channels=channels, size=size, dtype=dtype)
    assert re.search(reason, refusal(model, data, **options))


def test_one_value_a_channel_is_the_references_error():
    model = Conv4(3, 1, 8, 16, pooling="stride").double()
    data = nets.image_tasks(ways=1, shots=1)
    assert refusal(model, data) == "BatchNorm would see one value a channel"
    with pytest.raises(ValueError, match="xpected more than 1 value per channel"):
        meta_step(model, *data, **OPTIONS)


@pytest.mark.parametrize(("which", "where"), [(1, "support_y"), (3, "query_y")])
def test_labels_out_of_range_are_refused_before_any_work(which, where):
    model, data = Conv4(3, 1, 8, 16).double(), nets.image_tasks()
    data[which][2, 1] = 3
    with pytest.raises(ValueError, match=rf"{where}: expected labels in 0\.\.2 .* found 3 in task 2, example 1"):
        meta_step(model, *data, **OPTIONS)
    assert all(p.grad is None for p in model.parameters())


def test_autocast_around_the_call_is_not_ours():
    model, data = Conv4(3, 1, 8, 16), nets.image_tasks(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert refusal(model, data) == "torch.autocast is on around the call"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (Conv4(5, 3, 32, 84), "conv"),
        (Conv4(5, 1, 64, 28, pooling="stride"), "conv"),
        (libraries.OmniglotCNN(), "conv"),
        (MLP(784, 5, (64, 64)), "mlp"),
        (nn.Linear(3, 2), "flat"),
    ],
)
def test_explain_without_data_speaks_of_the_real_structure(model, family):
    found = explain(model)
    assert (found.backend, found.family) == ("cpu", family), found
    assert str(found).startswith(f"backend: cpu, {family} (")
    if family == "mlp":
        assert explain(model, loss="mse").family == "mlp"


SHARPNESS = (None, 0.05, Sharpness(0.01, "linf", adaptive=True))
STATES = (("sign-maml", "full"), ("sign-maml", "int8"), ("fo-maml", "full"), ("maml", "full"))


@pytest.mark.parametrize(("method", "task_state"), STATES)
@pytest.mark.parametrize("adapted", ["all", "head", "body", "one tensor"])
@pytest.mark.parametrize("family", [conv, mlp], ids=["conv", "mlp"])
def test_the_kernels_serve_every_method_rate_and_step(family, adapted, method, task_state):
    """Of a recognised network, on the CPU and on CUDA; MAML through sharpness-aware steps has native gradients."""
    if family is conv:
        model, data = Conv4(3, 1, 8, 16, layers=2), nets.image_tasks(dtype=torch.float32)
    else:
        model, data = perceptrons.network((4, 6, 3), nn.ReLU), nets.vector_tasks(dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    adapt = {"all": None, "head": names[-2:], "body": names[:-2], "one tensor": names[:1]}[adapted]
    kinds = ("scalar", "tensor", "filter", "element", "step", "tensor and step", "element and step")
    for kind in kinds[:4] if task_state == "int8" else kinds:
        for learnable in (False, True):
            rates = emulated_cases.rates_of(model, kind, 2, learnable=learnable)
            if isinstance(rates, dict) and adapt is not None:
                rates = {name: rates[name] for name in adapt}
            for sharpness in SHARPNESS:
                options = {"inner_lr": rates, "inner_steps": 2, "method": method, "adapt": adapt}
                options |= {"task_state": task_state, "sharpness": sharpness}
                found = explain(model, *data, **options)
                problem = perceptrons.problem_of(model, data, loss="cross_entropy", **options)
                served = method != "maml" or sharpness is None
                name = family.__name__.rpartition(".")[2]
                assert (found.backend, found.family) == ("cpu", name if served else "layers"), found
                assert (family.why_not(problem, on_cuda=True) is None) == served


def test_explain_names_every_family_that_does_not_serve():
    text = str(explain(nets.Attention()))
    assert "not cpu, conv: it flattens other axes" in text
    assert "not cpu, mlp: it has convolutions" in text
    assert "not cuda: " in text
    with pytest.raises(ValueError, match=r"found 'cpu': conv: .*; mlp: .*; flat: "):
        explain(nets.Attention(), method="maml", backend="cpu")


def test_each_family_is_asked_once_a_call(monkeypatch):
    from signmaml_ext import dispatch

    asked: list[str] = []
    families = tuple(
        dispatch.Family(
            family.name, family.summary, lambda problem, f=family: asked.append(f.name) or f.why_not(problem),
            family.meta_gradients, family.adapt, family.fused,
        )
        for family in dispatch.BACKENDS["cpu"].families
    )  # fmt: skip
    backend = dispatch.Backend("cpu", "cpu", lambda: None, families)
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", backend)
    meta_step(nets.mlp().double(), *nets.vector_tasks(), **OPTIONS)
    assert asked == ["conv", "mlp"]


def test_a_structure_that_changes_between_calls():
    """Never a silently wrong result: the second call is served by "flat", the third by "conv" again."""
    model, data = libraries.one_sequence().double(), nets.image_tasks()
    assert explain(model, *data, **OPTIONS).family == "conv"
    meta_step(model, *data, **OPTIONS)
    first = nets.grads(model)
    model[2] = nn.Softplus()
    meta_step(model, *data, **OPTIONS)
    assert explain(model, *data, **OPTIONS).family == "flat"
    second = nets.grads(model)
    assert any(not torch.allclose(first[name], second[name]) for name in first)
    model[2] = nn.ReLU()
    assert meta_step(model, *data, **OPTIONS).backend == "cpu"
    torch.testing.assert_close(nets.grads(model), first, rtol=0, atol=0)


def test_eval_mode_and_other_examples_count():
    model, data = libraries.one_sequence().double(), nets.image_tasks()
    model[18] = nn.Dropout(0.5)
    meta_step(model.train(), *data, **OPTIONS, seed=0)
    assert explain(model, *data, **OPTIONS).family == "layers"
    meta_step(model.eval(), *data, **OPTIONS)
    assert explain(model, *data, **OPTIONS).family == "conv"


def test_the_callers_generator_is_left_alone():
    model, data = Conv4(3, 1, 8, 16), nets.image_tasks(dtype=torch.float32)
    before = torch.get_rng_state()
    meta_step(model, *data, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


KERNEL_NETS = {"conv": lambda: Conv4(3, 1, 8, 16, layers=2), "mlp": lambda: MLP(256, 3, hidden=(8, 8))}
# Shape of a parameter's rate, from the parameter's own and the number of steps.
RATES = {
    "tensor": lambda shape, steps: (),
    "tensor and step": lambda shape, steps: (steps, *[1] * len(shape)),
    "element": lambda shape, steps: shape,
    "element and step": lambda shape, steps: (steps, *shape),
    "row": lambda shape, steps: (shape[0], *[1] * (len(shape) - 1)),
}


def rates_of(model: nn.Module, kind: str, adapted: set[str], learnable: bool):
    """Rates of one kind for a call with two steps."""
    shared = {"number": 0.01, "scalar": torch.tensor(0.01), "step": torch.tensor([0.01, 0.02])}
    if kind == "number":
        return shared[kind]
    if kind in shared:
        return shared[kind].requires_grad_(learnable)
    named = {name: p for name, p in model.named_parameters() if name in adapted}
    return {n: torch.full(RATES[kind](tuple(p.shape), 2), 0.01).requires_grad_(learnable) for n, p in named.items()}


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("adapt_all", [True, False])
@pytest.mark.parametrize("sharpness", [None, 0.1])
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
@pytest.mark.parametrize("family", KERNEL_NETS)
def test_no_rate_and_no_pattern_leaves_the_kernels_on_a_cpu(family, method, sharpness, adapt_all, learnable):
    """The whole grid; steps that are sharpness-aware and differentiated have native gradients."""
    model = KERNEL_NETS[family]()
    data = nets.image_tasks(dtype=torch.float32)
    names = list(dict(model.named_parameters()))
    adapted = set(names if adapt_all else names[-2:])
    for kind in ("number", "scalar", "step", *RATES):
        rates = rates_of(model, kind, adapted, learnable)
        options = {"inner_lr": rates, "inner_steps": 2, "method": method, "adapt": sorted(adapted)}
        found = explain(model, *data, **options, sharpness=sharpness)
        if sharpness is not None and method == "maml":
            assert (found.backend, found.family) == ("cpu", "layers"), kind
            assert "sharpness-aware" in found.families["cpu"][family]
        else:
            assert (found.backend, found.family) == ("cpu", family), kind
