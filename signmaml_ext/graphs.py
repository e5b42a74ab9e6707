"""CUDA graphs: a whole meta-step recorded once, then replayed with one launch and a copy of its inputs.

A graph repeats what was launched while it was recorded. Python does not run again, so a graph is right only for calls
that would launch the same work. The *key* of a recorded call decides that:

- the model (a weak reference), everything that its forward may depend on (structure.py: modules, settings, hooks, code,
  and the attributes of each module; for usual layers only those that its forward reads), and the address, shape,
  strides and dtype of every parameter and buffer;
- shape, strides, dtype and device of the data and of `inner_lr` tensors, and the value of an `inner_lr` float;
- every other argument except `seed`, `first_task` and `graph`, and torch's settings for autocast, determinism and
  cuDNN.

Hence these rules. **Not rebuilt:** for other data, for weights or buffers changed in place (an optimizer step,
`load_state_dict`), for another value in a rate tensor, for another `seed`, on another stream. **Built again:** when
anything in the key is new: another shape, another float rate (a rate that changes often belongs in a tensor), a
parameter that was replaced, moved or frozen, `train()` against `eval()`, another function object as `loss`. The last
`LIMIT` graphs are kept as long as they take no more than a `SHARE`-th of their device's memory, so models and shapes
alternate without rebuilding; graphs of a deleted model are dropped.
**Not detected:** changes to anything else that a loss reads, or that a forward reads through more than a few levels of
objects. After such a change call `clear()`. **Refused,** with a ValueError: a model that draws random numbers, a model
or loss that makes the host wait, ``nonfinite="raise"`` (which makes it wait in every call), an `inner_lr` that requires
grad, a loss that cannot be hashed, and devices other than CUDA.

A graph serves a call with ``graph=True`` and, unless it says ``graph=False``, a call that the Conv-N kernels serve on
a CUDA device. Inside a capture of the caller's own, `meta_step` launches plainly and becomes part of that graph.

Memory: a graph keeps its inputs, its results and everything in between in a pool of its own, as long as it is kept. If
there is no room to record another one, all others of the device are dropped first.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import chain, dispatch, inputs, modes, structure, threads
from .problem import Problem
from .results import MetaGradients

LIMIT = 8  # graphs kept: a few models or shapes in turn, each with the memory of a whole meta-step
SHARE = 4  # all of them together keep at most this part of their device's memory

Function = Callable[[], tuple[Tensor, ...]]


class GraphRefused(ValueError):
    """A graph cannot hold this call; the message says why."""


# ----------------------------------------------------------------------------------------------------
# The device that records


class Recording(Protocol):
    """A recorded function.

    Attributes:
        outputs: What the function returned; rewritten by every replay.
        bytes: Memory that it keeps.
    """

    outputs: tuple[Tensor, ...]
    bytes: int

    def in_turn(self) -> AbstractContextManager[object]:
        """A context for writing inputs, launching the replay and reading outputs; such contexts never overlap."""

    def replay(self) -> None:
        """Runs what was recorded, on the current stream."""


class Recorder(Protocol):
    """Records functions without arguments on one device; its `why_not` is None where that is possible.

    Attributes:
        most_bytes: Memory that all recordings of the device together should keep at most.
    """

    most_bytes: int

    def warm_up(self, function: Function) -> None:
        """Runs the function more than once: one-time work of the first call must not be recorded."""

    def record(self, function: Function) -> Recording:
        """Records the function without running it."""


# Graphs whose recording failed. They are kept because torch's allocator goes on asking them whether a stream is theirs.
_failed: list[Any] = []


class CudaRecorder:
    """Records into a `torch.cuda.CUDAGraph` with a memory pool of its own, on a stream of its own.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.most_bytes = torch.cuda.get_device_properties(device).total_memory // SHARE
        # Warm-up and recording share it: libraries keep a workspace for each stream that they have seen.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Function) -> None:
        """Runs the function twice on the side stream.

        The first run may wait for the device: kernels are loaded, the model is verified, constants are written.

        Raises:
            GraphRefused: The second run waits for the device too.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    function()
                    with _refusing_to_wait():
                        function()
            finally:
                current.wait_stream(self._stream)

    def record(self, function: Function) -> Recording:
        """Records the function.

        Raises:
            GraphRefused: Something in it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the device meanwhile.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = function()
        except torch.OutOfMemoryError:
            _failed.append(graph)
            raise
        except RuntimeError as error:
            _failed.append(graph)
            raise GraphRefused(f"graph: expected a call that can be recorded, found: {error}") from error
        return _CudaRecording(graph, outputs, self._device)


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], device: torch.device) -> None:
        self.outputs = outputs
        self.bytes = _bytes_of_pool(graph.pool())
        self._graph, self._device = graph, device
        self._finished = torch.cuda.Event()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Streams take turns: one may not write the inputs while another's replay still reads them."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._finished)
            try:
                yield
            finally:
                self._finished.record(stream)

    def replay(self) -> None:
        self._graph.replay()


