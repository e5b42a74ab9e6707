"""Images for few-shot learning, by class and split, decoded once to uint8 and cached.

`load` takes the name of a set of `DATASETS`; the functions named after the sets have more options.

Example:
    >>> from signmaml import data
    >>> images = data.load("glyphs", "val", progress=False)
    >>> images.class_names[0], images.images_of(0).shape
    ('Arabic/U+0621', torch.Size([20, 1, 28, 28]))
"""

from __future__ import annotations

from .arguments import SPLITS
from .cache import cache_dir
from .cifar import cifar_fs, fc100
from .cub import cub
from .datasets import from_dataset
from .folder import folder
from .glyphs import glyphs
from .image_set import ImageSet
from .mini_imagenet import mini_imagenet
from .omniglot import omniglot
from .registry import DATASETS, DatasetInfo, load
from .verification import SplitReport, complete_splits, verify

__all__ = [
    "DATASETS",
    "SPLITS",
    "DatasetInfo",
    "ImageSet",
    "SplitReport",
    "cache_dir",
    "cifar_fs",
    "complete_splits",
    "cub",
    "fc100",
    "folder",
    "from_dataset",
    "glyphs",
    "load",
    "mini_imagenet",
    "omniglot",
    "verify",
]
