"""Results of a run: the best validation, the test, and result.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evaluation import Evaluation


@dataclass(frozen=True)
class Best:
    """The best validation so far; of two equal ones, the earlier.

    Attributes:
        iteration: Meta-iterations done at that point.
        metric: "accuracy" (higher is better) or "mse" (lower is better).
        value: Mean of the metric over the validation tasks.
    """

    iteration: int
    metric: str
    value: float

    def beaten_by(self, found: Evaluation) -> bool:
        """Whether an evaluation is better; any number is better than nan."""
        if math.isnan(self.value):
            return not math.isnan(found.mean)
        return found.mean > self.value if self.metric == "accuracy" else found.mean < self.value


@dataclass(frozen=True)
class FitResult:
    """Result of `MetaTrainer.fit`.

    Attributes:
        test: The test with the best weights; None with `test_tasks=0` or without test data.
        best: The best validation; None without validation.
        iterations: Meta-iterations done.
        seconds: Time spent training and validating, over all parts of a resumed run.
        folder: The run's folder.
    """

    test: Evaluation | None
    best: Best | None
    iterations: int
    seconds: float
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Everything except the folder, as JSON values."""
        return {
            "test": None if self.test is None else self.test.to_dict(),
            "validation": None if self.best is None else dataclasses.asdict(self.best),
            "iterations": self.iterations,
            "train_seconds": round(self.seconds, 3),
        }
