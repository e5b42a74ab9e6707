"""Episodes: the stream of tasks against its definition, its statistics, and what a device must not wait for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2

from helpers.cases.images import random_set
from signmaml.data import ImageSet
from signmaml.episodes import Episodes, EpisodeSampler, SinusoidSampler
from training.operators import WAITING, Recorder

WORD = 2**64

# One task of seed 0 and 30 classes of 20 images each, and one sinusoid, as they were when the stream was defined.
GOLDEN_CLASSES = [[7, 12, 27, 10, 2], [10, 0, 23, 21, 4]]
GOLDEN_ROWS = [
    [[146, 152], [245, 259], [556, 549], [218, 215], [47, 56]],
    [[214, 201], [17, 14], [476, 469], [433, 422], [89, 99]],
]
GOLDEN_X = [-1.890053629875183, 0.28661757707595825]
GOLDEN_Y = [-0.7867101430892944, 1.1327751874923706]


# --- the definition, in Python's own integers ---------------------------------------------------------------


def child(parent: int, number: int) -> int:
    """mix(parent + G * (number + 1)) modulo 2**64, mix being the finaliser of SplitMix64."""
    z = (parent + 0x9E3779B97F4A7C15 * (number + 1)) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def first_in_order(key: int, candidates: int, available: int, count: int) -> list[int]:
    """The `count` of `available` numbers with the smallest random keys; a key's low bits hold the number itself."""
    low = (1 << (candidates - 1).bit_length()) - 1
    order = {number: (signed(child(key, number)) & ~low) | number for number in range(available)}
    return sorted(order, key=order.__getitem__)[:count]


def defined_task(seed: int, task: int, sizes: list[int], ways: int, images: int, turns: int = 1) -> list[list[int]]:
    """For each way: [class number, row, row, ...]."""
    start = [sum(sizes[:number]) for number in range(len(sizes))]
    of_seed = child(0, seed)
    classes_key, images_key = child(child(of_seed, 0), task), child(child(of_seed, 1), task)
    drawn = []
    for way, number in enumerate(first_in_order(classes_key, turns * len(sizes), turns * len(sizes), ways)):
        real = number % len(sizes)
        places = first_in_order(child(images_key, way), max(sizes), sizes[real], images)
        drawn.append([number, *(start[real] + place for place in places)])
    return drawn


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
@pytest.mark.parametrize("rotations", [False, True])
def test_tasks_follow_the_definition(seed: int, rotations: bool) -> None:
    sizes = [4, 9, 5, 17, 4, 6, 33]
    sampler = EpisodeSampler(random_set(sizes), ways=5, shots=1, queries=3, tasks=2, seed=seed, rotations=rotations)
    for first in (0, 1, 1_000_003, 2**62 - 9):
        classes, rows = sampler.draw_indices(first, 3)
        found = torch.cat([classes[:, :, None], rows], 2).tolist()
        turns = 4 if rotations else 1
        assert found == [defined_task(seed, first + task, sizes, 5, 4, turns) for task in range(3)]


def test_tasks_stay_as_recorded() -> None:
    """Compares with recorded numbers: a change of the stream would make recorded runs unrepeatable."""
    sampler = EpisodeSampler(random_set([20] * 30), ways=5, shots=1, queries=1, tasks=4)
    classes, rows = sampler.draw_indices(0, 2)
    assert classes.tolist() == GOLDEN_CLASSES
    assert rows.tolist() == GOLDEN_ROWS
    points = SinusoidSampler(shots=2, queries=1, tasks=1).draw(3)
    torch.testing.assert_close(points.support_x.flatten().tolist(), GOLDEN_X, rtol=1e-7, atol=0)
    torch.testing.assert_close(points.support_y.flatten().tolist(), GOLDEN_Y, rtol=1e-6, atol=0)


