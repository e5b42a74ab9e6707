"""Outputs for the metrics of a run: metrics.jsonl, TensorBoard, the terminal.

A *record* is a flat dictionary with `iteration` (meta-iterations done) and `split` ("train" or "val"; for experiment
trackers also "test"). Records contain nothing that depends on the clock, so a resumed run's metrics.jsonl equals an
uninterrupted run's byte for byte.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .files import write_atomically

Record = Mapping[str, Any]


class MetricsFile:
    """A JSON-lines file of records, open for appending.

    Args:
        path: The file; created if it does not exist.
        keep_until: Records of later iterations are dropped first, as is a last line cut short by a crash.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["iteration"] <= keep_until]
        write_atomically(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: Record) -> None:
        """Appends a record; a number that is not finite becomes null."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Forces the records to disk; call it before a checkpoint, which must not be ahead of the metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, up to the first incomplete line; empty if there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            break
        records.append(record)
    return records


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers_of(record: Record) -> dict[str, int | float]:
    """A record's numbers under `split/name`, as trackers have them."""
    return {
        f"{record['split']}/{name}": value
        for name, value in record.items()
        if name not in ("iteration", "split") and isinstance(value, (int, float))
    }


def tensorboard_wanted(chosen: bool | None) -> bool:
    """Resolves a configuration's `tensorboard`, where None means "if it is installed"."""
    return importlib.util.find_spec("tensorboard") is not None if chosen is None else chosen


class TensorBoard:
    """Writes records as TensorBoard scalars `split/name`.

    Args:
        folder: Where the event files go.
        start: Iteration the run continues from; later events of an earlier process are hidden.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "tensorboard: expected the package tensorboard (pip install tensorboard), found none"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, record: Record) -> None:
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere.

    Args:
        total: Iterations of the run.
        start: Iterations done already.
        enabled: False shows nothing.
        stream: Output stream; None: stderr for the bar, stdout for lines.
    """

    seconds_between_lines = 5.0

    def __init__(self, total: int, start: int, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._enabled, self._total, self._start, self._done = enabled, total, start, start
        self._began = self._last_line = time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar: Any = None
        self._stream = sys.stdout if stream is None else stream
        bar_stream = sys.stderr if stream is None else stream
        if enabled and bar_stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="it", file=bar_stream, dynamic_ncols=True, desc="train")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Counts one iteration as done (on an accelerator, as launched)."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)

    def write(self, record: Record) -> None:
        """Shows the newest numbers."""
        self._shown[str(record["split"])] = _headline(record)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{split} {text}" for split, text in self._shown.items()))
            return
        now = time.monotonic()
        due = record["split"] == "val" or now - self._last_line >= self.seconds_between_lines
        if self._enabled and due:
            self._last_line = now
            self._print_line(record, now)

    def _print_line(self, record: Record, now: float) -> None:
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else math.inf
        timing = f"{rate:.1f} it/s, {clock(left)} left"
        numbers = f"{record['split']:<5} {_headline(record)}"
        print(
            f"iteration {self._done:>{len(str(self._total))}}/{self._total}  {numbers}  ({timing})", file=self._stream
        )
        self._stream.flush()

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=self._stream, flush=True)


@contextmanager
def counting(name: str, total: int, *, enabled: bool = True, unit: str = "task") -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each amount done; shows a bar on a terminal, one line at the start elsewhere."""
    if not enabled:
        yield lambda amount: None
        return
    if not sys.stderr.isatty():
        print(f"{name}: {total} {unit}s ...", flush=True)
        yield lambda amount: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, desc=name, dynamic_ncols=True) as bar:

        def count(amount: int) -> None:
            bar.update(amount)

        yield count


def _headline(record: Record) -> str:
    if record.get("accuracy") is None:
        return f"loss {_number(record['loss'], '.4g')}"
    interval = f" +- {100 * record['ci95']:.1f}" if record.get("ci95") is not None else ""
    return f"accuracy {_number(100 * record['accuracy'], '.1f')}{interval}%, loss {_number(record['loss'], '.3f')}"


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
