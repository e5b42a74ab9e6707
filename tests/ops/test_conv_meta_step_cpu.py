"""The native Conv-N meta-step on the CPU against the definition: reference.py in float64."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.cases.images import real_data
from signmaml.data import load
from signmaml.episodes import EpisodeSampler
from signmaml.models import Conv4
from signmaml_ext import adapt, evaluate, meta_step
from signmaml_ext._loader import C

ISAS = C.cpu_isas()
Data = tuple[Tensor, Tensor, Tensor, Tensor]


# The quick tests use only the instruction set that this machine would choose.
@pytest.fixture(params=[*(pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS[:-1]), ISAS[-1]])
def isa(isas: list[str], request: pytest.FixtureRequest) -> str:
    C.select_cpu_isa(request.param)  # `isas` restores the choice
    return str(request.param)


class MeanReadout(nn.Module):
    """Strided blocks without convolution bias; the classifier reads the mean over positions."""

    def __init__(self, channels: int, filters: int, ways: int, layers: int) -> None:
        super().__init__()
        widths = [channels] + [filters] * layers
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o, eps=1e-3), nn.ReLU())
                for i, o in itertools.pairwise(widths)
            )
        )
        self.linear = nn.Linear(filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean(dim=[2, 3]))


def net(*, channels: int = 1, filters: int = 8, size: int = 12, ways: int = 3, pooling: str = "max", layers: int = 2):
    """A network with BatchNorm scales of both signs, so that pooling takes the largest and the smallest value."""
    if pooling == "mean":
        model: nn.Module = MeanReadout(channels, filters, ways, layers)
    else:
        model = Conv4(ways=ways, channels=channels, filters=filters, image_size=size, pooling=pooling, layers=layers)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_(std=0.3)
    return model.double()


def data(*, channels: int = 1, size: int = 12, ways: int = 3, tasks: int = 2, support: int = 4, query: int = 5) -> Data:
    def images(count: int) -> Tensor:
        return torch.randn(tasks, count, channels, size, size, dtype=torch.float64) * 0.7 + 0.4

    labels = [torch.randint(ways, (tasks, count)) for count in (support, query)]
    return images(support), labels[0], images(query), labels[1]


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


Outcome = tuple[Any, dict[str, Tensor]]
REFERENCES: dict[str, Outcome] = {}


def on(backend: str, model: nn.Module, batch: Data, arguments: dict[str, Any]) -> Outcome:
    """The call's result and meta-gradients."""
    model.zero_grad(set_to_none=True)
    result = meta_step(model, *batch, backend=backend, **arguments)
    found = grads(model)
    model.zero_grad(set_to_none=True)
    return result, found


def key_of(*values: Any) -> str:
    """Digest of everything that a call depends on, including every bit of the tensors."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode() + value.detach().numpy().tobytes())
        elif isinstance(value, Mapping):
            add(list(value.items()))
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            digest.update(f"{value!r} ".encode())

    add(values)
    return digest.hexdigest()


def reference(model: nn.Module, batch: Data, arguments: dict[str, Any]) -> Outcome:
    """The readable backend's outcome, computed once per case because it is the same for every instruction set."""
    key = key_of(model, model.state_dict(), batch, arguments)
    if key not in REFERENCES:
        REFERENCES[key] = on("torch", model, batch, arguments)
    result, found = REFERENCES[key]
    return result, {name: gradient.clone() for name, gradient in found.items()}


def both(model: nn.Module, batch: Data, **arguments: Any) -> tuple[Any, dict[str, Tensor], Any, dict[str, Tensor]]:
    """The call on the native backend and on the reference, each with its meta-gradients."""
    return *on("cpu", model, batch, arguments), *reference(model, batch, arguments)


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to `b`'s norm; 0 if both tensors are 0."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


