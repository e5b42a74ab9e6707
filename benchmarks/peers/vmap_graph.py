"""torch.func vmap over all tasks, captured once in a CUDA graph and replayed."""

from __future__ import annotations

import torch
from torch import Tensor
from workloads import Problem

from peers import Step, vmap

NAME = "vmap + CUDA graph"
SUMMARY = "the vmapped meta-step as one replayed CUDA graph"


def why_not(problem: Problem) -> str | None:
    return None if problem.device.type == "cuda" else "needs a CUDA device"


def prepare(problem: Problem) -> Step:
    side = torch.cuda.Stream(problem.device)
    side.wait_stream(torch.cuda.current_stream(problem.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            vmap.meta_step(problem, problem.tasks)
    torch.cuda.current_stream(problem.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mean = vmap.meta_step(problem, problem.tasks)

    def run() -> dict[str, Tensor]:
        graph.replay()
        return mean

    return Step(run, lambda found: {name: value.clone() for name, value in found.items()})
