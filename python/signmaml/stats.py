"""The 95% interval of a mean over tasks."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit


def mean_and_ci95(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and the half-width of its 95% interval by Student's t; nan for fewer than two values.

    Example:
        >>> mean, half = mean_and_ci95(np.array([0.0, 1.0, 0.0, 1.0]))
        >>> round(mean, 3), round(half, 3)
        (0.5, 0.919)
    """
    count = len(values)
    mean = float(values.mean()) if count else math.nan
    if count < 2:
        return mean, math.nan
    quantile = float(stdtrit(count - 1, 0.975))  # two-sided 95%
    return mean, quantile * float(values.std(ddof=1)) / math.sqrt(count)