# --- what a meta-batch is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rotations", [False, True])
def test_images_are_those_of_the_indices(channels: int, rotations: bool) -> None:
    images = random_set([6, 8, 5, 7], channels=channels)
    sampler = EpisodeSampler(images, ways=3, shots=2, queries=3, tasks=6, rotations=rotations, normalize="raw", seed=3)
    batch = sampler.draw(1)
    classes, rows = sampler.draw_indices(6, 6)
    assert set(classes.flatten().tolist()) <= set(range(sampler.classes))
    for task in range(6):
        for way in range(3):
            turns = int(classes[task, way]) // 4
            wanted = torch.rot90(images.images[rows[task, way]], turns, (2, 3)).float()
            assert torch.equal(batch.support_x[task].view(3, 2, channels, 4, 4)[way], wanted[:2])
            assert torch.equal(batch.query_x[task].view(3, 3, channels, 4, 4)[way], wanted[2:])
    assert rotations == bool((classes >= 4).any())


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("crop", "flip")])
@pytest.mark.parametrize("flat", [False, True])
def test_changes_of_images_follow_the_definition(names: tuple[str, ...], flat: bool) -> None:
    options: dict[str, Any] = {"ways": 3, "shots": 2, "queries": 3, "tasks": 6, "normalize": "raw", "seed": 3}
    images = random_set([6, 8, 5, 7], channels=3, size=24)
    if flat:  # 8 rows, 24 columns
        images = ImageSet("flat", "train", images.images[:, :, :8], images.class_names, images.class_sizes)
    sampler = EpisodeSampler(images, augment=names, rotations=not flat, **options)
    plain = EpisodeSampler(images, rotations=not flat, **options)
    assert torch.equal(sampler.draw_indices(6, 6)[1], plain.draw_indices(6, 6)[1]), "the same images of the same tasks"
    batch, before = sampler.draw(1), plain.draw(1)
    height, width = images.image_shape[1:]
    most_down, most_right = (height // 8, width // 8) if "crop" in names else (0, 0)
    for task, way, place in itertools.product(range(6), range(3), range(5)):
        word = child(child(child(child(child(0, 3), 4), 6 + task), way), place)
        down, right = (word >> 1) % 2**31 % (2 * most_down + 1), (word >> 32) % (2 * most_right + 1)
        of_set, index = ("support_x", 2 * way + place) if place < 2 else ("query_x", 3 * way + place - 2)
        padding = (most_right, most_right, most_down, most_down)
        wanted = F.pad(getattr(before, of_set)[task, index], padding, mode="reflect")
        wanted = wanted[:, down : down + height, right : right + width]
        if "flip" in names and word % 2:
            wanted = wanted.flip(2)
        assert torch.equal(getattr(batch, of_set)[task, index], wanted)


def test_all_changes_occur_equally_often() -> None:
    """One image of distinct pixels, so that each change is recognised by what is in the middle and beside it."""
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(2, 1, 8, 8)
    images = ImageSet("one", "train", torch.cat([image, image]), ("a", "b"), torch.tensor([2, 2]))
    sampler = EpisodeSampler(images, ways=2, shots=1, queries=1, tasks=2000, normalize="raw", augment=["flip", "crop"])
    pixels = torch.cat([sampler.draw(0).support_x, sampler.draw(0).query_x], 1).flatten(0, 2).long()
    flipped = pixels[:, 3, 4] < pixels[:, 3, 3]
    middle = torch.where(flipped, pixels[:, 3, 4], pixels[:, 3, 3])
    down, right = middle.div(8, rounding_mode="floor") - 2, middle.remainder(8) - 2
    check_uniform(torch.bincount(flipped.long() * 9 + down * 3 + right, minlength=18))


def test_shapes_types_and_labels() -> None:
    batch = EpisodeSampler(random_set([9] * 8, channels=3, size=5), ways=4, shots=2, queries=3, tasks=7).draw(0)
    assert isinstance(batch, Episodes)
    assert batch.support_x.shape == (7, 8, 3, 5, 5) and batch.query_x.shape == (7, 12, 3, 5, 5)
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
    assert batch.support_y.dtype == batch.query_y.dtype == torch.int64
    assert all(part.is_contiguous() for part in batch)
    assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 7
    assert batch.query_y.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 7


def test_classes_differ_and_support_and_query_share_no_image() -> None:
    sampler = EpisodeSampler(random_set([4, 5, 4, 9, 30]), ways=5, shots=1, queries=3, tasks=1)
    classes, rows = sampler.draw_indices(0, 500)
    assert (classes.sort(1).values == torch.arange(5)).all()
    flat = rows.flatten(1).sort(1).values
    assert (flat[:, 1:] > flat[:, :-1]).all()
    starts = torch.tensor([0, 4, 9, 13, 22, 52])
    assert (rows >= starts[classes][:, :, None]).all() and (rows < starts[classes + 1][:, :, None]).all()


def test_first_images_do_not_depend_on_how_many_follow() -> None:
    images = random_set([20] * 6)
    one = EpisodeSampler(images, ways=3, shots=1, queries=1, tasks=4).draw_indices(0, 50)[1]
    many = EpisodeSampler(images, ways=3, shots=1, queries=15, tasks=9).draw_indices(0, 50)[1]
    assert torch.equal(one, many[:, :, :2])


MAKERS: dict[str, Callable[..., Any]] = {
    "images": lambda tasks, **kw: EpisodeSampler(
        random_set([5, 8, 6, 7, 9, 5]), ways=3, shots=2, queries=3, tasks=tasks, rotations=True, **kw
    ),
    "changed images": lambda tasks, **kw: EpisodeSampler(
        random_set([5, 8, 6, 7, 9, 5], size=9), ways=3, shots=2, queries=3, tasks=tasks, augment=["flip", "crop"], **kw
    ),
    "sinusoid": lambda tasks, **kw: SinusoidSampler(shots=3, queries=4, tasks=tasks, **kw),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_numbers_do_not_depend_on_the_split_into_calls(kind: str) -> None:
    whole = MAKERS[kind](12).draw(5)
    for cuts in ((12,), (1,) * 12, (5, 7), (3, 1, 8)):
        sampler = MAKERS[kind](4)
        first, parts = 60, []
        for tasks in cuts:
            parts.append(sampler.draw_tasks(first, tasks))
            first += tasks
        for name, pieces in zip(Episodes._fields, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), getattr(whole, name)), name


@pytest.mark.parametrize("kind", MAKERS)
def test_draws_repeat_and_share_no_memory(kind: str) -> None:
    sampler = MAKERS[kind](3, seed=11)
    first = sampler.draw(2)
    kept = [part.clone() for part in first]
    for part in first:
        part.fill_(0)
    sampler.draw(0)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(sampler.draw(2), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(MAKERS[kind](3, seed=11).draw(2), kept, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_seeds_and_iterations_differ_and_the_global_generator_is_left_alone(kind: str) -> None:
    state = torch.get_rng_state()
    draws = [MAKERS[kind](3, seed=seed).draw(it)[0] for seed in (0, 1, 2**63 - 1) for it in (0, 1, 2)]
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])
    assert torch.equal(state, torch.get_rng_state())


# --- statistics: the stream is fixed, so a failure is never bad luck ----------------------------------------


def check_uniform(counts: torch.Tensor) -> None:
    """A chi-square test at a level of one in a million."""
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert expected > 20 and statistic < chi2.ppf(1 - 1e-6, counts.numel() - 1)
    # Counts that are far too even are as wrong.
    assert statistic > chi2.ppf(1e-6, counts.numel() - 1)


def test_classes_are_uniform_in_every_place_and_pair() -> None:
    sampler = EpisodeSampler(random_set([3] * 23), ways=4, shots=1, queries=1, tasks=1, seed=5)
    classes, _ = sampler.draw_indices(0, 20_000)
    for way in range(4):
        check_uniform(torch.bincount(classes[:, way], minlength=23).double())
    pairs = torch.bincount(classes[:, 0] * 23 + classes[:, 1], minlength=23 * 23).double().view(23, 23)
    assert (pairs.diagonal() == 0).all()
    check_uniform(pairs[~torch.eye(23, dtype=torch.bool)])


def test_images_of_a_class_are_uniform_whatever_the_other_classes_sizes() -> None:
    sizes = [2, 3, 7, 64]
    sampler = EpisodeSampler(random_set(sizes), ways=4, shots=1, queries=1, tasks=1, seed=6)
    classes, rows = sampler.draw_indices(0, 8_000)
    start = 0
    for number, size in enumerate(sizes):
        places = rows[classes == number] - start
        assert places.shape == (8_000, 2)
        for place in range(2):
            check_uniform(torch.bincount(places[:, place], minlength=size).double())
        start += size


def test_tasks_and_ways_are_independent() -> None:
    sampler = EpisodeSampler(random_set([8] * 8), ways=2, shots=1, queries=1, tasks=1)
    classes, rows = sampler.draw_indices(0, 20_001)
    after = classes[:-1, 0] * 8 + classes[1:, 0]
    check_uniform(torch.bincount(after, minlength=64).double())
    places = rows[:, :, 0] % 8
    check_uniform(torch.bincount(places[:, 0] * 8 + places[:, 1], minlength=64).double())


# --- normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("raw", lambda x: x),
        ("zero-one", lambda x: x / 255),
        ("signed", lambda x: (x - 127.5) / 127.5),
        ((0.5, 0.25), lambda x: (x / 255 - 0.5) / 0.25),
        (
            ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
            lambda x: (
                (x / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
            ),
        ),
    ],
)
def test_normalisation(normalize: Any, expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    images = random_set([5] * 4, channels=3)
    raw = EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=2, normalize="raw").draw(0)
    sampler = EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=2, normalize=normalize)
    batch = sampler.draw(0)
    torch.testing.assert_close(batch.support_x, expected(raw.support_x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.query_x, expected(raw.query_x), rtol=1e-5, atol=1e-6)
    assert json.loads(json.dumps(sampler.describe()))["normalize"] == json.loads(
        json.dumps(sampler.describe()["normalize"])
    )


def test_description_says_what_decides_the_numbers() -> None:
    sampler = EpisodeSampler(random_set([5] * 4), ways=3, shots=1, queries=2, tasks=2, seed=9, rotations=True)
    assert json.loads(json.dumps(sampler.describe())) == {
        "set": "random", "split": "train", "classes": 16, "ways": 3, "shots": 1, "queries": 2, "tasks": 2,
        "seed": 9, "rotations": True, "normalize": "zero-one", "augment": [],
    }  # fmt: skip
    assert sampler.class_name(1) == "class1"
    assert sampler.class_name(9) == "class1 turned 180 degrees"


# --- no loop over tasks, no wait for the device -------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_drawing_neither_waits_nor_loops(kind: str, on_device: bool) -> None:
    operators = []
    number = torch.tensor(1)
    for tasks in (2, 64):
        sampler = MAKERS[kind](tasks)
        with Recorder() as recorder:
            if on_device:
                sampler.draw_at(number)
            else:
                sampler.draw(1)
        assert WAITING.isdisjoint(recorder.called), WAITING.intersection(recorder.called)
        operators.append(recorder.called)
    assert operators[0] == operators[1]
    assert len(operators[0]) < 250


# --- refusals -----------------------------------------------------------------------------------------------


def test_sets_samplers_and_episodes_print_as_one_line() -> None:
    images = random_set([6, 5, 6, 6, 6, 6])
    assert repr(images) == "ImageSet(random/train: 6 classes, 35 images of 1 x 4 x 4)"
    sampler = EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=5, rotations=True)
    assert repr(sampler) == (
        "EpisodeSampler(random/train: 6 classes (24 with rotations), 35 images; "
        "3-way 1-shot, 2 queries a class, 5 tasks)"
    )
    assert repr(sampler.draw(0)) == "Episodes(5 tasks: support_x [5, 3, 1, 4, 4], query_x [5, 6, 1, 4, 4])"
    waves = SinusoidSampler(shots=5, queries=10, tasks=2)
    assert repr(waves) == "SinusoidSampler(5 support and 10 query points, 2 tasks)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ways": 7}, ValueError, r"ways: expected an integer in 2\.\.6 \(classes in random/train\), found 7"),
        ({"ways": 25, "rotations": True}, ValueError, r"ways: expected an integer in 2\.\.24 .*4 rotations.*found 25"),
        ({"ways": 1}, ValueError, "ways: .* found 1"),
        ({"ways": 2.0}, TypeError, "ways: .* found 2.0"),
        ({"ways": True}, TypeError, "ways: .* found True"),
        ({"shots": 0}, ValueError, "shots: .* found 0"),
        ({"queries": 0}, ValueError, "queries: .* found 0"),
        ({"queries": 5}, ValueError, r"shots, queries: 1 \+ 5 needs at least 6 images .* 'class1' \(5\)"),
        ({"tasks": 0}, ValueError, "tasks: .* found 0"),
        ({"seed": -1}, ValueError, "seed: .* found -1"),
        ({"seed": 2**63}, ValueError, "seed: .* found 9223372036854775808"),
        ({"rotations": 1}, TypeError, "rotations: expected True or False, found 1"),
        ({"device": "nope"}, ValueError, "device: expected a torch device .* found 'nope'"),
        ({"augment": "flip"}, TypeError, "augment: expected a sequence of names among flip, crop, found 'flip'"),
        ({"augment": ["mirror"]}, ValueError, "augment: .* found 'mirror'"),
        ({"augment": ["crop"]}, ValueError, "augment: expected images of at least 8 x 8 pixels .* found 4 x 4"),
        ({"normalize": "imagenet"}, ValueError, "normalize: .* found 'imagenet'"),
        ({"normalize": 0.5}, TypeError, "normalize: .* found 0.5"),
        ({"normalize": ((0.5, 0.5), 0.5)}, ValueError, r"normalize: .* 1 finite numbers \(channels\)"),
        ({"normalize": (0.5, 0.0)}, ValueError, "normalize: expected std above 0"),
        ({"normalize": (float("nan"), 1.0)}, ValueError, "normalize: .* finite"),
        ({"normalize": (1.334440614822485e36, 1)}, ValueError, "normalize: .* finite in float32, found"),
        ({"normalize": (0.5, 1e-50)}, ValueError, "normalize: .* finite in float32, found"),
        ({"normalize": (0.0, 1e-39)}, ValueError, "normalize: .* finite in float32, found"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"ways": 3, "shots": 1, "queries": 2, "tasks": 2} | change
    with pytest.raises(error, match=message):
        EpisodeSampler(random_set([6, 5, 6, 6, 6, 6]), **arguments)