SHAPES = [
    {"size": 8, "filters": 8, "layers": 1},
    {"size": 13, "filters": 8, "layers": 3, "channels": 3},
    {"size": 21, "filters": 24, "layers": 4, "channels": 2},
    {"size": 11, "filters": 40, "layers": 2, "ways": 2},
    {"size": 9, "filters": 64, "layers": 2},
    {"size": 7, "filters": 128, "layers": 1, "channels": 3},
    {"size": 64, "filters": 8, "layers": 6},
    {"size": 15, "filters": 128, "layers": 3},
    {"size": 51, "filters": 16, "layers": 2, "ways": 2},
    {"size": 33, "filters": 16, "layers": 1, "channels": 3, "ways": 7},
    {"size": 8, "filters": 8, "layers": 1, "pooling": "stride"},
    {"size": 13, "filters": 24, "layers": 3, "pooling": "stride", "channels": 3},
    {"size": 24, "filters": 64, "layers": 4, "pooling": "stride"},
    {"size": 9, "filters": 128, "layers": 2, "pooling": "stride"},
    {"size": 70, "filters": 8, "layers": 6, "pooling": "stride", "channels": 2},
    {"size": 14, "filters": 32, "layers": 3, "pooling": "mean"},
    {"size": 11, "filters": 48, "layers": 2, "pooling": "mean", "channels": 3, "ways": 4},
    # Rows with more positions than are copied at once.
    pytest.param({"size": 262, "filters": 8, "layers": 2}, marks=pytest.mark.slow),
    pytest.param({"size": 270, "filters": 8, "layers": 2, "pooling": "stride"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(str(value) for value in shape.values()))
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_float64_trajectories_are_those_of_the_reference(isa: str, shape: dict[str, Any], method: str) -> None:
    model = net(**shape)
    batch = data(**{key: value for key, value in shape.items() if key in ("channels", "size", "ways")})
    native, own, reference, expected = both(model, batch, inner_lr=0.01, inner_steps=3, method=method)
    assert native.backend == "cpu"
    torch.testing.assert_close(native.support_loss, reference.support_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-11, atol=1e-12)
    assert torch.equal(native.query_accuracy, reference.query_accuracy)
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name


def test_strided_blocks_of_any_size() -> None:
    """Outputs of an axis share products in threes and twos, except those left over at the border or in a chunk."""
    for size in [*range(1, 33), 58, 59, 60, 61, 62, 63, 64, 123]:
        model, batch = net(size=2 * size, pooling="stride"), data(size=2 * size, tasks=1, support=3, query=3)
        _, own, _, expected = both(model, batch, inner_lr=0.01, inner_steps=0)
        for name, gradient in expected.items():
            assert distance(own[name], gradient) < 1e-10, (size, name)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("support", "query"), [(1, 1), (2, 17), (31, 3)])
@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_sets_of_any_size(steps: int, support: int, query: int, pooling: str) -> None:
    model, batch = net(size=10, pooling=pooling), data(size=10, support=support, query=query)
    native, own, reference, expected = both(model, batch, inner_lr=0.05, inner_steps=steps)
    assert native.backend == "cpu"
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-11, name
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-12, atol=1e-12)


def test_a_hundred_ways() -> None:
    model, batch = net(size=10, ways=100), data(size=10, ways=100, support=100, query=120, tasks=1)
    _, own, _, expected = both(model, batch, inner_lr=0.01, inner_steps=2)
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name


@pytest.mark.parametrize(
    "patterns", [["classifier.*"], ["features.*"], ["features.1.conv.weight"], ["*.normalize.*"], ["features.0.*"]]
)
def test_what_does_not_adapt_stays(isa: str, patterns: list[str]) -> None:
    model, batch = net(layers=3), data()
    _, own, _, expected = both(model, batch, inner_lr=0.02, inner_steps=3, adapt=patterns)
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name


def test_rates_by_tensor_and_step() -> None:
    model, batch = net(), data()
    rates: dict[str, float | Tensor] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        by_step = torch.tensor([0.01, 0.0, 0.03], dtype=torch.float64) * (number + 1)
        rates[name] = by_step.reshape(3, *[1] * parameter.ndim)
    _, own, _, expected = both(model, batch, inner_lr=rates, inner_steps=3)
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10, name


