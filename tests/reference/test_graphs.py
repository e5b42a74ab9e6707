"""The rules of recorded meta-steps, with a stand-in for the device that records them."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from helpers.cases import nets
from helpers.cases.perceptrons import problem_of
from helpers.devices.replaying import ReplayingRecorder, ReplayingRecording, stand_in
from signmaml_ext import Signum, graphs, meta_step, modes

OPTIONS = {"inner_lr": 0.02, "inner_steps": 3}
USUAL = {"loss": "cross_entropy", "backend": "auto"}  # as meta_step has them


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> graphs.GraphCache:
    return stand_in(monkeypatch)


def results(result) -> dict[str, Tensor]:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_equals_eager(model: nn.Module, data, **options) -> None:
    """Result and `.grad`, bit for bit."""
    model.zero_grad()
    expected = meta_step(model, *data, **options, graph=False)
    gradients = nets.grads(model)
    found = meta_step(model, *data, **options, graph=True)
    assert_same(results(found), results(expected))
    assert found.backend == expected.backend
    assert_same(nets.grads(model), gradients)


CASES = {
    "linear layers": (nets.mlp, nets.vector_tasks, {}),
    "convolutions": (nets.conv4, nets.image_tasks, {}),
    "running statistics": (nets.conv4, nets.image_tasks, {"batch_norm": "running"}),
    "tied": (nets.Tied, nets.vector_tasks, {}),
    "unused parameters": (nets.WithUnused, nets.vector_tasks, {}),
    "attention": (nets.Attention, nets.image_tasks, {}),
    "regression": (lambda: nets.mlp(1, 1, nn.Tanh), nets.regression_tasks, {"loss": "mse"}),
    "fo-maml": (nets.mlp, nets.vector_tasks, {"method": "fo-maml"}),
    "maml": (nets.mlp, nets.vector_tasks, {"method": "maml"}),
    "only the head": (nets.mlp, nets.vector_tasks, {"adapt": ["4.*"]}),
    "no steps": (nets.mlp, nets.vector_tasks, {"inner_steps": 0}),
    "tasks as int8": (nets.mlp, nets.vector_tasks, {"task_state": "int8"}),
    "pure PyTorch": (nets.mlp, nets.vector_tasks, {"backend": "torch"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_replay_equals_the_plain_call_bitwise(cache, case, dtype):
    make, draw, changes = CASES[case]
    model = make().to(dtype)
    for _ in range(3):
        assert_equals_eager(model, draw(dtype=dtype), **(OPTIONS | changes))
    assert cache.info()[:4] == (1, graphs.LIMIT, 1, 3)


def test_weights_and_buffers_changed_in_place_are_seen_without_rebuilding(cache):
    model, data = nets.conv4().double(), nets.image_tasks()
    options = OPTIONS | {"batch_norm": "running"}
    assert_equals_eager(model, data, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    meta_step(model, *data, **options, graph=False)
    optimizer.step()
    model[0][0].normalize.running_mean += 0.5
    assert_equals_eager(model, data, **options)
    model.load_state_dict(nets.conv4().double().state_dict())
    assert_equals_eager(model, data, **options)
    assert cache.info().builds == 1


def test_results_are_the_callers_own(cache):
    """Neither an earlier result nor an earlier gradient changes when the graph is replayed."""
    model, data = nets.mlp().double(), nets.vector_tasks()
    first = meta_step(model, *data, **OPTIONS, graph=True)
    kept, gradients = {n: v.clone() for n, v in results(first).items()}, nets.grads(model)
    kept_gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    second = meta_step(model, *nets.vector_tasks(), **OPTIONS, graph=True)
    assert not torch.equal(first.query_loss, second.query_loss)
    assert_same(results(first), kept)
    assert_same(gradients, kept_gradients)
    # Writing into them does not change later results.
    second.query_loss.fill_(7.0)
    for parameter in model.parameters():
        parameter.grad.fill_(7.0)
    assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().builds == 1


def test_gradients_are_added(cache):
    model, data = nets.WithUnused().double(), nets.vector_tasks()
    meta_step(model, *data, **OPTIONS, graph=True)
    once = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    meta_step(model, *data, **OPTIONS, graph=True)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (once[name] is None) == name.startswith("unused")
        assert once[name] is None or torch.equal(parameter.grad, 2 * once[name])


def test_results_do_not_keep_the_gradients_in_memory(cache):
    model = nn.Linear(4, 3).double()
    result = meta_step(model, *nets.vector_tasks(), **OPTIONS, graph=True)
    numbers = sum(value.numel() for value in results(result).values() if value.dtype == torch.float64)
    assert result.query_loss.untyped_storage().nbytes() == 8 * numbers


CHANGES_OF_THE_CALL = {
    "another shape": lambda model: {"data": nets.vector_tasks(shots=3)},
    "another number of tasks": lambda model: {"data": nets.vector_tasks(tasks=5)},
    "other strides": lambda model: {"data": [v.transpose(0, 1).contiguous().transpose(0, 1) for v in DATA]},
    "another rate": lambda model: {"inner_lr": 0.03},
    "a rate in a tensor": lambda model: {"inner_lr": torch.tensor(0.02, dtype=torch.float64)},
    "more steps": lambda model: {"inner_steps": 4},
    "another method": lambda model: {"method": "fo-maml"},
    "another loss": lambda model: {"loss": nets.F.multi_margin_loss},
    "the head alone": lambda model: {"adapt": ["4.*"]},
    "another policy": lambda model: {"nonfinite": "skip"},
    "another backend": lambda model: {"backend": "torch"},
    "an inner rule": lambda model: {"inner_rule": Signum(weight_decay=0.1)},
    "tasks as int8": lambda model: {"task_state": "int8"},
    "noise of dead biases": lambda model: {"zero_dead_bias": False},
}
DATA = nets.vector_tasks()


@pytest.mark.parametrize("change", CHANGES_OF_THE_CALL)
def test_a_call_of_another_kind_is_recorded_anew(cache, change):
    model = nets.mlp().double()
    meta_step(model, *DATA, **OPTIONS, graph=True)
    changed = OPTIONS | CHANGES_OF_THE_CALL[change](model)
    assert_equals_eager(model, changed.pop("data", DATA), **changed)
    assert cache.info().builds == 2
    # The first graph is still cached.
    assert_equals_eager(model, DATA, **OPTIONS)
    assert cache.info().builds == 2


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def move_parameter(model):
    model[0].weight.data = torch.randn_like(model[0].weight)


def freeze(model):
    model[0].weight.requires_grad_(False)


def tie(model):
    model[2][0].weight = model[2][1].weight


def hook(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


CHANGES_OF_THE_MODEL = {
    "parameter replaced": replace_parameter,
    "parameter moved": move_parameter,
    "parameter frozen": freeze,
    "parameters tied": tie,
    "training mode": lambda model: model.eval(),
    "mode of one module": lambda model: model[1].eval(),
    "an attribute": lambda model: setattr(model[1], "eps", 0.5),
    "a module replaced": lambda model: model.__setitem__(3, nn.Tanh()),
    "a hook": hook,
    "buffer replaced": lambda model: setattr(model[1], "running_mean", torch.ones(4, dtype=torch.float64)),
}


@pytest.mark.parametrize("change", CHANGES_OF_THE_MODEL)
def test_a_model_that_would_launch_otherwise_is_recorded_anew(cache, change):
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), twins, nn.ReLU(), nn.Linear(4, 3)).double()
    options = OPTIONS | {"batch_norm": "running"}
    assert_equals_eager(model, DATA, **options)
    CHANGES_OF_THE_MODEL[change](model)
    assert_equals_eager(model, DATA, **options)
    assert cache.info().builds == 2


def test_settings_of_torch_are_part_of_the_key(cache):
    model, data = nets.mlp(), nets.vector_tasks(dtype=torch.float32)
    meta_step(model, *data, **OPTIONS, graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().builds == 2
    assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().builds == 2


def test_a_tensor_rate_may_change_its_value(cache):
    model, data = nets.mlp().double(), nets.vector_tasks()
    rate, by_name = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64), {}
    assert_equals_eager(model, data, inner_lr=rate, inner_steps=3)
    assert_equals_eager(model, data, inner_lr=rate * 4, inner_steps=3)
    assert cache.info().builds == 1
    for scale in (1.0, 3.0):
        by_name = {name: scale * 0.01 * torch.rand_like(p) for name, p in model.named_parameters()}
        by_name["0.bias"] = 0.01  # a float in the dict is part of the graph's key
        assert_equals_eager(model, data, inner_lr=by_name, inner_steps=3)
    assert cache.info().builds == 2
    by_name["0.bias"] = 0.02
    assert_equals_eager(model, data, inner_lr=by_name, inner_steps=3)
    assert cache.info().builds == 3


def test_another_seed_is_the_same_graph(cache):
    model, data = nets.mlp().double(), nets.vector_tasks()
    for seed in (None, 0, 5):
        assert_equals_eager(model, data, **OPTIONS, seed=seed)
    assert cache.info().builds == 1


def test_models_and_shapes_alternate_without_rebuilding(cache):
    models = [nets.mlp().double() for _ in range(2)]
    shapes = [nets.vector_tasks(), nets.vector_tasks(tasks=2, shots=3)]
    for _ in range(3):
        for model in models:
            for data in shapes:
                assert_equals_eager(model, data, **OPTIONS)
    assert cache.info()[:4] == (4, graphs.LIMIT, 4, 12)


def test_the_graph_used_longest_ago_goes_first(monkeypatch):
    cache = stand_in(monkeypatch, limit=2)
    model, first = nets.mlp().double(), nets.vector_tasks()
    second, third = nets.vector_tasks(tasks=2), nets.vector_tasks(tasks=4)
    for data in (first, second, first, third):  # the third evicts the second
        assert_equals_eager(model, data, **OPTIONS)
    assert cache.info()[:3] == (2, 2, 3)
    assert_equals_eager(model, first, **OPTIONS)
    assert cache.info().builds == 3
    assert_equals_eager(model, second, **OPTIONS)
    assert cache.info()[:3] == (2, 2, 4)


def test_graphs_leave_when_they_take_too_much_of_the_device(cache, monkeypatch):
    """The oldest go first; the newest stays even alone above the bound, and the bound does not count in calls."""
    model = nets.mlp().double()
    data = [nets.vector_tasks(tasks=tasks) for tasks in (2, 3, 4)]
    meta_step(model, *data[0], **OPTIONS, graph=True)
    one = cache.info().bytes
    assert one > 0
    monkeypatch.setattr(ReplayingRecorder, "most_bytes", 3 * one)
    for each in data[1:]:  # a little larger than the first
        assert_equals_eager(model, each, **OPTIONS)
    assert cache.info().graphs == 2 and cache.info().bytes <= 3 * one
    monkeypatch.setattr(ReplayingRecorder, "most_bytes", 0)
    for _ in range(2):
        assert_equals_eager(model, data[0], **OPTIONS)
    assert cache.info()[:3] == (1, graphs.LIMIT, 4)


def test_without_room_for_another_graph_all_others_leave(cache, monkeypatch):
    model, data = nets.mlp().double(), nets.vector_tasks()
    for tasks in (2, 4):
        meta_step(model, *nets.vector_tasks(tasks=tasks), **OPTIONS, graph=True)
    record = ReplayingRecorder.record

    def recorded(self, function):
        if cache._graphs:
            raise torch.OutOfMemoryError("no memory left")
        return record(self, function)

    monkeypatch.setattr(ReplayingRecorder, "record", recorded)
    assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().graphs == 1


def test_without_room_for_any_graph_the_error_says_so(cache, monkeypatch):
    def record(self, function):
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(ReplayingRecorder, "record", record)
    with pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        meta_step(nets.mlp().double(), *nets.vector_tasks(), **OPTIONS, graph=True)
    assert cache.info().graphs == 0


class FixedRecorder(ReplayingRecorder):
    """Like a graph, it knows nothing of the model once it is recorded."""

    def record(self, function: graphs.Function) -> ReplayingRecording:
        outputs = tuple(t.clone() for t in self._like)
        return ReplayingRecording(lambda: outputs, outputs)


@pytest.mark.slow
def test_graphs_do_not_keep_a_model_and_go_with_it(cache, monkeypatch):
    monkeypatch.setitem(graphs.RECORDERS, "cpu", FixedRecorder)
    data, other = nets.vector_tasks(), nets.mlp().double()
    meta_step(other, *data, **OPTIONS, graph=True)
    for _ in range(3):
        model = nets.mlp().double()
        meta_step(model, *data, **OPTIONS, graph=True)
        meta_step(model, *nets.vector_tasks(tasks=2), **OPTIONS, graph=True)
        assert cache.info().graphs == 3
        del model
        gc.collect()
        assert cache.info().graphs == 1
    meta_step(other, *data, **OPTIONS, graph=True)
    assert cache.info().builds == 7


def test_clear_drops_the_graphs_of_one_model_or_of_all(cache):
    models, data = [nets.mlp().double() for _ in range(2)], nets.vector_tasks()
    for model in models:
        meta_step(model, *data, **OPTIONS, graph=True)
    graphs.clear(models[0])
    assert graphs.info().graphs == 1
    meta_step(models[1], *data, **OPTIONS, graph=True)
    assert graphs.info().builds == 2
    graphs.clear()
    assert graphs.info().graphs == 0
    assert_equals_eager(models[1], data, **OPTIONS)
    assert graphs.info().builds == 3


class Elsewhere(nn.Linear):
    """Its forward reads a class attribute and a global, not only its own tensors."""

    scales = (1.0,)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales[0] * numbers_of_a_loss[0]


numbers_of_a_loss = [1.0]


def scaled(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(prediction, target) * numbers_of_a_loss[0]


@pytest.mark.parametrize("owner", [Elsewhere, sys.modules[__name__]], ids=["class", "global"])
def test_what_a_forward_reads_elsewhere_is_noticed(cache, monkeypatch, owner):
    monkeypatch.setitem(graphs.RECORDERS, "cpu", FixedRecorder)
    model, data = Elsewhere(4, 3).double(), nets.vector_tasks()
    first = meta_step(model, *data, **OPTIONS, graph=True).query_loss
    monkeypatch.setattr(owner, "scales" if owner is Elsewhere else "numbers_of_a_loss", [5.0])
    assert not torch.equal(meta_step(model, *data, **OPTIONS, graph=True).query_loss, first)
    assert graphs.info().builds == 2


def test_what_a_loss_reads_elsewhere_needs_clear(cache, monkeypatch):
    """The documented limit, and how to work around it."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", FixedRecorder)
    model, data = nets.mlp().double(), nets.vector_tasks()
    first = meta_step(model, *data, **OPTIONS, graph=True, loss=scaled).query_loss
    monkeypatch.setattr(sys.modules[__name__], "numbers_of_a_loss", [5.0])
    assert torch.equal(meta_step(model, *data, **OPTIONS, graph=True, loss=scaled).query_loss, first)
    graphs.clear(model)
    assert not torch.equal(meta_step(model, *data, **OPTIONS, graph=True, loss=scaled).query_loss, first)