def test_bad_images_and_task_numbers() -> None:
    with pytest.raises(TypeError, match="images: expected an ImageSet, found Tensor"):
        EpisodeSampler(torch.zeros(3), ways=2, shots=1, queries=1, tasks=1)  # type: ignore[arg-type]
    images = random_set([4] * 4)
    flat = type(images)("flat", "val", images.images[:, :, :2], images.class_names, images.class_sizes)
    with pytest.raises(ValueError, match="rotations: expected square images, found height 2 and width 4"):
        EpisodeSampler(flat, ways=2, shots=1, queries=1, tasks=1, rotations=True)
    for sampler in (
        EpisodeSampler(flat, ways=2, shots=1, queries=1, tasks=8),
        SinusoidSampler(shots=1, queries=1, tasks=8),
    ):
        for bad in (-1, 2**62, 0.5):
            with pytest.raises((TypeError, ValueError), match="iteration: expected an integer"):
                sampler.draw(bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"tasks: .* found 0"):
            sampler.draw_tasks(0, 0)
        with pytest.raises(ValueError, match="first_task"):
            sampler.draw_tasks(2**62, 1)


# --- sinusoids ----------------------------------------------------------------------------------------------


def test_sinusoids_follow_the_definition() -> None:
    import math

    sampler = SinusoidSampler(
        shots=3, queries=2, tasks=4, seed=8, amplitude=(1.0, 2.0), phase=(0.5, 1.5), x_range=(-2, 6)
    )
    batch = sampler.draw(9)
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    assert x.shape == y.shape == (4, 5, 1) and x.dtype == y.dtype == torch.float32

    def share(stream: int, task: int, number: int) -> float:
        return (child(child(child(child(0, 8), stream), task), number) >> 11) * 2.0**-53

    for task in range(4):
        amplitude, phase = 1 + share(2, 36 + task, 0), 0.5 + share(2, 36 + task, 1)
        for point in range(5):
            at = float(torch.tensor(-2 + 8 * share(3, 36 + task, point), dtype=torch.float32))
            assert float(x[task, point]) == at
            assert float(y[task, point]) == pytest.approx(amplitude * math.sin(at + phase), rel=1e-6, abs=1e-6)


