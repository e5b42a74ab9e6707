"""A training run of a few seconds, as a program: python -m helpers.programs.toy_run FOLDER ITERATIONS [--slow SECONDS].

The tests start it, stop it in various ways and resume it themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.cases.toy_images import toy_images
from signmaml.config import TrainConfig
from signmaml.signals import TrainingInterrupted
from signmaml.trainer import MetaTrainer


class DropoutNet(nn.Module):
    """Has dropout, to test randomness inside the step, and BatchNorm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(256, 20)
        self.normalize = nn.BatchNorm1d(20)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(torch.relu(self.normalize(self.features(x.flatten(1))))))


def toy_config(iterations: int, **changes: Any) -> TrainConfig:
    """Logs, validates and saves at periods that do not divide each other."""
    return TrainConfig(
        data="toy", ways=3, shots=1, queries=3, tasks=3, inner_steps=2, iterations=iterations, log_every=4,
        validate_every=6, validate_tasks=5, checkpoint_every=5, test_tasks=6, learn_inner_lr="per-layer-per-step",
        schedule="cosine", seed=3, device="cpu", tensorboard=False,
    ).replace(**changes)  # fmt: skip


def toy_trainer(folder: Path | str, iterations: int = 12, **changes: Any) -> MetaTrainer:
    """Starts with the same weights in every process; draws no plots, which would take longer than the training."""
    torch.manual_seed(11)
    sets = {split: toy_images(split) for split in ("train", "val", "test")}
    trainer = MetaTrainer(toy_config(iterations, **changes), model=DropoutNet(), out=folder, progress=False, **sets)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    return trainer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("iterations", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    options = parser.parse_args()
    trainer = toy_trainer(options.folder, options.iterations)
    step = trainer._train_step

    def slow_step() -> None:
        step()
        print(trainer.iteration, flush=True)
        time.sleep(options.slow)

    trainer._train_step = slow_step  # type: ignore[method-assign]
    try:
        trainer.fit()
    except TrainingInterrupted as interruption:
        print(interruption, flush=True)
        return interruption.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
