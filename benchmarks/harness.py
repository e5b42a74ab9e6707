"""Timing that a sceptic can rerun: interleaved repetitions, medians and quartiles, and where it all was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import signmaml_ext

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median, quartiles, number of repetitions."""

    median_ms: float
    low_ms: float
    high_ms: float
    repetitions: int


def compare(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float, device: torch.device, least: int = 3
) -> dict[str, Timing]:
    """Times candidates in turns, so that a slow minute of the machine hits all of them.

    Args:
        candidates: What to run, by name; each is run twice before anything is timed.
        seconds: Time for all repetitions of all candidates together.
        device: Where they run; a CUDA device is waited for.
        least: Repetitions at least, however long they take.
    """
    for run in candidates.values():
        for _ in range(2):
            run()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, run in candidates.items():
            samples[name].append(_once(run, device))
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high, len(values))


def stamp(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "signmaml_ext": signmaml_ext.__version__,
        "built_with_cuda": signmaml_ext.dispatch.backend_status()["cuda"] is None,
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """A result file: JSON with the timings as plain numbers."""

    def plain(value: object) -> object:
        if isinstance(value, Timing):
            return {key: round(number, 4) for key, number in asdict(value).items()}
        raise TypeError(f"{type(value)} in a result")

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=plain) + "\n")
    print(f"wrote {path}")
