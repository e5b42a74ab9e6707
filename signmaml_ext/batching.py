"""Whether tasks run together or one by one, and how many at once, decided by the cost of one task's forward pass.

Together (under torch.vmap) an operator is called once for all tasks, which pays where calls take most of the time. One
by one, matrix products run at their best rate, a task's parameters stay in the cache, and several tasks run on several
threads. The choice depends on the model and on sizes, never on a clock: it is the same in every run and on every
machine, so that runs repeat bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import chain, inputs, modes
from .problem import Problem
from .replica import Replicas

# Seconds, fitted to benchmarks/zoo_models.py on the CPUs of benchmarks/results, and rounded. A forward and backward
# pass takes PASS plus CALL for each operator; a core multiplies and adds at RATE. Under vmap an operator takes longer
# to call, convolutions become grouped and slower, and parameters and saved activations no longer stay in the cache,
# which costs PARAMETER_BYTE and SAVED_BYTE per byte.
PASS, CALL = 350e-6, 30e-6
RATE = 35e9
TOGETHER_CALL = 1.5
TOGETHER_CONVOLUTIONS = 0.15
PARAMETER_BYTE, SAVED_BYTE = 0.7e-9, 0.8e-9
# Limits for tasks that run together: bytes of parameters that stay in a core's cache, and bytes of all that they need.
CACHE_BYTES = 4 * 2**20
MOST_BYTES = 256 * 2**20
# Threads pay if a task takes longer than this, in seconds.
LONG = 2e-3


@dataclass(frozen=True)
class Size:
    """The cost of one forward pass of one task.

    Attributes:
        calls: Operators called.
        products: Floating-point operations of matrix products, two per multiply-add.
        convolutions: The same for convolutions.
        saved: Bytes that the backward pass needs.
        parameters: Bytes of the trainable parameters.
    """

    calls: int
    products: float
    convolutions: float
    saved: float
    parameters: int

    @property
    def alone(self) -> float:
        """Modelled seconds of a forward and backward pass of one task by itself."""
        return PASS + CALL * self.calls + 3 * (self.products + self.convolutions) / RATE

    def together(self, tasks: int) -> float:
        """The same for one of `tasks` tasks that run together."""
        calls = TOGETHER_CALL * (PASS + CALL * self.calls) / tasks
        work = 3 * (self.products + self.convolutions / TOGETHER_CONVOLUTIONS) / RATE
        return calls + work + PARAMETER_BYTE * self.parameters + SAVED_BYTE * self.saved

    @property
    def most_together(self) -> int:
        """Most tasks that may run together."""
        in_cache = CACHE_BYTES // max(1, self.parameters)
        return max(1, min(in_cache, int(MOST_BYTES / max(1.0, self.saved + 6 * self.parameters))))

    def scaled(self, share: float) -> Size:
        """The cost of a pass with `share` times as many examples."""
        products, convolutions, saved = (share * v for v in (self.products, self.convolutions, self.saved))
        return replace(self, products=products, convolutions=convolutions, saved=saved)


def size_of(problem: Problem) -> Size | None:
    """The cost of a task's pass on its query set (or, without one, on its support set); None if it fails.

    Measured by one forward pass, which leaves torch's generators as they were; cached by model, shapes and mode.
    """
    x = problem.support_x if problem.query_x is None else problem.query_x
    shapes = tuple((part.shape[1:], part.dtype) for part in inputs.parts(x))
    key = ("size", problem.model.training, problem.batch_norm, problem.precision, tuple(problem.params), shapes)
    answers = chain.of_module(problem.model).answers
    if key not in answers:
        # A copy of the examples, because the forward may modify its input in place.
        answers[key] = _measured(problem, inputs.each(inputs.take(x, 0), Tensor.clone))
    size: Size | None = answers[key]
    return size


def _measured(problem: Problem, x: inputs.Inputs) -> Size | None:
    counter, saved = _Counter(), 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    def forward() -> None:
        copy = Replicas(problem.model, "running" if problem.batch_norm == "running" else "batch").make(
            {name: p.detach().clone().requires_grad_() for name, p in problem.params.items()}
        )
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), counter, modes.autocast(problem):
            inputs.call(copy, x)

    def in_modes() -> None:
        with modes.call_modes(problem):
            forward()

    try:
        modes.without_drawing(problem.device, in_modes)
    except Exception:  # the call itself will raise it, with a proper message
        return None
    parameters = sum(p.nbytes for p in problem.params.values())
    return Size(counter.calls, counter.products, counter.convolutions, saved, parameters)


class _Counter(TorchDispatchMode):
    """Counts calls of operators and their multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.products = self.convolutions = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, because torch would otherwise take a second to import its compiler, only to disable it here."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view:
            self.calls += 1
        if name in _PRODUCTS:
            self.products += _PRODUCTS[name](*args[:3])
        elif name == "convolution":
            weight, output = args[1], found
            smaller = min(args[0].numel() // args[0].shape[1], output.numel() // output.shape[1])
            transposed = bool(args[6])
            positions = smaller if transposed else output.numel() // output.shape[1]
            self.convolutions += 2.0 * positions * weight.numel()
        return found


def _of_matrices(a: Tensor, b: Tensor, *_: Any) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _of_attention(q: Tensor, k: Tensor, v: Tensor) -> float:
    return 2.0 * q.numel() * k.shape[-2] + 2.0 * q.numel() // q.shape[-1] * v.shape[-2] * v.shape[-1]


_PRODUCTS: dict[str, Callable[..., float]] = {
    "mm": _of_matrices,
    "bmm": _of_matrices,
    "addmm": lambda bias, a, b: _of_matrices(a, b),
    "baddbmm": lambda bias, a, b: _of_matrices(a, b),
    "_scaled_dot_product_flash_attention_for_cpu": _of_attention,
    "mkldnn_rnn_layer": lambda x, w, u: 2.0 * x.shape[0] * x.shape[1] * (w.numel() + u.numel()),
}


def why_one_by_one(problem: Problem) -> str | None:
    """None if it pays to run tasks together, else the reason; on a CPU by `Size`, elsewhere it always pays."""
    if problem.device.type != "cpu":
        return None
    if problem.tasks == 1:
        return "there is one"
    size = size_of(problem)
    if size is None:
        return "its forward does not run on such examples, so that nothing is known of it"
    together = min(problem.tasks, size.most_together)
    usual = size.scaled(_share(problem))
    if together < 2 or usual.together(together) >= usual.alone:
        work = (usual.products + usual.convolutions) / 1e6
        return f"a task's forward pass calls {usual.calls} operators for {work:.3g} MFLOP, which pays by itself"
    return None


def _share(problem: Problem) -> float:
    """Mean number of examples of a pass, divided by that of the pass that `size_of` measures."""
    if problem.query_y is None:
        return 1.0
    support, query = problem.support_y.shape[1], problem.query_y.shape[1]
    return (problem.steps * support + query) / ((problem.steps + 1) * query)


def pays_on_threads(problem: Problem) -> bool:
    """Whether a task takes long enough by itself for several threads to pay."""
    size = size_of(problem)
    return size is not None and size.scaled(_share(problem)).alone * (problem.steps + 1) > LONG


def chunk(problem: Problem) -> int:
    """Most tasks that run together."""
    if problem.device.type != "cpu":
        return problem.tasks
    size = size_of(problem)
    return problem.tasks if size is None else size.most_together
