"""Whole meta-steps against every peer: python benchmarks/bench_meta_step.py --workload A B C D

workloads.py describes workloads A to D, peers/ the implementations. Before anything is timed, each implementation must
compute the right meta-gradient:
  1. in float64, at the timed K, on some of the tasks: equal to the sequential loop to 1e-9 of its norm;
  2. in float32 with K = 0: equal to the float64 result to 0.02 (no sign can flip, but a ReLU whose input rounds to the
     other side of 0 changes the norm by up to 0.006 on B; 1e-6 is usual);
  3. in float32 with the timed K and T and a hundredth of the rate: within a quarter of the change that the steps make
     to the float64 result. (At the full rate, a rounding error near g = 0 flips a whole step and the flips cascade: on
     A every implementation, the sequential loop included, is 0.1 to 0.6 from float64; a hundredth of the rate leaves
     about 0.03 of the change.)
     The other methods have no sign to flip: with the timed K, T and rate, equal to the float64 result to 0.1. (A ReLU
     or a winner of the pooling may round to the other side. On C, maml, most of the eight tasks are 1e-6 to 3e-3 from
     float64, but one of them is 0.04 away in the sequential loop, and another one 0.09 in our kernels.)
  4. in the timed call itself: its distance from float64 is printed as "drift" and must be below 1, the distance of
     unrelated gradients.
Then all run interleaved in one process. The speed-up is the median of the ratios within a round. The rate counts the
operations of a direct convolution (counts.py), and its share is relative to a large matrix product timed in the same
rounds. Memory is that of one meta-step in a separate process: the peak of its resident set (CPU) or of torch's
allocator (CUDA) during the second step, minus the memory in use before the first.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import counts
import harness
import torch
from harness import Summary
from peers import Step, ours
from report_parts import table
from torch import Tensor
from workloads import METHODS, WORKLOADS, Problem

import signmaml_ext

PEERS = (
    "sequential",
    "learn2learn_",
    "higher_",
    "torchopt_",
    "parallel_metalearn_",
    "vmap",
    "vmap_graph",
    "compiled",
    "jax_",
    "tuned_torch",
)
BASE, BEST_TORCH, OURS = "sequential loop", "hand-tuned PyTorch", "signmaml_ext"
CHECKED_TASKS = 2
FLOAT64_TOLERANCE, FLOAT32_TOLERANCE, STEPS_TOLERANCE, PLAIN_TOLERANCE = 1e-9, 0.02, 0.25, 0.1


@dataclass(frozen=True)
class Implementation:
    """One way to compute a meta-step; see peers/__init__.py."""

    name: str
    why_not: Callable[[Problem], str | None]
    prepare: Callable[[Problem], Step]
    slow_to_prepare: bool = False


def implementations() -> list[Implementation]:
    """Peers first, then every backend of this package."""
    found = []
    for name in PEERS:
        peer = importlib.import_module(f"peers.{name}")
        slow = getattr(peer, "SLOW_TO_PREPARE", False)
        found.append(Implementation(peer.NAME, peer.why_not, peer.prepare, slow))
    for backend in reversed(signmaml_ext.dispatch.BACKENDS):
        found.append(
            Implementation(
                f"{OURS}, {backend}",
                functools.partial(ours.why_not, backend=backend),
                functools.partial(ours.prepare, backend=backend),
            )
        )
    return found


# ---- correctness ----------------------------------------------------------------------------------------------------


class WrongGradient(Exception):
    """An implementation computes a different meta-gradient from the others."""


def flat(gradients: Mapping[str, Tensor], problem: Problem) -> Tensor:
    """All gradients as one vector in float64, in the model's order."""
    names = [name for name, _ in problem.model.named_parameters()]
    harness.require(set(gradients) == set(names), f"gradients for {sorted(gradients)}, parameters {sorted(names)}")
    return torch.cat([gradients[name].detach().double().cpu().flatten() for name in names])


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of the expected vector."""
    return float((found - expected).norm() / expected.norm())


class Checker:
    """Checks implementations against the meta-gradients of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        few = problem.first(min(problem.tasks, CHECKED_TASKS if problem.convolutional else 50))
        self.few, self.few_float64 = few, few.to(torch.float64)
        base = importlib.import_module("peers.sequential")
        self.expected = flat(base.meta_step(self.few_float64), problem)
        self.expected_joint = flat(base.meta_step(self.few_float64.with_steps(0)), problem)
        self.whole = flat(base.meta_step(problem.to(torch.float64)), problem)
        self.slow = replace(problem, inner_lr=problem.inner_lr / 100)
        self.expected_slow = flat(base.meta_step(self.slow.to(torch.float64)), problem)
        joint = flat(base.meta_step(problem.with_steps(0).to(torch.float64)), problem)
        self.steps_change = distance(joint, self.expected_slow)

    def check(self, implementation: Implementation) -> None:
        """Checks 1 to 3.

        Raises:
            WrongGradient: If one fails.
        """
        cases = (
            ("float64", self.few_float64, self.expected, FLOAT64_TOLERANCE),
            ("float32, K = 0", self.few.with_steps(0), self.expected_joint, FLOAT32_TOLERANCE),
            ("float32, small steps", self.slow, self.expected_slow, STEPS_TOLERANCE * self.steps_change)
            if self.problem.method == "sign-maml"
            else ("float32", self.problem, self.whole, PLAIN_TOLERANCE),
        )
        for what, problem, expected, tolerance in cases:
            if problem is self.few_float64 and implementation.why_not(problem) is not None:
                continue  # a backend without float64 is checked in float32
            step = implementation.prepare(problem)
            found = distance(flat(step.gradients(step.run()), self.problem), expected)
            if not found <= tolerance:  # also for NaN
                raise WrongGradient(f"another meta-gradient ({what}: {found:.1e} away, allowed {tolerance:.1e})")

    def drift(self, step: Step) -> float:
        """Check 4, on the call that will be timed.

        Raises:
            WrongGradient: If it fails.
        """
        found = distance(flat(step.gradients(step.run()), self.problem), self.whole)
        if not found < 1:
            raise WrongGradient(f"{found:.2f} from the float64 meta-gradient")
        return found


