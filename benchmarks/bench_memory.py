"""Memory of tasks in full precision and as int8 step counts: python benchmarks/bench_memory.py [--out FILE]

A network of P parameters that runs on the flat-buffer operators, T tasks, K sign steps. Each case runs in its own
process and reports the bytes of the T adapted models, and the peak above the memory in use before the call (resident
memory on a CPU, allocated memory on a GPU). "full, in chunks" uses full precision for as many tasks at a time as the
int8 form processes together, which shows what chunks save without the counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

import signmaml_ext
from signmaml_ext import CompactParams, compact

STEPS = 5
CASES = ("adapt full", "adapt int8", "meta_step full", "meta_step full, in chunks", "meta_step int8")
OPTIONS = {"inner_lr": 0.01, "inner_steps": STEPS, "loss": "mse"}


def network() -> nn.Module:
    """1-40-40-1 with an activation that no whole-step kernel supports."""
    return nn.Sequential(nn.Linear(1, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 1))


def held_bytes(adapted: Any) -> int:
    """Bytes of the adapted models of all tasks."""
    tensors = adapted.counts if isinstance(adapted, CompactParams) else adapted
    return sum(value.nbytes for value in tensors.values())


def call(case: str, model: nn.Module, data: list[Tensor]) -> int | None:
    """Runs one case; returns the bytes of its result if it keeps the adapted models."""
    state = "int8" if "int8" in case else "full"
    if case.startswith("adapt"):
        return held_bytes(signmaml_ext.adapt(model, *data[:2], **OPTIONS, task_state=state))
    if "chunks" in case:
        size = compact.CHUNK_BYTES // sum(p.nbytes for p in model.parameters())
        for parts in zip(*(value.split(size) for value in data), strict=True):
            signmaml_ext.meta_step(model, *parts, **OPTIONS)
    else:
        signmaml_ext.meta_step(model, *data, **OPTIONS, task_state=state)
    return None


def peak_of(work: Callable[[], int | None], device: torch.device) -> tuple[int | None, int]:
    """The work's result and its peak memory above the memory in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = work()
        return held, torch.cuda.max_memory_allocated() - before
    before = resident()
    held = work()
    return held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def resident() -> int:
    """This process's resident memory. Linux only, like the package."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(case: str, tasks: int) -> dict[str, int | None]:
    """One case in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = network().to(device)
    data = [torch.randn(tasks, 10, 1, device=device) for _ in range(4)]
    small = [value[:2] for value in data]
    call(case, model, small)  # load everything that a first call loads before measuring
    held, peak = peak_of(lambda: call(case, model, data), device)
    return {"held_bytes": held, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=40_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help="this one only, in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.tasks)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in network().parameters())
    stamp = harness.stamp(device)
    print(f"T = {arguments.tasks}, P = {parameters}, K = {STEPS}, {stamp['device']}")
    rows = {}
    for case in CASES:
        command = [sys.executable, __file__, "--tasks", str(arguments.tasks), "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[case] = json.loads(done.stdout)
        held, peak = rows[case]["held_bytes"], rows[case]["peak_bytes"]
        kept = "-" if held is None else f"{held / 2**20:.0f} MiB"
        print(f"{case:<26} held {kept:>9}   peak {peak / 2**20:6.0f} MiB", flush=True)
    if arguments.out:
        command = f"python benchmarks/bench_memory.py --tasks {arguments.tasks}"
        sizes = {"tasks": arguments.tasks, "parameters": parameters, "steps": STEPS}
        harness.write(arguments.out, {"benchmark": "memory", **stamp, "command": command, **sizes, "cases": rows})


if __name__ == "__main__":
    main()
