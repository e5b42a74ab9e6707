"""Image sets from datasets of other libraries: torchvision, Hugging Face, or any with images and labels."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .arguments import a_few, check_integer, check_split, plain_label
from .decode import IMAGE_SIZES, Decoding, to_pixels
from .image_set import ImageSet
from .progress import track

# Under these names a mapping's image and label are looked for.
_IMAGES = ("image", "img", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "target", "class")


def from_dataset(
    dataset: Any,
    *,
    image_size: int,
    channels: int = 3,
    classes: Collection[Hashable] | None = None,
    image: str | None = None,
    label: str | None = None,
    name: str = "dataset",
    split: str = "train",
    progress: bool = True,
) -> ImageSet:
    """An image set of a dataset with images and labels, all of whose examples are read once.

    Args:
        dataset: Has a length and numbered items. An item is a pair (image, label), as torchvision's datasets have
            them, or a mapping with both, as those of Hugging Face's `datasets` are. Images are PIL images or uint8
            arrays ``[H, W]`` or ``[H, W, C]``.
        image_size: Height and width, 8 to 1024, that images are resized to.
        channels: 1: grey; 3: RGB.
        classes: The labels to take, such as those for training; None: all.
        image: The image's key in a mapping; None: "image", "img" or "pixel_values".
        label: The label's key; None: "label", "labels", "fine_label", "target" or "class".
        name: The set's name in reports.
        split: ``"train"``, ``"val"`` or ``"test"``.
        progress: Whether to show progress on stderr.

    Returns:
        Classes in the order of their labels, named as the dataset names them (``dataset.features[label].names``, or
        ``dataset.classes``), else by their labels.

    Raises:
        TypeError, ValueError: An argument is out of range; an item is something else; a class of `classes` has no
            image; an image is damaged (the message names its number).

    Example:
        >>> pictures = [(Image.new("L", (10, 10), 40 * i), i % 2) for i in range(6)]
        >>> from_dataset(pictures, image_size=8, channels=1, progress=False)
        ImageSet(dataset/train: 2 classes, 6 images of 1 x 8 x 8)
    """
    check_split(split)
    decoding = Decoding(check_integer("image_size", image_size, *IMAGE_SIZES), channels)
    if isinstance(channels, bool) or channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, found {channels!r}")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset: expected one with a length and numbered items, found {type(dataset).__name__}")
    count = len(dataset)
    if count == 0:
        raise ValueError("dataset: expected at least one image, found none")
    wanted = None if classes is None else {plain_label(label) for label in classes}
    pixels: dict[Any, list[np.ndarray]] = {}
    keys: tuple[Any, Any] | None = None
    for number in track(range(count), total=count, what=f"{name}/{split}: decoding", unit="images", show=progress):
        item = dataset[number]
        keys = keys or _keys(item, image, label)
        of_class = plain_label(item[keys[1]])
        if not isinstance(of_class, (int, str, tuple)):
            raise TypeError(
                f"dataset: expected integers or strings as labels, found {type(of_class).__name__} at {number}"
            )
        if wanted is None or of_class in wanted:
            pixels.setdefault(of_class, []).append(_decoded(item[keys[0]], decoding, number))
    absent = [repr(found) for found in (wanted or ()) if found not in pixels]
    if absent:
        raise ValueError(f"classes: expected labels that the dataset has, found {a_few(absent)}")
    assert keys is not None
    names = _class_names(dataset, keys[1])
    try:
        order = sorted(pixels)
    except TypeError as error:
        raise TypeError(f"dataset: expected labels of one kind, found others: {error}") from error
    sizes = torch.tensor([len(pixels[of_class]) for of_class in order], dtype=torch.int64, device="cpu")
    stacked = torch.from_numpy(np.stack([picture for of_class in order for picture in pixels[of_class]]))
    return ImageSet(name, split, stacked, tuple(_name(of_class, names) for of_class in order), sizes)


def _keys(item: Any, image: str | None, label: str | None) -> tuple[Any, Any]:
    """The keys of image and label in an item."""
    if isinstance(item, Mapping):
        found = [
            given if given is not None else next((key for key in usual if key in item), None)
            for given, usual in ((image, _IMAGES), (label, _LABELS))
        ]
        for key, argument in zip(found, ("image", "label"), strict=True):
            if key is None or key not in item:
                raise ValueError(f"{argument}: expected the key of the {argument} in items, found {list(item)}")
        return found[0], found[1]
    if not isinstance(item, Sequence) or isinstance(item, (str, bytes)) or len(item) < 2:
        raise TypeError(f"dataset: expected items (image, label) or mappings, found {type(item).__name__}")
    return 0, 1


def _decoded(value: Any, decoding: Decoding, number: int) -> np.ndarray:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.asarray(value)
        if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
            found = f"{array.dtype} {list(array.shape)}"
            raise TypeError(f"dataset: expected images [H, W] or [H, W, C] of uint8, found {found} at {number}")
        value = Image.fromarray(
            np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        )
    if not isinstance(value, Image.Image):
        raise TypeError(f"dataset: expected PIL images or uint8 arrays, found {type(value).__name__} at {number}")
    try:
        return to_pixels(value, decoding)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset: cannot decode image {number}: {error}") from error


def _class_names(dataset: Any, key: Any) -> Sequence[str] | None:
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and key in features:
        names = getattr(features[key], "names", None)
    else:
        names = getattr(dataset, "classes", None)
    return names if isinstance(names, Sequence) and not isinstance(names, str) else None


def _name(label: Any, names: Sequence[str] | None) -> str:
    return str(names[label]) if names is not None and type(label) is int and 0 <= label < len(names) else str(label)
