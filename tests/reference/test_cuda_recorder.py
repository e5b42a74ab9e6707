"""The order in which `CudaRecorder` calls torch.cuda, on a stand-in that only logs the calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from signmaml_ext import graphs

DEVICE = torch.device("cuda", 1)


class WrittenDown:
    """Stand-in for torch.cuda: a stream is a name, and every call adds a line to `log`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current, self.debug_mode, self.made = "main", 0, 0
        cuda = self

        class Stream:
            def __init__(self, name: object) -> None:
                cuda.made += isinstance(name, torch.device)
                self.name = name if isinstance(name, str) else f"side{cuda.made}"

            def wait_stream(self, other: Stream) -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Event) -> None:
                cuda.log.append(f"{self.name} waits for the event")

        class Event:
            def record(self, stream: Stream) -> None:
                cuda.log.append(f"event on {stream.name}")

        class Graph:
            def replay(self) -> None:
                cuda.log.append(f"replay on {cuda.current}")

            def pool(self) -> tuple[int, int]:
                return (0, 7)

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, Graph

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device == DEVICE
        self.log.append("device {")
        try:
            yield
        finally:
            self.log.append("}")

    @contextmanager
    def graph(self, graph: Any, **keywords: Any) -> Iterator[None]:
        inspect.signature(GRAPH).bind(graph, **keywords)
        self.log.append(f"recording on {keywords['stream'].name}, {keywords['capture_error_mode']}")
        yield
        self.log.append("recorded")

    def get_device_properties(self, device: torch.device) -> Any:
        assert device == DEVICE
        return SimpleNamespace(total_memory=4000)

    def memory_snapshot(self) -> list[dict[str, Any]]:
        """As torch's allocator reports segments, of which two are the graph's."""
        pools = ((0, 0), (0, 7), (0, 7), (0, 8))
        return [{"segment_pool_id": pool, "total_size": 10**i} for i, pool in enumerate(pools)]

    def current_stream(self) -> Any:
        return self.Stream(self.current)

    def get_sync_debug_mode(self) -> int:
        return self.debug_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.debug_mode = {"error": 2}.get(mode, mode)  # type: ignore[call-overload, assignment]
        self.log.append(f"waiting is {'an error' if self.debug_mode == 2 else 'allowed'}")


GRAPH = torch.cuda.graph
NAMES = (
    *("Stream", "Event", "CUDAGraph", "stream", "device", "graph"),
    *("current_stream", "get_sync_debug_mode", "set_sync_debug_mode", "get_device_properties", "memory_snapshot"),
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> WrittenDown:
    written = WrittenDown()
    for name in NAMES:
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(written, name))
    monkeypatch.setattr(graphs, "_failed", [])
    return written


def test_warm_up_recording_and_replay_in_their_order(cuda: WrittenDown) -> None:
    recorder = graphs.RECORDERS["cuda"](DEVICE)

    def function() -> tuple[torch.Tensor, ...]:
        cuda.log.append(f"function on {cuda.current}")
        return (torch.ones(2),)

    recorder.warm_up(function)
    assert cuda.log == [
        "device {",
        "side1 waits for main",
        "function on side1",
        "waiting is an error",
        "function on side1",
        "waiting is allowed",
        "main waits for side1",
        "}",
    ]
    cuda.log.clear()
    recording = recorder.record(function)
    assert [line for line in cuda.log if line not in ("device {", "}")] == [
        "recording on side1, thread_local",
        "function on main",  # torch.cuda.graph, not the recorder, makes the side stream current
        "recorded",
    ]
    assert torch.equal(recording.outputs[0], torch.ones(2))
    assert recording.bytes == 10 + 100, "the segments of its own pool"
    assert recorder.most_bytes == 4000 // graphs.SHARE
    cuda.log.clear()
    with cuda.stream(cuda.Stream("other")), recording.in_turn():
        cuda.log.append("inputs")
        recording.replay()
        cuda.log.append("outputs")
    assert cuda.log == [
        "device {", "other waits for the event", "inputs", "replay on other", "outputs", "event on other", "}",
    ]  # fmt: skip


def test_every_graph_has_a_stream_of_its_own(cuda: WrittenDown) -> None:
    for _ in range(3):
        graphs.CudaRecorder(DEVICE).warm_up(lambda: ())
    assert [line for line in cuda.log if "waits for main" in line] == [f"side{n} waits for main" for n in (1, 2, 3)]


def test_a_function_that_waits_is_refused_before_it_is_recorded(cuda: WrittenDown) -> None:
    def function() -> tuple[torch.Tensor, ...]:
        if cuda.debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        return ()

    with pytest.raises(graphs.GraphRefused, match=r"never make the host wait .*\(called a synchronizing"):
        graphs.CudaRecorder(DEVICE).warm_up(function)
    assert cuda.debug_mode == 0 and cuda.log[-2:] == ["main waits for side1", "}"]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_errors_of_the_function_are_its_own(cuda: WrittenDown, kind: type[Exception]) -> None:
    def function() -> tuple[torch.Tensor, ...]:
        raise kind("labels")

    with pytest.raises(kind, match=r"^labels$"):
        graphs.CudaRecorder(DEVICE).warm_up(function)
    assert cuda.log[-2:] == ["main waits for side1", "}"]

    calls: list[int] = []

    def second_time() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return () if len(calls) == 1 else function()

    with pytest.raises(kind, match=r"^labels$"):
        graphs.CudaRecorder(DEVICE).warm_up(second_time)
    assert cuda.debug_mode == 0


def test_a_recording_that_fails_is_refused_and_its_graph_stays(cuda: WrittenDown) -> None:
    def function() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(graphs.GraphRefused, match="can be recorded, found: CUDA error: operation not permitted"):
        graphs.CudaRecorder(DEVICE).record(function)
    assert len(graphs._failed) == 1