def _bytes_of_pool(pool: object) -> int:
    """Device memory that torch's allocator holds for a pool of graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == pool)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Turns a call that makes the host wait into a refusal.

    This is checked before recording, because a failed recording leaves torch's allocator in a state from which it does
    not recover. The setting is process-wide, so another thread that waits meanwhile gets the error too.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # inside, so that an interrupt right after it is undone
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise GraphRefused(
            "graph: expected a model and a loss that never make the host wait for the device, found one that does "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


# Makers of recorders, by device type.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


# ----------------------------------------------------------------------------------------------------
# What a graph cannot hold


def why_not(problem: Problem) -> str | None:
    """None if the arguments of a call allow a graph, else the reason; the model itself is not run."""
    if problem.device.type not in RECORDERS:
        return f"graphs are for CUDA devices, and the model is on {problem.device}"
    if problem.nonfinite == "raise":
        return "nonfinite='raise' makes the host wait for the device"
    if problem.rates.learnable():
        return "inner_lr requires grad"
    if not isinstance(problem.support_x, Tensor):
        return "the model has several inputs"
    if callable(problem.loss):
        try:
            hash(problem.loss)
        except TypeError:
            return f"the loss, of type {type(problem.loss).__name__}, cannot be hashed, so it is not known again"
    return None


def why_not_graph(problem: Problem) -> str | None:
    """Whether a graph could hold a meta-step; runs one and discards its result.

    Returns:
        None if it could, else the reason. `.grad` and torch's generators are as before.

    Raises:
        ValueError, TypeError: As `meta_step`.
    """
    reason = why_not(problem)
    if reason is not None:
        return reason
    try:
        with _refusing_random_draws(problem.device):
            dispatch.meta_gradients(problem.replace(keyed=False))
    except GraphRefused as error:
        return str(error)
    return None


@contextmanager
def _refusing_random_draws(device: torch.device) -> Iterator[None]:
    """Refuses at its end if a random number was drawn; restores torch's generators."""
    generators = modes.generators(device)
    before = [generator.get_state() for generator in generators]
    try:
        yield
        drawn = any(
            not torch.equal(generator.get_state(), state) for generator, state in zip(generators, before, strict=True)
        )
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
    if drawn:
        raise GraphRefused("graph: expected a model that draws no random numbers, found that its forward pass does")


# ----------------------------------------------------------------------------------------------------
# Keys


def _what_it_is(model: nn.Module) -> Hashable:
    """What the forward of a model depends on besides the numbers in its tensors.

    For a network of layers it is known what the forward reads, so a counter or an epoch kept on the model is left out.
    For any other model everything counts.
    """
    if isinstance(chain.network_of(model), tuple):
        known = chain.of_module(model)
        return known.structure, known.values
    return structure.of_module(model), structure.of_attributes(model)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype)


# The attributes of a problem that the key holds as they are. The others are in the key in another form, or left out: a
# graph draws no random numbers, and how the call asks for a graph does not matter.
_BY_VALUE = tuple(
    field.name
    for field in fields(Problem)
    if field.name
    not in (
        *("model", "params", "support_x", "support_y", "query_x", "query_y", "rates"),
        *("seed", "first_task", "graph", "keyed"),
    )
)


def key_of(problem: Problem) -> tuple[object, ...]:
    """Everything that the launches of a call depend on; see the module's docstring."""
    model, device = problem.model, problem.device
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    rates = problem.rates.values
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (
        id(model),
        _what_it_is(model),
        tuple((name, *_place(tensor)) for name, tensor in tensors),
        device,
        tuple(_kind(value) for value in _data_of(problem).values()),
        tuple((name, _kind(rate) if isinstance(rate, Tensor) else rate) for name, rate in rates.items()),
        problem.steps,
        *(getattr(problem, name) for name in _BY_VALUE),
        autocast,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )


def _data_of(problem: Problem) -> dict[str, Tensor]:
    assert problem.query_x is not None and problem.query_y is not None
    return {
        "support_x": inputs.only(problem.support_x),
        "support_y": problem.support_y,
        "query_x": inputs.only(problem.query_x),
        "query_y": problem.query_y,
    }


def _inputs_of(problem: Problem) -> list[Tensor]:
    """The tensors that are copied in for every replay: data, then rates."""
    rates = [rate.detach() for rate in problem.rates.values.values() if isinstance(rate, Tensor)]
    return [*_data_of(problem).values(), *rates]


# ----------------------------------------------------------------------------------------------------
# A recorded meta-step


