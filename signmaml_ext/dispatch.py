"""Which backend serves a call, and why the others do not: one predicate decides and explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _loader, flat, mlp, reference
from .checks import Problem


@dataclass(frozen=True)
class Backend:
    """One way to compute a meta-step.

    Attributes:
        name: What `backend=` says.
        summary: One line for people.
        why_not_here: None if this installation and machine can run it at all, else the reason.
        why_not: None if it serves this problem, else the reason.
        meta_gradients: The meta-step.
        adapt: The inner loop, with the query pass if there is a query set.
    """

    name: str
    summary: str
    why_not_here: Callable[[], str | None]
    why_not: Callable[[Problem], str | None]
    meta_gradients: Callable[[Problem], reference.MetaGradients]
    adapt: Callable[[Problem], reference.Adaptation]


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    Attributes:
        backend: The backend that would serve the call.
        reasons: By backend name: None if it could serve the call, else why not.
        how: How the tasks would run: together or one by one, and why.
    """

    backend: str
    reasons: dict[str, str | None]
    how: str

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({BACKENDS[self.backend].summary}); {self.how}"]
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: {reason or f'it could, but {self.backend} was preferred or asked for'}")
        return "\n".join(lines)


def _no_cuda_here() -> str | None:
    if not _loader.C.built_with_cuda:
        return "signmaml_ext was built without CUDA (no nvcc at build time)"
    if not torch.backends.cuda.is_built():
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _why_not_cuda(problem: Problem) -> str | None:
    elsewhere = None if problem.device.type == "cuda" else f"the model is on {problem.device}"
    reason = _no_cuda_here() or elsewhere
    if reason is not None or mlp.why_not(problem) is None:
        return reason
    return flat.why_not(problem, "cuda")


# In order of preference for backend="auto".
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            "one kernel for multilayer perceptrons, else native sign steps on flat buffers with gradients by torch",
            _no_cuda_here,
            _why_not_cuda,
            lambda problem: (mlp if mlp.why_not(problem) is None else flat).meta_gradients(problem),
            lambda problem: (mlp if mlp.why_not(problem) is None else flat).adapt(problem),
        ),
        Backend(
            "cpu",
            "native sign steps on flat buffers, gradients by torch, on the CPU",
            lambda: None,
            lambda problem: flat.why_not(problem, "cpu"),
            flat.meta_gradients,
            flat.adapt,
        ),
        Backend(
            "torch",
            "pure PyTorch, any module, any device",
            lambda: None,
            lambda problem: None,
            reference.meta_gradients,
            reference.adapt,
        ),
    )
}


def backend_status() -> dict[str, str | None]:
    """By backend: None if it is usable on this machine, else the reason."""
    return {name: backend.why_not_here() for name, backend in BACKENDS.items()}


def choose(problem: Problem) -> Backend:
    """The backend that serves a problem.

    Raises:
        ValueError: If the backend that the caller asked for does not serve it; the message says why.
    """
    if problem.backend == "auto":
        return next(backend for backend in BACKENDS.values() if backend.why_not(problem) is None)
    backend = BACKENDS[problem.backend]
    reason = backend.why_not(problem)
    if reason is not None:
        raise ValueError(f"backend: expected one that serves this call, found {problem.backend!r}: {reason}")
    return backend


def run(problem: Problem, compute: Callable[[Backend, Problem], reference.Result]) -> tuple[str, reference.Result]:
    """Computes with the chosen backend; "auto" goes on to pure PyTorch when a module turns out not to batch."""
    backend = choose(problem)
    try:
        with torch.inference_mode(False):  # what is computed here outlives the caller's inference mode
            return backend.name, compute(backend, problem)
    except reference.NotBatchable as error:
        if problem.backend != "auto":
            raise ValueError(
                f"backend: expected one that serves this module, found {problem.backend!r}: {error}"
            ) from error
    with torch.inference_mode(False):
        return "torch", compute(BACKENDS["torch"], problem)


def explain(problem: Problem) -> Explanation:
    """Which backend would serve the problem, and why the others would not."""
    reasons = {name: backend.why_not(problem) for name, backend in BACKENDS.items()}
    one_by_one = reference.why_not_batched(problem.model, problem.device)
    how = "all tasks together" if one_by_one is None else f"task by task ({one_by_one})"
    return Explanation(choose(problem).name, reasons, how)
