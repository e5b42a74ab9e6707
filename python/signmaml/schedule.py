"""Pure functions of the iteration: the outer learning rate and the seed of a step."""

from __future__ import annotations

import math

from .splitmix import mixed


def learning_rate(schedule: str, start: float, iteration: int, iterations: int, warmup: int = 0) -> float:
    """The outer learning rate of one iteration.

    Args:
        schedule: "constant", or "cosine" (from `start` at iteration 0 towards 0 at the end, half a cosine).
        start: Learning rate at iteration 0.
        iteration: 0-based.
        iterations: Length of the run.
        warmup: Over so many first iterations the rate rises to that of the schedule, in equal parts.

    Example:
        >>> learning_rate("cosine", 1e-3, 50, 100)
        0.0005
        >>> [learning_rate("constant", 1.0, i, 100, warmup=4) for i in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if iteration < warmup:
        start = start * (iteration + 1) / warmup
    if schedule == "constant":
        return start
    return start * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def step_weights(steps: int, iteration: int, annealed_over: int) -> dict[int, float]:
    """The multi-step loss of MAML++ (Antoniou, Edwards, Storkey 2019): how much the query loss after each step counts.

    All count alike at first. Over `annealed_over` iterations the earlier ones fall to 0 in equal parts, and the last
    one takes what they lose; from then on it counts alone.

    Returns:
        By number of inner steps, the weights that are not 0, the last step's at the end; their sum is 1.

    Example:
        >>> step_weights(2, 0, 10), step_weights(2, 5, 10), step_weights(2, 10, 10)
        ({1: 0.5, 2: 0.5}, {1: 0.25, 2: 0.75}, {2: 1.0})
    """
    if iteration >= annealed_over:
        return {steps: 1.0}
    earlier = (1 - iteration / annealed_over) / steps
    return dict.fromkeys(range(1, steps), earlier) | {steps: 1 - earlier * (steps - 1)}


def step_seed(seed: int, iteration: int) -> int:
    """A seed for the randomness inside one meta-step (dropout): well mixed, 63 bits, the same after a resume.

    Example:
        >>> step_seed(0, 1) == step_seed(0, 1) != step_seed(1, 0)
        True
    """
    return mixed(mixed(seed) ^ iteration) >> 1
