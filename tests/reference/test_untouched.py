"""The user's module is not touched, even during a call: threads, interrupts, what forwards and hooks leave behind."""

from __future__ import annotations

import copy
import functools
import io
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import signmaml
import signmaml_ext
from helpers.cases import definition, nets
from signmaml_ext import batching, chain, evaluate, meta_step, modes
from signmaml_ext.lazy import cached_property
from signmaml_ext.replica import Replicas

OPTIONS = {"inner_lr": 0.02, "inner_steps": 3}
METHODS = ("sign-maml", "fo-maml", "maml")


class Checkpointed(nn.Module):
    """Checkpoints its body as Hugging Face's models do with gradient checkpointing on."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.activation, self.saves = activation, True

    def body(self, x: Tensor) -> Tensor:
        return self.activation(self.b(self.activation(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.body, x, use_reentrant=False) if self.saves else self.body(x))


class Leaves(nn.Module):
    """Leaves tensors behind on itself, in a list and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.seen: list[Tensor] = []
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.body(x))
        self.seen.append(self.features)
        self.calls += 1
        return self.head(self.features)


def old_weight_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 8)), nn.GELU(), nn.Linear(8, 3))


def old_spectral_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 8)), nn.GELU(), nn.Linear(8, 3))


def softplus_and_dropout() -> nn.Module:
    """Random, and no chain of layers that native code has."""
    return nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Dropout(0.3), nn.Linear(8, 3))