def test_a_counter_on_a_chain_of_layers_records_nothing_anew(cache):
    model, data = nets.mlp(), nets.vector_tasks(dtype=torch.float32)
    for number in range(3):
        model.epoch = number
        meta_step(model, *data, **OPTIONS, graph=True)
    assert graphs.info().builds == 1


@pytest.mark.parametrize("make", [nets.FunctionalDropout, lambda: nets.Attention(dropout=0.1)])
def test_models_that_draw_random_numbers_are_refused(cache, make):
    model = make()
    draw = nets.vector_tasks if isinstance(model, nets.FunctionalDropout) else nets.image_tasks
    data = draw(dtype=torch.float32)
    before = torch.get_rng_state()
    with pytest.raises(graphs.GraphRefused, match="draws no random numbers"):
        meta_step(model, *data, **OPTIONS, graph=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert cache.info()[:3] == (0, graphs.LIMIT, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "draws no random numbers" in graphs.why_not_graph(problem_of(model, data, **(USUAL | OPTIONS)))
    model.eval()
    assert_equals_eager(model, data, **OPTIONS)
    assert graphs.why_not_graph(problem_of(model, data, **(USUAL | OPTIONS))) is None


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"nonfinite": "raise"}, "makes the host wait"),
        ({"inner_lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}, "inner_lr requires grad"),
        ({"loss": Unhashable()}, "Unhashable, cannot be hashed"),
    ],
)
def test_calls_that_a_graph_cannot_hold_are_refused(cache, change, reason):
    model, data = nets.mlp().double(), nets.vector_tasks()
    with pytest.raises(ValueError, match=f"graph: expected a call that a graph can hold, found that .*{reason}"):
        meta_step(model, *data, **(OPTIONS | change), graph=True)
    assert reason in graphs.why_not_graph(problem_of(model, data, **(USUAL | OPTIONS | change)))
    assert ReplayingRecorder.made == []


