"""A stand-in for the device that records graphs: on the CPU, a replay runs the function again on the same inputs.

It keeps what a CUDA graph keeps and no more: outputs stay in one place, Python's own state from the time of recording
is not looked at again by the code under test, and nothing runs while recording.
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

    made: list[ReplayingRecorder] = []  # noqa: RUF012 (a list for all of them, emptied by `stand_in`)

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
        # Poisoned: who reads before the first replay is found out.
        outputs = tuple(torch.full_like(t, torch.nan if t.is_floating_point() else 77) for t in self._like)
        self.recording = ReplayingRecording(function, outputs)
        return self.recording


class ReplayingRecording:
    """What `record` gave."""

    def __init__(self, function: graphs.Function, outputs: tuple[Tensor, ...]) -> None:
        self.outputs, self._function = outputs, function
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
    """Makes the CPU a device that records, with a fresh cache, for one test."""
    ReplayingRecorder.made.clear()
    cache = graphs.GraphCache(limit)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", ReplayingRecorder)
    monkeypatch.setattr(graphs, "CACHE", cache)
    return cache
