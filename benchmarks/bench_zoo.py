"""Models without their own kernel against the plain loop: python benchmarks/bench_zoo.py [--threads 1 2] --out DIR

For each model of zoo_models.py and each method, times a meta-step and the loop that a user would write, interleaved,
and measures the memory of each in a separate process. With --compile, for "sign-maml" only: a meta-step with
`compile=True`, one without, and the loop with its gradients and steps compiled by torch.compile.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import report
import torch
import zoo_models
from zoo_models import WORKLOADS

import signmaml_ext

STEPS = 3
RATE = 0.01
CPU = torch.device("cpu")


class Case:
    """One model and method, with both ways to compute its meta-step."""

    def __init__(self, name: str, method: str) -> None:
        torch.manual_seed(0)
        self.work, self.method = WORKLOADS[name], method
        self.model, self.data = self.work.make(), self.work.data()
        options = dict(self.work.options)
        learns = options.pop("learns_rate", False)
        self.rate: Any = torch.tensor(RATE, requires_grad=True) if learns else RATE
        self.options = {**options, "loss": self.work.loss, "method": method}

    def ours(self, compile: bool = False) -> signmaml_ext.MetaStepResult:
        """The meta-step by the package."""
        options = {**self.options, "inner_lr": self.rate, "inner_steps": STEPS, "compile": compile}
        return signmaml_ext.meta_step(self.model, *self.data, **options)

    def loop(self) -> None:
        """The meta-step by the plain loop."""
        zoo_models.loop(self.work, self.model, self.data, steps=STEPS, rate=self.rate, method=self.method)

    def explain(self) -> str:
        """The first line of `explain`."""
        found = signmaml_ext.explain(self.model, *self.data, inner_lr=self.rate, inner_steps=STEPS, **self.options)
        return str(found).splitlines()[0]

    def check(self) -> None:
        """Checks that both ways give the same meta-gradient, in float64 and at a rate that flips no sign."""
        model, data = self.model.double(), [x.double() if x.is_floating_point() else x for x in self.data]
        self.model, self.data = model, tuple(data)
        rate, self.rate = self.rate, 1e-6 if not isinstance(self.rate, torch.Tensor) else self.rate.detach().double()
        if isinstance(rate, torch.Tensor):
            self.rate.requires_grad_()
        found = []
        for run in (self.loop, self.ours):
            model.zero_grad()
            run()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        error = ((found[0] - found[1]).norm() / found[0].norm()).item()
        harness.require(error < 1e-6, f"the meta-gradient differs from the loop's by {error:.1e}")
        model.zero_grad()
        self.model, self.rate = model.float(), rate
        self.data = tuple(x.float() if x.is_floating_point() else x for x in self.data)


def measure(name: str, method: str, threads: int, seconds: float) -> dict[str, Any]:
    """Times and ratios of one case."""
    torch.set_num_threads(threads)
    case = Case(name, method)
    case.check()
    compared = harness.compare({"loop": case.loop, "ours": case.ours}, seconds=seconds, device=CPU, least=5)
    return {
        "model": name,
        "method": method,
        "threads": threads,
        "how": case.explain(),
        "ratio": compared.ratio("ours", "loop"),
        "ms": {key: compared.timing(key) for key in ("loop", "ours")},
    }


def measure_compiled(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Times and ratios of `compile=True`."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    case = Case(name, "sign-maml")
    together = "all tasks together" in case.explain()
    step = functools.partial(case.ours, compile=True)
    peer = zoo_models.compiled_loop(case.work, case.model, case.data, steps=STEPS, rate=RATE, together=together)
    before = time.perf_counter()
    step()
    first = time.perf_counter() - before
    compared = harness.compare(
        {"compiled loop": peer, "ours": case.ours, "ours, compiled": step}, seconds=seconds, device=CPU, least=5
    )
    return {
        "model": name,
        "threads": threads,
        "together": together,
        "first_call_s": first,
        "ratios": {other: compared.ratio("ours, compiled", other) for other in ("ours", "compiled loop")},
        "ms": {key: compared.timing(key) for key in ("compiled loop", "ours", "ours, compiled")},
    }


def memory(name: str, method: str, way: str) -> float:
    """MiB at the peak of the second call, above the memory in use before the first."""
    torch.set_num_threads(1)
    case = Case(name, method)
    peak = harness.PeakMemory(CPU)
    for _ in range(2):
        getattr(case, way)()
    return peak.mib()


def memory_apart(name: str, method: str, way: str) -> float:
    """The same in a separate process."""
    command = [sys.executable, __file__, "--memory", name, method, way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(WORKLOADS), help="names, or parts of names")
    parser.add_argument("--methods", nargs="*", default=list(report.METHODS), choices=report.METHODS)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="of timing for each case")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--compile", action="store_true", help="measure compile=True instead")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3, metavar=("MODEL", "METHOD", "WAY"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        print(memory(*asked.memory))
        return
    names = [name for name in WORKLOADS if any(part in name for part in asked.models)]
    harness.require(bool(names), f"no model is called {asked.models}; there are {', '.join(WORKLOADS)}")
    stamp, results = harness.stamp(CPU), []
    if asked.compile:
        for name in (name for name in names if not WORKLOADS[name].options):
            of_case = [measure_compiled(name, threads, asked.seconds) for threads in asked.threads]
            results += json.loads(json.dumps(of_case, default=harness.plain))
            print(report.zoo_compiled(results[-len(asked.threads) :]), flush=True)
        print(report.zoo_compiled(results))
        if asked.out:
            written = {"benchmark": "zoo-compiled", **stamp, "steps": STEPS, "results": results}
            harness.write(asked.out / "zoo_compiled_cpu.json", written)
        return
    for name in names:
        for method in asked.methods:
            of_case = [measure(name, method, threads, asked.seconds) for threads in asked.threads]
            if not asked.no_memory:
                of_case[0]["memory"] = {way: memory_apart(name, method, way) for way in ("loop", "ours")}
            results += json.loads(json.dumps(of_case, default=harness.plain))
            told = ", ".join(f"{r['ratio']['median']:.2f}" for r in results[-len(of_case) :])
            print(f"{name}, {method}: {told} times the loop ({of_case[0]['how']})", flush=True)
    print(report.zoo(results))
    if asked.out:
        harness.write(asked.out / "zoo_cpu.json", {"benchmark": "zoo", **stamp, "steps": STEPS, "results": results})


if __name__ == "__main__":
    main()
