"""Tests of one trained learner of `evidence.py`: correct answers by task, and curves over inner steps and shots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from evidence_plan import Setting

import signmaml_ext
from signmaml.building import evaluation_arguments
from signmaml.data.image_set import ImageSet
from signmaml.episodes import EpisodeSampler
from signmaml.evaluation import default_chunk, dropout_off
from signmaml.files import write_atomically
from signmaml.trainer import MetaTrainer

FILE = "scores.npz"
TEST_SEED, TEST_TASKS, CURVE_TASKS = 20_000, 1000, 300
STEPS, SHOTS = (0, 1, 2, 3, 5, 7, 10, 15), (1, 2, 3, 5, 10)


def correct_answers(
    trainer: MetaTrainer,
    images: ImageSet,
    *,
    queries: int,
    tasks: int = TEST_TASKS,
    batch_norm: str = "batch",
    steps: int | None = None,
    shots: int | None = None,
) -> np.ndarray:
    """The number of correct answers in each task.

    A task that met a NaN or an Inf counts as its predictions say. The tasks depend on the images and the numbers of
    ways, shots and queries alone, so all learners get the same.

    Args:
        trainer: A finished one; its model and rates are tested, with its configuration's number of ways.
        images: Test images.
        queries: Query images a class.
        tasks: How many tasks.
        batch_norm: "batch" (transductive) or "support" (inductive).
        steps: Inner steps; None: the configuration's.
        shots: Support images a class; None: the configuration's.

    Returns:
        int64 `[tasks]`, each 0 to ways * queries.
    """
    config, chunk = trainer.config, default_chunk(trainer.device)
    sampler = EpisodeSampler(
        images,
        ways=config.ways,
        shots=shots or config.shots,
        queries=queries,
        tasks=chunk,
        seed=TEST_SEED,
        device=trainer.device,
        normalize=config.normalize,
    )
    if steps is not None:
        config = config.replace(test_steps=steps)
    arguments = {**evaluation_arguments(config, trainer.rates, "cross_entropy"), "batch_norm": batch_norm}
    found = []
    with dropout_off(trainer.model):
        for first in range(0, tasks, chunk):
            episodes = sampler.draw_tasks(first, min(chunk, tasks - first))
            result = signmaml_ext.evaluate(trainer.model, *episodes, **arguments)
            found.append(result.query_accuracy.double().cpu() * config.ways * queries)
    return torch.cat(found).round().to(torch.int64).numpy()


def score(trainer: MetaTrainer, images: ImageSet, setting: Setting, *, curves: bool) -> dict[str, np.ndarray]:
    """All tests of a learner, as correct answers by task.

    Returns:
        By name: `test_batch_q15` (transductive, 15 queries a class), `test_support_q15` (inductive) and so on for each
        of the setting's numbers of queries; with `curves` also `steps_S` and `shots_N`.
    """
    found = {
        f"test_{batch_norm}_q{queries}": correct_answers(trainer, images, queries=queries, batch_norm=batch_norm)
        for queries in setting.test_queries
        for batch_norm in ("batch", "support")
    }
    if curves:
        few = {"queries": setting.test_queries[0], "tasks": CURVE_TASKS}
        found |= {f"steps_{steps}": correct_answers(trainer, images, steps=steps, **few) for steps in STEPS}
        found |= {f"shots_{shots}": correct_answers(trainer, images, shots=shots, **few) for shots in SHOTS}
    return found


def save(path: Path, scores: Mapping[str, np.ndarray]) -> None:
    """Writes the answers, whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **scores)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}