def test_the_cpu_is_no_device_for_graphs():
    model, data = nets.mlp().double(), nets.vector_tasks()
    with pytest.raises(ValueError, match=r"graph: .* graphs are for CUDA devices, and the model is on cpu"):
        meta_step(model, *data, **OPTIONS, graph=True)
    with pytest.raises(TypeError, match="graph: expected True, False or None, found str 'yes'"):
        meta_step(model, *data, **OPTIONS, graph="yes")
    assert meta_step(model, *data, **OPTIONS, graph=False).query_loss.isfinite().all()


def test_errors_of_the_call_are_those_of_the_plain_call(cache):
    model, data = nets.mlp().double(), nets.vector_tasks()
    wrong = [value.clone() for value in data]
    wrong[1][0, 0] = 9
    with pytest.raises(ValueError, match=r"support_y: expected labels in 0\.\.2"):
        meta_step(model, *wrong, **OPTIONS, graph=True)
    assert cache.info()[:3] == (0, graphs.LIMIT, 0)
    assert_equals_eager(model, data, **OPTIONS)


def test_nan_flags_its_task(cache):
    model, data = nets.mlp().double(), nets.vector_tasks()
    assert_equals_eager(model, data, **OPTIONS, nonfinite="skip")
    data[0][1, 0, 0] = torch.nan
    result = meta_step(model, *data, **OPTIONS, nonfinite="skip", graph=True)
    assert result.nonfinite.tolist() == [False, True, False] and int(result.live_tasks) == 2
    assert cache.info().builds == 1


