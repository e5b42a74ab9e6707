"""mini-ImageNet by the split of Ravi and Larochelle (2017): 64, 16 and 20 classes of 600 images."""

from __future__ import annotations

import csv
import io
import os

from .arguments import SPLITS
from .decode import Decoding
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder
from .standard import StandardSet, load_standard, split_facts

_LISTS = frozenset({"train.csv", "val.csv", "test.csv"})


def mini_imagenet(
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    progress: bool = True,
) -> ImageSet:
    """mini-ImageNet, 84 x 84.

    ImageNet's terms allow no public download: bring your own copy. The split of an image is that of its class, wherever
    the folder is. Pickles (``mini-imagenet-cache-*.pkl``) are not read.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: A folder or .zip with ``WNID/*.jpg`` at any depth, such as ``{train,val,test}/WNID/*.jpg``; or with
            the lists ``{train,val,test}.csv`` (filename, label) and the images they name in one folder.
        image_size: Height and width, 8 to 1024. Default 84.
        download: Must be False.
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[M, 3, image_size, image_size]`` uint8; classes are named by WordNet id.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: An argument is out of range; classes of the split are missing; an image is damaged; a list
            names missing images.
    """
    return load_standard(MINI_IMAGENET, split, root=root, image_size=image_size, download=download, progress=progress)


def find_classes(source: Source) -> dict[str, list[SourceFile]]:
    """WordNet id -> its images, from folders if there are any, else from the csv lists."""
    wnids = {wnid for split in SPLITS for wnid in split_facts()["mini_imagenet"][split]}
    found: dict[str, list[SourceFile]] = {}
    for folder, files in by_folder(source.images).items():
        name = folder.rpartition("/")[2]
        if name in wnids:
            found.setdefault(name, []).extend(files)
    return found or _find_by_lists(source)


def _find_by_lists(source: Source) -> dict[str, list[SourceFile]]:
    by_name = {file.parts[-1]: file for file in source.images}
    found: dict[str, list[SourceFile]] = {}
    for listing in source.others:
        if listing.parts[-1] not in _LISTS:
            continue
        rows = list(csv.DictReader(io.StringIO(source.read(listing).decode("utf-8-sig"))))
        if rows and not {"filename", "label"} <= set(rows[0]):
            raise ValueError(
                f"mini_imagenet: {listing.path}: expected columns filename and label, found {list(rows[0])}"
            )
        absent = [row["filename"] for row in rows if row["filename"] not in by_name]
        if absent and len(absent) < len(rows):
            raise ValueError(
                f"mini_imagenet: {listing.path} names {len(absent)} images that are not at {source.label}, "
                f"first {absent[0]!r}"
            )
        for row in rows:
            if row["filename"] in by_name:
                found.setdefault(row["label"], []).append(by_name[row["filename"]])
    return found


MINI_IMAGENET = StandardSet(
    name="mini_imagenet",
    classes={split: tuple(split_facts()["mini_imagenet"][split]) for split in SPLITS},
    decoding=Decoding(image_size=84, channels=3),
    images_per_class=600,
    find=find_classes,
    layouts="a folder or .zip with WNID/*.jpg at any depth, or with train.csv, val.csv, test.csv and the images they "
    "name; pickles are not read",
)
