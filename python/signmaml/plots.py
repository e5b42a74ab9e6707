"""Plots of a run: training curves, one episode with predictions, fits of sine waves. They need no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import signmaml_ext

from .episodes import Episodes, Sampler, draw, draw_tasks
from .evaluation import EvaluationArguments, dropout_off
from .loggers import read_metrics
from .sheets import draw_episode, draw_images, save_figure

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["draw_curves", "draw_episode", "draw_fits", "draw_images", "draw_task"]

TRAIN, VALIDATION = "#4c78a8", "#e45756"
INNER, OUTER = "#54a24b", "#b279a2"
Records = Sequence[Mapping[str, Any]]


def draw_curves(metrics: Path | Mapping[str, Path], out: Path) -> None:
    """Accuracy (classification only) and loss against meta-iterations, validation with its 95% interval.

    One run whose rates are adapted online has a further panel with both rates, the outer one before the schedule.

    Args:
        metrics: A metrics.jsonl, or several by label, whose validation curves are compared.
        out: PNG file to write.

    Raises:
        ValueError: There is nothing to draw.
    """
    paths = metrics if isinstance(metrics, Mapping) else {"": metrics}
    runs = {label: read_metrics(path) for label, path in paths.items()}
    for label, path in paths.items():
        if not runs[label]:
            raise ValueError(f"metrics: expected records of a run, found none in {path}")
    classified = any(record.get("accuracy") is not None for records in runs.values() for record in records)
    quantities = ["accuracy", "loss"] if classified else ["loss"]
    if len(runs) == 1 and any("inner_lr" in record for record in next(iter(runs.values()))):
        quantities.append("rates")
    figure = Figure(figsize=(2 + 4.5 * len(quantities), 4.2), layout="constrained")
    axes = figure.subplots(1, len(quantities), squeeze=False)[0]
    for quantity, axis in zip(quantities, axes, strict=True):
        if quantity == "rates":
            _draw_rates(axis, next(iter(runs.values())))
        elif len(runs) == 1:
            _draw_run(axis, next(iter(runs.values())), quantity)
        else:
            _compare_runs(axis, runs, quantity)
        axis.set_xlabel("meta-iteration")
        labels = {"accuracy": "query accuracy (%)", "loss": _loss_label(classified), "rates": "learning rate"}
        axis.set_ylabel(labels[quantity])
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    save_figure(figure, out)


def draw_task(
    model: nn.Module,
    sampler: Sampler,
    out: Path,
    *,
    task: int = 0,
    title: str = "",
    **arguments: Unpack[EvaluationArguments],
) -> bool:
    """Draws one adapted task of a sampler: a contact sheet for images, fits for functions of one number.

    Args:
        model: The meta-trained model.
        sampler: Where the task comes from.
        out: PNG file to write.
        task: Number of the task; with a sampler that has no `draw_tasks`, a task of its first meta-batch.
        title: Title, such as data set and split; the number of the task is appended.
        **arguments: For `signmaml_ext.evaluate`.

    Returns:
        Whether a plot was drawn; tasks of other kinds have none.
    """
    several = hasattr(sampler, "draw_tasks")
    episodes = draw_tasks(sampler, task, 3) if several else draw(sampler, 0).part(task, task + 1)
    support_x, support_y = episodes.support_x, episodes.support_y
    if support_y.dtype == torch.int64 and support_x.ndim == 5 and support_x.shape[2] in (1, 3):
        draw_episode(
            model,
            episodes.part(0, 1),
            out,
            class_names=_class_names(sampler, task),
            title=f"{title}, task {task}".lstrip(", "),
            **arguments,
        )
        return True
    if support_y.dtype != torch.int64 and support_x.shape[2:].numel() == 1 and support_y.shape[2:].numel() == 1:
        draw_fits(model, episodes, out, first_task=task, title=title, **arguments)
        return True
    return False


def draw_fits(
    model: nn.Module,
    episodes: Episodes,
    out: Path,
    *,
    first_task: int = 0,
    title: str = "",
    **arguments: Unpack[EvaluationArguments],
) -> None:
    """Draws the predictions before and after adapting for a few one-dimensional regression tasks.

    Args:
        model: The meta-trained model.
        episodes: The tasks; all tensors `[T, points, 1]`.
        out: PNG file to write.
        first_task: Number of the first task.
        title: Line above the panels.
        **arguments: For `signmaml_ext.evaluate`.
    """
    support_x, support_y, query_x, query_y = episodes
    tasks = len(support_x)
    every_x = torch.cat((support_x, query_x), 1)
    grid = torch.linspace(float(every_x.min()), float(every_x.max()), 200, device=support_x.device)
    grid_x = grid.to(support_x.dtype).view(1, -1, 1).expand(tasks, -1, 1)
    unknown = torch.zeros_like(grid_x)  # evaluate needs targets, but their loss is unused

    with dropout_off(model):
        on_grid = Episodes(support_x, support_y, grid_x, unknown)
        after = signmaml_ext.evaluate(model, *on_grid, **arguments).logits  # type: ignore[arg-type]
        if not isinstance(arguments["inner_lr"], float):
            arguments["inner_lr"] = 0.0  # learned rates may be one per step, and there are no steps here
        at_start: EvaluationArguments = {**arguments, "inner_steps": 0}
        before = signmaml_ext.evaluate(model, *on_grid, **at_start).logits  # type: ignore[arg-type]
    figure = Figure(figsize=(4.2 * tasks, 3.6), layout="constrained")
    axes = figure.subplots(1, tasks, squeeze=False, sharey=True)[0]
    for number, axis in enumerate(axes):
        points = (support_x, support_y, query_x, query_y)
        sx, sy, qx, qy = (part[number].flatten().cpu().numpy() for part in points)
        x = grid.cpu().numpy()
        axis.plot(x, before[number].flatten().cpu().numpy(), "--", color="0.6", label="before adaptation")
        steps = arguments["inner_steps"]
        axis.plot(x, after[number].flatten().cpu().numpy(), color=TRAIN, label=f"after {steps} steps")
        axis.plot(qx, qy, ".", color="0.35", markersize=5, label="query (truth)")
        axis.plot(sx, sy, "^", color=VALIDATION, markersize=7, label="support")
        axis.set_title(f"task {first_task + number}", fontsize=10)
        axis.set_xlabel("x")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("y")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def _draw_run(axis: Axes, records: Records, quantity: str) -> None:
    x, y, _ = _series(records, "train", quantity)
    if x:
        smooth = _smoothed(y, max(1, len(y) // 40))
        axis.plot(x, y, color=TRAIN, alpha=0.3, linewidth=0.8)
        axis.plot(x, smooth, color=TRAIN, linewidth=1.6, label="train (moving mean)")
    x, y, half = _series(records, "val", quantity)
    if x:
        axis.plot(x, y, "o-", color=VALIDATION, markersize=4, linewidth=1.6, label="validation, 95% interval")
        band = [(a - b, a + b) for a, b in zip(y, half, strict=True)]
        axis.fill_between(x, [b[0] for b in band], [b[1] for b in band], color=VALIDATION, alpha=0.18, linewidth=0)


def _draw_rates(axis: Axes, records: Records) -> None:
    """Both rates of each record, on a logarithmic axis: the schedule would hide what the adaptation does."""
    lines = (("inner_lr", INNER, "inner"), ("outer_lr_before_schedule", OUTER, "outer, before the schedule"))
    for quantity, color, label in lines:
        x, y, _ = _series(records, "train", quantity)
        axis.plot(x, y, color=color, linewidth=1.6, label=label)
    axis.set_yscale("log")
    axis.margins(y=0.3)  # room for the legend


def _compare_runs(axis: Axes, runs: Mapping[str, Records], quantity: str) -> None:
    for label, records in runs.items():
        x, y, half = _series(records, "val", quantity)
        split = "val"
        if not x:
            x, y, half = _series(records, "train", quantity)
            split = "train"
        (line,) = axis.plot(x, y, "o-", markersize=3, linewidth=1.4, label=f"{label} ({split})")
        lower, upper = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, lower, upper, color=line.get_color(), alpha=0.15, linewidth=0)


def _series(records: Records, split: str, quantity: str) -> tuple[list[int], list[float], list[float]]:
    """Iterations, values and half-widths of the interval, for records that have the quantity."""
    chosen = [r for r in records if r["split"] == split and r.get(quantity) is not None]
    # The interval is that of the metric: accuracy in classification, else the loss.
    owner = "accuracy" if any(r.get("accuracy") is not None for r in chosen) else "loss"
    scale = 100.0 if quantity == "accuracy" else 1.0
    half = [scale * (r.get("ci95") or 0.0) if quantity == owner else 0.0 for r in chosen]
    return [r["iteration"] for r in chosen], [scale * r[quantity] for r in chosen], half


def _smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` neighbours on either side."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _loss_label(classified: bool) -> str:
    return "query cross-entropy (nats)" if classified else "query mean squared error"


def _class_names(sampler: Sampler, task: int) -> list[str] | None:
    indices, name = getattr(sampler, "draw_indices", None), getattr(sampler, "class_name", None)
    if indices is None or name is None:
        return None
    return [name(number) for number in indices(task, 1)[0][0].tolist()]