def with_batch_norm_and_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def images_group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything a call must leave unchanged, by identity and value."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    now = state_of(model)
    values, found = before.pop("values"), now.pop("values")
    assert now == before
    assert all(torch.equal(found[name], values[name]) for name in values)
    before["values"] = values
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert torch.is_grad_enabled()
    assert not any(turns.tickets() for turns in (modes._drawing, modes._attention, modes._tf32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [F.gelu, torch.relu], ids=["generic", "recognised"])
def test_activation_checkpointing_is_exact(activation, method):
    """The backward pass recomputes activations with the parameters of the step they belong to."""
    model, data = Checkpointed(activation).double(), nets.vector_tasks()
    model.saves = False
    expected, *_ = definition.meta_gradient(model, data, **OPTIONS, method=method)
    model.saves = True
    result = meta_step(model, *data, **OPTIONS, method=method)
    for name, gradient in nets.grads(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert result.backend == "cpu"
    with pytest.raises(ValueError, match=r"batching: .*checkpointing"):
        meta_step(model, *data, **OPTIONS, method=method, batching="together", backend="torch")


@pytest.mark.parametrize("make", [Leaves, old_weight_norm, old_spectral_norm, with_batch_norm_and_dropout])
@pytest.mark.parametrize("batching", ["auto", "one-by-one"])
def test_what_a_forward_leaves_is_gone(make, batching):
    model, data = make().double(), nets.vector_tasks()
    before = state_of(model)
    for method in METHODS:
        meta_step(model, *data, **OPTIONS, method=method, batching=batching)
    evaluate(model, *data, **OPTIONS, batching=batching)
    assert_untouched(model, before)
    assert not getattr(model, "seen", [])
    torch.save(model.state_dict(), io.BytesIO())
    if make is Leaves:
        copy.deepcopy(model)
        torch.save(model, io.BytesIO())


def test_module_hooks_run_and_what_they_collect_can_be_read():
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    collected: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: collected.append(output))
    assert "has hooks" in signmaml_ext.explain(model, *data, **OPTIONS).how
    evaluate(model, *data, **OPTIONS)
    assert len(collected) == 3 * (3 + 1)
    assert all(torch.isfinite(value.detach()).all() for value in collected)
    torch.save(collected, io.BytesIO())
    assert [tuple(value.shape) for value in collected[:4]] == [(6, 8)] * 3 + [(9, 8)]


def test_a_hook_changes_the_forward():
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    meta_step(model, *data, **OPTIONS)
    expected, *_ = definition.meta_gradient(model, data, **OPTIONS, method="sign-maml")
    for name, gradient in nets.grads(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_hooks_of_parameters_run_on_the_meta_gradient():
    """Once, as in `backward()`: the gradient hook may change the gradient, the other sees the accumulated one."""
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    meta_step(model, *data, **OPTIONS)
    plain = nets.grads(model)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda gradient: gradient * 3)
    model[2].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    for round_ in (1, 2):
        meta_step(model, *data, **OPTIONS)
        assert len(seen) == round_
        assert torch.equal(seen[-1], model[2].weight.grad)
    tripled = {name: 6 * value if name == "0.weight" else 2 * value for name, value in plain.items()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, tripled, rtol=1e-12, atol=0)
    evaluate(model, *data, **OPTIONS)
    assert len(seen) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Threads

THREADED = {
    "recognised": (nets.mlp, nets.vector_tasks),
    "together": (lambda: nets.mlp(activation=nn.GELU), nets.vector_tasks),
    "dropout": (softplus_and_dropout, nets.vector_tasks),
    "BatchNorm and dropout": (with_batch_norm_and_dropout, nets.vector_tasks),
    "convolutions": (images_group_norm, nets.image_tasks),
    "hand-made checkpointing": (Checkpointed, nets.vector_tasks),
}


@pytest.mark.parametrize("name", THREADED)
def test_threads_give_what_calls_in_turn_give(name):
    make, tasks = THREADED[name]
    model, data = make().double(), tasks()
    before = state_of(model)
    calls = [(seed, method) for seed in range(4) for method in ("sign-maml", "maml")]

    def call(seed: int, method: str) -> Tensor:
        evaluated = evaluate(model, *data, **OPTIONS, seed=seed, method=method)
        return torch.cat([evaluated.query_loss, evaluated.support_loss.flatten(), evaluated.logits.flatten()])

    expected = [call(*arguments) for arguments in calls]
    wrong: list[object] = []

    def work() -> None:
        for arguments, value in zip(calls, expected, strict=True):
            try:
                if not torch.equal(call(*arguments), value):
                    wrong.append(arguments)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_untouched(model, before)


def test_meta_steps_of_threads_add_up_in_grad():
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    meta_step(model, *data, **OPTIONS)
    one = nets.grads(model)
    threads = [threading.Thread(target=lambda: meta_step(model, *data, **OPTIONS)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, gradient in nets.grads(model).items():
        torch.testing.assert_close(gradient, 8 * one[name], rtol=1e-12, atol=0)


def test_calls_that_disagree_take_turns():
    """Calls that want the same setting share it; the last one to leave restores the caller's."""
    setting, log = ["caller's"], []
    turns = modes._Switches(lambda value: [(lambda: setting[0], lambda v: setting.__setitem__(0, v), value)])
    inside = threading.Barrier(2)

    def agree() -> None:
        with turns.of("a"):
            inside.wait(10)
            log.append(setting[0])
            inside.wait(10)

    def disagree() -> None:
        with turns.of("b"):
            log.append(setting[0])
            with turns.of("a"):  # a nested call keeps the outer call's setting
                log.append(setting[0])

    first = [threading.Thread(target=agree) for _ in range(2)]
    for thread in first:
        thread.start()
    last = threading.Thread(target=disagree)
    last.start()
    for thread in (*first, last):
        thread.join(10)
    assert log == ["a", "a", "b", "b"]
    assert setting == ["caller's"]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_dropout_leaves_the_callers_stream_but_for_one_draw(backend):
    model, data = with_batch_norm_and_dropout(), nets.vector_tasks(dtype=torch.float32)
    for seed, draws in ((3, 0), (None, 1)):
        for _ in range(2):  # the first call finds out that the model draws random numbers
            torch.manual_seed(7)
            evaluate(model, *data, **OPTIONS, seed=seed, backend=backend)
            found = torch.rand(())
            torch.manual_seed(7)
            for _ in range(draws):
                torch.randint(2**62, ())
            assert found == torch.rand(())


# ---------------------------------------------------------------------------------------------------------------------
# Interrupts


def interrupted_at(line: int, call: Callable[[], object]) -> bool:
    """Runs `call` with a Ctrl-C at its `line`-th line of Python, in any code. Returns whether it was interrupted."""
    count = 0

    def trace(frame, event, argument):  # type: ignore[no-untyped-def]
        nonlocal count
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


INTERRUPTED = {
    "recognised": (nets.mlp, nets.vector_tasks, "sign-maml"),
    "together": (lambda: nets.mlp(activation=nn.GELU), nets.vector_tasks, "sign-maml"),
    "second order": (lambda: nets.mlp(activation=nn.GELU), nets.vector_tasks, "maml"),
    "random": (softplus_and_dropout, nets.vector_tasks, "fo-maml"),
    "random, recognised": (with_batch_norm_and_dropout, nets.vector_tasks, "fo-maml"),
    "checkpointed": (Checkpointed, nets.vector_tasks, "sign-maml"),
    "on threads": (images_group_norm, nets.image_tasks, "sign-maml"),
}


@pytest.fixture
def short_tasks_on_threads(monkeypatch):
    monkeypatch.setattr(batching, "LONG", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lines_of(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame, event, argument):  # type: ignore[no-untyped-def]
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def interrupt(name: str, points: int) -> None:
    make, tasks, method = INTERRUPTED[name]
    model, data = make().double(), tasks()

    def call() -> Tensor:
        way = "one-by-one" if name == "on threads" else "auto"
        return evaluate(model, *data, **OPTIONS, method=method, seed=1, batching=way).query_loss

    expected, before = call(), state_of(model)
    lines = lines_of(call)
    happened = 0
    for number in range(points):
        happened += interrupted_at(1 + number * lines // points, call)
        assert_untouched(model, before)
        assert chain.present_look() is None, "later calls would not look at the model again"
    assert happened >= 0.8 * points  # Python ignores the ones that arrive while it cleans up
    found = []
    for work in (lambda: found.append(call()), lambda: found.append(call())):  # a held lock would block a thread
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(60)
    assert len(found) == 2 and all(torch.equal(loss, expected) for loss in (*found, call()))


# Python ignores an interrupt that arrives in a callback of the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_leaves_everything_as_it_was(name, short_tasks_on_threads):
    interrupt(name, 12)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTED)
def test_hundreds_of_interrupts(name, short_tasks_on_threads):
    interrupt(name, 300)


class Late:
    @cached_property
    def value(self) -> list[int]:
        return [1]


def test_an_attribute_whose_computation_was_interrupted_is_computed_again():
    """Also by other threads. functools' own may stay locked on Python 3.10 and 3.11, so no source uses it."""
    sources = [file for package in (signmaml_ext, signmaml) for file in Path(package.__file__).parent.rglob("*.py")]
    assert not [file for file in sources if re.search(r"from functools .*\bcached_property", file.read_text())]
    for line in range(1, 40):
        late, found = Late(), []
        interrupted_at(line, lambda late=late: late.value)  # type: ignore[misc]
        thread = threading.Thread(target=lambda late=late, found=found: found.append(late.value), daemon=True)
        thread.start()
        thread.join(10)
        assert found == [[1]] and late.value is found[0]


# ---------------------------------------------------------------------------------------------------------------------
# Private copies


class References(nn.Module):
    """Reaches its parts by other ways than torch's dictionaries of modules and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.steps = [self.a, (self.b, {"c": self.c})]
        self.scaled = lambda x: x * self.scale
        self.shifted = self._shifted
        self.again = functools.partial(F.linear, weight=self.a.weight)
        self.parent = weakref.ref(self)
        self.helper = Helper(self)
        self.head = nn.Linear(4, 3)

    def _shifted(self, x: Tensor) -> Tensor:
        return x + self.shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps[1][1]["c"](torch.tanh(self.steps[1][0](self.steps[0](x))))
        x = self.parent().again(torch.tanh(self.shifted(self.scaled(x))))
        return self.helper.run(x)


class Helper:
    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def run(self, x: Tensor) -> Tensor:
        return self.owner.head(x)


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_reached_by_every_way(method):
    model, data = References().double(), nets.vector_tasks()
    before = state_of(model)
    reference = ByName(model)
    meta_step(model, *data, **OPTIONS, method=method)
    found = nets.grads(model)
    expected, *_ = definition.meta_gradient(reference, data, **OPTIONS, method=method)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert_untouched(model, before)
    assert model.parent() is model and model.helper.owner is model and model.steps[0] is model.a


class ByName(nn.Module):
    """Computes what `References` does, and reads every part by its name."""

    def __init__(self, like: References) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (copy.deepcopy(part) for part in (like.a, like.b, like.c, like.head))
        self.scale, self.shift = nn.Parameter(like.scale.detach().clone()), nn.Parameter(like.shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.tanh(self.b(self.a(x)))) * self.scale + self.shift
        return self.head(F.linear(torch.tanh(x), self.a.weight))


def test_buffers_are_copied_once_and_again_when_written():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4.0))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.table

    model = Writes()
    replicas = Replicas(model)
    first, second = replicas.make({}), None
    for _ in range(3):
        first(torch.ones(4))
        second = replicas.make({})
        assert second.table is first.table
        assert second.calls is not first.calls and second.calls == 0
    assert model.calls == 0 and second.table is not model.table


def test_an_embedding_that_renormalises_its_weight_leaves_the_users():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x).mean(1))

    model = Words().double()
    x, y = torch.randint(7, (3, 6, 5)), torch.randint(3, (3, 6))
    before = state_of(model)
    for adapt in (None, ["head.*"]):
        meta_step(model, x, y, x, y, **OPTIONS, adapt=adapt)
    assert_untouched(model, before)


HIDDEN = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))


def test_a_parameter_that_is_reached_past_the_module_is_refused():
    """A copy cannot replace it, so the gradient would be wrong."""

    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = HIDDEN, nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x @ HIDDEN))

    model, data = Global(), nets.vector_tasks()
    with pytest.raises(ValueError, match=r"model: expected a forward that reaches its parameters .* takes 'hidden'"):
        meta_step(model, *data, **OPTIONS)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_compiled_model_is_served_as_the_module_it_wraps():
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    meta_step(model, *data, **OPTIONS)
    expected = nets.grads(model)
    result = meta_step(torch.compile(model, backend="eager"), *data, **OPTIONS)
    assert result.backend == "cpu"
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-12, atol=0)
    model.compile(backend="eager")
    meta_step(model, *data, **OPTIONS)
    torch.testing.assert_close(nets.grads(model), expected, rtol=1e-12, atol=0)


def one_process_group(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_wrapped_models_are_refused_with_the_way_to_go(tmp_path):
    data = nets.vector_tasks(dtype=torch.float32)
    one_process_group(tmp_path)
    try:
        wrapped = [nn.parallel.DistributedDataParallel(nets.mlp())]
    finally:
        torch.distributed.destroy_process_group()
    wrapped += [nn.DataParallel(nets.mlp()), nn.Sequential(nn.DataParallel(nets.mlp()))]
    for model in wrapped:
        with pytest.raises(ValueError, match=r"model: expected the module itself.*first_task.*found .*DataParallel"):
            meta_step(model, *data, **OPTIONS)
    with pytest.raises(ValueError, match=r"model: .*found .*whose parameters lie in TorchScript"):
        meta_step(torch.jit.script(nets.mlp()), *data, **OPTIONS)
    with pytest.raises(ValueError, match=r"model: .*found SyncBatchNorm \(module '1'\)"):
        meta_step(nn.Sequential(nn.Linear(4, 8), nn.SyncBatchNorm(8), nn.Linear(8, 3)), *data, **OPTIONS)


def test_maml_that_adapts_the_head_alone_counts_how_its_steps_depend_on_the_body():
    model, data = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks()
    for way in ("together", "one-by-one"):
        meta_step(model, *data, **OPTIONS, method="maml", adapt=["4.*"], batching=way)
        expected, *_ = definition.meta_gradient(model, data, **OPTIONS, method="maml", adapt=["4.*"])
        for name, gradient in nets.grads(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_padding_row_stays_in_every_task(method):
    class Text(nn.Module):
        def __init__(self, bag: bool) -> None:
            super().__init__()
            self.bag = bag
            self.words = (nn.EmbeddingBag if bag else nn.Embedding)(11, 8, padding_idx=3)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            found = self.words(tokens)
            return self.head(torch.tanh(found if self.bag else found.mean(1)))

    x, y = torch.randint(11, (4, 6, 5)), torch.randint(3, (4, 6))
    for bag in (False, True):
        if bag and method == "maml":
            continue  # torch has no second derivative of EmbeddingBag
        model = Text(bag).double()
        with torch.no_grad():
            model.words.weight[3] = 0.25
        adapted = signmaml_ext.adapt(model, x, y, **OPTIONS, method=method)["words.weight"]
        assert (adapted[:, 3] == 0.25).all()
        meta_step(model, x, y, x, y, **OPTIONS, method=method)
        assert (nets.grads(model)["words.weight"][3] == 0).all()
        with pytest.raises(ValueError, match="found 'together': "):
            meta_step(model, x, y, x, y, **OPTIONS, method=method, batching="together", backend="torch")


def test_a_model_that_differentiates_inside_its_forward():
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    model = Force().double()
    x, y = torch.randn(3, 8, 2, dtype=torch.float64), torch.randn(3, 8, 2, dtype=torch.float64)
    result = meta_step(model, x, y, x, y, **OPTIONS, loss="mse")
    evaluated = evaluate(model, x, y, x, y, **OPTIONS, loss="mse")
    torch.testing.assert_close(evaluated.query_loss, result.query_loss, rtol=1e-12, atol=0)
    assert not evaluated.logits.requires_grad and not x.requires_grad


class Collecting(nn.Module):
    """Hooks fill a dictionary, and the forward reads it there."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.seen: dict[str, Tensor] = {}
        seen = self.seen
        hooks = {
            "closure": lambda module, args, output: seen.update(body=output),
            "partial": functools.partial(remember, seen),
            "method": self.keep,
        }
        self.body.register_forward_hook(hooks[way])

    def keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen["body"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(torch.tanh(self.seen["body"]))


def remember(seen: dict[str, Tensor], module: nn.Module, args: object, output: Tensor) -> None:
    seen["body"] = output


@pytest.mark.parametrize("way", ["closure", "partial", "method"])
def test_what_hooks_and_forwards_share_they_share_in_a_copy(way):
    model, data = Collecting(way).double(), nets.vector_tasks()
    plain = nn.Sequential(model.body, nn.Tanh(), model.head)
    meta_step(model, *data, **OPTIONS)
    found = list(nets.grads(model).values())
    assert model.seen == {}
    meta_step(plain, *data, **OPTIONS, backend="torch")
    for gradient, expected in zip(found, nets.grads(plain).values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


class Holds(nn.Module):
    """Keeps a part in an object that is neither a module nor of a user-defined class."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.held = types.SimpleNamespace(part=self.body, plain=3)
        if way == "cached":
            body = self.body
            self.held = functools.lru_cache(lambda: body)

    def forward(self, x: Tensor) -> Tensor:
        body = self.held.part if isinstance(self.held, types.SimpleNamespace) else self.held()
        return self.head(F.gelu(body(x)))


def test_a_part_in_a_namespace_is_the_copys_part():
    model, data = Holds("namespace").double(), nets.vector_tasks()
    meta_step(model, *data, **OPTIONS)
    expected, *_ = definition.meta_gradient(model, data, **OPTIONS, method="sign-maml")
    for gradient, found in zip(expected.values(), nets.grads(model).values(), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)
    assert model.held.part is model.body


def test_a_part_in_a_cache_is_refused():
    model, data = Holds("cached").double(), nets.vector_tasks()
    with pytest.raises(ValueError, match=r"takes 'body\.(weight|bias)' from elsewhere"):
        meta_step(model, *data, **OPTIONS)


def test_what_partials_collect_elsewhere_is_for_the_user():
    model, data, collected = nets.mlp(activation=nn.GELU).double(), nets.vector_tasks(), {}
    model[0].register_forward_hook(functools.partial(remember, collected))
    evaluate(model, *data, **OPTIONS)
    assert collected["body"].shape == (9, 8)


class CountsInPlace(nn.Module):
    """Its output depends on a buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones((), dtype=torch.float64))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(x) * self.count.clone()


@pytest.mark.parametrize("steps", [0, 2])
def test_tasks_on_threads_do_not_see_each_others_buffers(steps, monkeypatch):
    monkeypatch.setattr(batching, "LONG", 0.0)
    model, data = CountsInPlace().double(), nets.vector_tasks(tasks=9)
    options = {"inner_lr": 0.02, "inner_steps": steps, "batching": "one-by-one"}
    expected = evaluate(model, *data, **options).logits
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            assert torch.equal(evaluate(model, *data, **options).logits, expected)
    finally:
        torch.set_num_threads(before)


def test_threads_that_measure_and_threads_that_differentiate_twice_do_not_wait_for_each_other():
    """Each thread takes several turns; sets of a new size are measured first."""
    model = nets.mlp(activation=nn.GELU).double()
    done = []

    def measuring() -> None:
        for shots in range(1, 8):
            evaluate(model, *nets.vector_tasks(shots=shots, queries=shots), **OPTIONS)
        done.append("measured")

    def twice() -> None:
        for _ in range(7):
            meta_step(model, *nets.vector_tasks(), **OPTIONS, method="maml", batching="one-by-one")
        done.append("differentiated")

    threads = [threading.Thread(target=work, daemon=True) for work in (measuring, twice)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == ["differentiated", "measured"]


@pytest.mark.parametrize("batching", ["auto", "together", "one-by-one"])
def test_a_forward_that_works_on_its_input_in_place_works_on_a_tasks_own(batching):
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mul_(2.0))

    model, data = Doubles().double(), nets.vector_tasks()
    copies = [value.clone() for value in data]
    first = evaluate(model, *data, **OPTIONS, batching=batching).logits
    assert all(torch.equal(value, kept) for value, kept in zip(data, copies, strict=True))
    plain = evaluate(model.head, 2 * data[0], data[1], 2 * data[2], data[3], **OPTIONS).logits
    torch.testing.assert_close(first, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("patched", [False, True])
def test_nothing_that_is_known_keeps_a_model_alive(patched):
    import gc

    model = nn.Linear(4, 3).double() if not patched else nets.mlp(activation=nn.GELU).double()
    if patched:
        model.forward = model.forward
    meta_step(model, *nets.vector_tasks(), **OPTIONS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Rebinds(nn.Module):
    """Moves its weight to new memory in each forward, and reads a dictionary of its own subclass."""

    class Settings(dict):
        __getattr__ = dict.__getitem__

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.settings = self.Settings(decay=0.9)

    def forward(self, x: Tensor) -> Tensor:
        self.body.weight.data = self.body.weight.data * self.settings.decay
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_parameters_that_a_forward_gives_other_memory(method):
    model, data = Rebinds().double(), nets.vector_tasks()
    before = state_of(model)
    expected = None
    for backend, way in (("torch", "one-by-one"), ("cpu", "one-by-one"), ("auto", "auto"), ("torch", "auto")):
        meta_step(model, *data, **OPTIONS, method=method, backend=backend, batching=way)
        found = nets.grads(model)
        expected = expected or found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert_untouched(model, before)
