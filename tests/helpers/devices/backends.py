"""The backends of the shared tests: the reference, the CPU, the emulated CUDA kernels, and CUDA if available.

A test with the fixture `backend` passes its value as `backend=` and creates tensors without naming a device. It then
runs on all of them: "emulated" passes CPU tensors to the CUDA family's own Python code and launches on the emulated
GPU; under "cuda", new tensors are on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.devices import emulated
from signmaml_ext import checks, dispatch, ops
from signmaml_ext.problem import Problem

NAMES = ("torch", "cpu", "emulated", "cuda")


def params(*names: str) -> list[Any]:
    """Values for a fixture; the GPU's value has the `gpu` marker."""
    return [pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in names]


@contextmanager
def selected(name: str) -> Iterator[None]:
    """Makes a backend usable for a test, or skips the test with the reason."""
    if name == "emulated":
        with pytest.MonkeyPatch.context() as patch:
            native = emulated_module()
            native.configure(multiprocessors=1)
            patch.setitem(dispatch.BACKENDS, "emulated", emulated_backend(native))
            patch.setattr(checks, "BACKENDS", (*checks.BACKENDS, "emulated"))
            yield
        return
    reason = dispatch.backend_status()[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    if name == "cuda":
        with torch.device("cuda"):
            yield
    else:
        yield


@lru_cache(maxsize=1)
def emulated_module() -> ModuleType:
    """The emulated module, built and loaded once."""
    return emulated.load(emulated.build_once())


class OnEmulatedGpu:
    """Replaces `signmaml_ext._C` in ops.py: the CPU's operators run the CUDA kernels on the emulated GPU."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native

    def __getattr__(self, name: str) -> Any:
        on_cpu, on_gpu = (getattr(self.native, n, None) for n in (name, name.removesuffix("_cpu") + "_cuda"))
        if not name.endswith("_cpu") or on_gpu is None:
            return on_cpu
        # A CPU operator's last argument is the number of threads; a CUDA operator's last two are device and stream.
        return lambda *arguments: on_gpu(*arguments[:-1], 0, 0)


@contextmanager
def operators_emulated() -> Iterator[None]:
    """Makes the torch operators on CPU tensors run their CUDA kernels on the emulated GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "C", OnEmulatedGpu(emulated_module()))
        yield


def emulated_backend(native: ModuleType) -> dispatch.Backend:
    """The "cuda" backend of dispatch.py for CPU tensors on the emulated GPU. It is last, so "auto" never takes it."""

    def emulated_family(family: dispatch.Family, *arguments: Any) -> dispatch.Family:
        def run(compute: Callable[..., Any]) -> Callable[[Problem], Any]:
            def on_emulated_gpu(problem: Problem) -> Any:
                with operators_emulated():
                    return compute(problem, *arguments)

            return on_emulated_gpu

        def why_not(problem: Problem) -> str | None:
            # As for a model that is on CUDA.
            return family.why_not(problem, on_cuda=True) if family.fused else family.why_not(problem)

        calls = {"meta_gradients": run(family.meta_gradients), "adapt": run(family.adapt)}
        return replace(family, why_not=why_not, **calls)

    families = [
        emulated_family(family, native) if family.fused else emulated_family(dispatch._flat("cpu"))
        for family in dispatch.BACKENDS["cuda"].families
    ]
    return dispatch.Backend("emulated", "cpu", lambda: None, tuple(families))
