"""Episodes: whole meta-batches of few-shot tasks drawn on the device that trains.

Each task is identified by one number. Everything random in it is a function of (seed, task number), computed in
integer arithmetic on the device. Therefore

- CPU and CUDA draw the same tasks, however a run is split into calls, processes or machines;
- a run resumes from its iteration number alone: there is no generator state to save;
- drawing needs no loop over tasks or images and never waits for the device.

Random numbers: ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014) on 64-bit integers, and ``G`` is the
odd constant 0x9E3779B97F4A7C15, nearest to 2**64 divided by the golden ratio. From the seed down, each level of the
tree (seed, stream, task, element, ...) takes one step::

    child = mix(parent + G * (number + 1))        modulo 2**64

Sampling without replacement sorts the candidates by such a random number and takes the first ones. The candidate's
index replaces the low bits, so no two keys are equal and every device sorts them the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from . import splitmix
from .augmentation import Augmentation, checked_augmentation
from .data.arguments import a_few, check_integer
from .data.image_set import ImageSet
from .pixels import Normalization, PixelNormalizer, checked_normalization

MAX_TASK = 2**62  # task numbers stay far from the int64 limit
MAX_SEED = 2**63 - 1
MAX_POINTS = 2**24  # per sine wave; a larger number is a mistake and would only exhaust memory

# Streams of one task. Never renumber them: recorded runs would no longer be reproducible.
_CLASSES, _IMAGES, _SINE, _POINTS, _CHANGES = 0, 1, 2, 3, 4


class Episodes(NamedTuple):
    """A meta-batch of ``T`` tasks.

    Attributes:
        support_x: ``[T, S, ...]`` float32. For images ``[T, N*K, C, H, W]``, the K images of a class adjacent.
        support_y: ``[T, S]`` int64 labels ``0..N-1``, or ``[T, S, 1]`` float32 targets.
        query_x: ``[T, Q, ...]`` float32, in the same order; no image is in both sets of a task.
        query_y: ``[T, Q]`` int64 labels, or ``[T, Q, 1]`` float32 targets.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self.support_x)

    def __repr__(self) -> str:
        support, query = list(self.support_x.shape), list(self.query_x.shape)
        return f"Episodes({self.tasks} tasks: support_x {support}, query_x {query})"

    def part(self, first: int, stop: int) -> Episodes:
        """Tasks `first` to `stop - 1` as views; fewer if the batch ends earlier."""
        return Episodes(*(tensor[first:stop] for tensor in self))


class Sampler(Protocol):
    """Anything that draws meta-batches.

    `draw(iteration)` returns `(support_x, support_y, query_x, query_y)`, each `[T, ...]`, as an `Episodes` or any
    sequence of four tensors. A sampler may also have `draw_tasks(first_task, tasks)`, which makes evaluation
    independent of the chunk size, and attributes `ways`, `shots`, `queries`, `seed` for the report.
    """

    def draw(self, iteration: int) -> Sequence[torch.Tensor]: ...


def draw(sampler: Sampler, iteration: int) -> Episodes:
    """The meta-batch of an iteration, from any sampler.

    Raises:
        TypeError: The sampler does not return four tensors.
    """
    return _named(sampler.draw(iteration), sampler)


def draw_tasks(sampler: Sampler, first_task: int, tasks: int) -> Episodes:
    """The tasks `first_task` to `first_task + tasks - 1`, from a sampler that has `draw_tasks`.

    Raises:
        TypeError: The sampler does not return four tensors.
    """
    return _named(sampler.draw_tasks(first_task, tasks), sampler)  # type: ignore[attr-defined]


def _named(parts: Sequence[torch.Tensor], sampler: Sampler) -> Episodes:
    if isinstance(parts, Episodes):
        return parts
    found = list(parts) if isinstance(parts, Sequence) else [parts]
    if len(found) != 4 or not all(isinstance(part, torch.Tensor) for part in found):
        kinds = ", ".join(type(part).__name__ for part in found)
        raise TypeError(
            "sampler: expected (support_x, support_y, query_x, query_y), four tensors, "
            f"found {len(found)} of {kinds or 'nothing'} from {type(sampler).__name__}"
        )
    return Episodes(*found)