def same_for_any_number_of_threads(model: nn.Module, batch: Data, numbers: Sequence[int], **arguments: Any) -> None:
    batch = tuple(value.float() if value.is_floating_point() else value for value in batch)
    before, found = torch.get_num_threads(), []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            model.zero_grad(set_to_none=True)
            result = meta_step(model, *batch, inner_lr=0.01, inner_steps=2, backend="cpu", **arguments)
            found.append([*grads(model).values(), result.query_loss, result.support_loss])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("pooling", ["max", "stride", "mean"])
def test_bitwise_the_same_for_any_number_of_threads(isa: str, pooling: str) -> None:
    model = net(size=19, filters=24, layers=3, pooling=pooling).float()
    same_for_any_number_of_threads(model, data(size=19, tasks=5), (1, 2, 3, 7))


@pytest.mark.parametrize("channels", [1, 3])
def test_bitwise_the_same_where_outputs_are_made_twice(isa: str, channels: int) -> None:
    model = net(channels=channels, size=33, filters=64, pooling="stride", layers=3).float()
    for support, query in ((2, 3), (13, 18), (3, 18), (2, 40)):  # kept, made twice, one after the other, many times
        batch = data(channels=channels, size=33, tasks=3, support=support, query=query)
        same_for_any_number_of_threads(model, batch, (1, 2, 4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 70), (66, 4), (8, 8), (37, 35)])
def test_covariance_of_the_first_windows(isa: str, channels: int, size: tuple[int, int]) -> None:
    """More rows and columns than one stretch has, and images smaller than a vector."""
    for pooling in ("max", "stride"):
        model = net(channels=channels, size=8, pooling=pooling, layers=1)
        height, width = size
        halves = (height // 2 * (width // 2)) if pooling == "max" else (height + 1) // 2 * ((width + 1) // 2)
        model.classifier = nn.Linear(8 * halves, 3).double()
        support, support_y, query, query_y = data(channels=channels, size=8)
        batch = (support.new_empty(2, 4, channels, *size), support_y, query.new_empty(2, 5, channels, *size), query_y)
        for images in (batch[0], batch[2]):
            images.normal_(mean=3.0)
        _, own, _, expected = both(model, batch, inner_lr=0.01, inner_steps=1)
        for name, gradient in expected.items():
            assert distance(own[name], gradient) < 1e-10, name


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_a_task_has_the_same_bits_whatever_shares_its_batch(isa: str, pooling: str) -> None:
    model, batch = net(size=19, filters=24, layers=3, pooling=pooling).float(), data(size=19, tasks=5)
    batch = tuple(value.float() if value.is_floating_point() else value for value in batch)
    broken = batch[0].clone()
    broken[3, 0, 0, 4, 4] = torch.nan  # this task leaves NaN in every buffer it used
    arguments: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 2, "backend": "cpu"}
    together = evaluate(model, broken, *batch[1:], **arguments)
    adapted = adapt(model, broken, batch[1], **arguments)
    assert together.nonfinite.tolist() == [False, False, False, True, False]
    for task in (0, 1, 2, 4):
        alone = evaluate(model, *(value[task : task + 1] for value in batch), **arguments)
        assert torch.equal(alone.logits[0], together.logits[task])
        assert torch.equal(alone.support_loss[:, 0], together.support_loss[:, task])
        own = adapt(model, batch[0][task : task + 1], batch[1][task : task + 1], **arguments)
        assert all(torch.equal(value[0], adapted[name][task]) for name, value in own.items())


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_a_broken_task_is_flagged_and_can_be_left_out(isa: str, pooling: str) -> None:
    model, batch = net(pooling=pooling), data(tasks=3)
    batch[2][1, 0, 0, 0, 0] = torch.inf
    native, own, reference, expected = both(model, batch, inner_lr=0.01, inner_steps=1, nonfinite="skip")
    assert native.nonfinite.tolist() == reference.nonfinite.tolist() == [False, True, False]
    assert int(native.live_tasks) == 2
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-11, name
    native, own, _, _ = both(model, batch, inner_lr=0.01, inner_steps=1)
    assert native.nonfinite.tolist() == [False, True, False]
    dead = [name for name in own if name.endswith("conv.bias")]
    assert all(bool(own[name].isnan().any()) for name in own if name not in dead)