# ---- measurement ----------------------------------------------------------------------------------------------------


def measure(
    workload: str,
    *,
    tasks: int,
    steps: int,
    method: str = "sign-maml",
    device: torch.device,
    seconds: float,
    least: int,
    wanted: Sequence[Implementation],
    left_out: Mapping[str, str] | None = None,
    with_checks: bool = True,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Times some implementations on one workload at one T and K; prints the table."""
    problem = replace(WORKLOADS[workload].problem(tasks=tasks, steps=steps, device=device), method=method)
    checker = Checker(problem) if with_checks else None
    prepared: dict[str, Step] = {}
    skipped: dict[str, str] = dict(left_out or {})
    drifts: dict[str, float] = {}
    for implementation in wanted:
        name = implementation.name
        reason = implementation.why_not(problem)
        if reason is None:
            try:
                if checker is not None:
                    checker.check(implementation)
                prepared[name] = implementation.prepare(problem)
                if checker is not None:
                    drifts[name] = checker.drift(prepared[name])
            except Exception as error:  # a peer on untested versions may raise anything
                if name.startswith(OURS) or name == BASE:
                    raise
                prepared.pop(name, None)
                reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:120]}"
        if reason is not None:
            skipped[name] = reason
            print(f"{workload}  {name}: skipped: {reason}", flush=True)
    gc.collect()

    product, n = harness.matrix_product(device)
    runs = {"matrix product": product} | {name: step.run for name, step in prepared.items()}
    with_signs = sign_steps(problem, [each for each in wanted if each.name in prepared])
    runs |= with_signs
    comparison = harness.compare(runs, seconds=seconds, device=device, least=least)
    flops = WORKLOADS[workload].flops(tasks, steps, method)
    matrix_flops = counts.matrix_flops(n)
    peers = [name for name in prepared if name != BASE and not name.startswith(OURS)]
    best_peer = min(peers, key=lambda name: comparison.timing(name).median, default="")
    rows: dict[str, Any] = {}
    for name, step in prepared.items():
        share = [
            (flops / ours_ms) / (matrix_flops / matrix_ms)
            for ours_ms, matrix_ms in zip(comparison.samples[name], comparison.samples["matrix product"], strict=True)
        ]
        row: dict[str, Any] = {
            "time_ms": comparison.timing(name),
            "gflops": comparison.rate(name, flops),
            "share_of_matrix": Summary.of(share),
        }
        bases = {"speedup": BASE, "speedup_over_best_torch": BEST_TORCH, "speedup_over_best_peer": best_peer}
        for key, base in bases.items():
            if base in prepared:
                row[key] = comparison.ratio(name, base)
        if (signs := f"{name}, sign-maml") in with_signs:
            row["times_sign_maml"] = comparison.ratio(signs, name)
        if name in drifts:
            row["drift"] = float(f"{drifts[name]:.2g}")
        if step.note:
            row["note"] = step.note
        rows[name] = row
    prepared.clear()
    if with_memory:
        for name, row in rows.items():
            row["memory_mib"] = memory(workload, name, tasks, steps, device, method)
    point = {
        "tasks": tasks,
        "steps": steps,
        "method": method,
        "gflop": float(f"{flops / 1e9:.4g}"),
        "matrix_gflops": comparison.rate("matrix product", matrix_flops),
        "best_peer": best_peer,
        "implementations": rows,
        "skipped": skipped,
    }
    print(as_table(workload, point), flush=True)
    return point


def sign_steps(problem: Problem, wanted: Sequence[Implementation]) -> dict[str, Callable[[], Any]]:
    """This package's meta-steps of sign-maml, with which those of another method are compared."""
    if problem.method == "sign-maml":
        return {}
    signs = replace(problem, method="sign-maml")
    ours_alone = [each for each in wanted if each.name.startswith(OURS) and each.why_not(signs) is None]
    return {f"{each.name}, sign-maml": each.prepare(signs).run for each in ours_alone}


def as_table(workload: str, point: Mapping[str, Any]) -> str:
    """One point as a printable table."""
    matrix = point["matrix_gflops"].median
    lines = [
        f"\n{workload}: {WORKLOADS[workload].summary}; {point['method']}",
        f"T = {point['tasks']}, K = {point['steps']}, {point['gflop']:g} GFLOP; a large matrix product runs at "
        f"{matrix:.0f} GFLOP/s\n",
    ]
    rows = []
    for name, row in point["implementations"].items():
        time, memory_mib = row["time_ms"], row.get("memory_mib")
        rows.append(
            [
                name,
                f"{time.median:.1f}",
                f"{time.low:.1f} .. {time.high:.1f}",
                f"{row['speedup'].median:.2f}" if "speedup" in row else "-",
                f"{row['gflops'].median:.1f}",
                f"{row['share_of_matrix'].median:.1%}",
                "-" if memory_mib is None else f"{memory_mib:.0f}",
                f"{row['drift']:.2g}" if "drift" in row else "-",
                row.get("note", ""),
            ]
        )
    header = ["implementation", "ms", "quartiles", "x the loop", "GFLOP/s", "of matrix rate", "MiB", "drift", "note"]
    return "\n".join([*lines, table(header, rows)])


def memory(workload: str, name: str, tasks: int, steps: int, device: torch.device, method: str) -> float | None:
    """MiB of one implementation, measured by `probe` in a separate process."""
    command = [sys.executable, __file__, "--probe", name, "--workload", workload, "--device", str(device)]
    command += ["--method", method]
    done = subprocess.run(
        [*command, "--tasks", str(tasks), "--steps", str(steps)], capture_output=True, text=True, timeout=600
    )
    if done.returncode != 0:
        print(f"{name}: no memory figure: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return round(float(done.stdout.split()[-1]), 1)


def probe(workload: str, name: str, tasks: int, steps: int, device: torch.device, method: str) -> None:
    """Prints the MiB that one meta-step takes; see the module."""
    problem = replace(WORKLOADS[workload].problem(tasks=tasks, steps=steps, device=device), method=method)
    (implementation,) = [each for each in implementations() if each.name == name]
    harness.require(implementation.why_not(problem) is None, f"{name} cannot run this")  # and imports its library
    if name.startswith("JAX") and device.type == "cuda":
        harness.require(False, "XLA takes most of the device's memory at its start, whatever it needs")
    before = harness.PeakMemory(device)
    step = implementation.prepare(problem)
    step.run()
    second = harness.PeakMemory(device)
    step.run()
    print(second.mib() + (second.before - before.before) / 2**20)


# ---- command line ---------------------------------------------------------------------------------------------------

GROWTH = {"A": (1, 2, 8, 16), "B": (1, 8, 32, 64), "C": (1, 2, 8, 16), "D": (1, 100, 1000, 4000)}
GROWTH_STEPS = (1, 5, 10)


def growth(
    workload: str,
    device: torch.device,
    seconds: float,
    wanted: Sequence[Implementation],
    with_memory: bool,
    method: str,
) -> list[Any]:
    """Points over T at K = 5, and over K at the workload's T."""
    usual = WORKLOADS[workload].tasks
    points = [(tasks, 5) for tasks in GROWTH[workload]]
    points += [(usual, steps) for steps in GROWTH_STEPS if steps != 5]
    return [
        measure(
            workload,
            tasks=tasks,
            steps=steps,
            device=device,
            seconds=seconds,
            least=3,
            wanted=wanted,
            method=method,
            with_checks=False,
            with_memory=with_memory,
        )
        for tasks, steps in points
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--method", choices=METHODS, default="sign-maml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", nargs="+", type=int, help="T, one or several; default: the workload's")
    parser.add_argument("--steps", nargs="+", type=int, default=[5], help="K, one or several")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=30, help="time for the 5 or more rounds of one T and K")
    parser.add_argument("--quick", action="store_true", help="3 rounds; without torch.compile and memory")
    parser.add_argument("--no-compile", action="store_true", help="leave peers out that compile for minutes")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--growth", action="store_true", help="over T and over K, with a few implementations")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for result files (JSON)")
    parser.add_argument("--probe", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.probe:
        probe(arguments.workload[0], arguments.probe, arguments.tasks[0], arguments.steps[0], device, arguments.method)
        return
    wanted = implementations()
    if arguments.growth:
        few = (BASE, BEST_TORCH, "torch.func vmap", OURS)
        wanted = [each for each in wanted if each.name.startswith(few)]
    if arguments.only:
        wanted = [each for each in wanted if any(part in each.name for part in arguments.only)]
    left_out = {}
    if arguments.quick or arguments.no_compile:
        left_out = {each.name: "left out, it compiles for minutes" for each in wanted if each.slow_to_prepare}
        wanted = [each for each in wanted if not each.slow_to_prepare]
    with_memory = not (arguments.quick or arguments.no_memory)
    for workload in arguments.workload:
        result: dict[str, Any] = {**harness.stamp(device), "workload": workload}
        result["method"] = arguments.method
        # report.py makes tables of the results of one kind, so another method is another kind.
        suffix = "" if arguments.method == "sign-maml" else f"_{arguments.method}"
        if arguments.growth:
            points = growth(workload, device, arguments.seconds, wanted, with_memory, arguments.method)
            result |= {"benchmark": f"growth{suffix}", "points": points}
        else:
            points = [
                measure(
                    workload,
                    tasks=tasks,
                    steps=steps,
                    method=arguments.method,
                    device=device,
                    seconds=0 if arguments.quick else arguments.seconds,
                    least=3 if arguments.quick else 5,
                    wanted=wanted,
                    left_out=left_out,
                    with_memory=with_memory,
                )
                for tasks in arguments.tasks or [WORKLOADS[workload].tasks]
                for steps in arguments.steps
            ]
            result |= {"benchmark": f"meta_step{suffix}", "points": points}
        if arguments.out:
            kind = "growth" if arguments.growth else "meta_step"
            harness.write(arguments.out / f"{kind}_{workload}{suffix}_{device.type}.json", result)


if __name__ == "__main__":
    main()
