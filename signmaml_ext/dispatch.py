"""Which backend serves a call, and why the others do not: one predicate decides and explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _loader, chain, conv, flat, gpus, layers, mlp, reference
from .plan import table
from .problem import Problem
from .results import Adaptation, MetaGradients


@dataclass(frozen=True)
class Family:
    """One way to compute a meta-step.

    Attributes:
        name: In explanations.
        summary: One line for people.
        why_not: None if it serves this problem, else the reason.
        meta_gradients: The meta-step.
        adapt: The inner loop, with the query pass if there is a query set.
        fused: Whether all tasks run in one native call.
        native: Whether native calls compute a pass of many tasks.
    """

    name: str
    summary: str
    why_not: Callable[[Problem], str | None]
    meta_gradients: Callable[[Problem], MetaGradients]
    adapt: Callable[[Problem], Adaptation]
    fused: bool = False
    native: bool = False


@dataclass(frozen=True)
class Backend:
    """Ways to compute a meta-step on one kind of device.

    Attributes:
        name: The value of `backend=`.
        device_type: Where it runs; None: anywhere.
        why_not_here: None if this installation and machine can run it at all, else the reason. It must not initialise
            CUDA: calls on the CPU ask it too, perhaps in a forked process.
        why_not_on: None if it can run on this device, which is of its kind, else the reason.
        families: In order of preference.
    """

    name: str
    device_type: str | None
    why_not_here: Callable[[], str | None]
    families: tuple[Family, ...]
    why_not_on: Callable[[torch.device], str | None] = lambda device: None

    def why_not_there(self, problem: Problem) -> str | None:
        """Why no family of this backend can serve the problem; None if one may."""
        reason = self.why_not_here()
        if reason is None and self.device_type not in (None, problem.device.type):
            return f"the model is on {problem.device}"
        return self.why_not_on(problem.device) if reason is None else reason

    def family_for(self, problem: Problem) -> tuple[Family | None, dict[str, str]]:
        """The first family that serves a problem, each asked once, and why those before it do not."""
        reasons: dict[str, str] = {}
        for family in self.families:
            reason = family.why_not(problem)
            if reason is None:
                return family, reasons
            reasons[family.name] = reason
        return None, reasons


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    Attributes:
        backend: The backend that would serve the call.
        family: The family of that backend that would.
        summary: What that family does.
        reasons: By backend name: None if it could serve the call, else why not.
        families: By backend name: why each family that was asked before one served does not serve the call.
        how: How the tasks would run: together or one by one, and why.
        plan: What a call would launch on a GPU, as a table: a model, not a measurement. None unless asked for.
    """

    backend: str
    family: str
    summary: str
    reasons: dict[str, str | None]
    families: dict[str, dict[str, str]]
    how: str
    plan: str | None = None

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}, {self.family} ({self.summary}); {self.how}"]
        for name, reason in self.reasons.items():
            for family, of_family in self.families[name].items():
                lines.append(f"  not {name}, {family}: {of_family}")
            if name != self.backend and not (reason and self.families[name]):
                lines.append(f"  not {name}: {reason or f'it could, but {self.backend} was preferred or asked for'}")
        return "\n".join(lines if self.plan is None else [*lines, self.plan])