@pytest.mark.parametrize("case", ["constant images", "scale 0", "all dead", "sparse"])
def test_ties_and_zeros(isa: str, case: str) -> None:
    model, batch = net(channels=1), data()
    make_ties_and_zeros(case, model, batch, constant=batch[2])
    # No inner step: where gradients are 0 up to rounding, their signs are arbitrary.
    native, own, reference, expected = both(model, batch, inner_lr=0.01, inner_steps=0)
    torch.testing.assert_close(native.query_loss, reference.query_loss, rtol=1e-11, atol=1e-12)
    for name, gradient in expected.items():
        assert distance(own[name], gradient) < 1e-10 or (own[name] - gradient).norm() < 1e-13, name


def make_ties_and_zeros(case: str, model: nn.Module, batch: Data, constant: Tensor) -> None:
    """Changes a network or its data; `constant` are the images that become constant in that case."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and case == "scale 0":
                module.weight[::2] = 0
            if isinstance(module, nn.BatchNorm2d) and case == "all dead":
                module.bias.fill_(-100)
    if case == "constant images":
        constant[0], constant[1] = 0.5, 0.0
    if case == "sparse":  # most windows are equal, so pooling has many ties
        for images in (batch[0], batch[2]):
            images[images < 1.2] = 0


@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_taps_that_meet_only_zeros_have_no_gradient(isa: str, pooling: str, dtype: torch.dtype) -> None:
    """Their gradients are exactly 0, because the smallest rounding error would become a whole sign step."""
    size = 8 if pooling == "stride" else 16
    model = net(size=size, filters=24, layers=4, pooling=pooling)
    with torch.no_grad():
        model.features[1].normalize.weight[3], model.features[1].normalize.bias[3] = 0, -1
    model.to(dtype)
    batch = tuple(value.to(dtype) if value.is_floating_point() else value for value in data(size=size))
    meta_step(model, *batch, inner_lr=0.01, inner_steps=1, backend="cpu")
    found = grads(model)
    after_dead = found["features.2.conv.weight"]
    assert not after_dead[:, 3].any()
    assert after_dead[:, [0, 1, 2, 4]].any()
    if pooling == "max":
        return
    one_position = found["features.3.conv.weight"]  # its images have 1 x 1 positions
    assert one_position[:, :, 1, 1].any()
    one_position[:, :, 1, 1] = 0
    assert not one_position.any()


@pytest.mark.parametrize("size", [16, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_taps_beside_an_edge_that_is_all_there_is_have_no_gradient(isa: str, size: int, dtype: torch.dtype) -> None:
    model = net(size=size, channels=3, filters=24, layers=3)
    batch = tuple(value.to(dtype) if value.is_floating_point() else value for value in data(size=size, channels=3))
    batch[0][:, :, 0], batch[2][:, :, 0] = 1, 1
    with torch.no_grad():  # filter 3 reads the left neighbour in channel 0, so it shows where it meets the border
        first = model.features[0]
        first.conv.weight[3] = 0
        first.conv.weight[3, 0, 1, 0] = 1
        first.normalize.weight[3], first.normalize.bias[3] = -1, 0
    model.to(dtype)
    meta_step(model, *batch, inner_lr=0.01, inner_steps=0, backend="cpu")
    found = grads(model)["features.1.conv.weight"][:, 3]
    assert not found[..., 2].any()
    assert found[..., 0].any()
    assert found[..., 1].any()


NO_STEP: dict[str, Any] = {"inner_lr": 0.0, "inner_steps": 0}


def float32_errors(model: nn.Module, batch: Data, arguments: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """For each tensor, the errors of the native float32 gradient and of torch's against float64."""
    _, _, _, exact = both(model.double(), batch, **arguments)
    single = tuple(value.float() if value.is_floating_point() else value for value in batch)
    _, own, _, theirs = both(model.float(), single, **arguments)
    for name, gradient in exact.items():
        yield name, distance(own[name].double(), gradient), distance(theirs[name].double(), gradient)


