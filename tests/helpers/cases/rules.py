"""The vectors that inner rules step along, as sums over all gradients so far; the package has recursions instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

# From a parameter's gradients of the steps so far, the newest last.
Vector = Callable[[Sequence[Tensor]], Tensor]


def weighted(gradients: Sequence[Tensor], weight: float, power: int = 1) -> Tensor:
    """sum_i weight^(k-i) g_i^power."""
    last = len(gradients) - 1
    return sum(weight ** (last - i) * g**power for i, g in enumerate(gradients))  # type: ignore[return-value]


def plain() -> Vector:
    return lambda gradients: gradients[-1]


def signum(momentum: float) -> Vector:
    return lambda gradients: (1 - momentum) * weighted(gradients, momentum)


def lion(beta1: float, beta2: float) -> Vector:
    def vector(gradients: Sequence[Tensor]) -> Tensor:
        *before, newest = gradients
        remembered = (1 - beta2) * weighted(before, beta2) if before else 0.0
        return beta1 * remembered + (1 - beta1) * newest

    return vector


def momentum(weight: float, nesterov: bool = False) -> Vector:
    def vector(gradients: Sequence[Tensor]) -> Tensor:
        total = weighted(gradients, weight)
        return gradients[-1] + weight * total if nesterov else total

    return vector


def adam(beta1: float, beta2: float, eps: float) -> Vector:
    """For gradients that are not 0."""

    def vector(gradients: Sequence[Tensor]) -> Tensor:
        count = len(gradients)
        mean = (1 - beta1) * weighted(gradients, beta1) / (1 - beta1**count)
        square = (1 - beta2) * weighted(gradients, beta2, power=2) / (1 - beta2**count)
        return mean / (square.sqrt() + eps)

    return vector
