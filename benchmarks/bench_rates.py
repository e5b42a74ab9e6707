"""What learnable inner rates cost: python benchmarks/bench_rates.py [--device cuda] [--out DIR]

The meta-steps of workloads.py by the kernels, each with the same constant rate and with learnable ones of every
kind. A ratio is the time with learnable rates over that with the constant one, the median of the ratios within rounds.
Before anything is timed, a case must give the parameters' gradient as the constant rate does: by sign steps bit for
bit, else to 0.02 of its norm, because a step with a rate for each element rounds on its own and ReLU may then decide
otherwise. And every rate that moves something must get a gradient that is finite.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from bench_meta_step import FLOAT32_TOLERANCE, distance, flat
from torch import Tensor, nn
from workloads import METHODS, WORKLOADS, Problem

import signmaml_ext

STEPS = 5
Rates = float | Tensor | Mapping[str, Tensor]


def rates_of(model: nn.Module, rate: float) -> dict[str, Rates]:
    """Learnable rates of the same value, by kind."""

    tensors = dict(model.named_parameters())
    device = next(iter(tensors.values())).device

    def leaf(*shape: int) -> Tensor:
        return torch.full(shape, rate, requires_grad=True, device=device)

    return {
        "one": leaf(),
        "a step": leaf(STEPS),
        "a tensor": {name: leaf() for name in tensors},
        "a tensor and step": {name: leaf(STEPS, *[1] * p.ndim) for name, p in tensors.items()},
        "an element": {name: leaf(*p.shape) for name, p in tensors.items()},
        "an element and step": {name: leaf(STEPS, *p.shape) for name, p in tensors.items()},
    }


class Case:
    """A meta-step with some rates."""

    def __init__(self, problem: Problem, rates: Rates) -> None:
        self.problem, self.rates = problem, rates

    def __call__(self) -> None:
        problem = self.problem
        for leaf in (*problem.model.parameters(), *self.leaves()):
            leaf.grad = None
        options: dict[str, Any] = {"inner_lr": self.rates, "inner_steps": problem.steps, "method": problem.method}
        signmaml_ext.meta_step(problem.model, *problem.data, **options, loss=problem.loss, backend=problem.device.type)

    def leaves(self) -> list[Tensor]:
        """The learnable rates."""
        if isinstance(self.rates, Mapping):
            return list(self.rates.values())
        return [self.rates] if isinstance(self.rates, Tensor) else []

    def gradient(self) -> Tensor:
        """That of all parameters, as one vector."""
        self()
        found = {name: p.grad for name, p in self.problem.model.named_parameters() if p.grad is not None}
        return flat(found, self.problem)


def measure(workload: str, method: str, seconds: float, device: torch.device) -> dict[str, Any]:
    """One workload and method with all kinds of rates."""
    of_workload = WORKLOADS[workload]
    problem = of_workload.problem(tasks=of_workload.tasks, steps=STEPS, device=device)
    problem = replace(problem, method=method)
    constant = Case(problem, problem.inner_lr)
    cases = {kind: Case(problem, rates) for kind, rates in rates_of(problem.model, problem.inner_lr).items()}
    expected = constant.gradient()
    for kind, case in cases.items():
        far = distance(case.gradient(), expected)
        near = far == 0 if method == "sign-maml" else far < FLOAT32_TOLERANCE
        harness.require(near, f"{workload}, {method}, a rate for {kind}: another gradient than with a constant rate")
        learned = [leaf.grad for leaf in case.leaves() if leaf.grad is not None]
        harness.require(bool(learned), f"{workload}, {method}, a rate for {kind}: no rate has a gradient")
        finite = all(bool(value.isfinite().all()) for value in learned)
        harness.require(finite, f"{workload}, {method}, a rate for {kind}: its gradient is not finite")
    compared = harness.compare({"constant": constant, **cases}, seconds=seconds, device=device, least=5)
    return {
        "workload": workload,
        "method": method,
        "ms": compared.timing("constant"),
        "ratio": {kind: compared.ratio("constant", kind) for kind in cases},  # its time over the constant rate's
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=15, help="of timing for each workload and method")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result file (JSON)")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    stamp, results = harness.stamp(device), []
    for workload in asked.workload:
        for method in asked.methods:
            results.append(measure(workload, method, asked.seconds, device))
            told = ", ".join(f"{kind} {ratio.median:.2f}" for kind, ratio in results[-1]["ratio"].items())
            print(f"{workload}, {method}: {results[-1]['ms'].median:.1f} ms; learnable, a rate for {told}", flush=True)
    result = {"benchmark": "rates", **stamp, "steps": STEPS, "results": results}
    if asked.out:
        harness.write(asked.out / f"rates_{device.type}.json", result)


if __name__ == "__main__":
    main()
