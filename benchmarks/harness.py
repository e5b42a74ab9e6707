"""Reproducible timing: interleaved repetitions, paired ratios, medians and quartiles, and a stamp of the machine.

Candidates are interleaved: each round takes one sample of each, and every other round reverses the order. A slow phase
of the machine thus affects all of them and cancels in the ratio of two samples of a round. Times are those between two
events on the stream on a CUDA device, and those of a monotonic clock on the CPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from signmaml_ext.info import info

ROOT = Path(__file__).resolve().parents[1]
FLUSH_BYTES = 256 << 20  # larger than the last-level cache of common CPUs and the L2 of common GPUs


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Comparison:
    """Samples of each candidate in milliseconds per call; sample i of each belongs to round i."""

    samples: Mapping[str, Sequence[float]]

    def timing(self, name: str) -> Summary:
        """Milliseconds per call."""
        return Summary.of(self.samples[name])

    def ratio(self, of: str, to: str) -> Summary:
        """How many times faster `of` is than `to`: time of `to` over time of `of`, within each round."""
        return Summary.of([b / a for a, b in zip(self.samples[of], self.samples[to], strict=True)])

    def rate(self, name: str, amount: float) -> Summary:
        """`amount` (per call) per nanosecond: GB/s for bytes, GFLOP/s for operations."""
        return Summary.of([amount / ms / 1e6 for ms in self.samples[name]])


class Flush:
    """Evicts the caches, so that a kernel reads its operands from memory."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device,
    least: int = 3,
    most: int = 1000,
    sample_ms: float = 20,
    flush: Callable[[], object] | None = None,
    queued: bool = False,
) -> Comparison:
    """Times candidates, interleaved.

    Args:
        candidates: The calls, by name; each runs once before anything is timed.
        seconds: Time for all rounds together.
        device: Where they run; a CUDA device is synchronised.
        least: Minimum number of rounds, however long they take.
        most: Maximum number of rounds.
        sample_ms: A sample repeats a call for about this long, to reduce the clock's noise.
        flush: Called before each sample, outside the clock; a sample is then a single call.
        queued: On a CUDA device, time the device alone: a short kernel would otherwise wait for the host's next launch.
    """
    sample = _queued_sample if queued and device.type == "cuda" else _sample
    most_calls = MOST_QUEUED if sample is _queued_sample else 1000
    calls = {}
    for name, run in candidates.items():
        once = sample(run, 1, device)
        if once < 10 * sample_ms:  # a first call includes cache and page misses, which matter only if it is short
            once = min(once, sample(run, 1, device))
        calls[name] = 1 if flush else max(1, min(most_calls, round(sample_ms / max(once, 1e-4))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    order = list(candidates)
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name in order:
            if flush:
                flush()
            samples[name].append(sample(candidates[name], calls[name], device))
        order.reverse()
        rounds += 1
    return Comparison(samples)


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds per call."""
    if device.type == "cuda":
        return _on_device(run, calls, device)[0]
    begin = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - begin) / 1e6 / calls


def _on_device(run: Callable[[], object], calls: int, device: torch.device, sleep: int = 0) -> tuple[float, bool]:
    """Milliseconds per call by the device's clock, after a sleep of so many of its clock cycles, and whether it had not
    reached the first call when the host had queued the last one."""
    torch.cuda.synchronize(device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep:
        torch.cuda._sleep(sleep)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    behind = not start.query()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / calls, behind


MOST_QUEUED = 200  # calls; a device queues about a thousand launches
FIRST_SLEEP, LONGEST_SLEEP = 200_000, 2**30  # clock cycles: about 0.1 ms and 0.5 s


def _queued_sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds per call on the device, which sleeps until the host has queued all of them.

    If a sleep was too short, or if a call makes the host wait, the sample is repeated with a longer one, up to
    LONGEST_SLEEP.
    """
    sleep = FIRST_SLEEP
    while True:
        found, behind = _on_device(run, calls, device, sleep)
        if behind or sleep >= LONGEST_SLEEP:
            return found
        sleep *= 4


def matrix_product(
    device: torch.device, n: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], Any], int]:
    """A large square matrix product, the practical peak of the machine, and its side n."""
    n = n or (8192 if device.type == "cuda" else 1536)
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), n


def stamp(device: torch.device) -> dict[str, Any]:
    """Machine, date, versions and command of a measurement."""
    found = info()
    versions = {key: found["versions"][key] for key in ("signmaml_ext", "python", "torch", "torch_cuda", "driver")}
    return {
        "command": command_line(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "instruction_set": found["cpu"]["instruction_set"],
        "built_with_cuda": found["native"]["built_with_cuda"],
        "build_type": found["native"]["build_type"],
        **versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields without the places on this machine."""
    return {name: value for name, value in config.items() if name not in ("data_root", "out")}


def command_line() -> str:
    """The command as typed, with paths relative to the project's folder."""
    words = []
    for word in (sys.argv[0], *sys.argv[1:]):
        path = Path(word)
        words.append(str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else word)
    return "python " + shlex.join(words)


def commit() -> str:
    """The measured commit, marked if tracked files differ from it; "not a clone" in a copy without git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "not a clone"
    # Changes to results and documentation do not affect the measured code.
    changed = git("status", "--porcelain", "-uno", "--", ":!benchmarks/results", ":!docs", ":!README.md")
    return head + ("+changes" if changed else "")


def processor() -> str:
    """The processor's name and how many cores this process may use.

    Includes family and model if /proc/cpuinfo has them, because virtual machines use one name for several generations.
    """
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        first = path.read_text().split("\n\n", 1)[0]
        facts = dict(re.findall(r"^([^\t:]+?)\s*: (.+)$", first, re.MULTILINE))
        name = facts.get("model name", name).strip()
        if "cpu family" in facts and "model" in facts:
            name += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def plain(value: object) -> object:
    """The `default` of `json.dumps`: turns summaries into plain rounded numbers."""
    if isinstance(value, Summary):
        return {key: float(f"{getattr(value, key):.5g}") for key in ("median", "low", "high")} | {"n": value.samples}
    raise TypeError(f"{type(value)} in a result")


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result file as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=plain) + "\n")
    print(f"wrote {path}")


class PeakMemory:
    """Peak memory, of this process (CPU) or of torch on the device, above the memory in use at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            # Freed memory that is still resident would be reused and hide that much of the peak.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # reset the kernel's high-water mark
            self.before = _resident("VmRSS")

    def mib(self) -> float:
        """MiB above the memory in use at construction."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        return (_resident("VmHWM") - self.before) / 2**20


def _resident(key: str) -> int:
    """Bytes as reported by the kernel."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def require(condition: bool, message: str) -> None:
    """Exits with a message unless a condition for a valid measurement holds."""
    if not condition:
        print(message, file=sys.stderr)
        raise SystemExit(1)
