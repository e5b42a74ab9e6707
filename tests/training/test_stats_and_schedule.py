"""The interval of a mean, the outer learning rate, and the seeds of steps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from signmaml.schedule import learning_rate, step_seed
from signmaml.stats import mean_and_ci95

# Two-sided 95% quantiles by degrees of freedom, as in the tables of statistics textbooks.
TABLE_95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 29: 2.0452, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize("degrees", TABLE_95)
def test_interval_uses_the_table_of_student(degrees: int) -> None:
    values = np.random.default_rng(degrees).normal(size=degrees + 1)
    mean, half = mean_and_ci95(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / degrees)
    assert mean == pytest.approx(sum(values) / len(values))
    assert half == pytest.approx(TABLE_95[degrees] * deviation / math.sqrt(degrees + 1), rel=5e-5)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [abs(mean) <= half for mean, half in (mean_and_ci95(rng.normal(size=5)) for _ in range(4000))]
    assert 0.94 < np.mean(covered) < 0.96


def test_too_few_values_have_no_interval() -> None:
    assert mean_and_ci95(np.ones(4)) == (1.0, 0.0)
    assert mean_and_ci95(np.array([0.5]))[0] == 0.5
    assert math.isnan(mean_and_ci95(np.array([0.5]))[1])
    assert all(map(math.isnan, mean_and_ci95(np.array([]))))


def test_schedules() -> None:
    assert [learning_rate("constant", 0.1, i, 10) for i in (0, 5, 9)] == [0.1] * 3
    cosine = [learning_rate("cosine", 0.1, i, 10) for i in range(10)]
    assert cosine[0] == 0.1 and cosine[5] == pytest.approx(0.05)
    assert all(a > b > 0 for a, b in pairwise(cosine))


def test_step_seeds_differ_and_fit_63_bits() -> None:
    seeds = {step_seed(seed, iteration) for seed in range(30) for iteration in range(30)}
    assert len(seeds) == 900 and max(seeds) < 2**63 and min(seeds) >= 0
