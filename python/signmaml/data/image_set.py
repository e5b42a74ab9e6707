"""`ImageSet`: one split of a set of labelled images, decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """One split of an image set, decoded to uint8 on the CPU.

    The images of a class are adjacent, and classes are in the order of `class_names`.

    Attributes:
        name: The set, such as ``"omniglot"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        images: ``[M, C, H, W]`` uint8.
        class_names: One name per class, all different.
        class_sizes: ``[classes]`` int64, all at least 1, sum ``M``.
        inverted: Whether the pixels are those of image files inverted, such as dark ink on white made bright.

    Raises:
        TypeError: An argument does not have the type or dtype stated.
        ValueError: Shapes, sizes and names are inconsistent.

    Example:
        >>> import torch
        >>> pictures = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
        >>> pair = ImageSet("toy", "train", pictures, ("a", "b"), torch.tensor([4, 2]))
        >>> pair.classes, pair.image_shape, pair.images_of(1).shape
        (2, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """

    name: str
    split: str
    images: torch.Tensor
    class_names: tuple[str, ...]
    class_sizes: torch.Tensor
    inverted: bool = False

    def __post_init__(self) -> None:
        for name, value in (("images", self.images), ("class_sizes", self.class_sizes)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, found {type(value).__name__}")
            if value.device.type != "cpu":
                raise ValueError(f"{name}: expected a tensor on cpu, found one on {value.device}")
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise TypeError(f"class_names: expected a tuple of str, found {self.class_names!r}")
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype torch.uint8, found {self.images.dtype}")
        if self.images.dim() != 4:
            raise ValueError(f"images: expected shape [M, C, H, W], found {list(self.images.shape)}")
        if self.class_sizes.dtype != torch.int64:
            raise TypeError(f"class_sizes: expected dtype torch.int64, found {self.class_sizes.dtype}")
        if tuple(self.class_sizes.shape) != (len(self.class_names),):
            raise ValueError(
                f"class_sizes: expected shape [{len(self.class_names)}] (one a class name), "
                f"found {list(self.class_sizes.shape)}"
            )
        if not self.class_names:
            raise ValueError("class_names: expected at least one class, found none")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names: expected different names, found one twice")
        sizes = self.class_sizes.tolist()
        if min(sizes) < 1:
            empty = self.class_names[sizes.index(min(sizes))]
            raise ValueError(f"class_sizes: expected at least 1 image a class, found {min(sizes)} for {empty!r}")
        if sum(sizes) != len(self.images):
            raise ValueError(f"class_sizes: expected the sum {len(self.images)} (images), found {sum(sizes)}")

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        counts = f"{self.classes:,} classes, {len(self.images):,} images of {shape}"
        return f"ImageSet({self.name}/{self.split}: {counts})"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def class_starts(self) -> torch.Tensor:
        """``[classes]`` int64: where each class begins in `images`."""
        return torch.cumsum(self.class_sizes, 0) - self.class_sizes

    def images_of(self, class_index: int) -> torch.Tensor:
        """The images of one class, a view ``[class size, C, H, W]`` uint8."""
        first = int(self.class_starts[class_index])
        return self.images[first : first + int(self.class_sizes[class_index])]
