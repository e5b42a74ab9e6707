"""Shared by the standard sets: find the classes of a split in a source, reject gaps, decode, cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from json import loads
from pathlib import Path
from typing import Any

from .arguments import SPLITS, a_few, check_integer, check_split
from .cache import cache_dir, cached
from .decode import IMAGE_SIZES, Decoding, decode
from .image_set import ImageSet
from .sources import Source, SourceFile, fingerprint, open_source

Classes = Mapping[str, Sequence[SourceFile]]


@dataclass(frozen=True)
class StandardSet:
    """A published set with fixed classes and splits.

    Attributes:
        name: The set's name.
        classes: Split -> its class names, in order.
        decoding: Default size, channels and inversion.
        images_per_class: As published; None: classes differ.
        find: Source -> every class of the set that it contains, with its files.
        layouts: Description of the accepted roots, for messages.
        open: Opens a root; default `open_source`.
        download_folder: Folder below ``cache_dir()/downloads``.
        download: Downloads the set into a folder; None: it has no public download.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    decoding: Decoding
    images_per_class: int | None
    find: Callable[[Source], Classes]
    layouts: str
    open: Callable[[Path], Source] = open_source
    download_folder: str = ""
    download: Callable[[Path], None] | None = None

    def default_root(self) -> Path:
        """Where a download is stored and looked for."""
        return cache_dir() / "downloads" / (self.download_folder or self.name)


@cache
def split_facts() -> dict[str, Any]:
    """The class lists of the standard splits (`splits.json`)."""
    text = resources.files("signmaml.data").joinpath("splits.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = loads(text)
    return facts


def load_standard(
    standard: StandardSet,
    split: str,
    *,
    root: str | os.PathLike[str] | None,
    image_size: int | None,
    download: bool,
    progress: bool,
) -> ImageSet:
    """Loads one split; the functions named after the sets document the errors."""
    check_split(split)
    if image_size is not None:
        image_size = check_integer("image_size", image_size, *IMAGE_SIZES)
    place = Path(root).expanduser() if root is not None else standard.default_root()
    if download and standard.download is None:
        raise ValueError(f"download: {standard.name} has no public download; {_what_to_do(standard)}")
    if download and _missing(standard, split, place):
        _download(standard, place)
    with open_standard(standard, place) as source:
        return decode_standard(standard, source, split, image_size=image_size, progress=progress)


def open_standard(standard: StandardSet, place: Path) -> Source:
    """Lists the source at `place`.

    Raises:
        FileNotFoundError: Nothing is at `place`; the message names it and says what to do.
    """
    if not place.exists():
        raise FileNotFoundError(f"{standard.name}: found nothing at {place}; {_what_to_do(standard)}")
    return standard.open(place)


def decode_standard(
    standard: StandardSet,
    source: Source,
    split: str,
    *,
    image_size: int | None = None,
    progress: bool,
    use_cache: bool = True,
) -> ImageSet:
    """Decodes one split of an open source, or takes it from the cache."""
    classes = _complete_split(standard, source, split)
    decoding = standard.decoding
    if image_size is not None:
        decoding = replace(decoding, image_size=image_size)
    name = standard.name

    def build() -> ImageSet:
        return decode(source, classes, decoding, name=name, split=split, progress=progress)

    return cached(split_key(standard, source, split, classes, decoding), build) if use_cache else build()


def split_key(
    standard: StandardSet, source: Source, split: str, classes: Classes, decoding: Decoding
) -> dict[str, Any]:
    """The cache's key of a split."""
    files = [file for group in classes.values() for file in group]
    return {
        "name": standard.name,
        "split": split,
        "source": fingerprint(source, files),
        "classes": list(classes),
        **decoding.key(),
    }


def _complete_split(standard: StandardSet, source: Source, split: str) -> Classes:
    """The files of every class of the split, in the split's order."""
    found = standard.find(source)
    wanted = standard.classes[split]
    missing = [name for name in wanted if name not in found]
    if missing:
        complete = [s for s in SPLITS if all(name in found for name in standard.classes[s])]
        have = f"complete here: {', '.join(complete)}" if complete else "no split is complete here"
        raise ValueError(
            f"{standard.name}/{split}: {len(missing)} of {len(wanted)} classes are missing at {source.label} "
            f"({a_few(missing, 3)}); {have}; found {len(source.images)} image files, {len(found)} classes of the set. "
            f"To get them: {_what_to_do(standard)}"
        )
    return {name: found[name] for name in wanted}


def _missing(standard: StandardSet, split: str, place: Path) -> bool:
    if not place.exists():
        return True
    with standard.open(place) as source:
        found = standard.find(source)
    return any(name not in found for name in standard.classes[split])


def _download(standard: StandardSet, place: Path) -> None:
    assert standard.download is not None
    try:
        standard.download(place)
    except (OSError, RuntimeError) as error:  # no network, the server's answer, a full disk, a wrong checksum
        raise ConnectionError(
            f"{standard.name}: the download into {place} failed ({type(error).__name__}: {error}); try again, or get "
            f"the set by other means and give root=, {standard.layouts}"
        ) from error


def _what_to_do(standard: StandardSet) -> str:
    advice = f"give root= (on the command line --data-root), {standard.layouts}"
    if standard.download is not None:
        advice += f"; or download it once with download=True (signmaml data fetch {standard.name})"
    return advice
