"""Your own network on your own images, with the trainer: progress, validation, checkpoints, test, plots.

python examples/own_model.py [ITERATIONS] [FOLDER]

The network is a GRU that reads an image row by row; nothing in it is specific to meta-learning. The images are
generated here: each class is a grating with one angle and width. For files on disk, `signmaml.data.folder(root, split)`
also returns an `ImageSet`.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from signmaml import MetaTrainer, TrainConfig
from signmaml.data import ImageSet

SIZE = 24


class RowReader(nn.Module):
    """A recurrent classifier: rows of pixels in, class scores out."""

    def __init__(self, ways: int, units: int = 48) -> None:
        super().__init__()
        self.input = nn.Linear(SIZE, 3 * units)
        self.state = nn.Linear(units, 3 * units)
        self.head = nn.Linear(units, ways)
        self.units = units

    def forward(self, x: Tensor) -> Tensor:
        rows = self.input(x.squeeze(1))
        hidden = rows.new_zeros(len(x), self.units)
        for row in rows.unbind(1):
            reset_x, update_x, new_x = row.chunk(3, 1)
            reset_h, update_h, new_h = self.state(hidden).chunk(3, 1)
            update = torch.sigmoid(update_x + update_h)
            hidden = update * hidden + (1 - update) * torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return self.head(hidden)


def gratings(split: str, classes: int, each: int = 20) -> ImageSet:
    """Stripes with one angle and width per class, and random phase and noise."""
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angle = math.pi * torch.rand(classes, 1, 1, 1, generator=generator)
    width = 4 + 8 * torch.rand(classes, 1, 1, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(classes, each, 1, 1, generator=generator)
    wave = torch.sin(2 * math.pi * (x * angle.cos() + y * angle.sin()) / width + phase)
    noisy = wave + 0.3 * torch.randn(classes, each, SIZE, SIZE, generator=generator)
    pixels = (127.5 + 80 * noisy).clamp(0, 255).to(torch.uint8)
    names = tuple(f"grating {number}" for number in range(classes))
    return ImageSet("gratings", split, pixels.reshape(-1, 1, SIZE, SIZE), names, torch.full((classes,), each))


if __name__ == "__main__":
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    config = TrainConfig(
        ways=5,
        shots=5,
        queries=5,
        tasks=8,
        outer_lr=0.001,
        inner_lr=0.003,
        inner_steps=5,
        learn_inner_lr="per-layer",
        normalize="signed",
        iterations=iterations,
        test_tasks=200,
        out=sys.argv[2] if len(sys.argv) > 2 else "runs/gratings",
    )
    torch.manual_seed(0)
    trainer = MetaTrainer(
        config,
        model=RowReader(config.ways),
        train=gratings("train", 100),
        val=gratings("val", 20),
        test=gratings("test", 20),
    )
    print(trainer.describe())
    print(trainer.fit(overwrite=True).test)
