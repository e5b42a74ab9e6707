"""What holds for the duration of a call: precision, the form of attention, streams of random numbers.

All of it belongs to the thread that calls, but for what torch has one of a process: its CPU generator, its switches for
TF32 and for kinds of attention. Calls of several threads share these in turn, see `Turns`.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import threads
from .problem import Problem

Result = TypeVar("Result")


@contextmanager
def call_modes(problem: Problem) -> Iterator[None]:
    """All modes of a problem, put back at the end, also after an error."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_attention.of(problem.method == "maml"))
        if problem.device.type == "cuda":
            stack.enter_context(_tf32.of(problem.precision == "tf32"))
        yield


class Turns:
    """Calls of several threads that agree on something share a turn; others wait until the turn is over.

    A thread that is inside goes on inside, whatever a call within its call asks for. Who takes several turns takes them
    in the order random numbers, attention, TF32: in two orders, two threads would wait for each other. All agree on the
    collector, so nobody waits for that one.
    """

    def __init__(self) -> None:
        self._lock = threads.lasting_lock()
        self._changed = threading.Condition(self._lock)
        self._value: object = None
        self._inside: dict[object, int] = {}  # thread by ticket
        self._waiting = 0

    @contextmanager
    def of(self, value: object) -> Iterator[None]:
        """A turn for calls whose value equals this one."""
        ticket, thread = object(), threading.get_ident()
        try:
            with self._lock:
                if thread not in self._inside.values():
                    self._wait_for(value)
                starts = not self._inside
                self._inside[ticket] = thread
                if starts:
                    self._value = value
                    self.begin(value)
            yield
        finally:
            self.leave([ticket])

    def _wait_for(self, value: object) -> None:
        first = True  # who comes into a turn while others wait for its end waits with them
        self._waiting += 1
        try:
            while self._inside and (self._value != value or (first and self._waiting > 1)):
                threads.wait_for(self._changed, self._lock)
                first = False
        finally:
            self._waiting -= 1

    def tickets(self) -> list[object]:
        """The tickets of this thread."""
        thread = threading.get_ident()
        return [ticket for ticket, holder in list(self._inside.items()) if holder == thread]

    def leave(self, tickets: list[object]) -> None:
        """Gives tickets back; the last one ends the turn."""
        with self._lock:
            for ticket in tickets:
                if self._inside.pop(ticket, None) is not None and not self._inside:
                    self.end()
                    self._changed.notify_all()

    def begin(self, value: object) -> None:
        """At the start of a turn."""

    def end(self) -> None:
        """At its end."""


# What reads a switch, what sets it, and what it should be.
_Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


class _Switches(Turns):
    """Settings of the process: a turn's first call sets them, its last one puts the caller's back.

    Args:
        wanted: The switches for the value of a turn.
    """

    def __init__(self, wanted: Callable[[object], list[_Switch]]) -> None:
        super().__init__()
        self._wanted = wanted
        self._before: list[tuple[Callable[[Any], None], Any]] = []

    def begin(self, value: object) -> None:
        switches = self._wanted(value)
        self._before = [(write, read()) for read, write, _ in switches]
        for _, write, setting in switches:
            write(setting)

    def end(self) -> None:
        for write, setting in self._before:
            write(setting)
        self._before = []

    def switched_off(self) -> bool:
        """Whether a turn is on that set a switch of the caller's from True to False."""
        return any(setting is True for _, setting in self._before)


def _precision(allowed: object) -> list[_Switch]:
    """Strict float32 (or TF32) convolutions and matrix products on CUDA; torch's default mixes the two."""
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9; reading the older flags may raise there
        flags: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
        name, setting = "fp32_precision", cast(Any, "tf32" if allowed else "ieee")
    else:
        flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
        name, setting = "allow_tf32", bool(allowed)
    return [(partial(getattr, flag, name), partial(setattr, flag, name), setting) for flag in flags]


