"""The real sets, where they are available: counts, splits, pixels, and `verify`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cases.images import real_data
from signmaml import data
from signmaml.episodes import EpisodeSampler

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))


def test_omniglot() -> None:
    root = real_data("omniglot")
    assert data.complete_splits("omniglot", root) == data.SPLITS
    splits = {split: data.load("omniglot", split, root=root, progress=False) for split in data.SPLITS}
    assert {split: images.classes for split, images in splits.items()} == {"train": 1028, "val": 172, "test": 423}
    for images in splits.values():
        assert set(images.class_sizes.tolist()) == {20} and images.image_shape == (1, 28, 28)
        # White ink on black: every image has some, but little of the area is ink.
        assert bool((images.images.amax((1, 2, 3)) > 100).all())
        assert 0.04 < float(images.images.float().mean()) / 255 < 0.2
    name = splits["test"].class_names[200]
    drawing = sorted(root.glob(f"*/{name}/*.png"))[3]
    wanted = Image.open(drawing).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
    assert np.array_equal(splits["test"].images_of(200)[3, 0].numpy(), 255 - np.asarray(wanted))
    sampler = EpisodeSampler(splits["train"], ways=5, shots=1, queries=1, tasks=8, rotations=True)
    assert sampler.classes == 4112 and sampler.draw(0).support_x.shape == (8, 5, 1, 28, 28)
    assert [(r.classes, r.images, r.problems) for r in data.verify("omniglot", root=root, progress=False)] == [
        (1028, 20560, ()), (172, 3440, ()), (423, 8460, ()),
    ]  # fmt: skip


def test_cifar100() -> None:
    root = real_data("cifar100")
    complete = data.complete_splits("fc100", root)
    assert {"train", "test"} <= set(complete)
    test = data.load("fc100", "test", root=root, progress=False)
    assert test.classes == 20 and set(test.class_sizes.tolist()) == {600} and test.image_shape == (3, 32, 32)
    file = sorted((root / test.class_names[4]).iterdir())[17]
    assert np.array_equal(test.images_of(4)[17].numpy(), np.asarray(Image.open(file)).transpose(2, 0, 1))
    assert data.load("fc100", "train", root=root, progress=False).classes == 60
    if "val" not in complete:
        with pytest.raises(ValueError, match="fc100/val: 20 of 20 classes are missing"):
            data.load("fc100", "val", root=root, progress=False)
        with pytest.raises(ValueError, match=r"cifar_fs/train: \d+ of 64 classes are missing .* no split is complete"):
            data.load("cifar_fs", "train", root=root, progress=False)


def test_mini_imagenet() -> None:
    root = real_data("mini-imagenet")
    test = data.load("mini_imagenet", "test", root=root, progress=False)
    assert test.classes == 20 and set(test.class_sizes.tolist()) == {600} and test.image_shape == (3, 84, 84)
    again = data.load("mini_imagenet", "test", root=root, progress=False)
    assert torch.equal(again.images, test.images)
    means = test.images.float().mean((0, 2, 3))
    assert bool((means > 90).all()) and bool((means < 140).all())
    if "train" not in data.complete_splits("mini_imagenet", root):
        with pytest.raises(ValueError, match="mini_imagenet/train: 64 of 64 classes are missing"):
            data.load("mini_imagenet", "train", root=root, progress=False)
