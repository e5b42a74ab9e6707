"""Random changes of training images, drawn on the device like the tasks themselves.

What happens to an image is a function of the sampler's seed, the task's number and the image's place in the task. A
class turned by quarter turns is not such a change but a class of its own; see `EpisodeSampler`'s `rotations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import splitmix
from .config import AUGMENTATIONS
from .data.arguments import check_choice

LARGEST_SHIFT = 8  # a crop shifts an image by at most one part in so many of its side


def checked_augmentation(value: Any, height: int, width: int) -> tuple[str, ...]:
    """The names of changes, in their usual order.

    Raises:
        TypeError, ValueError: They are no sequence of names, one is unknown, or images are too small for one.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"augment: expected a sequence of names among {', '.join(AUGMENTATIONS)}, found {value!r}")
    names = [check_choice("augment", name, AUGMENTATIONS) for name in value]
    if "crop" in names and min(height, width) < LARGEST_SHIFT:
        raise ValueError(
            f"augment: expected images of at least {LARGEST_SHIFT} x {LARGEST_SHIFT} pixels for 'crop', found "
            f"{height} x {width}"
        )
    return tuple(name for name in AUGMENTATIONS if name in names)


class Augmentation:
    """Changes uint8 images at random: mirrors them, shifts them.

    Args:
        names: A result of `checked_augmentation`. ``"flip"`` mirrors an image left to right with probability 1/2.
            ``"crop"`` shifts it by up to an eighth of its side in each direction, every shift equally likely; what
            comes in at the border mirrors what is there.
        height: H.
        width: W.
        device: Where the images are.
    """

    def __init__(self, names: Sequence[str], height: int, width: int, device: torch.device) -> None:
        self._flips = "flip" in names
        shifts = "crop" in names
        self._rows = _Axis(height, height // LARGEST_SHIFT if shifts else 0, device)
        self._columns = _Axis(width, width // LARGEST_SHIFT if shifts else 0, device)

    def __call__(self, pixels: Tensor, words: Tensor) -> Tensor:
        """The changed images.

        Args:
            pixels: ``[B, C, H, W]``.
            words: ``[B]`` int64, random; the same word makes the same change.
        """
        channels, height, width = pixels.shape[1:]
        if self._rows.most:
            rows = self._rows.sources(splitmix.shifted(words, 1).bitwise_and_(2**31 - 1))
            pixels = pixels.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
        columns = self._columns.sources(splitmix.shifted(words, 32))
        if self._flips:
            mirrored = words.bitwise_and(1).bool()[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
        return pixels.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


class _Axis:
    """One axis of images: where its pixels come from after a shift of at most `most`."""

    def __init__(self, size: int, most: int, device: torch.device) -> None:
        self._size, self.most = size, most
        self._places = torch.arange(size, device=device)

    def sources(self, words: Tensor) -> Tensor:
        """``[B, size]`` int64 from random words ``[B]`` of at least 0."""
        shifts = words.remainder(2 * self.most + 1) - self.most
        last = self._size - 1
        # Mirrored at the first pixel, then at the last.
        return last - (last - (self._places + shifts[:, None]).abs()).abs()
