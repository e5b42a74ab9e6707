"""A CPU stand-in for a device that records graphs: a replay runs the function again on the same inputs.

It guarantees only what a CUDA graph does: outputs stay in place, the code under test does not look again at Python
state from the time of recording, and nothing runs while recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from signmaml_ext import graphs


class ReplayingRecorder:
    """Records by remembering the function."""

    made: list[ReplayingRecorder] = []  # noqa: RUF012 (shared by all instances; `stand_in` empties it)
    most_bytes = 2**40

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.warm_ups = 0
        self.recording: ReplayingRecording | None = None
        self._like: tuple[Tensor, ...] = ()
        ReplayingRecorder.made.append(self)

    def warm_up(self, function: graphs.Function) -> None:
        for _ in range(2):
            self._like = function()
            self.warm_ups += 1

    def record(self, function: graphs.Function) -> ReplayingRecording:
        assert self.warm_ups, "a function is warmed up before it is recorded"
        # Poison the outputs, to detect reads before the first replay.
        outputs = tuple(torch.full_like(t, torch.nan if t.is_floating_point() else 77) for t in self._like)
        self.recording = ReplayingRecording(function, outputs)
        return self.recording


class ReplayingRecording:
    """The result of `record`."""

    def __init__(self, function: graphs.Function, outputs: tuple[Tensor, ...]) -> None:
        self.outputs, self._function = outputs, function
        self.bytes = sum(output.nbytes for output in outputs)
        self._busy = False
        self.replays = 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        assert not self._busy
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def replay(self) -> None:
        assert self._busy, "replays take turns"
        self.replays += 1
        for output, value in zip(self.outputs, self._function(), strict=True):
            output.copy_(value)


def stand_in(monkeypatch: pytest.MonkeyPatch, limit: int = graphs.LIMIT) -> graphs.GraphCache:
    """Makes the CPU a recording device with a fresh cache, for one test."""
    ReplayingRecorder.made.clear()
    cache = graphs.GraphCache(limit)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", ReplayingRecorder)
    monkeypatch.setattr(graphs, "CACHE", cache)
    return cache
