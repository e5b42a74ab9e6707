"""Which parts of a set are on disk, and whether they are complete; for ``data list`` and ``data verify``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .arguments import SPLITS, a_few, check_choice, check_integer
from .decode import IMAGE_SIZES
from .folder import Selection, decode_own, find_classes
from .glyphs import GLYPH_SIZES, draw_split
from .image_set import ImageSet
from .registry import DATASETS, STANDARD, check_root
from .sources import open_source
from .standard import decode_standard, open_standard

Place = str | os.PathLike[str] | None


@dataclass(frozen=True)
class SplitReport:
    """The result of `verify` for one split.

    Attributes:
        split: ``"train"``, ``"val"`` or ``"test"``.
        classes: Classes found; 0 if the split cannot be loaded.
        images: Images found, all of them decoded; 0 if the split cannot be loaded.
        problems: Descriptions of all problems; empty if there are none.
    """

    split: str
    classes: int
    images: int
    problems: tuple[str, ...] = ()


def complete_splits(name: str, root: Place = None, *, selection: Selection | None = None) -> tuple[str, ...]:
    """The splits that have all their classes on disk. Only lists files; nothing is decoded or downloaded.

    Args:
        name: A key of `DATASETS`.
        root: As for `load`.
        selection: Which own images are in which split.

    Returns:
        Splits in order; empty if nothing is there.

    Raises:
        ValueError: There is no such set, or the content of `root` is rejected (see `folder`).

    Example:
        >>> complete_splits("glyphs")
        ('train', 'val', 'test')
    """
    check_choice("name", name, DATASETS)
    if name == "glyphs":
        return SPLITS
    place = STANDARD[name].default_root() if root is None and name in STANDARD else root
    if place is None or not Path(place).expanduser().exists():
        return ()
    if name == "folder":
        with open_source(place) as source:
            splits = find_classes(source, selection)
        return tuple(split for split in SPLITS if splits[split])
    standard = STANDARD[name]
    with standard.open(Path(place).expanduser()) as source:
        here = standard.find(source).keys()
    return tuple(split for split in SPLITS if here >= set(standard.classes[split]))


def verify(
    name: str,
    *,
    root: Place = None,
    image_size: int | None = None,
    selection: Selection | None = None,
    progress: bool = True,
) -> tuple[SplitReport, ...]:
    """Checks that every split is complete, every image decodes (bypassing the cache) and counts are as published.

    Args:
        name: A key of `DATASETS`.
        root: As for `load`.
        image_size: As for `load`; needed only for own images of different sizes.
        selection: Which own images are in which split.
        progress: Whether to show progress on stderr.

    Returns:
        One report per split, in order; for own images, only the splits that exist.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        TypeError, ValueError: An argument is out of range, or `root` is rejected as a whole.
    """
    check_choice("name", name, DATASETS)
    check_root(name, root)
    if image_size is not None:
        image_size = check_integer("image_size", image_size, *(GLYPH_SIZES if name == "glyphs" else IMAGE_SIZES))
    expected = DATASETS[name].images_per_class
    readers = _readers(name, root, image_size, progress, selection)
    return tuple(_report(split, read, expected) for split, read in readers)


def _readers(
    name: str, root: Place, image_size: int | None, progress: bool, selection: Selection | None
) -> Iterator[tuple[str, Callable[[], ImageSet]]]:
    """For each split, a function that decodes it again; sources stay open during the iteration."""
    if name == "glyphs":
        for split in SPLITS:
            yield split, partial(draw_split, split, image_size or 28, 20, 0, progress)
        return
    if name == "folder":
        assert root is not None
        with open_source(root) as source:
            found = find_classes(source, selection)
            read_own = partial(decode_own, source, found, image_size=image_size, channels=None, selection=selection)
            for split in filter(found.get, SPLITS):
                yield split, partial(read_own, split, progress=progress, use_cache=False)
        return
    standard = STANDARD[name]
    place = standard.default_root() if root is None else Path(root).expanduser()
    with open_standard(standard, place) as source:
        read = partial(decode_standard, standard, source, image_size=image_size)
        for split in SPLITS:
            yield split, partial(read, split, progress=progress, use_cache=False)


def _report(split: str, read: Callable[[], ImageSet], images_per_class: int | None) -> SplitReport:
    try:
        images = read()
    except ValueError as error:  # classes are missing, or an image is damaged
        return SplitReport(split, 0, 0, (str(error),))
    sizes = dict(zip(images.class_names, images.class_sizes.tolist(), strict=True))
    odd = [f"{name} ({size})" for name, size in sizes.items() if images_per_class not in (None, size)]
    problems = (f"{len(odd)} classes have not {images_per_class} images as published: {a_few(odd)}",) if odd else ()
    return SplitReport(split, images.classes, len(images.images), problems)
