"""Sheets of images: an episode with predictions, a sample of an image set."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor, nn

import signmaml_ext

from .data import ImageSet
from .episodes import Episodes
from .evaluation import EvaluationArguments, dropout_off
from .files import write_atomically

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .prediction import Predictions, Support

RIGHT, WRONG = "#2e7d32", "#c62828"
_MOST_PREDICTED_ROWS = 20
_MOST_ROWS, _MOST_SUPPORT, _MOST_QUERIES = 10, 5, 10
# Inches.
_LABEL, _CELL, _ROW, _HEADING = 2.0, 0.95, 1.2, 0.85


def draw_episode(
    model: nn.Module,
    episode: Episodes,
    out: Path,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
    **arguments: Unpack[EvaluationArguments],
) -> None:
    """A contact sheet: one row per class, support images left, query images right under their predicted class.

    Args:
        model: The meta-trained model.
        episode: One task; x is `[1, S, C, H, W]`, y `[1, S]`.
        out: PNG file to write.
        class_names: Name of each label; None: numbers only.
        title: First line above the sheet.
        **arguments: For `signmaml_ext.evaluate`.
    """
    with dropout_off(model):
        logits = signmaml_ext.evaluate(model, *episode, **arguments).logits  # type: ignore[arg-type]
    predicted = logits[0].argmax(-1).cpu()
    support_x, support_y, query_x, query_y = (tensor[0].cpu() for tensor in episode)
    labels = sorted(set(query_y.tolist()))
    shown = labels[:_MOST_ROWS]
    support = {label: _where(support_y, label)[:_MOST_SUPPORT] for label in shown}
    queries = {label: _where(query_y, label)[:_MOST_QUERIES] for label in shown}
    left, right = (max(map(len, rows.values())) for rows in (support, queries))

    figure, grid = _episode_grid(len(shown), left, right)
    limits = float(support_x.min()), float(support_x.max())
    for row, label in enumerate(shown):
        for column, index in enumerate(support[label]):
            axis = _image(figure, grid, (row, column), support_x[index], limits)
            if column == 0:
                name = f"class {label}" if class_names is None else f"{label}  {_shorten(class_names[label])}"
                _label_row(axis, name)
            if (row, column) == (0, 0):
                _head(axis, "support")
        for column, index in enumerate(queries[label]):
            axis = _image(figure, grid, (row, left + 1 + column), query_x[index], limits)
            _mark(axis, int(predicted[index]), label)
            if (row, column) == (0, 0):
                _head(axis, "query, under the predicted class")
    hits = int((predicted == query_y).sum())
    rest = "" if len(shown) == len(labels) else f"; first {len(shown)} of {len(labels)} classes"
    setting = f"{len(labels)}-way {len(support_y) // len(labels)}-shot"
    steps = arguments["inner_steps"]
    summary = f"{setting}: {hits} of {len(query_y)} query images right after {steps} inner steps{rest}"
    figure.suptitle(f"{title}\n{summary}" if title else summary, fontsize=11, y=0.995, va="top")
    save_figure(figure, out)


def draw_predictions(
    found: Predictions, queries: Tensor, support: Support | None, out: Path, *, title: str = ""
) -> None:
    """A contact sheet of new images: one row per class, its support images left, the queries predicted as it right.

    Above each query stands its probability, and in red the class that its folder is named like where that is another.
    Images are as the network sees them.

    Args:
        found: The predictions.
        queries: `[n, C, H, W]`, the images.
        support: The support set; None: its column stays empty.
        out: PNG file to write.
        title: First line above the sheet.
    """
    predicted = found.predicted
    counts = Counter(predicted)
    order = [name for name in found.classes if counts[name]]
    if support is not None:  # else a class without a query has nothing to show
        order += [name for name in found.classes if not counts[name]]
    shown = order[:_MOST_PREDICTED_ROWS]
    of_class = {name: [i for i, label in enumerate(predicted) if label == name][:_MOST_QUERIES] for name in shown}
    examples: dict[str, list[Tensor]] = {name: [] for name in shown}
    if support is not None:
        for image, label in zip(support.inputs, support.labels, strict=True):
            if label in examples and len(examples[label]) < _MOST_SUPPORT:
                examples[label].append(image)
    left = max(1, *(len(images) for images in examples.values()))
    right = max(1, *(len(rows) for rows in of_class.values()))
    figure, grid = _episode_grid(len(shown), left, right)
    limits = float(queries.min()), float(queries.max())
    for row, name in enumerate(shown):
        shown_of = "" if counts[name] <= _MOST_QUERIES else f", {_MOST_QUERIES} shown"
        label = f"{_shorten(name)}\n{counts[name]} predicted{shown_of}"
        for column, image in enumerate(examples[name]):
            axis = _image(figure, grid, (row, column), image, limits)
            if column == 0:
                _label_row(axis, label)
                if row == 0:
                    _head(axis, "support")
        for column, index in enumerate(of_class[name]):
            axis = _image(figure, grid, (row, left + 1 + column), queries[index], limits)
            truth = found.truth[index]
            _mark_probability(axis, float(found.probabilities[index].max()), None if truth == name else truth)
            if column == 0:
                if row == 0:
                    _head(axis, "query, by predicted class")
                if not examples[name]:
                    _label_row(axis, label)
    hits, known = found.right()
    summary = f"{len(found.names)} images, {len(found.classes)} classes"
    summary += f": {hits} of {known} agree with the name of their folder" if known else ""
    summary += f"; {len(shown)} classes shown" if len(shown) < len(order) else ""
    figure.suptitle(f"{title}\n{summary}" if title else summary, fontsize=11, y=0.995, va="top")
    save_figure(figure, out)


def draw_images(images: ImageSet, out: Path, *, classes: int = 12, each: int = 10) -> None:
    """Draws one row for each of some evenly spaced classes, with their first images.

    Args:
        images: The set.
        out: PNG file to write.
        classes: Maximum number of rows.
        each: Maximum number of images per class.
    """
    rows = min(classes, images.classes)
    chosen = [number * images.classes // rows for number in range(rows)]
    columns = min(each, int(images.class_sizes.max()))
    width, height = _LABEL + 0.2 + 0.75 * columns, 0.6 + 0.8 * rows
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        rows, columns, left=_LABEL / width, right=0.985, top=1 - 0.5 / height, bottom=0.02, wspace=0.06, hspace=0.06
    )
    for row, number in enumerate(chosen):
        for column, picture in enumerate(images.images_of(number)[:columns]):
            axis = _image(figure, grid, (row, column), picture.float(), (0.0, 255.0))
            if column == 0:
                _label_row(axis, _shorten(images.class_names[number]))
    figure.suptitle(f"{images.name}/{images.split}: {rows} of {images.classes} classes", fontsize=11, y=0.99, va="top")
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Writes a PNG file atomically; needs no window system, whichever backend matplotlib is configured for."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(out, buffer.getvalue())


def _episode_grid(rows: int, left: int, right: int) -> tuple[Figure, GridSpec]:
    """A grid with a narrow empty column between support and query."""
    width, height = _LABEL + 0.3 + _CELL * (left + right), _HEADING + 0.3 + _ROW * rows
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        rows,
        left + 1 + right,
        width_ratios=[1.0] * left + [0.35] + [1.0] * right,
        left=_LABEL / width,
        right=0.985,
        top=1 - _HEADING / height,
        bottom=0.02,
        wspace=0.08,
        hspace=0.32,
    )
    return figure, grid


def _where(labels: Tensor, label: int) -> list[int]:
    positions: list[int] = (labels == label).nonzero().flatten().tolist()
    return positions


def _image(figure: Figure, grid: GridSpec, cell: tuple[int, int], image: Tensor, limits: tuple[float, float]) -> Axes:
    """Draws `[C, H, W]` with the given limits for black and white."""
    low, high = limits
    axis = figure.add_subplot(grid[cell])
    pixels = ((image - low) / max(high - low, 1e-12)).clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.8")
    return axis


def _mark(axis: Axes, predicted: int, label: int) -> None:
    right = predicted == label
    colour = RIGHT if right else WRONG
    axis.set_title(str(predicted) if right else f"{predicted} (is {label})", fontsize=9, color=colour, pad=3)
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.0 if right else 3.0)


def _mark_probability(axis: Axes, probability: float, wrong: str | None) -> None:
    """`wrong`: the class that the image's folder is named like, where it is another than the predicted one."""
    text = f"{probability:.2f}" if wrong is None else f"{probability:.2f} (is {_shorten(wrong, 8)})"
    axis.set_title(text, fontsize=7 if wrong else 8, color=WRONG if wrong else "0.25", pad=3)
    if wrong is not None:
        for spine in axis.spines.values():
            spine.set_color(WRONG)
            spine.set_linewidth(2.5)


def _head(axis: Axes, text: str) -> None:
    axis.annotate(text, (0, 1), (0, 19), "axes fraction", "offset points", fontsize=10, weight="bold")


def _label_row(axis: Axes, text: str) -> None:
    axis.text(-0.12, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=9)


def _shorten(name: str, most: int = 20) -> str:
    return name if len(name) <= most else "..." + name[-(most - 3) :]
