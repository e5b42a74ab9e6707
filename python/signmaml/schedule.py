"""Pure functions of the iteration: the outer learning rate and the seed of a step."""

from __future__ import annotations

import math

_MASK = (1 << 64) - 1


def learning_rate(schedule: str, start: float, iteration: int, iterations: int) -> float:
    """The outer learning rate of one iteration.

    Args:
        schedule: "constant", or "cosine" (from `start` at iteration 0 towards 0 at the end, half a cosine).
        start: Learning rate at iteration 0.
        iteration: 0-based.
        iterations: Length of the run.

    Example:
        >>> learning_rate("cosine", 1e-3, 50, 100)
        0.0005
    """
    if schedule == "constant":
        return start
    return start * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def step_seed(seed: int, iteration: int) -> int:
    """A seed for what is random inside one meta-step (dropout): well mixed, 63 bits, the same after a resume.

    Example:
        >>> step_seed(0, 1) == step_seed(0, 1) != step_seed(1, 0)
        True
    """
    return _mix(_mix(seed) ^ iteration) >> 1


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every input bit changes about half of the output bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