class ClassDraw:
    """The classes and examples of tasks: `ways` different classes, and of each `each` different examples.

    Args:
        class_sizes: ``[classes]`` int64; the examples of a class are adjacent.
        ways: Classes of a task.
        each: Examples of a class.
        seed: Of all tasks.
        device: Where tasks are drawn.
        copies: How often each class counts, as a class of its own.
    """

    def __init__(
        self, class_sizes: torch.Tensor, *, ways: int, each: int, seed: int, device: torch.device, copies: int = 1
    ) -> None:
        self._seed, self._ways, self._each, self._classes = seed, ways, each, len(class_sizes)
        self._starts = (torch.cumsum(class_sizes, 0) - class_sizes).to(device)
        self._sizes = class_sizes.to(device)
        self._class_numbers = torch.arange(copies * self._classes, device=device)
        self._example_numbers = torch.arange(int(class_sizes.max()), device=device)
        self._ways_numbers = torch.arange(ways, device=device)

    def indices(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class numbers ``[T, ways]`` and rows of the set ``[T, ways, each]`` of the tasks with these numbers."""
        order = _children(_children(_stream(self._seed, _CLASSES), numbers)[:, None], self._class_numbers)
        classes = _first_in_order(order, self._class_numbers, self._ways)

        real = classes.remainder(self._classes)
        task_keys = _children(_stream(self._seed, _IMAGES), numbers)
        class_keys = _children(task_keys[:, None], self._ways_numbers)
        order = _children(class_keys[:, :, None], self._example_numbers)
        missing = self._example_numbers >= self._sizes[real][:, :, None]
        places = _first_in_order(order, self._example_numbers, self._each, missing)
        return classes, self._starts[real][:, :, None] + places


class NumberedSampler:
    """Calls that draw tasks by their numbers; a subclass makes the tasks with given numbers.

    Attributes:
        tasks: Tasks per meta-batch.
        device: Where tasks are drawn.
    """

    tasks: int
    device: torch.device

    def draw(self, iteration: int) -> Episodes:
        """The meta-batch of one iteration: tasks ``iteration * T`` to ``iteration * T + T - 1``.

        Args:
            iteration: 0 or more.

        Returns:
            `Episodes` with ``T = tasks`` on the sampler's device.

        Raises:
            TypeError, ValueError: `iteration` is not an integer in range.
        """
        iteration = check_integer("iteration", iteration, 0, MAX_TASK // self.tasks)
        return self.draw_tasks(iteration * self.tasks, self.tasks)

    def draw_tasks(self, first_task: int, tasks: int) -> Episodes:
        """The tasks ``first_task`` to ``first_task + tasks - 1``, the same however they are split into calls.

        Args:
            first_task: 0 or more.
            tasks: 1 or more.

        Returns:
            `Episodes` with ``T = tasks`` on the sampler's device.

        Raises:
            TypeError, ValueError: An argument is not an integer in range.
        """
        return self._draw(_task_numbers(first_task, tasks, self.device))

    def draw_at(self, iteration: torch.Tensor) -> Episodes:
        """The meta-batch of an iteration whose number is a tensor on the device; equals `draw` of that number.

        Shapes and launches do not depend on the number, so this call can be captured in a CUDA graph.

        Args:
            iteration: ``[]`` int64 on the sampler's device, 0 or more. The value is not checked, because the host
                does not read it.

        Returns:
            `Episodes` with ``T = tasks``.

        Raises:
            TypeError, ValueError: `iteration` is not such a tensor.
        """
        return self._draw(_numbers_of_iteration(iteration, self.tasks, self.device))

    def _draw(self, numbers: torch.Tensor) -> Episodes:
        """The tasks with these numbers `[T]`."""
        raise NotImplementedError


class EpisodeSampler(NumberedSampler):
    """Draws few-shot classification tasks from an image set.

    Each task takes ``ways`` different classes and ``shots + queries`` different images of each. All classes are
    equally likely, and so are all images of a class. The label of a class is its position in the draw.

    Args:
        images: The set; moved once, as uint8, to `device`.
        ways: Classes per task, at least 2.
        shots: Support images per class, at least 1.
        queries: Query images per class, at least 1.
        tasks: Tasks per meta-batch (`draw`), at least 1.
        seed: 0 to 2**63 - 1. Default 0.
        device: Where the images are stored and tasks are drawn. Default ``"cpu"``.
        rotations: True: each class rotated by 90, 180 and 270 degrees counts as three further classes (four times as
            many; all images of a class in a task share the rotation). Needs square images. Default False.
        normalize: How a pixel x in 0..255 is mapped: ``"zero-one"`` (default) x / 255; ``"signed"``
            (x - 127.5) / 127.5; ``"raw"`` x; or a pair ``(mean, std)``, each a number or one number per channel, on
            the 0..1 scale like torchvision's ``Normalize``: (x / 255 - mean) / std.
        augment: Random changes of the images, for training: any of ``"flip"`` (mirrored left to right with probability
            1/2) and ``"crop"`` (shifted by up to an eighth of the side, the border mirrored). Default none.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range; `device` is not a device; a class has fewer than ``shots + queries``
            images (the message names it); `rotations` with images that are not square.

    Determinism: the result depends only on the set, `ways`, `shots`, `queries`, `rotations`, `normalize`, `augment`,
    `seed` and the task number, not on `tasks`, the device or earlier calls. Raising `shots + queries` appends images to
    a class; its first images stay the same.

    Memory: the whole set as uint8, plus one meta-batch as float32. Never synchronises with the device.

    Example:
        >>> import torch
        >>> from signmaml.data import ImageSet
        >>> pictures = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 1, 4, 4)
        >>> toy = ImageSet("toy", "train", pictures, ("a", "b", "c", "d"), torch.tensor([10, 10, 10, 10]))
        >>> sampler = EpisodeSampler(toy, ways=3, shots=1, queries=2, tasks=5)
        >>> batch = sampler.draw(iteration=0)
        >>> batch.support_x.shape, batch.query_y.shape, batch.query_y[0].tolist()
        (torch.Size([5, 3, 1, 4, 4]), torch.Size([5, 6]), [0, 0, 1, 1, 2, 2])
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rotations: bool = False,
        normalize: Normalization = "zero-one",
        augment: Sequence[str] = (),
    ) -> None:
        if not isinstance(images, ImageSet):
            raise TypeError(f"images: expected an ImageSet, found {type(images).__name__}")
        if not isinstance(rotations, bool):
            raise TypeError(f"rotations: expected True or False, found {rotations!r}")
        channels, height, width = images.image_shape
        if rotations and height != width:
            raise ValueError(f"rotations: expected square images, found height {height} and width {width}")
        self.classes = images.classes * (4 if rotations else 1)
        counted = f"classes in {images.name}/{images.split}" + (", each in 4 rotations" if rotations else "")
        self.ways = check_integer("ways", ways, 2, self.classes, counted)
        self.shots = check_integer("shots", shots, 1)
        self.queries = check_integer("queries", queries, 1)
        self.tasks = check_integer("tasks", tasks, 1)
        self.seed = check_integer("seed", seed, 0, MAX_SEED)
        self.rotations = rotations
        self.normalize = checked_normalization(normalize, channels)
        self.augment = checked_augmentation(augment, height, width)
        self.device = checked_device(device)
        where = f"{images.name}/{images.split}"
        check_class_sizes(images.class_names, images.class_sizes.tolist(), self.shots, self.queries, "images", where)
        self._name, self._split, self._class_names = images.name, images.split, images.class_names
        self.inverted = images.inverted

        self._images = images.images.to(self.device)
        self._chances = ClassDraw(
            images.class_sizes, ways=self.ways, each=self.shots + self.queries, seed=self.seed, device=self.device,
            copies=4 if rotations else 1,
        )  # fmt: skip
        ways_numbers = torch.arange(self.ways, device=self.device)
        self._support_labels = ways_numbers.repeat_interleave(self.shots)
        self._query_labels = ways_numbers.repeat_interleave(self.queries)
        self._turned_pixels = _turned_pixels(height, self.device) if rotations else None
        self._normalize_pixels = PixelNormalizer(self.normalize, channels, self.device)
        self._changed = Augmentation(self.augment, height, width, self.device) if self.augment else None
        self._ways_numbers = ways_numbers
        self._places_numbers = torch.arange(self.shots + self.queries, device=self.device)

    def __repr__(self) -> str:
        task = f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class"
        return f"EpisodeSampler({self._name}/{self._split}: {self.size_in_words()}; {task}, {self.tasks} tasks)"

    def size_in_words(self) -> str:
        """Numbers of classes and images in the set, as text."""
        turned = f" ({self.classes:,} with rotations)" if self.rotations else ""
        return f"{len(self._class_names):,} classes{turned}, {len(self._images):,} images"

    def _draw(self, numbers: torch.Tensor) -> Episodes:
        """The tasks with these numbers `[T]`."""
        tasks = len(numbers)
        classes, rows = self._chances.indices(numbers)
        turns = classes.div(len(self._class_names), rounding_mode="floor") if self.rotations else None
        words = self._change_words(numbers) if self._changed is not None else None
        support, query = slice(0, self.shots), slice(self.shots, None)
        return Episodes(
            self._pick(rows, turns, words, support),
            self._support_labels.repeat(tasks, 1),
            self._pick(rows, turns, words, query),
            self._query_labels.repeat(tasks, 1),
        )

    def _change_words(self, numbers: torch.Tensor) -> torch.Tensor:
        """``[T, N, K + queries]`` int64: the random word of each image."""
        task_keys = _children(_stream(self.seed, _CHANGES), numbers)
        class_keys = _children(task_keys[:, None], self._ways_numbers)
        return _children(class_keys[:, :, None], self._places_numbers)

    def draw_indices(self, first_task: int, tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The classes and images that `draw_tasks` would take, as indices.

        Args:
            first_task: 0 or more.
            tasks: 1 or more.

        Returns:
            ``classes [T, N]`` int64 and ``rows [T, N, K + queries]`` int64 on the device: class numbers (with
            rotations: class + number of classes * quarter turns) and rows of the image set, support first.

        Raises:
            TypeError, ValueError: An argument is not an integer in range.
        """
        return self._chances.indices(_task_numbers(first_task, tasks, self.device))

    def class_name(self, number: int) -> str:
        """The name of a class that `draw_indices` returned as a number, with its rotation if there is one.

        Args:
            number: 0 to ``classes - 1``.

        Raises:
            TypeError, ValueError: `number` is not an integer in range.
        """
        number = check_integer("number", number, 0, self.classes - 1)
        turns, real = divmod(number, len(self._class_names))
        return self._class_names[real] + (f" turned {90 * turns} degrees" if turns else "")

    def describe(self) -> dict[str, Any]:
        """Everything that determines the tasks drawn, for a run's records (JSON types only)."""
        return {
            "set": self._name,
            "split": self._split,
            "classes": self.classes,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "tasks": self.tasks,
            "seed": self.seed,
            "rotations": self.rotations,
            "normalize": self.normalize if isinstance(self.normalize, str) else [list(v) for v in self.normalize],
            "augment": list(self.augment),
        }

    def _pick(
        self, rows: torch.Tensor, turns: torch.Tensor | None, words: torch.Tensor | None, part: slice
    ) -> torch.Tensor:
        """A part of each class's images at ``rows [T, N, K + queries]``, as ``[T, N*k, C, H, W]`` for k in the part.

        Each class is turned by ``turns [T, N]`` quarter turns, and each image changed by its ``words`` (as `rows`).
        """
        rows = rows[:, :, part]
        tasks, ways, k = rows.shape
        pixels = self._images.index_select(0, rows.reshape(-1))
        if turns is not None and self._turned_pixels is not None:
            channels = pixels.shape[1]
            sources = self._turned_pixels.index_select(0, turns.repeat_interleave(k, 1).reshape(-1))
            turned = pixels.flatten(2).gather(2, sources[:, None].expand(-1, channels, -1))
            pixels = turned.view_as(pixels)
        if words is not None and self._changed is not None:
            pixels = self._changed(pixels, words[:, :, part].reshape(-1))
        x = self._normalize_pixels(pixels)
        return x.view(tasks, ways * k, *x.shape[1:])


class SinusoidSampler(NumberedSampler):
    """Draws the sinusoid regression tasks of Finn et al. (2017): y = amplitude * sin(x + phase).

    Amplitude and phase are uniform over tasks, each x uniform over `x_range`.

    Args:
        shots: Support points per task, 1 to 2**24.
        queries: Query points per task, 1 to 2**24.
        tasks: Tasks per meta-batch, at least 1.
        seed: 0 to 2**63 - 1. Default 0.
        device: Where tasks are drawn. Default ``"cpu"``.
        amplitude: Least and greatest amplitude. Default (0.1, 5.0).
        phase: Least and greatest phase in radians. Default (0, pi).
        x_range: Least and greatest x. Default (-5, 5).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A count is out of range, or a range is not two numbers in order that are finite in float32.

    Determinism: as for `EpisodeSampler`. The sine is computed in float64 and rounded to float32 once, so devices agree
    unless a float64 rounding difference straddles a float32 rounding boundary, which is too rare to occur in a run.

    Example:
        >>> sampler = SinusoidSampler(shots=10, queries=15, tasks=4)
        >>> batch = sampler.draw(iteration=0)
        >>> batch.support_x.shape, batch.query_y.shape
        (torch.Size([4, 10, 1]), torch.Size([4, 15, 1]))
    """

    def __init__(
        self,
        *,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        self.shots = check_integer("shots", shots, 1, MAX_POINTS)
        self.queries = check_integer("queries", queries, 1, MAX_POINTS)
        self.tasks = check_integer("tasks", tasks, 1)
        self.seed = check_integer("seed", seed, 0, MAX_SEED)
        self.amplitude = _checked_range("amplitude", amplitude)
        self.phase = _checked_range("phase", phase)
        self.x_range = _checked_range("x_range", x_range)
        self.device = checked_device(device)

    def __repr__(self) -> str:
        return f"SinusoidSampler({self.shots} support and {self.queries} query points, {self.tasks} tasks)"

    def _draw(self, numbers: torch.Tensor) -> Episodes:
        """The tasks with these numbers `[T]`."""
        wave_keys = _children(_stream(self.seed, _SINE), numbers)[:, None]
        wave = _uniform(_children(wave_keys, torch.arange(2, device=self.device)))
        amplitude = _between(self.amplitude, wave[:, :1])
        phase = _between(self.phase, wave[:, 1:])

        point_keys = _children(_stream(self.seed, _POINTS), numbers)[:, None]
        points = torch.arange(self.shots + self.queries, device=self.device)
        x = _between(self.x_range, _uniform(_children(point_keys, points))).to(torch.float32)
        y = (amplitude * torch.sin(x.to(torch.float64) + phase)).to(torch.float32)
        x, y = x[:, :, None], y[:, :, None]
        split = self.shots
        return Episodes(
            x[:, :split].contiguous(), y[:, :split].contiguous(), x[:, split:].contiguous(), y[:, split:].contiguous()
        )

    def describe(self) -> dict[str, Any]:
        """Everything that determines the tasks drawn, for a run's records (JSON types only)."""
        return {
            "set": "sinusoid",
            "shots": self.shots,
            "queries": self.queries,
            "tasks": self.tasks,
            "seed": self.seed,
            "amplitude": list(self.amplitude),
            "phase": list(self.phase),
            "x_range": list(self.x_range),
        }


# --- task numbers ----------------------------------------------------------------------------------------------------


def _task_numbers(first_task: int, tasks: int, device: torch.device) -> torch.Tensor:
    """``first_task`` to ``first_task + tasks - 1``, checked."""
    tasks = check_integer("tasks", tasks, 1)
    first_task = check_integer("first_task", first_task, 0, MAX_TASK - tasks)
    return torch.arange(first_task, first_task + tasks, device=device)


def _numbers_of_iteration(iteration: torch.Tensor, tasks: int, device: torch.device) -> torch.Tensor:
    """The task numbers of an iteration whose number is on the device."""
    expected = f"iteration: expected an int64 tensor [] on {device}"
    if not isinstance(iteration, torch.Tensor):
        raise TypeError(f"{expected}, found {type(iteration).__name__}")
    if iteration.dtype != torch.int64:
        raise TypeError(f"{expected}, found {iteration.dtype}")
    # "cuda" and "cuda:0" may be the same device, so compare indices only if both are given.
    same = iteration.device.type == device.type and None in (device.index, iteration.device.index)
    if iteration.ndim != 0 or not (iteration.device == device or same):
        raise ValueError(f"{expected}, found {list(iteration.shape)} on {iteration.device}")
    return iteration * tasks + torch.arange(tasks, device=iteration.device)


# --- counter-based randomness ---------------------------------------------------------------------------------------


def _stream(seed: int, stream: int) -> int:
    """The key of one stream of a seed; all tasks share it."""

    def child(parent: int, number: int) -> int:
        return splitmix.mixed(parent + splitmix.GOLDEN * number)

    return child(child(0, seed), stream)


def _children(parents: torch.Tensor | int, numbers: torch.Tensor) -> torch.Tensor:
    """``mix(parents + G * (numbers + 1))`` on int64 tensors that broadcast; wraps modulo 2**64."""
    start = splitmix.signed(parents) if isinstance(parents, int) else parents
    return splitmix.mixed_(numbers * splitmix.signed(splitmix.GOLDEN) + start)


def _first_in_order(
    order: torch.Tensor, numbers: torch.Tensor, count: int, missing: torch.Tensor | None = None
) -> torch.Tensor:
    """The `count` candidates with the least `order`, least first.

    Args:
        order: ``[..., candidates]`` int64, random; overwritten.
        numbers: ``[candidates]`` int64, 0, 1, 2, ...
        count: At most the number of candidates that are not missing.
        missing: ``[..., candidates]`` bool, candidates to exclude.

    Returns:
        ``[..., count]`` int64, candidate numbers.
    """
    low_bits = (1 << (len(numbers) - 1).bit_length()) - 1
    order.bitwise_and_(~low_bits).bitwise_or_(numbers)
    if missing is not None:
        # Their keys need not be distinct: at least `count` other candidates sort before them.
        order.masked_fill_(missing, torch.iinfo(torch.int64).max)
    return order.topk(count, largest=False, sorted=True).values.bitwise_and_(low_bits)


def _uniform(words: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1) from the high 53 bits of int64 words."""
    return splitmix.shifted(words, 11).to(torch.float64).mul_(2.0**-53)


def _between(limits: tuple[float, float], share: torch.Tensor) -> torch.Tensor:
    return share.mul(limits[1] - limits[0]).add_(limits[0])


# --- checks and tables made once -------------------------------------------------------------------------------------


def checked_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch device such as 'cpu' or 'cuda', found {device!r}") from error


def check_class_sizes(
    names: Sequence[Any], sizes: Sequence[int], shots: int, queries: int, what: str, where: str
) -> None:
    """Refuses classes with fewer examples than a task takes; `what` these are and `where`, for the message."""
    needed = shots + queries
    small = [f"{name!r} ({size})" for name, size in zip(names, sizes, strict=True) if size < needed]
    if small:
        raise ValueError(
            f"shots, queries: {shots} + {queries} needs at least {needed} {what} in every class of {where}, "
            f"found fewer in {a_few(small)}"
        )


def _turned_pixels(size: int, device: torch.device) -> torch.Tensor:
    """``[4, H*W]`` int64: the source index of each pixel after 0 to 3 quarter turns (as ``torch.rot90``)."""
    grid = torch.arange(size * size, device="cpu").view(size, size)
    return torch.stack([torch.rot90(grid, turns).reshape(-1) for turns in range(4)]).to(device)


def _checked_range(name: str, value: Any) -> tuple[float, float]:
    expected = f"{name}: expected two numbers (least, greatest) in order, finite in float32"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{expected}, found {value!r}")
    try:
        low, high = float(value[0]), float(value[1])
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, found {value!r}") from error
    except OverflowError as error:  # an int beyond float64; its digits would not fit into a message
        raise ValueError(f"{expected}, found an integer beyond float64") from error
    greatest = torch.finfo(torch.float32).max
    if not -greatest <= low <= high <= greatest:  # false for NaN as well
        raise ValueError(f"{expected}, found {value!r}")
    return low, high
