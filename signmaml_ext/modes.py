"""What is set for the duration of a call and put back after it: BatchNorm's mode, randomness, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checks import Problem

# BatchNorm of any dimension.
BatchNorm = nn.modules.batchnorm._BatchNorm


@contextmanager
def call_modes(problem: Problem) -> Iterator[None]:
    """All modes of a problem, restored at the end, also after an error."""
    with ExitStack() as stack:
        stack.enter_context(batch_norm_mode(problem.model, problem.batch_norm))
        if problem.method == "maml":
            # Only the plain form of attention has a second derivative in torch.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if problem.device.type == "cuda":
            stack.enter_context(_tf32(problem.precision == "tf32"))
        yield


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """BatchNorm on the statistics of the batch at hand ("batch") or on its running ones, in train and eval alike.

    With `track_running_stats` off, torch's forward neither reads nor writes the running buffers.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training = mode == "batch"
            norm.track_running_stats = mode == "running"
        yield
    finally:
        for norm, (training, track_running_stats) in zip(norms, before, strict=True):
            norm.training = training
            norm.track_running_stats = track_running_stats


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the model's forward does to its buffers is forgotten at the end."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        for module, buffers in before:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Strict float32 (or TF32) convolutions and matrix products on CUDA; torch's default mixes the two."""
    flags: list[Any]
    attribute, value = "allow_tf32", cast(Any, allowed)
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9; reading the older flags may raise there
        flags = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
        attribute, value = "fp32_precision", "tf32" if allowed else "ieee"
    else:
        flags = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [getattr(flag, attribute) for flag in flags]
    try:
        for flag in flags:
            setattr(flag, attribute, value)
        yield
    finally:
        for flag, old in zip(flags, before, strict=True):
            setattr(flag, attribute, old)


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

    def __enter__(self) -> PlainRandomness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def at(self, task: int, step: int) -> AbstractContextManager[object]:
        """No stream of its own for any forward pass."""
        return nullcontext()


def randomness(problem: Problem) -> KeyedRandomness | PlainRandomness:
    """Where the forward passes of a call that runs task by task draw from."""
    if not problem.keyed or is_capturing(problem.device):
        return PlainRandomness()
    return KeyedRandomness(problem.seed, problem.device)


class KeyedRandomness:
    """Gives every (task, step) forward pass a random stream of its own, whatever ran before it.

    torch's generators on the CPU and on `device` are put back at the end, so the caller's stream is not disturbed.
    Without a seed, one is derived from the CPU generator; only then, and only if a forward pass drew a number, that
    generator is advanced by one draw, so that the next call has other masks.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        if is_capturing(device):
            raise RuntimeError(
                "signmaml_ext: expected a call of this model before the CUDA graph is captured (the first call looks "
                "at the model, which a graph cannot hold), found the first one inside the capture"
            )
        self._advance = seed is None
        self._generators = generators(device)
        if seed is None:
            twin = torch.Generator("cpu")
            twin.set_state(torch.default_generator.get_state())
            seed = int(torch.randint(2**62, (), generator=twin, device="cpu"))
        self._seed = seed
        self._drawn = False

    def __enter__(self) -> KeyedRandomness:
        self._before = [generator.get_state() for generator in self._generators]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)
        if self._advance and self._drawn and kind is None:
            torch.randint(2**62, (), generator=torch.default_generator, device="cpu")

    @contextmanager
    def at(self, task: int, step: int) -> Iterator[None]:
        """The stream of one task's forward pass at one step (the query pass counts as step K)."""
        for generator in self._generators:
            generator.manual_seed(_mix(self._seed, task, step))
        watch = self._advance and not self._drawn
        fresh = [generator.get_state() for generator in self._generators] if watch else []
        yield
        if watch:
            pairs = zip(self._generators, fresh, strict=True)
            self._drawn = any(not torch.equal(generator.get_state(), state) for generator, state in pairs)


def _mix(*words: int) -> int:
    """A 63-bit hash of integers (the finaliser of splitmix64, word by word)."""
    mask, state = 2**64 - 1, 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