class _Layout:
    """Where a result's tensors are in flat buffers, one per dtype, so that few copies bring all of them out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups: dict[torch.dtype, dict[str, torch.Size]] = {}
        for name, tensor in tensors.items():
            self._groups.setdefault(tensor.dtype, {})[name] = tensor.shape

    def __len__(self) -> int:
        return len(self._groups)

    def pack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.cat([tensors[name].reshape(-1) for name in shapes]) for shapes in self._groups.values())

    def unpack(self, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for buffer, shapes in zip(buffers, self._groups.values(), strict=True):
            parts = buffer.split([shape.numel() for shape in shapes.values()])
            found |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return found


class _MetaStep:
    """A meta-step on its own copies of the inputs, as a function without arguments."""

    def __init__(self, problem: Problem) -> None:
        self.inputs = [torch.empty_like(value).copy_(value) for value in _inputs_of(problem)]
        data, rates = self.inputs[:4], iter(self.inputs[4:])
        values = {name: next(rates) if isinstance(v, Tensor) else v for name, v in problem.rates.values.items()}
        self._problem = problem.replace(
            **dict(zip(_data_of(problem), data, strict=True)),
            rates=type(problem.rates)(values, problem.steps),
            keyed=False,
        )
        self.backend = ""
        # Gradients are separate, so that a result that the caller keeps does not keep them alive.
        self.gradients = self.numbers = _Layout({})

    def __call__(self) -> tuple[Tensor, ...]:
        self.backend, meta = dispatch.meta_gradients(self._problem)
        gradients = {name: gradient for name, gradient in meta.params.items() if gradient is not None}
        numbers = {name: getattr(meta, name) for name in _NUMBERS if getattr(meta, name) is not None}
        self.gradients, self.numbers = _Layout(gradients), _Layout(numbers)
        with torch.no_grad():
            return (*self.gradients.pack(gradients), *self.numbers.pack(numbers))


_NUMBERS = ("query_loss", "query_accuracy", "support_loss", "nonfinite", "live_tasks")


class _Recorded:
    """A recorded meta-step, with what is needed to replay it. Holds no reference to the model."""

    def __init__(self, problem: Problem) -> None:
        call = _MetaStep(problem)
        recorder = RECORDERS[problem.device.type](problem.device)
        with _refusing_random_draws(problem.device):
            recorder.warm_up(call)
        self.recording = recorder.record(call)
        self.device, self.most_bytes = problem.device, recorder.most_bytes
        self.bytes = self.recording.bytes + sum(value.nbytes for value in call.inputs)
        self.backend = call.backend
        self._names = tuple(problem.params)
        self._gradients, self._numbers = call.gradients, call.numbers
        # Grouped by dtype, because one copy kernel moves all tensors of a dtype.
        self._inputs = call.inputs
        self._kinds: dict[torch.dtype, list[int]] = {}
        for place, value in enumerate(call.inputs):
            self._kinds.setdefault(value.dtype, []).append(place)

    def replay(self, inputs: Sequence[Tensor]) -> MetaGradients:
        with self.recording.in_turn():
            for places in self._kinds.values():
                torch._foreach_copy_([self._inputs[place] for place in places], [inputs[place] for place in places])
            self.recording.replay()
            # Copies, because the next replay overwrites the outputs.
            buffers = [output.clone() for output in self.recording.outputs]
        gradients = self._gradients.unpack(buffers[: len(self._gradients)])
        numbers = self._numbers.unpack(buffers[len(self._gradients) :])
        return MetaGradients(
            params={name: gradients.get(name) for name in self._names},
            rates={},
            query_loss=numbers["query_loss"],
            query_accuracy=numbers.get("query_accuracy"),
            support_loss=numbers["support_loss"],
            nonfinite=numbers["nonfinite"],
            live_tasks=numbers["live_tasks"],
        )


class GraphInfo(NamedTuple):
    """Counts of the graphs in this process.

    Attributes:
        graphs: Graphs that are kept now.
        limit: The most that are kept.
        builds: Graphs recorded so far.
        replays: Calls that a graph served.
        bytes: Memory that the graphs keep.
    """

    graphs: int
    limit: int
    builds: int
    replays: int
    bytes: int


class GraphCache:
    """The last `limit` recorded meta-steps, by key, or fewer if they are large; any thread may call.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        # None: a call that did not ask for a graph and is launched plainly.
        self._graphs: OrderedDict[tuple[object, ...], _Recorded | None] = OrderedDict()
        self._models: dict[int, weakref.ref[nn.Module]] = {}
        # Ids of models that were garbage-collected, at any time and in any thread; the next call drops their graphs.
        self._gone: deque[int] = deque()
        self._lock = threads.lasting_lock()
        self._builds = self._replays = 0

    def meta_gradients(self, problem: Problem) -> tuple[str, MetaGradients]:
        """Replays a meta-step, recording it first if its key is new; returns backend and result.

        Raises:
            GraphRefused: A graph cannot hold this call, and the call asked for one.
            ValueError, TypeError: As the call without a graph.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._drop_gone()
            key = key_of(problem)
            recorded = self._graphs.get(key)
            if recorded is None and (problem.graph or key not in self._graphs):
                recorded = self._record(key, problem)
            self._graphs.move_to_end(key)
            if recorded is not None:
                self._replays += 1
                return recorded.backend, recorded.replay(_inputs_of(problem))
        return dispatch.meta_gradients(problem)

    def _record(self, key: tuple[object, ...], problem: Problem) -> _Recorded | None:
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)  # first, so that its memory is free for the new one
        recorded = None
        if problem.graph or dispatch.choose(problem)[1] in BY_DEFAULT:
            try:
                recorded = self._recorded(problem)
                self._builds += 1
            except GraphRefused as error:
                if problem.graph:
                    raise
                warnings.warn(f"signmaml_ext launches this call without a CUDA graph ({error})", stacklevel=5)
        number = id(problem.model)
        if number not in self._models:
            self._models[number] = weakref.ref(problem.model, lambda _: self._gone.append(number))
        self._graphs[key] = recorded
        if recorded is not None:
            self._drop_oldest(recorded)
        return recorded

    def _recorded(self, problem: Problem) -> _Recorded:
        try:
            return _Recorded(problem)
        except torch.OutOfMemoryError:
            others = list(self._kept_on(problem.device))
            if not others:
                raise
            for key in others:
                del self._graphs[key]
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()  # while recording, the allocator cannot give back what those graphs held
        return _Recorded(problem)

    def _drop_oldest(self, newest: _Recorded) -> None:
        """Drops the oldest graphs of a device until the rest may stay; the newest one always does."""
        of_device = self._kept_on(newest.device)
        total = sum(kept.bytes for kept in of_device.values())
        for key, kept in of_device.items():
            if total <= newest.most_bytes or kept is newest:
                return
            del self._graphs[key]
            total -= kept.bytes

    def _kept_on(self, device: torch.device) -> dict[tuple[object, ...], _Recorded]:
        """The recorded graphs of a device, oldest first."""
        return {key: kept for key, kept in self._graphs.items() if kept is not None and kept.device == device}

    def _drop_gone(self) -> None:
        while self._gone:
            self._forget(self._gone.popleft())

    def _forget(self, number: int) -> None:
        self._models.pop(number, None)
        for key in [key for key in self._graphs if key[0] == number]:
            del self._graphs[key]

    def clear(self, model: nn.Module | None = None) -> None:
        """Drops the graphs of a model, or all."""
        with self._lock:
            self._drop_gone()
            for number in [id(model)] if model is not None else list(self._models):
                self._forget(number)

    def info(self) -> GraphInfo:
        """How many graphs are kept, were built, and were replayed."""
        with self._lock:
            self._drop_gone()
            kept = [recorded for recorded in self._graphs.values() if recorded is not None]
            memory = sum(recorded.bytes for recorded in kept)
            return GraphInfo(len(kept), self._limit, self._builds, self._replays, memory)


CACHE = GraphCache()


# Families that use graphs unless the caller says no: many short launches, with no decisions between them.
BY_DEFAULT = (dispatch.CONV,)


def serve(problem: Problem) -> bool:
    """Whether a meta-step goes through this module: its device has graphs, or the caller asked for one."""
    return problem.device.type in RECORDERS or problem.graph is True


def run(problem: Problem) -> tuple[str, MetaGradients]:
    """Backend and result of a meta-step: by a graph if one is asked for or the default, else launched plainly.

    Raises:
        GraphRefused: A graph was asked for and cannot hold this call.
        ValueError, TypeError: As `meta_step`.
    """
    if problem.graph is False or modes.is_capturing(problem.device):
        return dispatch.meta_gradients(problem)
    if problem.graph is None and not _may_be_usual(problem):
        return dispatch.meta_gradients(problem)
    reason = why_not(problem)
    if reason is None:
        return CACHE.meta_gradients(problem)
    if problem.graph:
        raise GraphRefused(f"graph: expected a call that a graph can hold, found that {reason}")
    return dispatch.meta_gradients(problem)


def _may_be_usual(problem: Problem) -> bool:
    """Rules out, in microseconds, most of what `BY_DEFAULT` does not serve."""
    return any(isinstance(module, nn.Conv2d) for module in problem.model.modules())


def clear(model: nn.Module | None = None) -> None:
    """Drops recorded graphs and their memory, so that the next call records anew.

    Args:
        model: Whose graphs; None: all.
    """
    CACHE.clear(model)


def info() -> GraphInfo:
    """How many graphs are kept, were recorded, and how many calls they served."""
    return CACHE.info()