def test_inference_mode_and_no_grad(cache):
    model, data = nets.mlp().double(), nets.vector_tasks()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            result = meta_step(model, *data, **OPTIONS, graph=True)
        assert not result.query_loss.is_inference() and not result.query_loss.requires_grad
        assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().builds == 1


def test_threads_take_turns(cache):
    """The stand-in asserts that only one thread is inside at a time; each gets the result of its own data."""
    model = nets.mlp().double()
    tasks = [nets.vector_tasks() for _ in range(4)]
    expected = [meta_step(copy.deepcopy(model), *data, **OPTIONS).query_loss for data in tasks]
    # Checked up front: the stand-in runs torch's functional_call, which swaps the module's parameters meanwhile.
    problems = [problem_of(model, data, **(USUAL | OPTIONS), graph=True) for data in tasks]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(10):
            if not torch.equal(cache.meta_gradients(problems[place])[1].query_loss, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.info()[:4] == (1, graphs.LIMIT, 1, 40)


def test_inside_a_capture_of_the_callers_own_the_call_launches_plainly(cache, monkeypatch):
    model, data = nets.mlp().double(), nets.vector_tasks()
    expected = meta_step(model, *data, **OPTIONS).query_loss
    monkeypatch.setattr(modes, "is_capturing", lambda device: True)
    assert torch.equal(meta_step(model, *data, **OPTIONS, graph=True).query_loss, expected)
    assert cache.info()[:4] == (0, graphs.LIMIT, 0, 0)


def test_the_first_call_of_a_recognised_model_may_not_be_inside_a_capture(monkeypatch):
    """It compares numbers to verify what was recognised, and a capture computes none."""
    model, data = nets.conv4(filters=8).double(), nets.image_tasks()
    monkeypatch.setattr(modes, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="expected a call of this model before the CUDA graph is captured"):
        meta_step(model, *data, **OPTIONS)
    monkeypatch.undo()
    expected = meta_step(model, *data, **OPTIONS).query_loss
    monkeypatch.setattr(modes, "is_capturing", lambda device: True)
    assert torch.equal(meta_step(model, *data, **OPTIONS).query_loss, expected)


def test_constants_that_a_capture_read_stay(monkeypatch):
    from signmaml_ext import flat

    monkeypatch.setattr(modes, "is_capturing", lambda device: True)
    device = torch.device("cpu")
    kept = flat.constant((0.125, 0.5), torch.float64, device)
    flat._constant.cache_clear()
    assert any(tensor is kept for tensor in flat._captured.values())
    assert flat.constant((0.125, 0.5), torch.float64, device) is not kept


def conv_on_this_device() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nets.conv4(filters=8), nets.image_tasks(dtype=torch.float32)


def test_the_conv_family_is_a_graph_unless_the_caller_says_no(cache):
    model, data = conv_on_this_device()
    plain = meta_step(model, *data, **OPTIONS, graph=False)
    gradients = nets.grads(model)
    assert cache.info().builds == 0
    for replays in (1, 2):
        replayed = meta_step(model, *data, **OPTIONS)
        assert cache.info()[:4] == (1, graphs.LIMIT, 1, replays)
        assert_same(results(replayed), results(plain))
        assert_same(nets.grads(model), gradients)
    # `graph=True` uses the same graph.
    meta_step(model, *data, **OPTIONS, graph=True)
    assert cache.info()[2:4] == (1, 3)


def test_nothing_else_is_a_graph_unless_the_caller_says_yes(cache):
    attention, images = nets.Attention().double(), nets.image_tasks()
    meta_step(nets.mlp().double(), *nets.vector_tasks(), **OPTIONS)
    meta_step(attention, *images, **OPTIONS)
    model, data = conv_on_this_device()
    # Calls that another family serves, and calls that cannot be recorded.
    for change in ({"zero_dead_bias": False}, {"backend": "torch"}, {"nonfinite": "raise"}):
        meta_step(model, *data, **(OPTIONS | change))
        meta_step(model, *data, **(OPTIONS | change))
    assert cache.info()[:4] == (0, graphs.LIMIT, 0, 0)
    # A call that is not recorded by default is recorded on request.
    meta_step(model, *data, **(OPTIONS | {"zero_dead_bias": False}), graph=True)
    assert cache.info().builds == 1


def test_a_usual_graph_that_fails_is_launched_plainly_with_a_warning(cache, monkeypatch):
    class Failing(ReplayingRecorder):
        def record(self, function: graphs.Function) -> ReplayingRecording:
            raise graphs.GraphRefused("graph: expected luck, found none")

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Failing)
    model, data = conv_on_this_device()
    with pytest.warns(UserWarning, match=r"without a CUDA graph \(graph: expected luck"):
        result = meta_step(model, *data, **OPTIONS)
    assert torch.equal(result.query_loss, meta_step(model, *data, **OPTIONS, graph=False).query_loss)
    meta_step(model, *data, **OPTIONS)  # tried once
    assert len(ReplayingRecorder.made) == 1
    with pytest.raises(graphs.GraphRefused, match="luck"):
        meta_step(model, *data, **OPTIONS, graph=True)
