"""The native operators against memory bandwidth: python benchmarks/bench_kernels.py

For each operator and size: time, GB/s (bytes that must move, counted once), and the share of the bandwidth of a plain
copy of the same size measured in the same run. Tail sizes are in the list on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch

import signmaml_ext
from signmaml_ext import reference

SIZES = ((8, 32_901), (8, 121_093), (32, 113_088), (1000, 1_761), (8, 4_000_003), (8, 8_388_608))


def operators(tasks: int, parameters: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: what to run, and the bytes it must read and write."""
    params, grads, copy = (torch.randn(tasks, parameters, device=device) for _ in range(3))
    out, lr = torch.zeros(parameters, device=device), torch.full((1,), 1e-9, device=device)
    flags = torch.zeros(tasks, dtype=torch.bool, device=device)
    live = torch.ones(tasks, dtype=torch.bool, device=device)
    matrix, row = 4 * tasks * parameters, 4 * parameters
    return {
        "copy": (lambda: copy.copy_(grads), 2 * matrix),
        "sign_step_": (lambda: signmaml_ext.sign_step_(params, grads, lr, nonfinite=flags), 3 * matrix),
        "sign_step in PyTorch": (lambda: reference.sign_step(params, grads, lr), 3 * matrix),
        "meta_accumulate_": (lambda: signmaml_ext.meta_accumulate_(out, grads, nonfinite=flags), matrix + 2 * row),
        "meta_accumulate in PyTorch": (lambda: reference.meta_accumulate(out, grads, live), matrix + 2 * row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=5, help="time for the repetitions of a size")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"benchmark": "kernels", **harness.stamp(device), "sizes": {}}
    print(f"{'T x P':>16}  {'operator':28} {'us':>10} {'GB/s':>8} {'of copy':>8}")
    for tasks, parameters in SIZES:
        candidates = operators(tasks, parameters, device)
        runs = {name: run for name, (run, _) in candidates.items()}
        timings = harness.compare(runs, seconds=arguments.seconds, device=device, least=10)
        rates = {name: candidates[name][1] / timing.median_ms / 1e6 for name, timing in timings.items()}
        rows = {}
        for name, timing in timings.items():
            share = rates[name] / rates["copy"]
            rows[name] = {"timing": timing, "gb_per_s": round(rates[name], 2), "share_of_copy": round(share, 3)}
            size = f"{tasks} x {parameters}"
            print(f"{size:>16}  {name:28} {timing.median_ms * 1e3:10.1f} {rates[name]:8.2f} {share:8.1%}", flush=True)
        result["sizes"][f"{tasks}x{parameters}"] = rows
    if arguments.out:
        harness.write(arguments.out, result)


if __name__ == "__main__":
    main()
