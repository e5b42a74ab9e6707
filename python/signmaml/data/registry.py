"""The named data sets: facts about each, and one function that loads any of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .arguments import SPLITS, check_choice, check_split
from .cifar import CIFAR_FS, FC100, cifar_fs, fc100
from .cub import CUB, cub
from .folder import folder
from .glyphs import class_counts, glyphs
from .image_set import ImageSet
from .mini_imagenet import MINI_IMAGENET, mini_imagenet
from .omniglot import OMNIGLOT, omniglot
from .standard import StandardSet


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a named set, known before anything is read.

    Attributes:
        name: The name that `load` takes.
        summary: Its content, in one line.
        origin: Where its images come from and under what terms, in one line.
        image_size: Default height and width; None: the images' own.
        channels: 1 (grey) or 3 (RGB); None: as the images are.
        classes: Split -> number of classes, without rotations; empty if it depends on the images.
        images_per_class: As published; None if classes differ, or it depends on the images.
        rotations: Whether training usually counts rotated classes as separate classes.
        download: Whether `load` can fetch it with ``download=True``.
        needs_root: Whether `root` is required.
    """

    name: str
    summary: str
    origin: str
    image_size: int | None
    channels: int | None
    classes: Mapping[str, int]
    images_per_class: int | None
    rotations: bool = False
    download: bool = False
    needs_root: bool = False


STANDARD: Mapping[str, StandardSet] = {
    standard.name: standard for standard in (OMNIGLOT, FC100, CIFAR_FS, MINI_IMAGENET, CUB)
}
_LOADERS: Mapping[str, Callable[..., ImageSet]] = {
    "omniglot": omniglot,
    "fc100": fc100,
    "cifar_fs": cifar_fs,
    "mini_imagenet": mini_imagenet,
    "cub": cub,
}


def _published(name: str, summary: str, origin: str, *, rotations: bool = False) -> DatasetInfo:
    standard = STANDARD[name]
    return DatasetInfo(
        name=name,
        summary=summary,
        origin=origin,
        image_size=standard.decoding.image_size,
        channels=standard.decoding.channels,
        classes={split: len(standard.classes[split]) for split in SPLITS},
        images_per_class=standard.images_per_class,
        rotations=rotations,
        download=standard.download is not None,
    )


_CIFAR_ORIGIN = "CIFAR-100 (Krizhevsky 2009), by torchvision or your own copy"

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="glyphs",
            summary="printed letters, one class a letter, split by script",
            origin="drawn here from the fonts that matplotlib ships (DejaVu, STIX); no download",
            image_size=28,
            channels=1,
            classes=class_counts(),
            images_per_class=20,
        ),
        _published(
            "omniglot",
            "handwritten characters of 50 alphabets (Vinyals split)",
            "Lake, Salakhutdinov and Tenenbaum 2015, MIT licence, by torchvision or your own copy",
            rotations=True,
        ),
        _published("fc100", "CIFAR-100 split by superclass (Oreshkin et al. 2018)", _CIFAR_ORIGIN),
        _published("cifar_fs", "CIFAR-100 split at random (Bertinetto et al. 2019)", _CIFAR_ORIGIN),
        _published(
            "mini_imagenet",
            "100 classes of ImageNet (Ravi and Larochelle split)",
            "ImageNet's terms: non-commercial research, no public download; your own copy",
        ),
        _published(
            "cub",
            "photographs of 200 species of birds (split of Chen et al. 2019)",
            "CUB-200-2011 (Wah et al. 2011), for research; your own copy",
        ),
        DatasetInfo(
            name="folder",
            summary="own images, one folder a class",
            origin="a folder or .zip of yours, with or without the folders train, val and test",
            image_size=None,
            channels=None,
            classes={},
            images_per_class=None,
            needs_root=True,
        ),
    )
}


def load(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    split_by: str | None = None,
    min_images: int = 1,
    skip_damaged: bool = False,
    progress: bool = True,
) -> ImageSet:
    """Loads one split of a named set; each set also has its own function with more options.

    Args:
        name: A key of `DATASETS`.
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: Where the images are; the set's own function documents the layouts. None: the cache folder, for the
            sets that can be downloaded. ``"folder"`` requires it, ``"glyphs"`` does not allow it.
        image_size: Height and width. None: the set's default, `DatasetInfo.image_size`.
        download: Whether missing files may be downloaded. It has no effect for glyphs and own images.
        split_by: For own images, as in `folder`; likewise the next two.
        min_images: Least number of images in a class.
        skip_damaged: Whether damaged images are left out.
        progress: Whether to show progress on stderr.

    Returns:
        The split, from the cache if it was decoded before.

    Raises:
        FileNotFoundError: Nothing is at `root`; the message says what to do.
        TypeError, ValueError: An argument is out of range or does not fit the set; the set is incomplete or damaged.
        ImportError: `download` without a working torchvision.

    Example:
        >>> images = load("glyphs", "val", progress=False)
        >>> images.classes, images.image_shape
        (102, (1, 28, 28))
    """
    check_choice("name", name, DATASETS)
    check_split(split)
    check_root(name, root)
    check_selection(name, split_by, min_images, skip_damaged)
    if name == "glyphs":
        return glyphs(split, image_size=28 if image_size is None else image_size, progress=progress)
    if name == "folder":
        assert root is not None
        return folder(
            root,
            split,
            image_size=image_size,
            split_by=split_by,
            min_images=min_images,
            skip_damaged=skip_damaged,
            progress=progress,
        )
    return _LOADERS[name](split, root=root, image_size=image_size, download=download, progress=progress)


def check_selection(name: str, split_by: str | None, min_images: int, skip_damaged: bool) -> None:
    """Raises ValueError if a set that is not own images is given what selects among them."""
    given = {"split_by": split_by is not None, "min_images": min_images != 1, "skip_damaged": bool(skip_damaged)}
    for argument, is_given in given.items():
        if is_given and name != "folder":
            raise ValueError(f"{argument}: expected none for {name!r}, whose splits are fixed, found one")


def check_root(name: str, root: str | os.PathLike[str] | None) -> None:
    """Raises ValueError if `root` is given to a set that takes none, or missing for one that requires it."""
    if name == "glyphs" and root is not None:
        raise ValueError(f"root: expected None for glyphs, which are drawn and not read, found {str(root)!r}")
    if name == "folder" and root is None:
        raise ValueError(
            "root: expected the folder or .zip with your images (--data-root on the command line), found None"
        )
