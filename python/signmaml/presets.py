"""Named starting points for `TrainConfig`, as plain data: `signmaml train --preset NAME`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Omniglot, 5-way 1-shot, small enough for a few minutes on two CPU cores.
    "omniglot": {
        "data": "omniglot",
        "rotations": True,
        "tasks": 8,
        "iterations": 5000,
    },
    # The official code's run on mini-ImageNet; takes hours on a CPU.
    "official": {
        "data": "mini_imagenet",
        "image_size": 84,
        "rotations": False,
        "normalize": "raw",
        "ways": 5,
        "shots": 1,
        "queries": 1,
        "tasks": 8,
        "filters": 32,
        "method": "sign-maml",
        "inner_lr": 0.0035,
        "inner_steps": 5,
        "test_steps": 10,
        "iterations": 60_000,
        "outer_lr": 1e-3,
        "schedule": "constant",
        "validate_every": 1000,
        "validate_tasks": 200,
        "test_tasks": 1000,
        "log_every": 100,
        "checkpoint_every": 1000,
    },
    # Sharp-MAML (both steps) as published: exact MAML, on the data at hand. Combine it with --data and --method.
    "sharp-maml": {
        "method": "maml",
        "inner_lr": 0.1,
        "sharpness_lower": 0.05,
        "sharpness_upper": 0.05,
    },
    # Regression of sine waves from 10 points, as in the MAML paper.
    "sinusoid": {
        "data": "sinusoid",
        "model": "mlp",
        "shots": 10,
        "queries": 10,
        "tasks": 25,
        "inner_lr": 0.01,
        "inner_steps": 5,
        "iterations": 2000,
        "outer_lr": 1e-3,
        "schedule": "constant",
        "validate_every": 200,
        "test_tasks": 600,
    },
}
