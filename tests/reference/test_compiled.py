"""`compile=True`: the passes that torch computes go through torch.compile.

Most tests use torch's "aot_eager" backend, which traces and differentiates as Inductor does but compiles no code.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.cases import nets
from signmaml_ext import adapt, compiled, evaluate, explain, meta_step
from signmaml_ext import batching as batching_rules

OPTIONS = {"inner_lr": 0.02, "inner_steps": 2}
EXACT = {"rtol": 1e-9, "atol": 1e-12}

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture
def traced(monkeypatch):
    """Uses torch.compile without Inductor; gives the functions that were compiled."""
    given = []
    compile = torch.compile

    def noted(function, **options):
        given.append(function)
        return compile(function, **options)

    monkeypatch.setattr(torch, "compile", noted)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield given
    torch._dynamo.reset()


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3), nn.Softplus())


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


class Tied(nn.Module):
    """Its last layer shares the weight of its first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.last(torch.tanh(self.first(x)) * self.scale)))


class Leaves(nn.Module):
    """Leaves a tensor on itself, which torch.compile refuses under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = F.softplus(self.body(x))
        return self.head(self.features)


class Past(nn.Module):
    """Reads a parameter through a functools.partial instead of by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.again = functools.partial(F.linear, weight=self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))))


class Decides(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.body(x))
        return self.head(h if h.sum().item() > 0 else -2 * h)


class Renormalises(nn.Module):
    """Writes to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.body.weight.mul_(0.5)
        return self.head(F.gelu(self.body(x)))


class Uses(nn.Module):
    """Leaves some parameters unused, and has an embedding row for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, padding_idx=0)
        self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.words((3 * x).long().clamp(0, 5)).sum(1)))


MODELS = {
    "mlp": (lambda: nets.mlp(activation=nn.Softplus), nets.vector_tasks),
    "batch norm": (batch_norm, nets.vector_tasks),
    "group norm": (group_norm, nets.image_tasks),
    "tied": (Tied, nets.vector_tasks),
    "padding": (Uses, nets.vector_tasks),
}


def gradients(model: nn.Module, data: tuple[Tensor, ...], **options: object) -> dict[str, Tensor]:
    model.zero_grad()
    meta_step(model, *data, **{**OPTIONS, **options})
    return nets.grads(model)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_call_that_is_not_compiled(name, method, batching, traced):
    make, tasks = MODELS[name]
    model, data = make().double(), tasks()
    options = {"method": method, "batching": "auto" if name == "padding" else batching}
    expected = gradients(model, data, **options)
    found = gradients(model, data, **options, compile=True)
    assert traced
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], **EXACT)
        if expected[key] is not None:
            assert torch.equal(found[key] == 0, expected[key] == 0)  # e.g. biases in front of a BatchNorm


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_inductor(batching, monkeypatch):
    monkeypatch.setattr(batching_rules, "LONG", 0.0)  # with tasks one by one, use threads
    model, data = batch_norm().double(), nets.vector_tasks(tasks=9)
    expected = gradients(model, data, batching=batching)
    found = gradients(model, data, batching=batching, compile=True)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], **EXACT)


@pytest.mark.slow
def test_evaluate_and_adapt(traced):
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()
    for options in ({"method": "maml"}, {"adapt": "4.*"}, {"task_state": "int8"}):
        expected = evaluate(model, *data, **OPTIONS, **options)
        found = evaluate(model, *data, **OPTIONS, **options, compile=True)
        torch.testing.assert_close(found.logits, expected.logits, **EXACT)
        torch.testing.assert_close(found.support_loss, expected.support_loss, **EXACT)
        for name, value in adapt(model, *data[:2], **OPTIONS, **options).items():
            torch.testing.assert_close(
                adapt(model, *data[:2], **OPTIONS, **options, compile=True)[name], value, **EXACT
            )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "support", "running"])
@pytest.mark.filterwarnings("ignore:batch_norm='running'")
def test_batch_norm(mode, traced):
    model, data = batch_norm().double(), nets.vector_tasks()
    expected = gradients(model, data, batch_norm=mode)
    for key, found in gradients(model, data, batch_norm=mode, compile=True).items():
        torch.testing.assert_close(found, expected[key], **EXACT)


