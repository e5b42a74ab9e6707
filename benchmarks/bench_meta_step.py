"""Whole meta-steps against the sequential loop: python benchmarks/bench_meta_step.py --workload A B C D

Workloads (5-way, sign-maml, first order):
  A  84 x 84 RGB, Conv4-32, 1 shot, 1 query a class, T = 8, K = 5 (the official set-up)
  B  28 x 28, Conv4-64 strided, 1 shot, 15 queries a class, T = 32, K = 5
  C  32 x 32 RGB, Conv4-64, 5 shots, 15 queries a class, T = 8, K = 5
  D  sinusoid regression, MLP 1-40-40-1, 10 shots, T = 1000, K = 5
Data is random; before anything is timed, every implementation must give the same meta-gradient in float64.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from peers import sequential
from torch import Tensor, nn
from torch.nn import functional as F

import signmaml_ext
from signmaml.models import MLP, Conv4

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def images(tasks: int, shots: int, queries: int, channels: int, size: int) -> Data:
    """Random 5-way tasks."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(5).repeat_interleave(count).expand(tasks, -1).contiguous()
        return torch.rand(tasks, 5 * count, channels, size, size), labels

    return (*draw(shots), *draw(queries))


def sinusoids(tasks: int, shots: int) -> Data:
    """Regression tasks of random amplitude and phase."""
    amplitude, phase = torch.rand(tasks, 1, 1) * 4.9 + 0.1, torch.rand(tasks, 1, 1) * torch.pi

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, shots, 1) * 10 - 5
        return x, amplitude * torch.sin(x + phase)

    return (*draw(), *draw())


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data], str, float]] = {
    "A": (lambda: Conv4(5, 3, 32, 84), lambda: images(8, 1, 1, 3, 84), "cross_entropy", 0.0035),
    "B": (lambda: Conv4(5, 1, 64, 28, pooling="stride"), lambda: images(32, 1, 15, 1, 28), "cross_entropy", 0.01),
    "C": (lambda: Conv4(5, 3, 64, 32), lambda: images(8, 5, 15, 3, 32), "cross_entropy", 0.01),
    "D": (lambda: MLP(1, 1, hidden=(40, 40)), lambda: sinusoids(1000, 10), "mse", 0.01),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def implementations(loss: str, inner_lr: float, inner_steps: int) -> dict[str, Callable[..., object]]:
    """By name: what adds the meta-gradient to `.grad` when called with a model and the data."""
    options: dict[str, Any] = {"inner_lr": inner_lr, "inner_steps": inner_steps}
    ours = {
        f"signmaml_ext, backend {name}": functools.partial(
            signmaml_ext.meta_step, **options, loss=loss, backend=name, zero_dead_bias=False
        )
        for name, reason in signmaml_ext.dispatch.backend_status().items()
        if reason is None
    }
    return {"sequential loop": functools.partial(sequential.meta_step, **options, loss=LOSSES[loss])} | ours


def check_equal(model: nn.Module, data: Data, candidates: dict[str, Callable[..., object]]) -> dict[str, str]:
    """Meta-gradients of a few tasks in float64 must agree to 1e-9; gives the candidates that do not serve the model."""
    model = copy.deepcopy(model).double()
    few = tuple(value[:2].double() if value.is_floating_point() else value[:2] for value in data)
    skipped, expected = {}, None
    for name, run in candidates.items():
        model.zero_grad()
        try:
            run(model, *few)
        except ValueError as error:
            skipped[name] = str(error)
            continue
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=f"{name}: another meta-gradient")
    return skipped


def measure(workload: str, device: torch.device, seconds: float, inner_steps: int) -> dict[str, Any]:
    """Times all implementations on one workload."""
    torch.manual_seed(0)
    make_model, make_data, loss, inner_lr = WORKLOADS[workload]
    model, data = make_model().to(device), tuple(value.to(device) for value in make_data())
    candidates = implementations(loss, inner_lr, inner_steps)
    skipped = check_equal(model, data, candidates)
    runs = {n: functools.partial(_step, model, run, data) for n, run in candidates.items() if n not in skipped}
    timings = harness.compare(runs, seconds=seconds, device=device)
    base = timings["sequential loop"].median_ms
    for name, timing in timings.items():
        print(f"{workload}  {name:32} {timing.median_ms:10.1f} ms   {base / timing.median_ms:6.2f} x", flush=True)
    for name, reason in skipped.items():
        print(f"{workload}  {name:32}    skipped: {reason}", flush=True)
    return {"timings": timings, "skipped": skipped, "inner_steps": inner_steps}


def _step(model: nn.Module, run: Callable[..., object], data: Data) -> None:
    model.zero_grad()
    run(model, *data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=30, help="time for the repetitions of a workload")
    parser.add_argument("--quick", action="store_true", help="3 repetitions")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"benchmark": "meta_step", **harness.stamp(device), "workloads": {}}
    for workload in arguments.workload:
        result["workloads"][workload] = measure(workload, device, 0 if arguments.quick else arguments.seconds, 5)
    if arguments.out:
        harness.write(arguments.out, result)


if __name__ == "__main__":
    main()
