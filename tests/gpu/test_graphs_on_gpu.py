"""CUDA graphs of whole meta-steps: the rules of `signmaml_ext.graphs` with real graphs."""

from __future__ import annotations

import copy
import threading
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from helpers.cases import nets
from signmaml_ext import graphs, meta_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("deterministic_cudnn"),  # bits are compared
]

OPTIONS = {"inner_lr": 0.02, "inner_steps": 3}


def wide_conv4() -> nn.Module:
    """Conv-N's own kernels take a multiple of 8 filters."""
    return nets.conv4(filters=8)


CASES = {
    "Conv-N kernels": (wide_conv4, nets.image_tasks, {}),
    "Conv-N kernels, tf32": (wide_conv4, nets.image_tasks, {"precision": "tf32"}),
    "MLP kernel": (nets.mlp, nets.vector_tasks, {}),
    "MLP kernel, fo-maml": (nets.mlp, nets.vector_tasks, {"method": "fo-maml"}),
    "MLP kernel, maml": (nets.mlp, nets.vector_tasks, {"method": "maml"}),
    "Conv-N kernels, sharpness": (wide_conv4, nets.image_tasks, {"sharpness": 0.05}),
    "MLP kernel, sharpness": (nets.mlp, nets.vector_tasks, {"sharpness": 0.05}),
    "MLP kernel, int8": (nets.mlp, nets.vector_tasks, {"task_state": "int8"}),
    "flat buffers": (nets.Tied, nets.vector_tasks, {}),
    "flat buffers, int8": (nets.Tied, nets.vector_tasks, {"task_state": "int8"}),
    "flat buffers, convolutions": (nets.conv4, nets.image_tasks, {}),
    "flat buffers, attention": (lambda: nets.Attention().eval(), nets.image_tasks, {}),
    "pure PyTorch, maml": (nets.mlp, nets.vector_tasks, {"backend": "torch", "method": "maml"}),
    "pure PyTorch, bf16": (nets.conv4, nets.image_tasks, {"backend": "torch", "precision": "bf16"}),
    "a loss of the caller's": (nets.mlp, nets.vector_tasks, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch) -> graphs.GraphCache:
    fresh = graphs.GraphCache()
    monkeypatch.setattr(graphs, "CACHE", fresh)
    return fresh


def case(name: str, device: str = "cuda"):
    make, draw, changes = CASES[name]
    return make().to(device), draw_on(draw, device), OPTIONS | changes


def draw_on(draw, device: str = "cuda", **sizes) -> tuple[Tensor, ...]:
    return tuple(value.to(device) for value in draw(dtype=torch.float32, **sizes))


def results(result) -> dict[str, Tensor]:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name


def assert_equals_eager(model, data, **options) -> None:
    model.zero_grad()
    expected = meta_step(model, *data, **options, graph=False)
    gradients = nets.grads(model)
    found = meta_step(model, *data, **options, graph=True)
    assert_same(results(found), results(expected))
    assert_same(nets.grads(model), gradients)


@pytest.mark.parametrize("name", CASES)
def test_replay_equals_the_plain_call_bitwise(cache, name):
    model, data, options = case(name)
    draw = CASES[name][1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        assert_equals_eager(model, draw_on(draw), **options)
        meta_step(model, *data, **options, graph=False)
        optimizer.step()  # in place: the same graph sees it
        optimizer.zero_grad()
    assert cache.info()[2:] == (1, 4)


@pytest.mark.parametrize("name", ["Conv-N kernels", "MLP kernel", "flat buffers"])
def test_a_replay_does_not_wait_for_the_device(name):
    model, data, options = case(name)
    meta_step(model, *data, **options, graph=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta_step(model, *data, **options, graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_conv_family_is_a_graph_by_itself(cache):
    model, data, options = case("Conv-N kernels")
    for replays in (1, 2):
        result = meta_step(model, *data, **options)
        assert cache.info()[2:] == (1, replays) and result.backend == "cuda"
    other, vectors, _ = case("MLP kernel")
    meta_step(other, *vectors, **OPTIONS)
    assert cache.info()[2:] == (1, 2)


def test_models_and_shapes_alternate_without_rebuilding(cache):
    models = [wide_conv4().cuda() for _ in range(2)]
    shapes = [draw_on(nets.image_tasks), draw_on(nets.image_tasks, tasks=5, size=20)]
    models.append(nets.conv4(filters=8, size=20).cuda())
    pairs = [(models[0], shapes[0]), (models[1], shapes[0]), (models[2], shapes[1])]
    for _ in range(3):
        for model, data in pairs:
            assert_equals_eager(model, data, **OPTIONS)
    assert cache.info()[2:] == (3, 9)


def test_memory_stays_the_same_over_replays_and_goes_with_clear(cache):
    model, data, options = case("flat buffers, convolutions")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        meta_step(model, *data, **options, graph=True)
        model.zero_grad()
    torch.cuda.synchronize()
    with_graph = torch.cuda.memory_allocated()
    for _ in range(20):
        meta_step(model, *data, **options, graph=True)
        model.zero_grad()
    assert torch.cuda.memory_allocated() == with_graph > before
    graphs.clear()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < with_graph


@pytest.mark.parametrize("name", ["Conv-N kernels", "MLP kernel", "flat buffers", "pure PyTorch, maml"])
def test_inside_a_capture_of_the_callers_own(cache, name):
    model, data, options = case(name)
    static = [value.clone() for value in data]
    expected = results(meta_step(model, *data, **options, graph=False))  # also the call required before a capture
    gradients = nets.grads(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = meta_step(model, *static, **options, graph=True)
    graph.replay()
    assert_same(results(captured), expected)
    assert_same({name: p.grad for name, p in model.named_parameters()}, gradients)
    # New data in the caller's own inputs.
    fresh = draw_on(CASES[name][1])
    for place, value in zip(static, fresh, strict=True):
        place.copy_(value)
    graph.replay()
    found = {name: value.clone() for name, value in results(captured).items()}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    assert_same(found, results(meta_step(twin, *fresh, **options, graph=False)))
    assert cache.info()[2:] == (0, 0)


def test_the_first_call_of_a_model_inside_a_capture_is_refused():
    """Runs in a separate process, because a failed capture leaves torch's allocator in an unknown state."""
    import subprocess
    import sys

    code = """
import torch
from helpers.cases import nets
from signmaml_ext import meta_step
model = nets.conv4().cuda()
data = [value.cuda() for value in nets.image_tasks(dtype=torch.float32)]
torch.zeros(1).cuda()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        meta_step(model, *data, inner_lr=0.1, inner_steps=1, backend="torch")
except RuntimeError as error:
    print(error)
"""
    tests = __file__.rsplit("/", 2)[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{code}"], capture_output=True, text=True
    )
    assert "before the CUDA graph is captured" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Conv-N kernels", "flat buffers"])
def test_streams_take_turns(cache, name):
    """Replays of one graph on two streams, each with its own data, never mix."""
    model, _, options = case(name)
    tasks = [draw_on(CASES[name][1]) for _ in range(2)]
    expected = [meta_step(model, *data, **options, graph=False).query_loss for data in tasks]
    model.zero_grad()
    streams = [torch.cuda.Stream() for _ in tasks]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[place].append(meta_step(model, *tasks[place], **options, graph=True).query_loss)
    torch.cuda.synchronize()
    for place, losses in enumerate(found):
        assert all(torch.equal(loss, expected[place]) for loss in losses), place
    assert cache.info().builds == 1


def test_threads_take_turns(cache):
    model, _, options = case("MLP kernel")
    tasks = [draw_on(nets.vector_tasks) for _ in range(4)]
    expected = [meta_step(model, *data, **options, graph=False).query_loss for data in tasks]
    torch.cuda.synchronize()
    problems = [graphs.check_problem(model, *data, **(graphs._DEFAULTS | options), graph=True) for data in tasks]
    wrong: list[int] = []

    def work(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(cache.meta_gradients(problems[place])[1].query_loss, expected[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_device_that_is_not_the_current_one(cache):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    for name in ("Conv-N kernels", "MLP kernel", "flat buffers"):
        model, data, options = case(name, "cuda:1")
        with torch.cuda.device(0):
            assert_equals_eager(model, data, **options)
            assert_equals_eager(model, data, **options)
            assert torch.cuda.current_device() == 0
    assert cache.info()[2:] == (3, 6)


def waiting_loss(prediction: Tensor, target: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(prediction, target)
    return loss * (1.0 if float(loss) > 0 else 2.0)


def test_what_waits_or_draws_is_refused_and_the_device_stays_usable(cache):
    model, data, _ = case("MLP kernel")
    with pytest.raises(graphs.GraphRefused, match="never make the host wait"):
        meta_step(model, *data, **OPTIONS, loss=waiting_loss, backend="torch", graph=True)
    state = torch.cuda.get_rng_state()
    dropping = nets.FunctionalDropout().cuda()
    with pytest.raises(graphs.GraphRefused, match="draws no random numbers"):
        meta_step(dropping, *data, **OPTIONS, graph=True)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_equals_eager(model, data, **OPTIONS)
    assert cache.info().builds == 1


def test_nan_and_labels_out_of_range_flag_their_task(cache):
    model, data, options = case("Conv-N kernels")
    assert_equals_eager(model, data, **options, nonfinite="skip")
    data[1][1, 0] = 7
    data[2][2, 0, 0, 0, 0] = torch.nan
    result = meta_step(model, *data, **options, nonfinite="skip", graph=True)
    assert result.nonfinite.tolist() == [False, True, True] and int(result.live_tasks) == 1
    assert cache.info().builds == 1


def test_constants_outlive_torchs_cache_of_them():
    from signmaml_ext import flat

    model, data, options = case("flat buffers")
    expected = meta_step(model, *data, **options, graph=False).query_loss
    meta_step(model, *data, **options, graph=True)
    flat._constant.cache_clear()
    junk = [torch.full((64,), torch.nan, device="cuda") for _ in range(1000)]
    assert torch.equal(meta_step(model, *data, **options, graph=True).query_loss, expected)
    del junk
