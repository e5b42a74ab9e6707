"""Accuracy (or error) over many tasks, always with the protocol that produced it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

import signmaml_ext
from signmaml_ext import InnerRule, Plain, Sharpness

from .distributed import Group
from .episodes import Episodes, EpisodeSampler, Sampler, draw, draw_tasks
from .stats import mean_and_ci95

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .data import ImageSet

Rates = float | Tensor | Mapping[str, Tensor]
# From one task's episodes to its model before the inner loop, and the rates for it.
Start = Callable[[Episodes], tuple[nn.Module, Rates]]


class StepArguments(TypedDict):
    """Arguments that both training and evaluation pass on to `signmaml_ext`; see `signmaml_ext.meta_step`.

    `loss` may be None until the targets are known; then `loss_for` chooses it.
    """

    method: str
    loss: str | Callable[[Tensor, Tensor], Tensor] | None
    adapt: str | Sequence[str] | None
    batch_norm: str
    nonfinite: str
    backend: str
    precision: str
    sharpness: Sharpness | float | None
    inner_rule: InnerRule | None


class EvaluationArguments(StepArguments):
    """Arguments passed on to `signmaml_ext.evaluate`; see there."""

    inner_lr: Rates
    inner_steps: int


@dataclass(frozen=True)
class Evaluation:
    """A mean over tasks and everything it depends on; `str()` prints all of it, `to_dict()` is for JSON.

    Attributes:
        metric: "accuracy" (fraction of correct predictions, 0..1) or "mse" (mean squared error).
        mean: Mean of the metric over the tasks.
        ci95: Half-width of the 95% t-interval of the mean; nan for one task.
        loss: Mean query loss over the same tasks.
        tasks: Number of tasks drawn.
        nonfinite: How many of them met a NaN or an Inf; they count in the mean unless `left_out`.
        left_out: Whether non-finite tasks were left out of the mean (`nonfinite="skip"`).
        ways: Classes in a task; None in regression.
        shots: Support examples per class (per task in regression).
        queries: Query examples per class (per task in regression).
        test_steps: Inner steps.
        inner_lr: Inner learning rate, or "learned".
        method: "sign-maml", "fo-maml" or "maml".
        batch_norm: "batch", "support" or "running" statistics.
        rotations: Whether rotated classes counted as separate classes.
        seed: Seed of the tasks; None if the sampler has none.
        data: Name of the data set.
        split: "train", "val" or "test".
        backend: Backend that computed it.
        precision: "fp32", "tf32" or "bf16".
        sharpness: How inner gradients were perturbed, in words; "none" if they were not.
        inner_rule: The rule of the inner steps, in words; "none" for plain steps.
        head: "trained", or "prototypes" if each task had a head of its own (see `signmaml.heads`).
    """

    metric: str
    mean: float
    ci95: float
    loss: float
    tasks: int
    nonfinite: int
    left_out: bool
    ways: int | None
    shots: int
    queries: int
    test_steps: int
    inner_lr: float | str
    method: str
    batch_norm: str
    rotations: bool
    seed: int | None
    data: str
    split: str
    backend: str
    precision: str
    sharpness: str = "none"
    inner_rule: str = "none"
    head: str = "trained"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; a number that is not finite becomes None."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def score(self) -> str:
        """The mean with its interval, such as "accuracy 93.42% +- 0.35%"."""
        if self.metric == "accuracy":
            return f"accuracy {100 * self.mean:.2f}% +- {100 * self.ci95:.2f}%"
        return f"mean squared error {self.mean:.4g} +- {self.ci95:.2g}"

    def protocol(self) -> str:
        """The settings that the result depends on, in one line."""
        if self.ways is None:
            setting = f"{self.shots} support and {self.queries} query points a task"
        else:
            setting = f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class"
        rate = self.inner_lr if isinstance(self.inner_lr, str) else f"{self.inner_lr:g}"
        rotated = ", rotated classes" if self.rotations else ""
        extras = [] if self.inner_rule == "none" else [self.inner_rule]
        extras += [] if self.sharpness == "none" else [f"sharpness {self.sharpness}"]
        steps = f" with {' and '.join(extras)}" if extras else ""
        # Statistics of the query set use all its images at once.
        transductive = " (transductive)" if self.batch_norm == "batch" else ""
        seed = "" if self.seed is None else f", seed {self.seed}"
        setting += "" if self.head == "trained" else f", head from {self.head}"
        return (
            f"{setting}, {self.data}/{self.split}{rotated}; {self.method}{steps}, {self.test_steps} test steps, "
            f"inner_lr {rate}, BatchNorm on {self.batch_norm} statistics{transductive}; {self.tasks} tasks{seed}, "
            f"backend {self.backend}, {self.precision}"
        )

    def __str__(self) -> str:
        interval = "95% t-interval" if self.tasks > 1 else "no interval: it takes at least two tasks"
        lines = [f"{self.split} {self.score()} ({interval})", f"  protocol: {self.protocol()}"]
        if self.nonfinite:
            fate = "left out of the mean" if self.left_out else "part of the mean"
            lines.append(f"  {self.nonfinite} of {self.tasks} tasks met a NaN or an Inf ({fate})")
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    images_or_sampler: ImageSet | Sampler,
    *,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    tasks: int = 1000,
    inner_lr: Rates,
    inner_steps: int,
    method: str = "sign-maml",
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    adapt: str | Sequence[str] | None = None,
    batch_norm: str = "batch",
    nonfinite: str = "propagate",
    backend: str = "auto",
    precision: str = "fp32",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    seed: int = 0,
    rotations: bool = False,
    normalize: str = "zero-one",
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Adapts a model to many tasks and returns the mean of their query accuracy with its 95% interval.

    The model is left unchanged; dropout is off meanwhile. The tasks drawn do not depend on `chunk`.

    Args:
        model: The meta-trained model; its device is where everything runs.
        images_or_sampler: An `ImageSet` to draw episodes from, or any sampler (see `Sampler`).
        ways: Classes per task for an `ImageSet` (default 5); otherwise taken from the sampler or its tensors.
        shots: Support examples per class, likewise (default 1).
        queries: Query examples per class, likewise (default 15).
        tasks: Number of tasks, >= 1; with one task there is no interval.
        inner_lr: As in `signmaml_ext.evaluate`, like the following arguments down to `inner_rule`.
        inner_steps: Inner steps of every task.
        method: "sign-maml", "fo-maml" or "maml".
        loss: None: cross-entropy for int64 labels, the mean squared error for anything else.
        adapt: Name patterns of the parameters that the inner loop may move; None: all that require grad.
        batch_norm: "batch", "support" or "running" statistics.
        nonfinite: "propagate", "skip" (tasks that met a NaN or an Inf are left out of the mean) or "raise".
        backend: "auto", "cuda", "cpu" or "torch".
        precision: "fp32", "tf32" or "bf16".
        sharpness: How inner gradients are perturbed; None: not at all.
        inner_rule: What inner steps make of their gradients, and weight decay; None: plain steps.
        seed: Seed of the tasks drawn from an `ImageSet`, >= 0.
        rotations: As in `EpisodeSampler`; for an `ImageSet`.
        normalize: Likewise.
        chunk: Tasks computed at once; None: 25 on the CPU, 200 elsewhere.
        progress: Called with the number of tasks of each chunk once it has been launched.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError, TypeError: An argument does not fit; see `signmaml_ext.evaluate` and `EpisodeSampler`.
        FloatingPointError: With nonfinite="raise".

    Determinism: the same arguments give the same result; `chunk` may change tasks' results in the last bits.

    Example:
        >>> import signmaml
        >>> waves = signmaml.SinusoidSampler(shots=10, queries=10, tasks=25)
        >>> result = evaluate(signmaml.MLP(1, 1), waves, tasks=100, inner_lr=0.01, inner_steps=5)
        >>> result.metric, result.tasks, result.shots
        ('mse', 100, 10)
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1, found {tasks!r}")
    device = next(model.parameters()).device
    if chunk is None:
        chunk = default_chunk(device)
    sampler: Sampler
    if hasattr(images_or_sampler, "draw"):
        sampler = images_or_sampler
        data, split = getattr(sampler, "name", type(sampler).__name__), getattr(sampler, "split", "own")
    else:
        ways, shots, queries = ways or 5, shots or 1, queries or 15
        sampler = EpisodeSampler(
            images_or_sampler,
            ways=ways,
            shots=shots,
            queries=queries,
            tasks=min(chunk, tasks),
            seed=seed,
            device=device,
            rotations=rotations,
            normalize=normalize,
        )
        data, split = images_or_sampler.name, images_or_sampler.split
    return evaluate_sampler(
        model,
        sampler,
        tasks=tasks,
        chunk=chunk,
        report={"data": data, "split": split, "ways": ways, "shots": shots, "queries": queries},
        progress=progress,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        method=method,
        loss=loss,
        adapt=adapt,
        batch_norm=batch_norm,
        nonfinite=nonfinite,
        backend=backend,
        precision=precision,
        sharpness=sharpness,
        inner_rule=inner_rule,
    )


def evaluate_sampler(
    model: nn.Module,
    sampler: Sampler,
    *,
    tasks: int,
    chunk: int,
    report: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
    group: Group | None = None,
    start: Start | None = None,
    **arguments: Unpack[EvaluationArguments],
) -> Evaluation:
    """`evaluate` for an existing sampler.

    Args:
        model: The model.
        sampler: Where tasks come from.
        tasks: Number of tasks.
        chunk: Tasks at once, if the sampler can draw any number.
        report: For the `Evaluation`: `data` and `split`, and `ways`, `shots`, `queries` as far as they are known.
        progress: As in `evaluate`.
        group: Processes over which the chunks are dealt out; their number does not change the result. None: this
            process alone.
        start: What each task starts from, if it has a model of its own; tasks are then computed one by one.
        **arguments: For `signmaml_ext.evaluate`.
    """
    group = group or Group()
    numbers = torch.zeros(3, tasks, dtype=torch.float64, device=next(model.parameters()).device)
    at_once = chunk
    with dropout_off(model):
        for first, episodes in _chunks(sampler, tasks, chunk, group):
            if arguments["loss"] is None:
                arguments["loss"] = loss_for(episodes)
            if start is None:
                result, at_once = _evaluate_in_memory(model, episodes, at_once, arguments)
            else:
                result = _evaluate_each(episodes, start, arguments)
            metric = result.query_loss if result.query_accuracy is None else result.query_accuracy
            rows = (metric.double(), result.query_loss.double(), result.nonfinite.double())
            numbers[:, first : first + len(metric)] = torch.stack(rows)
            if progress is not None:
                progress(episodes.tasks)
    group.add(numbers)
    if not group.first:  # it may have had no chunk, so it takes rank 0's result
        return Evaluation(**json.loads(group.bytes_of_first(None)))
    values, losses, flags = numbers.cpu()
    flags = flags > 0
    left_out = arguments["nonfinite"] == "skip"
    counted = ~flags if left_out else torch.ones_like(flags)
    mean, ci95 = mean_and_ci95(values[counted].numpy())
    classification = result.query_accuracy is not None
    evaluation = Evaluation(
        metric="accuracy" if classification else "mse",
        mean=mean,
        ci95=ci95,
        loss=float(losses[counted].mean()),
        tasks=tasks,
        nonfinite=int(flags.sum()),
        left_out=left_out,
        **_setting(sampler, report, episodes, result.logits.shape[-1] if classification else None),
        test_steps=arguments["inner_steps"],
        inner_lr=_rate_for_report(arguments["inner_lr"]),
        method=arguments["method"],
        batch_norm=arguments["batch_norm"],
        rotations=bool(getattr(sampler, "rotations", False)),
        seed=getattr(sampler, "seed", None),
        data=report["data"],
        split=report["split"],
        backend=result.backend,
        precision=arguments["precision"],
        sharpness=_in_words(arguments["sharpness"]),
        inner_rule="none" if arguments["inner_rule"] in (None, Plain()) else str(arguments["inner_rule"]),
        head="trained" if start is None else "prototypes",
    )
    group.bytes_of_first(json.dumps(dataclasses.asdict(evaluation)).encode())
    return evaluation


def _evaluate_in_memory(
    model: nn.Module, episodes: Episodes, at_once: int, arguments: EvaluationArguments
) -> tuple[signmaml_ext.EvaluateResult, int]:
    """`signmaml_ext.evaluate` on at most `at_once` tasks together, fewer if they do not fit in memory.

    Returns:
        The result, and how many tasks fitted together.

    Raises:
        torch.OutOfMemoryError: One task alone does not fit; the message says how to reduce memory.
    """
    parts: list[signmaml_ext.EvaluateResult] = []
    done = 0
    while done < episodes.tasks:
        piece = episodes.part(done, done + at_once)
        try:
            parts.append(signmaml_ext.evaluate(model, *piece, **arguments))  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            at_once = fewer_tasks(piece.tasks, episodes, error)
            continue
        done += piece.tasks
    return _joined(parts), at_once


def _evaluate_each(episodes: Episodes, start: Start, arguments: EvaluationArguments) -> signmaml_ext.EvaluateResult:
    """`signmaml_ext.evaluate` on tasks that start from models of their own."""
    parts = []
    for task in range(episodes.tasks):
        piece = episodes.part(task, task + 1)
        model, rates = start(piece)
        own: EvaluationArguments = {**arguments, "inner_lr": rates}
        parts.append(signmaml_ext.evaluate(model, *piece, **own))  # type: ignore[arg-type]
    return _joined(parts)


def _joined(parts: Sequence[signmaml_ext.EvaluateResult]) -> signmaml_ext.EvaluateResult:
    """The results of several calls as one."""
    if len(parts) == 1:
        return parts[0]
    accuracies = [part.query_accuracy for part in parts if part.query_accuracy is not None]
    return dataclasses.replace(
        parts[0],
        query_loss=torch.cat([part.query_loss for part in parts]),
        query_accuracy=torch.cat(accuracies) if accuracies else None,
        logits=torch.cat([part.logits for part in parts]),
        support_loss=torch.cat([part.support_loss for part in parts], dim=1),
        nonfinite=torch.cat([part.nonfinite for part in parts]),
    )


def fewer_tasks(count: int, episodes: Episodes, error: torch.OutOfMemoryError) -> int:
    """How many tasks to compute together after `count` did not fit in memory: half as many.

    Raises:
        torch.OutOfMemoryError: `count` was 1 already; the message says how to reduce memory.
    """
    if count > 1:
        return -(-count // 2)
    support, query = list(episodes.support_x.shape[1:]), list(episodes.query_x.shape[1:])
    raise torch.OutOfMemoryError(
        f"memory: expected room for at least one task (support {support}, query {query}) on "
        f"{episodes.support_x.device}, found too little: {str(error).splitlines()[0] if str(error) else 'none left'}. "
        f"Memory grows with support and query examples (now {support[0]} and {query[0]}), with image size and "
        "filters, and for method 'maml' with inner_steps: halve one of them, or use precision 'bf16'"
    ) from error


def default_chunk(device: torch.device) -> int:
    """Tasks at once: a good number for two CPU cores, or enough to fill an accelerator."""
    return 25 if device.type == "cpu" else 200


def loss_for(episodes: Episodes) -> str:
    """The usual loss for a sampler's targets: cross-entropy for int64 labels, else the mean squared error."""
    return "cross_entropy" if episodes.support_y.dtype == torch.int64 else "mse"


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _chunks(sampler: Sampler, tasks: int, chunk: int, group: Group) -> Iterator[tuple[int, Episodes]]:
    """This process's share of meta-batches that hold `tasks` tasks in total, each with the number of its first task."""
    if hasattr(sampler, "draw_tasks"):
        for first in range(chunk * group.rank, tasks, chunk * group.size):
            yield first, draw_tasks(sampler, first, min(chunk, tasks - first))
        return
    done = iteration = 0
    while done < tasks:
        episodes = draw(sampler, iteration).part(0, tasks - done)
        if episodes.tasks == 0:
            raise ValueError(f"sampler: expected meta-batches with at least one task, found none in draw({iteration})")
        if iteration % group.size == group.rank:
            yield done, episodes
        done += episodes.tasks
        iteration += 1


def _setting(sampler: Sampler, report: Mapping[str, Any], episodes: Episodes, classes: int | None) -> dict[str, Any]:
    """Ways, shots and queries: from `report`, else from the sampler, else from the sizes of the sets."""

    def known(name: str) -> int | None:
        value = report.get(name)
        return getattr(sampler, name, None) if value is None else value

    ways = None if classes is None else known("ways") or classes
    shots = known("shots") or episodes.support_x.shape[1] // (ways or 1)
    queries = known("queries") or episodes.query_x.shape[1] // (ways or 1)
    return {"ways": ways, "shots": shots, "queries": queries}


def _in_words(sharpness: Sharpness | float | None) -> str:
    """Such as "0.05 (l2)"."""
    how = sharpness if sharpness is None or isinstance(sharpness, Sharpness) else Sharpness(sharpness)
    if how is None or how.rho == 0:
        return "none"
    return f"{how.rho:g} ({'adaptive ' * how.adaptive}{how.norm})"


def _rate_for_report(rate: Rates) -> float | str:
    if isinstance(rate, (int, float)):
        return float(rate)
    return "learned"
