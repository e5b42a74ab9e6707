"""Settings for the duration of a call: precision, the attention kernel, streams of random numbers.

Most of them are per thread. torch's CPU generator and its switches for TF32 and attention kernels are per process, so
calls from several threads take turns on them, see `Turns`.
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
    """Enters all modes of a problem and restores them at the end, also after an error."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_attention.of(problem.method == "maml"))
        if problem.device.type == "cuda":
            stack.enter_context(_tf32.of(problem.precision == "tf32"))
        yield


class Turns:
    """Threads whose calls ask for the same value share a turn; the others wait until the turn is over.

    A nested call never waits: its thread already holds the turn, even if the nested call asks for another value. Turns
    are taken in the order random numbers, attention, TF32, so that two threads cannot deadlock. All calls ask for the
    same setting of the collector, so that turn never blocks.
    """

    def __init__(self) -> None:
        self._lock = threads.lasting_lock()
        self._changed = threading.Condition(self._lock)
        self._value: object = None
        self._inside: dict[object, int] = {}  # thread by ticket
        self._waiting = 0

    @contextmanager
    def of(self, value: object) -> Iterator[None]:
        """A turn shared by calls that ask for an equal value."""
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
        first = True  # for fairness, a new thread does not join a turn that others wait to end
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
        """Called at the start of a turn."""

    def end(self) -> None:
        """Called at the end of a turn."""


# Getter and setter of a switch, and the wanted value.
_Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


class _Switches(Turns):
    """Process-wide settings: a turn's first call sets them, its last one restores the caller's.

    Args:
        wanted: Returns the switches for a turn's value.
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
        """Whether the current turn set one of the caller's switches from True to False."""
        return any(setting is True for _, setting in self._before)


def _precision(allowed: object) -> list[_Switch]:
    """Strict float32 (or TF32) convolutions and matrix products on CUDA; torch's default mixes the two.

    From torch 2.9 on there are older and newer flags for the same thing, and reading an older one raises if the two
    disagree, as `torch.backends.cudnn.flags` in a forward would. So both are set, the older ones where the caller's
    own settings leave them readable.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    older: list[_Switch] = [
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), bool(allowed)),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high" if allowed else "highest"),
    ]
    older = [switch for switch in older if _is_readable(switch[0])]
    if not hasattr(cudnn, "conv"):
        return older
    name, setting = "fp32_precision", cast(Any, "tf32" if allowed else "ieee")
    flags: tuple[Any, ...] = (matmul, cudnn.conv, cudnn.rnn)
    newer = [(partial(getattr, flag, name), partial(setattr, flag, name), setting) for flag in flags]
    return older + 2 * newer  # twice, because torch resets one of them where another becomes "none"


def _is_readable(read: Callable[[], Any]) -> bool:
    try:
        read()
    except RuntimeError:  # the caller's older and newer flags disagree
        return False
    return True


def _plain_attention(only: object) -> list[_Switch]:
    """In torch, only the math kernel of attention has a second derivative."""
    cuda = torch.backends.cuda
    switches: list[_Switch] = [
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
    ]
    return switches if only else []


def _no_collector(_: object) -> list[_Switch]:
    """Turns off Python's automatic garbage collection."""
    return [(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), False)]


_attention, _tf32, _collector = _Switches(_plain_attention), _Switches(_precision), _Switches(_no_collector)


def without_collector() -> AbstractContextManager[None]:
    """Turns off automatic garbage collection; `collect` runs it at safe moments instead.

    This avoids a deadlock in torch. `torch.get_rng_state`, which `torch.utils.checkpoint` calls, holds the generator's
    lock while it wraps the state as a Python object. If the collector starts just then and frees an autograd graph,
    torch releases the GIL and waits for it again, still holding the generator's lock. Another thread that asks for the
    state meanwhile waits for the generator's lock, holding the GIL.
    """
    return _collector.of(True)


