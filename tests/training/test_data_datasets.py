"""Image sets from datasets of other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from signmaml.data import from_dataset
from signmaml.episodes import EpisodeSampler


def picture(value: int, mode: str = "L") -> Image.Image:
    return Image.new(mode, (12, 9), value if mode == "L" else (value, 0, 0))


class Rows(list):
    """A list of items with attributes, as datasets are."""


def test_pairs_as_torchvisions_datasets() -> None:
    rows = Rows((picture(10 * i), (i * 2) % 3) for i in range(9))
    rows.classes = ["ant", "bee", "cat"]
    images = from_dataset(rows, image_size=8, channels=1, name="insects", split="test", progress=False)
    assert images.class_names == ("ant", "bee", "cat") and images.class_sizes.tolist() == [3, 3, 3]
    assert (images.name, images.split, images.image_shape) == ("insects", "test", (1, 8, 8))
    for number, name in enumerate(images.class_names):
        expected = [10 * i for i in range(9) if (i * 2) % 3 == rows.classes.index(name)]
        assert images.images_of(number)[:, 0, 0, 0].tolist() == expected, "a class in the dataset's order"
    EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=2).draw(0)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("photo", "kind")])
def test_mappings_as_hugging_faces_datasets(image: str, label: str) -> None:
    class Feature:
        names = ("no", "yes")

    rows = Rows({image: picture(20 * i, "RGB"), label: i % 2, "other": None} for i in range(4))
    rows.features = {label: Feature(), image: object()}
    named = {} if image != "photo" else {"image": image, "label": label}
    images = from_dataset(rows, image_size=10, progress=False, **named)
    assert images.class_names == ("no", "yes") and images.images.shape == (4, 3, 10, 10)
    assert images.images[:, 0, 0, 0].tolist() == [0, 40, 20, 60]


def test_classes_and_labels_of_other_kinds() -> None:
    rows = [(picture(10 * i), np.int64(i % 4)) for i in range(8)]
    images = from_dataset(rows, image_size=8, channels=1, classes=range(2, 4), progress=False)
    assert images.class_names == ("2", "3") and images.images[:, 0, 0, 0].tolist() == [20, 60, 30, 70]
    same = from_dataset(rows, image_size=8, channels=1, classes=torch.tensor([2, 3]), progress=False)
    assert torch.equal(same.images, images.images)
    words = from_dataset([(picture(1), "b"), (picture(2), "a")], image_size=8, channels=1, progress=False)
    assert words.class_names == ("a", "b")
    arrays = [(np.full((9, 12, 3), 7, np.uint8), torch.tensor(0)), (torch.full((9, 12), 9, dtype=torch.uint8), 0)]
    both = from_dataset(arrays, image_size=9, progress=False)
    assert both.class_names == ("0",) and both.images[:, 1, 4, 4].tolist() == [7, 9]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, ValueError, "dataset: expected at least one image, found none"),
        ([5], {}, TypeError, r"dataset: expected items \(image, label\) or mappings, found int"),
        ([("x", 1)], {}, TypeError, "dataset: expected PIL images or uint8 arrays, found str at 0"),
        ([(np.zeros((3, 9, 9)), 1)], {}, TypeError, r"of uint8, found float64 \[3, 9, 9\] at 0"),
        ([{"picture": 1, "label": 0}], {}, ValueError, r"image: expected the key of the image in items, found \['pic"),
        ([{"image": 1, "y": 0}], {}, ValueError, "label: expected the key of the label in items"),
        ([(picture(1), 0)], {"classes": [0, 5]}, ValueError, "classes: expected labels that the dataset has, found 5"),
        ([(picture(1), 0), (picture(1), "a")], {}, TypeError, "dataset: expected labels of one kind"),
        ([(picture(1), [1, 2])], {}, TypeError, "expected integers or strings as labels, found list at 0"),
        (iter([]), {}, TypeError, "dataset: expected one with a length and numbered items, found list_iterator"),
        ([(picture(1), 0)], {"channels": True}, ValueError, "channels: expected 1 or 3, found True"),
        ([(picture(1), 0)], {"channels": 2}, ValueError, "channels: expected 1 or 3, found 2"),
        ([(picture(1), 0)], {"image_size": 4}, ValueError, "image_size"),
        ([(picture(1), 0)], {"split": "dev"}, ValueError, "split"),
    ],
)
def test_what_does_not_fit(rows: list, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_dataset(rows, **{"image_size": 8, "progress": False, **options})
