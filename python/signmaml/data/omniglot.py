"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 1,623 characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import os
import re
from functools import partial

from .arguments import SPLITS
from .decode import Decoding
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder, open_source
from .standard import StandardSet, load_standard, split_facts
from .torchvision_download import download_omniglot

_CHARACTER = re.compile(r"character\d{2}")


def omniglot(
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    progress: bool = True,
) -> ImageSet:
    """Omniglot in the split of Vinyals et al. (2016): 1028, 172 and 423 characters.

    Pixels follow learn2learn: the 105 x 105 drawing is resized to 28 x 28 as a grey image (Lanczos, antialiased) and
    inverted, so that ink is high. With ``EpisodeSampler(rotations=True)``, as is usual in the literature, each
    character rotated by 90, 180 and 270 degrees counts as three further classes (4112, 688 and 1692 in total).

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: A folder or .zip that holds ``ALPHABET/characterNN/*.png`` at any depth, zipped or not (the release's
            ``images_background.zip`` and ``images_evaluation.zip`` inside it are read in place). None: where
            `download` puts it.
        image_size: Height and width, 8 to 1024. Default 28.
        download: Whether torchvision may download missing files (with its progress bar and checksums).
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[M, 1, image_size, image_size]`` uint8; classes are named ``ALPHABET/characterNN``.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: An argument is out of range; classes of the split are missing; an image is damaged.
        ImportError: `download` without a working torchvision.
    """
    return load_standard(OMNIGLOT, split, root=root, image_size=image_size, download=download, progress=progress)


def find_characters(source: Source) -> dict[str, list[SourceFile]]:
    """Class name -> its drawings. A drawing found twice (e.g. in a release's zip and in its tree) counts once."""
    found: dict[str, dict[str, SourceFile]] = {}
    for folder, files in by_folder(source.images).items():
        alphabet, character = ("/" + folder).split("/")[-2:]
        if alphabet and _CHARACTER.fullmatch(character):
            drawings = found.setdefault(f"{alphabet}/{character}", {})
            for file in files:
                drawings.setdefault(file.parts[-1], file)
    return {name: [drawings[key] for key in sorted(drawings)] for name, drawings in found.items()}


def _characters(split: str) -> tuple[str, ...]:
    alphabets: dict[str, tuple[int, int]] = split_facts()["omniglot"][split]
    return tuple(
        f"{alphabet}/character{number:02d}"
        for alphabet, (first, last) in alphabets.items()
        for number in range(first, last + 1)
    )


OMNIGLOT = StandardSet(
    name="omniglot",
    classes={split: _characters(split) for split in SPLITS},
    decoding=Decoding(image_size=28, channels=1, invert=True),
    images_per_class=20,
    find=find_characters,
    layouts="a folder or .zip with images_background/ALPHABET/characterNN/*.png and images_evaluation/... "
    "(or images_background.zip and images_evaluation.zip)",
    open=partial(open_source, inner_archives=("images_background.zip", "images_evaluation.zip")),
    download=download_omniglot,
)
