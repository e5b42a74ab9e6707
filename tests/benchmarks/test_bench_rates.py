"""bench_rates.py: every kind of rate has a gradient, and what would falsify a ratio is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_kind_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_rates

    found = bench_rates.measure("D", "sign-maml", 0, CPU)
    model = bench_rates.WORKLOADS["D"].problem(tasks=1, steps=1, device=CPU).model
    assert list(found["ratio"]) == list(bench_rates.rates_of(model, 0.1))
    assert all(ratio.samples == 5 and ratio.median > 0 for ratio in found["ratio"].values())


def test_other_work_is_not_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_rates

    right = bench_rates.rates_of

    def other_rates(model: Any, rate: float) -> dict[str, Any]:
        return right(model, 2 * rate)

    monkeypatch.setattr(bench_rates, "rates_of", other_rates)
    with pytest.raises(SystemExit):
        bench_rates.measure("D", "fo-maml", 0, CPU)
    assert "another gradient than with a constant rate" in capsys.readouterr().err
