"""The published sets, the registry and `verify`, on small images in the published layouts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cases.images import picture, write_image, write_tree, zip_tree
from signmaml import data
from signmaml.data.cifar import CIFAR_FS, FC100
from signmaml.data.cub import CUB
from signmaml.data.mini_imagenet import MINI_IMAGENET
from signmaml.data.omniglot import OMNIGLOT
from signmaml.data.standard import split_facts

SETS = {standard.name: standard for standard in (OMNIGLOT, FC100, CIFAR_FS, MINI_IMAGENET, CUB)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- the splits -------------------------------------------------------------------------------------------------------

SIZES = {
    "omniglot": (1028, 172, 423),
    "fc100": (60, 20, 20),
    "cifar_fs": (64, 16, 20),
    "mini_imagenet": (64, 16, 20),
    "cub": (100, 50, 50),
}


@pytest.mark.parametrize("name", SIZES)
def test_splits_have_the_published_sizes_and_share_no_class(name: str) -> None:
    classes = SETS[name].classes
    assert tuple(len(classes[split]) for split in data.SPLITS) == SIZES[name]
    assert tuple(data.DATASETS[name].classes.values()) == SIZES[name]
    every = [c for split in data.SPLITS for c in classes[split]]
    assert len(set(every)) == len(every) == sum(SIZES[name])


def test_omniglot_has_its_1623_characters_of_50_alphabets() -> None:
    every = [c for split in data.SPLITS for c in OMNIGLOT.classes[split]]
    assert len(every) == 1623 and len({c.partition("/")[0] for c in every}) == 50
    # Alphabets are whole except Gurmukhi, whose last four characters Vinyals' list puts in test.
    shared = {
        a
        for one, other in itertools.combinations(data.SPLITS, 2)
        for a in {c.partition("/")[0] for c in OMNIGLOT.classes[one]}
        & {c.partition("/")[0] for c in OMNIGLOT.classes[other]}
    }
    assert shared == {"Gurmukhi"}


def test_fc100_shares_no_superclass_and_both_cifar_splits_cover_cifar100() -> None:
    coarse = split_facts()["cifar100"]["fine_to_coarse"]
    assert len(coarse) == 100 and len(set(coarse.values())) == 20
    supers = [{coarse[c] for c in FC100.classes[split]} for split in data.SPLITS]
    assert sum(map(len, supers)) == len(set.union(*supers)) == 20
    for standard in (FC100, CIFAR_FS):
        assert set().union(*standard.classes.values()) == set(coarse)


def test_cub_is_split_by_the_numbers_of_the_species() -> None:
    numbers = {split: [int(name[:3]) for name in CUB.classes[split]] for split in data.SPLITS}
    assert numbers == {"train": list(range(1, 201, 2)), "val": list(range(2, 201, 4)), "test": list(range(4, 201, 4))}


# --- layouts ----------------------------------------------------------------------------------------------------------


def write_omniglot(root: Path, split: str = "val", images: int = 2) -> Path:
    """Drawings of 105 x 105, ink black, in both folders of the release."""
    for number, name in enumerate(OMNIGLOT.classes[split]):
        part = ("images_background", "images_evaluation")[number % 2]
        folder = root / part / name
        folder.mkdir(parents=True)
        for drawing in range(images):
            drawn = picture(number + drawing, size=105) > 127
            Image.fromarray(drawn).save(folder / f"{number:04d}_{drawing + 1:02d}.png")
    return root


def test_omniglot_is_resized_as_grey_and_inverted(tmp_path: Path) -> None:
    root = write_omniglot(tmp_path / "omniglot")
    images = data.omniglot("val", root=root, progress=False)
    assert images.class_names == OMNIGLOT.classes["val"] and set(images.class_sizes.tolist()) == {2}
    assert images.image_shape == (1, 28, 28)
    # As learn2learn: mode L, antialiased by Lanczos, 1 - x.
    drawn = Image.fromarray(picture(5, size=105) > 127).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
    assert np.array_equal(images.images_of(5)[0, 0].numpy(), 255 - np.asarray(drawn))
    assert data.omniglot("val", root=root, image_size=20, progress=False).image_shape == (1, 20, 20)
    again = data.omniglot("val", root=root, progress=False)
    assert images.inverted and again.inverted, "also from the cache"


@pytest.mark.slow
def test_omniglot_from_the_releases_zips(tmp_path: Path) -> None:
    root = write_omniglot(tmp_path / "omniglot")
    wanted = data.omniglot("val", root=root, progress=False)
    packed = tmp_path / "packed"
    packed.mkdir()
    for part in ("images_background", "images_evaluation"):
        zip_tree(root / part, packed / f"{part}.zip", prefix=f"{part}/")
    in_one_zip = zip_tree(packed, tmp_path / "all.zip")
    beside_the_tree = tmp_path / "both"
    beside_the_tree.mkdir()
    for path in [*packed.iterdir(), *root.iterdir()]:
        (beside_the_tree / path.name).symlink_to(path)
    for place in (packed, in_one_zip, beside_the_tree):
        images = data.omniglot("val", root=place, progress=False)
        assert torch.equal(images.images, wanted.images) and images.class_names == wanted.class_names


@pytest.mark.parametrize("layout", ["flat", "split folders", "zip"])
def test_cifar_classes_decide_the_split_wherever_they_lie(tmp_path: Path, layout: str) -> None:
    top = "anything/" if layout == "split folders" else ""
    classes = {f"{top}{name}": 2 for name in FC100.classes["test"]}
    root = write_tree(tmp_path / "cifar", classes, size=32, channels=3)
    place = zip_tree(root, tmp_path / "cifar.zip") if layout == "zip" else root
    images = data.fc100("test", root=place, progress=False)
    assert images.class_names == FC100.classes["test"] and images.image_shape == (3, 32, 32)
    assert np.array_equal(images.images[0].numpy(), picture(0, size=32, channels=3).transpose(2, 0, 1))
    assert data.complete_splits("fc100", place) == ("test",)
    assert data.complete_splits("cifar_fs", place) == ()


def test_mini_imagenet_from_folders_and_from_lists(tmp_path: Path) -> None:
    wnids = MINI_IMAGENET.classes["test"]
    tree = write_tree(tmp_path / "tree", {f"test/{wnid}": 2 for wnid in wnids}, size=84, channels=3)
    wanted = data.mini_imagenet("test", root=tree, progress=False)
    assert wanted.class_names == wnids and wanted.image_shape == (3, 84, 84)

    listed = tmp_path / "listed"
    rows = ["filename,label"]
    for number, (wnid, index) in enumerate((wnid, index) for wnid in wnids for index in range(2)):
        write_image(listed / "images" / f"{wnid}{index}.png", number, size=84, channels=3)
        rows.append(f"{wnid}{index}.png,{wnid}")
    (listed / "test.csv").write_text("\n".join(rows) + "\n")
    assert torch.equal(data.mini_imagenet("test", root=listed, progress=False).images, wanted.images)

    (listed / "images" / f"{wnids[3]}1.png").unlink()
    with pytest.raises(ValueError, match=rf"test.csv names 1 images that are not at .*first '{wnids[3]}1.png'"):
        data.mini_imagenet("test", root=listed, progress=False)


# --- torchvision, which downloads and reads CIFAR-100 -----------------------------------------------------------------


class FakeCifar100:
    """As ``torchvision.datasets.CIFAR100`` once it has read the release, with 6 and 1 images per class."""

    classes = sorted(split_facts()["cifar100"]["fine_to_coarse"])

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        release = Path(root) / "cifar-100-python"
        if download:
            release.mkdir(parents=True)
            (release / "meta").write_bytes(b"")
        assert (release / "meta").is_file()
        self.targets = [number % 100 for number in range(600 if train else 100)]
        numbers = np.arange(len(self.targets), dtype=np.uint8) + (0 if train else 3)
        self.data = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 32, 32, 3)).copy()


def test_cifar_is_downloaded_once_when_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signmaml.data.cifar.torchvision_datasets", lambda _: SimpleNamespace(CIFAR100=FakeCifar100))
    monkeypatch.setattr(
        "signmaml.data.torchvision_download.torchvision_datasets", lambda _: SimpleNamespace(CIFAR100=FakeCifar100)
    )
    with pytest.raises(FileNotFoundError, match=r"cifar_fs: found nothing at .*cifar100; give root= .* download=True"):
        data.cifar_fs("val", progress=False)
    for split in data.SPLITS:
        images = data.cifar_fs(
            split, download=True, progress=False
        )  # a second download would fail: the folder is there
        assert images.class_names == CIFAR_FS.classes[split] and set(images.class_sizes.tolist()) == {7}
    number = FakeCifar100.classes.index(images.class_names[0])
    shades = images.images_of(0)[:, 0, 0, 0].tolist()
    assert sorted(shades) == sorted([(number + 3) % 256, *((number + 100 * k) % 256 for k in range(6))])
    assert data.complete_splits("fc100") == data.SPLITS
    assert (cache / "downloads" / "cifar100").is_dir()


def test_torchvision_refuses_a_damaged_release(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"cifar100: torchvision refused .*cifar-100-python"):
        data.fc100("train", root=tmp_path, progress=False)


def test_a_failed_download_says_what_else_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(
        "signmaml.data.torchvision_download.torchvision_datasets", lambda _: SimpleNamespace(Omniglot=unreachable)
    )
    with pytest.raises(ConnectionError, match=r"omniglot: the download into .* no route to host.* give root="):
        data.load("omniglot", "train", download=True, progress=False)


def test_without_torchvision_the_message_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"torchvision is needed to download Omniglot, .* or give root="):
        data.omniglot("train", download=True, progress=False)


def test_mini_imagenet_cannot_be_downloaded() -> None:
    with pytest.raises(ValueError, match="download: mini_imagenet has no public download; give root="):
        data.mini_imagenet("train", download=True)


# --- partial and damaged sets -----------------------------------------------------------------------------------------


def test_a_partial_set_loads_its_complete_splits_and_says_what_is_missing(tmp_path: Path) -> None:
    classes = dict.fromkeys((*FC100.classes["train"][3:], *FC100.classes["val"]), 1)
    root = write_tree(tmp_path / "cifar", classes, size=32, channels=3)
    assert data.fc100("val", root=root, progress=False).classes == 20
    missing = ", ".join(FC100.classes["train"][:3])
    with pytest.raises(
        ValueError,
        match=rf"fc100/train: 3 of 60 classes are missing at .*cifar \({missing}\); complete here: val; found 77 image "
        r"files, 77 classes of the set\. To get them: give root= .*CLASS",
    ):
        data.fc100("train", root=root, progress=False)


def test_verify_reads_every_image_and_compares_the_counts(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "cifar", dict.fromkeys(FC100.classes["test"], 1), size=32, channels=3)
    data.fc100("test", root=root, progress=False)  # now it is in the cache, which verify must not use
    train, val, test = data.verify("fc100", root=root, progress=False)
    assert "60 of 60 classes are missing" in train.problems[0] and train.classes == 0
    assert "20 of 20 classes are missing" in val.problems[0]
    assert (test.split, test.classes, test.images) == ("test", 20, 20)
    assert "20 classes have not 600 images as published" in test.problems[0]
    broken = root / FC100.classes["test"][7] / "00.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    assert (
        f"cannot decode '{FC100.classes['test'][7]}/00.png'"
        in data.verify("fc100", root=root, progress=False)[2].problems[0]
    )


def test_verify_own_images(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "own", {"train/a": 2, "test/b": 3})
    reports = data.verify("folder", root=root, progress=False)
    assert [(r.split, r.classes, r.images, r.problems) for r in reports] == [("train", 1, 2, ()), ("test", 1, 3, ())]
    assert data.complete_splits("folder", root) == ("train", "test")
    assert not (tmp_path / "cache").exists()


# --- the registry -----------------------------------------------------------------------------------------------------


def test_registry_says_what_can_be_named() -> None:
    assert list(data.DATASETS) == ["glyphs", "omniglot", "fc100", "cifar_fs", "mini_imagenet", "cub", "folder"]
    for name, info in data.DATASETS.items():
        assert info.name == name and info.summary and info.origin
        json.dumps(dict(info.classes))
    assert [name for name, info in data.DATASETS.items() if info.rotations] == ["omniglot"]
    assert [name for name, info in data.DATASETS.items() if info.download] == ["omniglot", "fc100", "cifar_fs"]
    assert data.DATASETS["mini_imagenet"].image_size == 84 and data.DATASETS["fc100"].channels == 3


def test_load_passes_everything_on(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "own", {"train/a": 2, "val/b": 1, "test/c": 1})
    images = data.load("folder", "train", root=root, image_size=10, progress=False)
    assert images.image_shape == (1, 10, 10) and images.class_names == ("a",)
    cifar = write_tree(tmp_path / "cifar", dict.fromkeys(FC100.classes["val"], 1), size=32, channels=3)
    assert data.load("fc100", "val", root=cifar, image_size=16, progress=False).images.shape == (20, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("imagenet", "train"), ValueError, "name: expected one of 'glyphs', 'omniglot', .* found 'imagenet'"),
        (("omniglot", "dev"), ValueError, "split: expected one of 'train', 'val', 'test', found 'dev'"),
        (("folder", "train"), ValueError, "root: expected the folder or .zip with your images .* found None"),
        (("omniglot", "train"), FileNotFoundError, "omniglot: found nothing at .*downloads.omniglot; give root="),
        (("mini_imagenet", "train"), FileNotFoundError, "mini_imagenet: found nothing at .*mini_imagenet; give root="),
    ],
)
def test_bad_names(arguments: tuple[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.load(*arguments, progress=False)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [7, 1025, 28.0, True])
def test_bad_image_sizes(name: str, size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"image_size: expected an integer in 8\.\.1024"):
        data.load(name, "train", root="/nowhere", image_size=size)


def test_glyphs_take_no_root() -> None:
    with pytest.raises(ValueError, match="root: expected None for glyphs"):
        data.load("glyphs", "train", root="/somewhere")


@pytest.mark.slow
def test_data_needs_no_native_code() -> None:
    """`signmaml.data` and `signmaml.episodes` import neither the extension nor torchvision."""
    import subprocess
    import sys

    program = (
        "import sys, signmaml.data, signmaml.episodes; "
        "print([name for name in ('signmaml_ext', 'torchvision', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cub_from_the_release(tmp_path: Path) -> None:
    """Photographs of several sizes, beside masks under the same names."""
    root = tmp_path / "CUB_200_2011"
    for number, name in enumerate(CUB.classes["test"]):
        for index in range(2 + number % 2):
            write_image(root / "images" / name / f"{index}.png", number, size=20 + index, channels=3)
        write_image(root / "segmentations" / name / "0.png", number, size=20)
    images = data.cub("test", root=root, image_size=16, progress=False)
    assert images.class_names == CUB.classes["test"] and images.image_shape == (3, 16, 16)
    assert images.class_sizes.tolist() == [2 + number % 2 for number in range(50)]
    reports = {report.split: report for report in data.verify("cub", root=root, image_size=16, progress=False)}
    assert not reports["test"].problems and "100 of 100 classes are missing" in reports["train"].problems[0]
    with pytest.raises(ValueError, match="download: cub has no public download"):
        data.load("cub", "test", download=True)