def collect() -> None:
    """Runs the collections that are due while `without_collector` is active; never a full one."""
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
    """Whether launches are now captured in a CUDA graph instead of being run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------------------------
# The end of a call, also by an interrupt


def undisturbed(call: Callable[[], Result]) -> Result:
    """Runs a call and restores this thread's torch settings afterwards, however the call ends.

    Context managers alone miss an exception that arrives between two of their own lines, as Ctrl-C may. The settings
    are restored twice, so that after an interrupt in the first attempt there is still the second.
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
    """Finishes what an interrupt left half done, such as context managers between two of their own lines.

    Python would otherwise finish them at some later time and restore outdated settings.
    """
    error = sys.exc_info()[1]
    if error is None or isinstance(error, Exception):
        return
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _settings() -> Callable[[], None]:
    """A function that restores this thread's torch settings to their present values."""
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
    """Forward passes draw from torch's generators as they are, as a captured call must.

    A graph cannot read or set a generator; captured draws use torch's CUDA generator at every replay.
    """

    def at(self, task: int, step: int) -> AbstractContextManager[object]:
        """Does nothing: forward passes have no streams of their own."""
        return nullcontext()


class KeyedRandomness:
    """Gives every (task, step) forward pass its own random stream, independent of what ran before.

    Args:
        seed: Keys the streams, together with task and step.
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
            generator.manual_seed(stream_seed(self._seed, task, step))
        fresh = [] if self.drawn else _states(self._generators)
        yield
        if not self.drawn:
            self.drawn = _moved(self._generators, fresh)


Randomness = KeyedRandomness | PlainRandomness

# All threads share the CPU generator: calls that set it must run alone, calls that do not may overlap.
_drawing = Turns()


def with_randomness(problem: Problem, compute: Callable[[Randomness], Result], draws: bool) -> tuple[Result, bool]:
    """Runs `compute`; if the model draws random numbers, every forward pass draws from its own stream.

    A trial run shows whether the model draws: if torch's generators did not move, the result stands. Otherwise
    everything is computed again with streams, in a turn of its own. The generators end where they started, except that
    the CPU generator advances by one draw if the caller gave no seed, so that the next call has other masks.

    Args:
        problem: The call.
        compute: Runs the forward passes of the call.
        draws: Whether the model is expected to draw; a wrong guess only costs time.

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
            # If nothing was drawn here, another thread advanced the generators.
            _put_back(found, start if randomness.drawn else now)
        if problem.seed is None and randomness.drawn:
            torch.randint(2**62, (), generator=torch.default_generator, device="cpu")
        return result, randomness.drawn


def with_seed(problem: Problem, compute: Callable[[Problem], Result]) -> Result:
    """`compute` of a problem that has a seed, for a family that draws its own random numbers.

    Without one from the caller it comes from torch's CPU generator, as in `with_randomness`: the generator advances by
    one draw, and stays where it was if `compute` raises.
    """
    if problem.seed is not None:
        return compute(problem)
    with without_collector(), _drawing.of(object()):
        result = compute(problem.replace(seed=_derived_seed(torch.default_generator.get_state())))
        torch.randint(2**62, (), generator=torch.default_generator, device="cpu")
        return result


def without_drawing(device: torch.device, work: Callable[[], Result]) -> Result:
    """Runs `work` in a turn of its own and restores torch's generators."""
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


def state_of(generator: torch.Generator) -> bytes:
    """A generator's state, to compare it."""
    return _bytes(generator.get_state())


def _bytes(state: Tensor) -> bytes:
    """A generator's state. It is stored on the host for every device, so reading it never synchronises."""
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _put_back(found: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(found, states, strict=True):
        generator.set_state(state)


def stream_seed(seed: int, task: int, step: int) -> int:
    """The seed of the random stream of a task's forward pass at a step: a 63-bit hash of integers of any size."""
    digest = hashlib.blake2b(repr((seed, task, step)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
