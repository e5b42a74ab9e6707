"""Tests of one trained learner of `evidence.py`: correct answers by task, and curves over inner steps and shots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from evidence_plan import Setting
from torch import Tensor, nn

import signmaml_ext
from signmaml.building import evaluation_arguments
from signmaml.data.image_set import ImageSet
from signmaml.episodes import Episodes, EpisodeSampler
from signmaml.evaluation import default_chunk, dropout_off
from signmaml.files import write_atomically
from signmaml.heads import head_of, no_loss, with_head
from signmaml.trainer import MetaTrainer

FILE = "scores.npz"
TEST_SEED, TEST_TASKS, CURVE_TASKS = 20_000, 1000, 300
STEPS, SHOTS = (0, 1, 2, 3, 5, 7, 10, 15), (1, 2, 3, 5, 10)


def correct_answers(
    trainer: MetaTrainer,
    images: ImageSet,
    *,
    queries: int,
    tasks: int | None = None,
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
        tasks: How many tasks; None: TEST_TASKS.
        batch_norm: "batch" (transductive) or "support" (inductive).
        steps: Inner steps; None: the configuration's.
        shots: Support images a class; None: the configuration's.

    Returns:
        int64 `[tasks]`, each 0 to ways * queries.
    """
    config = trainer.config if steps is None else trainer.config.replace(test_steps=steps)
    arguments = {**evaluation_arguments(config, trainer.rates, "cross_entropy"), "batch_norm": batch_norm}
    found = []
    with dropout_off(trainer.model):
        for episodes in _test_tasks(trainer, images, queries, tasks, shots):
            result = signmaml_ext.evaluate(trainer.model, *episodes, **arguments)
            found.append(result.query_accuracy.double().cpu() * config.ways * queries)
    return torch.cat(found).round().to(torch.int64).numpy()


def answers_of_nearest_mean(trainer: MetaTrainer, images: ImageSet, *, queries: int) -> np.ndarray:
    """As `correct_answers`, without any inner step: a query's class is the one whose mean feature is nearest.

    The features are the inputs of the head, with BatchNorm by the batch at hand (transductive), and near is what has a
    small angle. With one shot it is the test without an inner loop (NIL) of Raghu et al. 2020, who weigh the support
    examples one by one.
    """
    found = []
    with dropout_off(trainer.model):
        (one,) = _test_tasks(trainer, images, queries, tasks=1)
        name = head_of(trainer.model, one.support_x[0]).name
        assert name is not None, "all networks of the plan end in a linear layer"
        body = with_head(trainer.model, name, nn.Identity())
        for episodes in _test_tasks(trainer, images, queries):
            support, query = (features(body, x) for x in (episodes.support_x, episodes.query_x))
            classes = nn.functional.one_hot(episodes.support_y, trainer.config.ways).to(support)
            means = nn.functional.normalize(classes.mT @ support, dim=-1)
            answers = (query @ means.mT).argmax(-1)
            found.append((answers == episodes.query_y).sum(1).cpu())
    return torch.cat(found).numpy()


def features(body: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of each task's inputs ``[T, n, ...]``, by the statistics of its batch: ``[T, n, F]``."""
    result = signmaml_ext.evaluate(body, x, None, x, None, inner_lr=0.0, inner_steps=0, loss=no_loss, backend="torch")
    return result.logits


def _test_tasks(
    trainer: MetaTrainer, images: ImageSet, queries: int, tasks: int | None = None, shots: int | None = None
) -> Iterator[Episodes]:
    """The test tasks, as many at once as the device does best."""
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
    tasks = TEST_TASKS if tasks is None else tasks
    for first in range(0, tasks, chunk):
        yield sampler.draw_tasks(first, min(chunk, tasks - first))


# A test of a trainer's learner on test images: the number of correct answers in each task.
Test = Callable[[MetaTrainer, ImageSet], np.ndarray]


def tests(setting: Setting, *, curves: bool) -> dict[str, Test]:
    """All tests of a learner of a setting.

    Returns:
        By name: `test_batch_q15` (transductive, 15 queries a class), `test_support_q15` (inductive) and so on for each
        of the setting's numbers of queries; `test_means_q15` without inner steps; with `curves` also `steps_S` and
        `shots_N`.
    """
    found: dict[str, Test] = {
        f"test_{batch_norm}_q{queries}": partial(correct_answers, queries=queries, batch_norm=batch_norm)
        for queries in setting.test_queries
        for batch_norm in ("batch", "support")
    }
    first = setting.test_queries[0]
    found[f"test_means_q{first}"] = partial(answers_of_nearest_mean, queries=first)
    if curves:
        few = partial(correct_answers, queries=first, tasks=CURVE_TASKS)
        found |= {f"steps_{steps}": partial(few, steps=steps) for steps in STEPS}
        found |= {f"shots_{shots}": partial(few, shots=shots) for shots in SHOTS}
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