def test_sinusoids_cover_their_ranges_evenly() -> None:
    sampler = SinusoidSampler(shots=1, queries=1, tasks=20_000)
    x = sampler.draw(0).support_x.flatten()
    check_uniform(torch.histc(x, 50, -5, 5).double())
    assert x.min() >= -5 and x.max() < 5


@pytest.mark.parametrize("name", ["amplitude", "phase", "x_range"])
@pytest.mark.parametrize("value", [(2, 1), (0, float("inf")), (0, 1e39), (-(10**400), 0), (1,), "ab", ("a", 1), 3])
def test_bad_ranges(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected two numbers"):
        SinusoidSampler(shots=1, queries=1, tasks=1, **{name: value})


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", MAKERS)
def test_cuda_draws_the_same_numbers_without_waiting(kind: str) -> None:
    on_cpu, on_cuda = MAKERS[kind](8), MAKERS[kind](8, device="cuda")
    on_cuda.draw(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [on_cuda.draw(iteration) for iteration in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for iteration, batch in enumerate(batches):
        for name, part, wanted in zip(Episodes._fields, batch, on_cpu.draw(iteration), strict=True):
            assert part.device.type == "cuda" and torch.equal(part.cpu(), wanted), name


# --- iterations whose number is stored on the device -----------------------------------------------------------------


@pytest.mark.parametrize("ways, shots, queries, tasks", [(5, 1, 1, 4), (2, 3, 4, 1), (9, 1, 2, 3)])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotations": True, "normalize": "signed"}, {"normalize": (0.4, 0.2)}, {"augment": ("crop", "flip")}],
    ids=str,
)
def test_draw_at_a_number_on_the_device_is_draw(
    ways: int, shots: int, queries: int, tasks: int, options: dict[str, Any]
) -> None:
    images = random_set([7, 11, 8, 20, 7, 9, 10, 7, 13], size=8)
    sampler = EpisodeSampler(images, ways=ways, shots=shots, queries=queries, tasks=tasks, seed=2**63 - 5, **options)
    number = torch.zeros((), dtype=torch.int64)
    for iteration in [*range(60), 2**40 + 3, (2**62 - 1) // tasks - 1]:
        number.fill_(iteration)
        for found, expected in zip(sampler.draw_at(number), sampler.draw(iteration), strict=True):
            assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_sinusoids_at_a_number_on_the_device_are_draw() -> None:
    sampler = SinusoidSampler(shots=3, queries=4, tasks=5, seed=8)
    for iteration in (0, 1, 2, 77, 2**50):
        found, expected = sampler.draw_at(torch.tensor(iteration)), sampler.draw(iteration)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", ["images", "sinusoids"])
def test_draw_at_refuses_what_is_no_such_number(which: str) -> None:
    sampler: Any = SinusoidSampler(shots=3, queries=4, tasks=5)
    if which == "images":
        sampler = EpisodeSampler(random_set([5, 5, 5]), ways=2, shots=1, queries=1, tasks=2)
    with pytest.raises(TypeError, match=r"iteration: expected an int64 tensor \[\] on cpu, found int"):
        sampler.draw_at(3)
    with pytest.raises(TypeError, match=r"found torch\.float32"):
        sampler.draw_at(torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"found \[1\] on cpu"):
        sampler.draw_at(torch.tensor([3]))
    with pytest.raises(ValueError, match=r"found \[\] on meta"):
        sampler.draw_at(torch.tensor(3, device="meta"))