def _plain_attention(only: object) -> list[_Switch]:
    """Only the plain form of attention has a second derivative in torch."""
    cuda = torch.backends.cuda
    switches: list[_Switch] = [
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
    ]
    return switches if only else []


def _no_collector(_: object) -> list[_Switch]:
    """Python's garbage collector by itself, off."""
    return [(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), False)]


_attention, _tf32, _collector = _Switches(_plain_attention), _Switches(_precision), _Switches(_no_collector)


def without_collector() -> AbstractContextManager[None]:
    """Python's garbage collector does not start by itself; `collect` does its work at moments that are safe.

    torch holds the lock of a generator while it wraps the generator's state as an object (`torch.get_rng_state`, which
    `torch.utils.checkpoint` calls). If the collector starts just then and frees a graph of autograd, torch lets go of
    Python's own lock meanwhile, and waits for it again with the generator's lock held. Another thread that asks for the
    state then waits for the generator's lock with Python's held: both wait for ever.
    """
    return _collector.of(True)


def collect() -> None:
    """The collections that would have been due, if the collector is off for `without_collector`; never a full one."""
    if not _collector.switched_off():
        return
    (young, old, _), (most_young, most_old, _) = gc.get_count(), gc.get_threshold()
    if young > most_young > 0:
        gc.collect(1 if old > most_old else 0)


def autocast(problem: Problem) -> AbstractContextManager[object]:
    """bfloat16 matrix products and convolutions for precision "bf16", else nothing."""
    if problem.precision != "bf16":
        return nullcontext()
    return torch.autocast(problem.device.type, dtype=torch.bfloat16)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph instead of being run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------------------------
# Whatever ends a call


def undisturbed(call: Callable[[], Result]) -> Result:
    """Runs a call; whatever ends it, torch's settings of this thread are afterwards what they were.

    Context managers do that too, but for an exception that arrives between two of their own lines, as Ctrl-C may. The
    settings are put back twice: an interrupt in the first attempt leaves the second.
    """
    put_back = _settings()
    try:
        try:
            return call()
        finally:
            _finish_frames()
            put_back()
    finally:
        _finish_frames()
        put_back()


def _finish_frames() -> None:
    """Lets go of what an interrupt left half done, such as context managers between two of their own lines.

    Whenever Python got round to that, it would put back settings of then.
    """
    error = sys.exc_info()[1]
    if error is None or isinstance(error, Exception):
        return
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _settings() -> Callable[[], None]:
    """What puts torch's settings of this thread back to what they are now."""
    functorch, hooks = torch._C._functorch, torch._C._autograd
    depth = functorch.get_dynamic_layer_stack_depth()
    grad_mode, cores = torch.is_grad_enabled(), torch.get_num_threads()
    no_saved_hooks = hooks._saved_tensors_hooks_get_disabled_error_message()
    saved_hooks = hooks._top_saved_tensors_default_hooks(False)
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}
    tickets = [(turns, turns.tickets()) for turns in (_attention, _tf32, _collector, _drawing)]
    locks = threads.held_locks()

    def put_back() -> None:
        for turns, held in tickets:
            left = [ticket for ticket in turns.tickets() if ticket not in held]
            if left:
                turns.leave(left)
        threads.free_locks(locks)
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        while (top := hooks._top_saved_tensors_default_hooks(False)) is not None and top != saved_hooks:
            hooks._pop_saved_tensors_default_hooks()
        torch.set_grad_enabled(grad_mode)
        if torch.get_num_threads() != cores:
            torch.set_num_threads(cores)
        for kind, (enabled, dtype) in autocast.items():
            if torch.is_autocast_enabled(kind) != enabled or torch.get_autocast_dtype(kind) != dtype:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
        if hooks._saved_tensors_hooks_get_disabled_error_message() != no_saved_hooks:
            if no_saved_hooks is None:
                hooks._saved_tensors_hooks_enable()
            else:
                hooks._saved_tensors_hooks_disable(no_saved_hooks)

    return put_back


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def generators(device: torch.device) -> list[torch.Generator]:
    """torch's own generators that a forward pass on a device may draw from."""
    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


