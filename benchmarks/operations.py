"""How many operations torch is asked for in one meta-step of any module: python benchmarks/operations.py

Each operation is one launch on a GPU or a few (a convolution in cuDNN can be several), so the counts are the least
number of launches there. Views and allocations, which launch nothing, are left out. Models with kernels of their own
(Conv-N, multilayer perceptrons) need none of these; `explain(model, ..., plan=True)` prints their launches.

The counts come from a run on the CPU with all tasks together (under vmap), where the same code asks for the same
operations. They do not depend on the sizes of images and batches, nor on the number of tasks, except with MAML: torch
takes the second derivative of the tasks' convolutions one by one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from report_parts import table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_models import conv4

import signmaml_ext.reference
from signmaml_ext import dispatch

# Operations beside views that launch nothing.
WITHOUT_A_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Conv4-32, GroupNorm": lambda: conv4(lambda filters: nn.GroupNorm(4, filters)),
    "Conv4-32, no norm": lambda: conv4(lambda filters: nn.Identity()),
    "Conv4-32, BatchNorm, LeakyReLU": lambda: conv4(nn.BatchNorm2d, lambda: nn.LeakyReLU(0.1)),
}
METHODS = ("sign-maml", "fo-maml", "maml")


class Operations(TorchDispatchMode):
    """Counts operations by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in WITHOUT_A_LAUNCH:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, *, steps: int, method: str, tasks: int = 8, size: int = 28, **options: Any) -> Counter[str]:
    """Operations of one meta-step on images of one channel and 5 classes, all tasks together.

    They are those of any module and of a CUDA device: without the CPU's native gradients of usual layers.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(tasks, 5, 1, size, size, generator=generator)
    labels = torch.arange(5).expand(tasks, -1).contiguous()
    arguments = {"inner_lr": 0.01, "inner_steps": steps, "method": method, "batching": "together", **options}
    cpu = dispatch.BACKENDS["cpu"]
    others = tuple(family for family in cpu.families if family is not dispatch.LAYERS)
    with mock.patch.dict(dispatch.BACKENDS, cpu=replace(cpu, families=others)):
        # Once before: what is found out about a model at its first call is no part of the count.
        signmaml_ext.meta_step(model, images, labels, images, labels, **arguments)
        # Only on a CPU are labels looked at; elsewhere the host would have to wait.
        unchecked = mock.patch.object(signmaml_ext.reference, "check_labels", lambda problem, classes: None)
        with unchecked, Operations() as operations:
            signmaml_ext.meta_step(model, images, labels, images, labels, **arguments)
    return operations.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="inner steps (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, make in MODELS.items():
        for method in METHODS:
            counts = count(make(), steps=arguments.steps, method=method)
            most = ", ".join(f"{operation} {times}" for operation, times in counts.most_common(5))
            rows.append((name, method, str(counts.total()), most))
    print(f"Operations of a meta-step of 8 tasks with {arguments.steps} inner steps, all tasks together:\n")
    print(table(("model", "method", "operations", "most of them"), rows))


if __name__ == "__main__":
    main()
