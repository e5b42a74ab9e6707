"""What all reports are made of: a Markdown table and a grid of axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid_of_axes(panels: int, columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Any, Any]:
    """A figure, and `panels` axes in rows of `columns`; a panel has `width` times `height` inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-panels // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for unused in axes.flat[panels:]:
        unused.set_axis_off()
    return figure, axes.flat[:panels]
