"""CIFAR-100 (Krizhevsky 2009) for few-shot learning: FC100 and CIFAR-FS, 600 images of 32 x 32 per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from .arguments import SPLITS
from .decode import Decoding
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder, open_source
from .standard import StandardSet, load_standard, split_facts
from .torchvision_download import download_cifar100, torchvision_datasets

_RELEASE = "cifar-100-python"


def fc100(
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    progress: bool = True,
) -> ImageSet:
    """Fewshot-CIFAR100 (Oreshkin et al. 2018): 60, 20 and 20 classes; each superclass is in one split only.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: A folder or .zip with ``CLASS/*.png`` at any depth, where CLASS is one of CIFAR-100's fine names; or a
            folder with the python release ``cifar-100-python`` (read and verified by torchvision). None: where
            `download` puts it.
        image_size: Height and width, 8 to 1024. Default 32, the images' own.
        download: Whether torchvision may download missing files (with its progress bar and checksum).
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[M, 3, image_size, image_size]`` uint8, 600 per class.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: An argument is out of range; classes of the split are missing; an image is damaged.
        ImportError: `download`, or the python release, without a working torchvision.
    """
    return load_standard(FC100, split, root=root, image_size=image_size, download=download, progress=progress)


def cifar_fs(
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    progress: bool = True,
) -> ImageSet:
    """CIFAR-FS (Bertinetto et al. 2019): 64, 16 and 20 classes of CIFAR-100. Arguments and errors as `fc100`."""
    return load_standard(CIFAR_FS, split, root=root, image_size=image_size, download=download, progress=progress)


class PythonRelease(Source):
    """CIFAR-100 as published, ``cifar-100-python``, presented as images ``CLASS/PART-NUMBER.png``.

    torchvision verifies the release's checksums and reads it.
    """

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        datasets = torchvision_datasets(f"to read {folder}")
        parts = {"test": False, "train": True}
        try:
            loaded = {part: datasets.CIFAR100(str(folder.parent), train=train) for part, train in parts.items()}
        except RuntimeError as error:
            raise ValueError(f"cifar100: torchvision refused {folder}: {error}") from error
        self._pixels: dict[str, np.ndarray] = {}
        for part, dataset in loaded.items():
            for number, (pixels, target) in enumerate(zip(dataset.data, dataset.targets, strict=True)):
                self._pixels[f"{dataset.classes[target]}/{part}-{number:05d}.png"] = pixels
        # torchvision's checksums fix the content, so the stamp can be constant.
        self.images = tuple(SourceFile(path, self._pixels[path].nbytes, 0) for path in sorted(self._pixels))
        self.others = ()

    def open_image(self, file: SourceFile) -> Image.Image:
        return Image.fromarray(self._pixels[file.path])

    def identity(self) -> str:
        return _RELEASE


def open_cifar(place: Path) -> Source:
    """The python release if `place` is or contains it, else a tree or a zip."""
    for folder in (place, place / _RELEASE):
        if folder.name == _RELEASE and (folder / "meta").is_file():
            return PythonRelease(folder)
    return open_source(place)


def find_classes(source: Source) -> dict[str, list[SourceFile]]:
    """Fine class -> its images, from folders named after the class at any depth."""
    fine_names = split_facts()["cifar100"]["fine_to_coarse"]
    found: dict[str, list[SourceFile]] = {}
    for folder, files in by_folder(source.images).items():
        name = folder.rpartition("/")[2]
        if name in fine_names:
            found.setdefault(name, []).extend(files)
    return found


def _fc100_classes(split: str) -> tuple[str, ...]:
    superclasses = set(split_facts()["fc100"][split])
    fine_to_coarse: dict[str, str] = split_facts()["cifar100"]["fine_to_coarse"]
    return tuple(fine for fine, coarse in sorted(fine_to_coarse.items()) if coarse in superclasses)


def _cifar_set(name: str, classes: dict[str, tuple[str, ...]]) -> StandardSet:
    return StandardSet(
        name=name,
        classes=classes,
        decoding=Decoding(image_size=32, channels=3),
        images_per_class=600,
        find=find_classes,
        layouts="a folder or .zip with CLASS/*.png (CIFAR-100's fine class names), or the folder that holds "
        "cifar-100-python",
        open=open_cifar,
        download_folder="cifar100",
        download=download_cifar100,
    )


FC100 = _cifar_set("fc100", {split: _fc100_classes(split) for split in SPLITS})
CIFAR_FS = _cifar_set("cifar_fs", {split: tuple(split_facts()["cifar_fs"][split]) for split in SPLITS})
