"""metrics.jsonl, TensorBoard and progress."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from signmaml.loggers import MetricsFile, Progress, TensorBoard, clock, counting, read_metrics, tensorboard_wanted


def record(iteration: int, split: str = "train", **values: float) -> dict:
    return {"iteration": iteration, "split": split, "loss": 1.0 / iteration, **values}


def written(path: Path, iterations: range) -> bytes:
    metrics = MetricsFile(path, keep_until=0)
    for iteration in iterations:
        metrics.write(record(iteration, accuracy=1 / 3))
    metrics.sync()
    metrics.close()
    return path.read_bytes()


def test_a_crash_at_any_byte_leaves_a_consistent_file(tmp_path: Path) -> None:
    """Cut the file anywhere, go back to a checkpoint, write on: the result is the uninterrupted file."""
    path = tmp_path / "metrics.jsonl"
    whole = written(path, range(1, 7))
    complete = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(complete[2] + 1, len(whole) + 1, 3):
        path.write_bytes(whole[:cut])
        metrics = MetricsFile(path, keep_until=3)  # the checkpoint was made at iteration 3
        for iteration in range(4, 7):
            metrics.write(record(iteration, accuracy=1 / 3))
        metrics.close()
        assert path.read_bytes() == whole, cut


def test_garbage_after_a_crash_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written(path, range(1, 4)) + b"\0\0\0\n" + b'{"iteration": 9, "split": "train"}\n')
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2, 3]
    path.write_bytes(b'[1]\n{"iteration": 1}\n')
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none") == []


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, keep_until=0)
    metrics.write({"iteration": 1, "split": "val", "loss": math.nan, "ci95": math.inf})
    metrics.close()
    assert json.loads(path.read_text()) == {"iteration": 1, "split": "val", "loss": None, "ci95": None}


def test_tensorboard_holds_the_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, start=0)
    for iteration in (10, 20):
        board.write(record(iteration, "val", accuracy=iteration / 100))
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("val/accuracy")] == [(10, 0.1), (20, 0.2)]
    assert set(events.Tags()["scalars"]) == {"val/accuracy", "val/loss"}


def test_tensorboard_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in (True, False):
        found = object() if installed else None
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert [tensorboard_wanted(choice) for choice in (None, True, False)] == [installed, True, False]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(20, 10, stream=stream) as progress:
        for _ in range(10):
            progress.advance()
        progress.write(record(20, "val", accuracy=0.5, ci95=0.01))
    text = stream.getvalue()
    assert "20/20" in text and "it/s" in text and "accuracy 50.0 +- 1.0%" in text


def test_progress_prints_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Progress(20, 0, stream=stream) as progress:
        progress.advance()
        progress.write(record(1))  # too soon for a line
        progress.write(record(1, "val"))
        monkeypatch.setattr(Progress, "seconds_between_lines", 0.0)
        progress.advance()
        progress.write({"iteration": 2, "split": "train", "loss": None})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("iteration  1/20  val   loss 1  (") and "it/s" in lines[0] and "left" in lines[0]
    assert "loss nan" in lines[1]


def test_progress_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 0, enabled=False) as progress, counting("test", 5, enabled=False) as count:
        progress.advance()
        progress.write(record(1, "val"))
        count(5)
    assert capsys.readouterr() == ("", "")


def test_counting_is_one_line_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("test", 5) as count:
        count(3)
        count(2)
    assert capsys.readouterr().out == "test: 5 tasks ...\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3661, "1:01:01"), (math.inf, "unknown")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