def assert_as_exact_as_torchs(model: nn.Module, batches: list[Data], **arguments: Any) -> None:
    errors = [list(float32_errors(model, batch, NO_STEP | arguments)) for batch in batches]
    for rows in zip(*errors, strict=True):
        # Medians, because in some batches rounding happens to flip a ReLU or a maximum in only one of the two.
        own, theirs = (statistics.median(row[column] for row in rows) for column in (1, 2))
        assert own <= 2 * theirs, rows[0][0]


@pytest.mark.parametrize(
    "shape", [*(SHAPES[number] for number in (2, 11, 12)), pytest.param(SHAPES[7], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sparse", [False, True])
def test_float32_gradients_are_as_exact_as_torchs(isa: str, shape: dict[str, Any], sparse: bool) -> None:
    model = net(**shape)
    sizes = {key: value for key, value in shape.items() if key in ("channels", "size", "ways")}
    batches = [data(**sizes, query=10) for _ in range(11)]
    if sparse:  # most windows are equal, so pooling has many ties, which all must break alike
        for batch in batches:
            batch[2][batch[2] < 1.2] = 0
    assert_as_exact_as_torchs(model, batches)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "channels", "size"), [("mini-imagenet", "mini_imagenet", 3, 84)])
def test_float32_gradients_on_real_images(kind: str, name: str, channels: int, size: int) -> None:
    root = real_data(kind)
    images = load(name, "test", root=root)
    sampler = EpisodeSampler(images, ways=5, shots=1, queries=1, tasks=1, seed=3)
    model = Conv4(ways=5, channels=channels, filters=32, image_size=size)
    # Raw values 0 to 255, as in the official set-up, give layer 1 a mean far from 0.
    draws = [sampler.draw(iteration) for iteration in range(11)]
    assert_as_exact_as_torchs(
        model, [tuple(v.double() * 255 if v.is_floating_point() else v for v in draw) for draw in draws]
    )


OFFICIAL: dict[str, Any] = {
    "blocks": 4,
    "channels": 3,
    "filters": 32,
    "height": 84,
    "width": 84,
    "ways": 5,
    "halving": "max",
    "readout": "flatten",
    "conv_bias": True,
    "eps": [1e-5] * 4,
}


def test_memory_does_not_grow_with_steps_or_tasks() -> None:
    one, many = (C.plan_conv_meta_step_cpu(OFFICIAL, tasks, 5, 5, 4, 2) for tasks in (2, 2000))
    assert one["workspace_bytes"] == many["workspace_bytes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": 12}, "filters: expected a multiple of 8, found 12"),
        ({"blocks": 7}, "blocks: expected 1 to 6, found 7"),
        ({"channels": 4}, "channels: expected 1 to 3, found 4"),
        ({"height": 8, "width": 8}, "height, width: expected an image that 4 halvings leave something of, found 8 x 8"),
        ({"halving": "mean"}, "halving: expected 'max' or 'stride', found 'mean'"),
        ({"eps": [1e-5]}, "eps: expected 4 of them, one a block, found 1"),
    ],
)
def test_the_native_call_refuses_what_it_does_not_serve(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.plan_conv_meta_step_cpu(OFFICIAL | changes, 1, 5, 5, 4, 1)
    with pytest.raises(ValueError, match="addresses: expected one for 'theta', found none"):
        sizes = {"tasks": 1, "support": 1, "query": 1, "steps": 1}
        C.conv_meta_step_cpu({}, OFFICIAL, **sizes, method="sign-maml", is_double=False, threads=1)