@pytest.mark.slow
def test_a_learnable_rate(traced):
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()
    rates = [torch.tensor(0.02, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for rate, compile in zip(rates, (False, True), strict=True):
        gradients(model, data, inner_lr=rate, compile=compile)
    torch.testing.assert_close(rates[1].grad, rates[0].grad, **EXACT)


@pytest.mark.slow
def test_tasks_on_threads_share_what_the_first_one_compiled(traced, monkeypatch):
    monkeypatch.setattr(batching_rules, "LONG", 0.0)
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks(tasks=9)
    before, counted = torch.get_num_threads(), torch._dynamo.utils.counters["stats"]
    found, graphs = [], []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(gradients(model, data, compile=True, batching="one-by-one"))
            graphs.append(counted["unique_graphs"])
    finally:
        torch.set_num_threads(before)
    for key, expected in gradients(model, data, batching="one-by-one").items():
        torch.testing.assert_close(found[0][key], expected, **EXACT)
        assert torch.equal(found[1][key], found[0][key]) and torch.equal(found[2][key], found[0][key])
    assert graphs == graphs[:1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_what_is_compiled_keeps_no_model_alive(batching, traced):
    model = nets.mlp(activation=nn.Softplus).double()
    gradients(model, nets.vector_tasks(), compile=True, batching=batching)
    alive = [weakref.ref(model), weakref.ref(model[0].weight)]
    assert traced
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_what_is_compiled_serves_the_next_call(traced):
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()
    counted = torch._dynamo.utils.counters["stats"]
    gradients(model, data, compile=True)
    before = counted["unique_graphs"]
    for _ in range(3):
        gradients(model, data, compile=True)
        with torch.no_grad():
            model[0].weight.mul_(1.01)
    assert before and counted["unique_graphs"] == before
    assert len(traced) == 2  # one for support sets and one for query sets
    labels = data[1].clone()
    labels[1, 0] = 3
    with pytest.raises(ValueError, match="support_y"):
        gradients(model, (data[0], labels, *data[2:]), compile=True)


@pytest.mark.slow
def test_a_model_that_changed_is_compiled_anew(traced):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.by = nn.Linear(4, 8), nn.Linear(8, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.by * torch.tanh(self.body(x)))

    model, data = Scaled().double(), nets.vector_tasks()
    for change in (lambda: None, lambda: setattr(model, "by", 2.0), lambda: setattr(model, "head", nn.Linear(8, 3))):
        change()
        model.double()
        expected = gradients(model, data)
        for key, found in gradients(model, data, compile=True).items():
            torch.testing.assert_close(found, expected[key], **EXACT)


@pytest.mark.slow
def test_dropout_repeats_by_the_seed(traced):
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    data = nets.vector_tasks()
    first, second, other = (gradients(model, data, compile=True, seed=seed)["0.weight"].clone() for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    gradients(model, data, compile=True, seed=1)
    assert torch.rand(()) == expected


@pytest.mark.slow
def test_several_inputs_and_outputs(traced):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
            return {"logits": torch.tanh(self.a(x)) + self.b(z), "rest": z}

    model, (sx, sy, qx, qy) = Two().double(), nets.vector_tasks()
    for data in (((sx, sx + 1), sy, (qx, qx + 1), qy), ({"x": sx, "z": sx}, sy, {"x": qx, "z": qx}, qy)):
        for batching in ("together", "one-by-one"):
            options = {"output": "logits", "batching": batching}
            expected = gradients(model, data, **options)
            for key, found in gradients(model, data, **options, compile=True).items():
                torch.testing.assert_close(found, expected[key], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Past, Leaves, Decides, Renormalises])
def test_what_torch_compile_cannot_do_is_refused(make, traced):
    model, data = make().double(), nets.vector_tasks()
    for batching in ("auto", "together", "one-by-one"):
        with pytest.raises(ValueError, match=r"(compile|batching): expected .* for this (model|call)"):
            gradients(model, data, compile=True, batching=batching)
    assert "features" not in vars(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="it compiles nothing"):
        gradients(model, data, compile=True, backend="torch")


class Knob:
    """Holds a value that torch.compile sees and `structure` does not."""

    __slots__ = ("value",)


KNOB = Knob()


class Turned(nn.Module):
    """Has a dead bias as long as the knob is at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(F.celu(self.norm(h) if KNOB.value == 0 else KNOB.value * self.norm(h) + h))


@pytest.mark.slow
def test_what_changes_unseen_is_looked_into_again(traced, monkeypatch):
    model, data = Turned().double(), nets.vector_tasks()
    monkeypatch.setattr(compiled, "MOST_CHANGES", 3)
    for KNOB.value in (0, 1, 0, 2):
        found = gradients(model, data, compile=True, batching="one-by-one")
        expected = gradients(copy.deepcopy(model), data, batching="one-by-one")
        assert bool((expected["body.bias"] == 0).all()) == (KNOB.value == 0)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], **EXACT)
            assert torch.equal(found[key] == 0, expected[key] == 0)
    with pytest.raises(ValueError, match="changes from call to call"):
        for KNOB.value in (3, 4):
            gradients(model, data, compile=True, batching="one-by-one")


def test_what_is_refused(monkeypatch):
    model, data = nets.mlp(activation=nn.Softplus).double(), nets.vector_tasks()
    with pytest.raises(ValueError, match="compile: expected False with method 'maml'"):
        gradients(model, data, method="maml", compile=True)
    with pytest.raises(ValueError, match="compile: expected False with graph=True"):
        gradients(model, data, graph=True, compile=True)
    with pytest.raises(TypeError, match="compile: expected True or False"):
        gradients(model, data, compile="max-autotune")

    def no_compiler(function, **options):
        def fails(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("backend raised:\nno C++ compiler")

        return fails

    import torch._dynamo

    monkeypatch.setattr(torch, "compile", no_compiler)
    for batching in ("together", "one-by-one", "auto"):
        with pytest.raises(ValueError, match=r"(?s)for this (call|model).*compiler"):
            gradients(model, data, compile=True, batching=batching)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explain_says_so():
    data = nets.vector_tasks()
    assert "by torch.compile" in str(explain(nets.mlp(activation=nn.Softplus).double(), *data, compile=True))
    assert "nothing to compile" in str(explain(nets.mlp().double(), *data, compile=True))