class PlainRandomness:
    """Forward passes draw from torch's generators as they are: what a captured call must do.

    A graph cannot read or set a generator; whatever is captured draws from torch's CUDA generator at every replay.
    """

    def at(self, task: int, step: int) -> AbstractContextManager[object]:
        """No stream of its own for any forward pass."""
        return nullcontext()


class KeyedRandomness:
    """Gives every (task, step) forward pass a random stream of its own, whatever ran before it.

    Args:
        seed: Keys the streams, with task and step.
        device: Where the model is; forward passes draw from torch's generators there and on the CPU.

    Attributes:
        drawn: Whether a forward pass drew a number so far.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = generators(device)
        self._seed = seed
        self.drawn = False

    @contextmanager
    def at(self, task: int, step: int) -> Iterator[None]:
        """The stream of one task's forward pass at one step (the query pass counts as step K)."""
        for generator in self._generators:
            generator.manual_seed(_key(self._seed, task, step))
        fresh = [] if self.drawn else _states(self._generators)
        yield
        if not self.drawn:
            self.drawn = _moved(self._generators, fresh)


Randomness = KeyedRandomness | PlainRandomness

# There is one generator on the CPU for all threads: who sets it must be alone, who leaves it alone need not be.
_drawing = Turns()


def with_randomness(problem: Problem, compute: Callable[[Randomness], Result], draws: bool) -> tuple[Result, bool]:
    """`compute`, every forward pass with a stream of random numbers of its own if the model draws any.

    Whether it does, trying tells: when torch's generators are afterwards where they were, nothing was drawn and the
    result stands. Else all is computed again with streams, alone among the threads' calls. The generators end where
    they started, but for one draw of the CPU's where the caller gave no seed, so that the next call has other masks.

    Args:
        problem: The call.
        compute: What runs its forward passes.
        draws: Whether the model is thought to draw; only how soon the answer is found depends on it.

    Returns:
        What `compute` returned, and whether the model drew.
    """
    if not problem.keyed or is_capturing(problem.device):
        return compute(PlainRandomness()), draws
    found = generators(problem.device)
    before = None
    if not draws:
        with _drawing.of("nobody sets a generator"):
            before = _states(found)
            try:
                result = compute(PlainRandomness())
            except BaseException:
                _put_back(found, before)
                raise
            if not _moved(found, before):
                return result, False
    with _drawing.of(object()):
        now = _states(found)
        start = now if before is None else before
        seed = _derived_seed(start[0]) if problem.seed is None else problem.seed
        randomness = KeyedRandomness(seed, problem.device)
        try:
            result = compute(randomness)
        finally:
            # If nothing was drawn here, it was another thread that moved the generators on.
            _put_back(found, start if randomness.drawn else now)
        if problem.seed is None and randomness.drawn:
            torch.randint(2**62, (), generator=torch.default_generator, device="cpu")
        return result, randomness.drawn


def without_drawing(device: torch.device, work: Callable[[], Result]) -> Result:
    """Runs something, alone among the threads' calls, and puts torch's generators back."""
    found = generators(device)
    with without_collector(), _drawing.of(object()):
        before = _states(found)
        try:
            return work()
        finally:
            _put_back(found, before)


def _derived_seed(state: Tensor) -> int:
    twin = torch.Generator("cpu")
    twin.set_state(state)
    return int(torch.randint(2**62, (), generator=twin, device="cpu"))


def _states(found: list[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in found]


def _moved(found: list[torch.Generator], before: list[Tensor]) -> bool:
    return any(_bytes(now) != _bytes(state) for now, state in zip(_states(found), before, strict=True))


def _bytes(state: Tensor) -> bytes:
    """A generator's state; it lies on the host, whatever the device, so that reading it waits for nothing."""
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _put_back(found: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(found, states, strict=True):
        generator.set_state(state)


def _key(*numbers: int) -> int:
    """A 63-bit hash of integers of any size: the seed of one stream."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
