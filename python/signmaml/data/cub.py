"""CUB-200-2011 (Wah et al. 2011): 200 species of birds, in the few-shot split of Chen et al. (2019)."""

from __future__ import annotations

import os

from .arguments import SPLITS
from .decode import Decoding
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder
from .standard import StandardSet, load_standard, split_facts


def cub(
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    progress: bool = True,
) -> ImageSet:
    """CUB-200-2011, 84 x 84: 100, 50 and 50 species of 41 to 60 photographs.

    The split is that of Chen et al. (2019, arXiv 1904.04232), as torchmeta has it: species 1, 3, 5, ... train, 2, 6,
    10, ... validate and 4, 8, 12, ... test. Photographs are resized as a whole, without the bounding boxes.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: A folder or .zip with ``NNN.Species/*.jpg`` at any depth, such as the release's ``CUB_200_2011``. (Its
            ``.tgz`` must be unpacked.)
        image_size: Height and width, 8 to 1024. Default 84.
        download: Must be False: bring your own copy.
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[M, 3, image_size, image_size]`` uint8; classes are named ``NNN.Species``.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: An argument is out of range; species of the split are missing; an image is damaged.
    """
    return load_standard(CUB, split, root=root, image_size=image_size, download=download, progress=progress)


def find_species(source: Source) -> dict[str, list[SourceFile]]:
    """Species -> its photographs."""
    species = {name for split in SPLITS for name in split_facts()["cub"][split]}
    found: dict[str, list[SourceFile]] = {}
    for folder, files in by_folder(source.images).items():
        name = folder.rpartition("/")[2]
        # The release holds masks under the same names, in another folder.
        if name in species and "segmentations" not in folder.split("/"):
            found.setdefault(name, []).extend(files)
    return found


CUB = StandardSet(
    name="cub",
    classes={split: tuple(split_facts()["cub"][split]) for split in SPLITS},
    decoding=Decoding(image_size=84, channels=3),
    images_per_class=None,
    find=find_species,
    layouts="a folder or .zip with NNN.Species/*.jpg at any depth, such as CUB_200_2011",
)
