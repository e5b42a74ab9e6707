"""Small learnable image sets: every class is a random pattern, and its images are noisy copies of it."""

from __future__ import annotations

from pathlib import Path

import torch

from signmaml.data import ImageSet

_FIRST_CLASS = {"train": 0, "val": 1000, "test": 2000}


def toy_images(
    split: str = "train",
    *,
    classes: int = 8,
    images: int = 10,
    size: int = 16,
    channels: int = 1,
    noise: float = 0.05,
    distracting: bool = False,
) -> ImageSet:
    """Classes differ from split to split; the same call gives the same set.

    With `distracting`, three quarters of each image are pure noise, in the same place for all classes. A meta-trained
    network learns to ignore it, which an untrained one cannot.
    """
    pictures = []
    for number in range(classes):
        generator = torch.Generator().manual_seed(_FIRST_CLASS[split] + number)
        pattern = torch.rand(channels, 4, 4, generator=generator) < 0.5
        pattern = pattern.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
        flipped = torch.rand(images, channels, size, size, generator=generator) < noise
        if distracting:
            flipped[..., size // 4 :] = torch.rand(images, channels, size, 3 * size // 4, generator=generator) < 0.5
        pictures.append((pattern ^ flipped).to(torch.uint8) * 255)
    names = tuple(f"{split}{number:02d}" for number in range(classes))
    return ImageSet("toy", split, torch.cat(pictures), names, torch.full((classes,), images))


def write_class_folders(root: Path, **sizes: int) -> Path:
    """Writes the three splits as a tree ROOT/{train,val,test}/CLASS/NN.png."""
    from PIL import Image

    for split in ("train", "val", "test"):
        images = toy_images(split, **sizes)
        for number, name in enumerate(images.class_names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index, picture in enumerate(images.images_of(number)):
                Image.fromarray(picture[0].numpy()).save(folder / f"{index:02d}.png")
    return root