def _no_cuda_here() -> str | None:
    if not _loader.C.built_with_cuda:
        return "signmaml_ext was built without CUDA (no nvcc at build time)"
    if not torch.backends.cuda.is_built():
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _not_on_any_gpu() -> str | None:
    reasons = [gpus.why_not_served(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def _not_on_this_gpu(device: torch.device) -> str | None:
    return gpus.why_not_served(torch.cuda.current_device() if device.index is None else device.index)


def _flat(device_type: str) -> Family:
    return Family(
        "flat",
        "steps on flat buffers, gradients by torch, any module",
        lambda problem: flat.why_not(problem, device_type),
        flat.meta_gradients,
        flat.adapt,
    )


CONV = Family("conv", "Conv-N networks in native code", conv.why_not, conv.meta_gradients, conv.adapt, fused=True)
MLP = Family("mlp", "multilayer perceptrons in native code", mlp.why_not, mlp.meta_gradients, mlp.adapt, fused=True)
LAYERS = Family(
    "layers",
    "usual layers, in chains and with shortcuts: gradients in native code, steps on flat buffers",
    layers.why_not,
    layers.meta_gradients,
    layers.adapt,
    native=True,
)
TORCH = Family(
    "reference",
    "pure PyTorch, any module, any device",
    lambda problem: "it compiles nothing" if problem.compile else None,
    reference.meta_gradients,
    reference.adapt,
)

# In order of preference for backend="auto".
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", "cuda", _no_cuda_here, (CONV, MLP, _flat("cuda")), _not_on_this_gpu),
        Backend("cpu", "cpu", lambda: None, (CONV, MLP, LAYERS, _flat("cpu"))),
        Backend("torch", None, lambda: None, (TORCH,)),
    )
}


def backend_status() -> dict[str, str | None]:
    """By backend: None if it is usable on this machine, else the reason."""
    status = {name: backend.why_not_here() for name, backend in BACKENDS.items()}
    return status if status["cuda"] else status | {"cuda": _not_on_any_gpu()}


def _joined(reasons: dict[str, str]) -> str:
    return "; ".join(f"{family}: {reason}" for family, reason in reasons.items())


def choose(problem: Problem) -> tuple[Backend, Family]:
    """The backend and the family that serve a problem.

    Raises:
        ValueError: If the backend that the caller asked for does not serve it; the message says why.
    """
    asked = BACKENDS.values() if problem.backend == "auto" else [BACKENDS[problem.backend]]
    reason: str | None = None
    for backend in asked:
        reason = backend.why_not_there(problem)
        if reason is not None:
            continue
        family, reasons = backend.family_for(problem)
        if family is not None:
            return backend, family
        reason = _joined(reasons)
    raise ValueError(f"backend: expected one that serves this call, found {problem.backend!r}: {reason}")


def run(problem: Problem, compute: Callable[[Family, Problem], reference.Result]) -> tuple[str, reference.Result]:
    """Computes with the chosen backend; returns its name and the result."""
    # What is computed here outlives the caller's inference mode.
    with chain.one_look(), torch.inference_mode(False):
        backend, family = choose(problem)
        return backend.name, compute(family, problem)


def meta_gradients(problem: Problem) -> tuple[str, MetaGradients]:
    """The meta-step, launched plainly: the backend's name, and the result."""
    return run(problem, lambda family, checked: family.meta_gradients(checked))


def adapt(problem: Problem) -> tuple[str, Adaptation]:
    """The inner loop: the backend's name, and the result."""
    return run(problem, lambda family, checked: family.adapt(checked))


def explain(problem: Problem, *, with_plan: bool = False) -> Explanation:
    """Which backend would serve the problem, and why the others would not."""
    reasons: dict[str, str | None] = {}
    families: dict[str, dict[str, str]] = {}
    for name, backend in BACKENDS.items():
        reasons[name], families[name] = backend.why_not_there(problem), {}
        if reasons[name] is None:
            family, families[name] = backend.family_for(problem)
            reasons[name] = None if family else _joined(families[name])
    chosen, family = choose(problem)
    one_by_one = reference.why_not_batched(problem)
    compiles = " (nothing to compile)" if problem.compile else ""
    if family.fused:
        how = f"all tasks in one native call{compiles}"
    elif family.native:
        how = f"a native call a pass ({layers.read(problem.model)}){compiles}"
    else:
        how = "all tasks together" if one_by_one is None else f"task by task ({one_by_one})"
        if problem.compile:
            how += ", by torch.compile"
    return Explanation(
        chosen.name, family.name, family.summary, reasons, families, how, table(problem) if with_plan else None
    )
