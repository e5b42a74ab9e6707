"""Image files, image sets and the real data sets for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.programs import shared
from signmaml.data import ImageSet

_REPOSITORY = Path(__file__).resolve().parents[3]


def real_data(kind: str) -> Path:
    """The tree of a real set, unpacked once per session; skips the test if the archives are missing.

    Args:
        kind: "omniglot", "cifar100" or "mini-imagenet".

    The archives are in the folder given by SIGNMAML_TEST_DATA, or in ../shared/data next to the repository.
    """
    place = Path(os.environ.get("SIGNMAML_TEST_DATA") or _REPOSITORY.parent / "shared" / "data")
    script = place / "unpack.py"
    if not script.is_file():
        pytest.skip(f"real images: no unpack.py in {place} (set SIGNMAML_TEST_DATA to the folder that has it)")

    def unpack(target: Path) -> None:
        done = subprocess.run([sys.executable, str(script), str(target), kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    unpacked = shared.once(f"real-{kind}", unpack) / kind
    if not unpacked.is_dir():
        pytest.skip(f"real images: {place} has no archive of {kind}")
    return unpacked


def random_set(sizes: Sequence[int], *, channels: int = 1, size: int = 4, split: str = "train") -> ImageSet:
    """Images of random pixels, all different and none a rotated copy of another."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (sum(sizes), channels, size, size), dtype=torch.uint8, generator=generator)
    names = tuple(f"class{number}" for number in range(len(sizes)))
    return ImageSet("random", split, images, names, torch.tensor(list(sizes)))


def picture(number: int, *, size: int = 12, channels: int = 1) -> np.ndarray:
    """Smooth pictures, all different: ``[size, size]`` or ``[size, size, 3]`` uint8."""
    y, x = np.mgrid[:size, :size] / size
    planes = [
        127 + 60 * np.sin(3 * x + number + c) + 60 * np.cos(2 * y * (1 + number % 5) + c) for c in range(channels)
    ]
    pixels = np.stack(planes, -1).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def write_image(path: Path, number: int, *, size: int = 12, channels: int = 1) -> Path:
    """Writes `picture` in the format given by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, size=size, channels=channels)).save(path)
    return path


def write_tree(root: Path, classes: Mapping[str, int], *, size: int = 12, channels: int = 1) -> Path:
    """Writes ``ROOT/CLASS/NN.png`` for every class and its number of images."""
    number = 0
    for name, count in classes.items():
        for index in range(count):
            write_image(root / name / f"{index:02d}.png", number, size=size, channels=channels)
            number += 1
    return root


def zip_tree(root: Path, archive: Path, prefix: str = "") -> Path:
    """Writes the tree as a zip archive, with `prefix` before its paths."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                file.write(path, prefix + path.relative_to(root).as_posix())
    return archive
