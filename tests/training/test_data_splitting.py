"""Own images split by shares, by images and by lists; small classes and damaged images left out."""

from __future__ import annotations

import errno
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.cases.images import write_image, write_tree
from signmaml import TrainConfig, cli
from signmaml.data import folder, load
from signmaml.data.sources import FolderSource, SourceFile
from signmaml.data.splitting import deal_out, rule_of

SPLITS = ("train", "val", "test")
TEN = {f"c{number}": 6 for number in range(10)}
Warns = Callable[..., object]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "own", TEN)


def sizes(root: Path, **options: object) -> dict[str, dict[str, int]]:
    """Split -> class -> number of images; a split without classes is left out."""
    found = {}
    for split in SPLITS:
        try:
            images = folder(root, split, progress=False, **options)  # type: ignore[arg-type]
        except ValueError as error:
            assert f"no classes for {split!r}" in str(error)
            continue
        found[split] = dict(zip(images.class_names, images.class_sizes.tolist(), strict=True))
    return found


# ---- Shares


@pytest.mark.parametrize(
    ("text", "counts"),
    [("70:20:10", (7, 2, 1)), ("classes:1:1:2", (3, 2, 5)), ("8:0:2", (8, 0, 2)), ("1:0:0", (10, 0, 0)),
     ("0.5:0.25:0.25", (6, 2, 2)), ("classes", (6, 2, 2)), ("1:1000:1000", (1, 4, 5))],
)  # fmt: skip
def test_shares_of_classes(root: Path, text: str, counts: tuple[int, ...]) -> None:
    found = sizes(root, split_by=text)
    assert tuple(len(found.get(split, ())) for split in SPLITS) == counts
    names = [name for classes in found.values() for name in classes]
    assert sorted(names) == sorted(TEN) and {n for classes in found.values() for n in classes.values()} == {6}
    assert sizes(root, split_by=text) == found
    if counts[0] < 10:
        assert sizes(root, split_by=text, seed=3) != found, "another seed, other classes"


def test_the_default_shares_are_those_without_split_by(root: Path) -> None:
    assert sizes(root, split_by="classes") == sizes(root) == sizes(root, split_by="64:16:20")


def test_the_same_classes_with_other_images(root: Path) -> None:
    found = sizes(root, split_by="images:3:1:2")
    assert found == {split: dict.fromkeys(TEN, count) for split, count in zip(SPLITS, (3, 1, 2), strict=True)}
    pixels = [folder(root, split, split_by="images:3:1:2", progress=False).images for split in SPLITS]
    assert len({bytes(image.numpy()) for part in pixels for image in part}) == 60, "no image twice"
    assert sizes(root, split_by="images") == {s: dict.fromkeys(TEN, n) for s, n in zip(SPLITS, (4, 1, 1), strict=True)}
    assert list(sizes(root, split_by="images:4:0:2")) == ["train", "test"]


def test_no_split_is_left_without_an_image(tmp_path: Path) -> None:
    write_tree(tmp_path / "own", {"a": 3, "b": 4})
    assert sizes(tmp_path / "own", split_by="images:98:1:1")["val"] == {"a": 1, "b": 1}
    write_tree(tmp_path / "own", {"c": 2})
    expected = "at least 3 images of class 'c' to split into train, val and test, found 2"
    with pytest.raises(ValueError, match=expected):
        folder(tmp_path / "own", "train", split_by="images", progress=False)
    with pytest.warns(UserWarning, match=r"1 classes have fewer than 3 images and are left out: c \(2\)"):
        folder(tmp_path / "own", "train", split_by="images", min_images=3, progress=False)


def test_dealing_out_leaves_something_for_everyone() -> None:
    for count in range(3, 30):
        for shares in ((0.98, 0.01, 0.01), (0.01, 0.01, 0.98), (0.01, 0.98, 0.01), (0.3, 0.3, 0.4)):
            parts = deal_out([str(i) for i in range(count)], 0, shares)
            assert all(parts.values()) and sum(map(len, parts.values())) == count
    assert deal_out(["a"], 0, (1, 0, 0)) == {"train": ["a"], "val": [], "test": []}
    with pytest.raises(ValueError, match="expected at least 2 classes to split into train and test, found 1"):
        deal_out(["a"], 0, (0.5, 0, 0.5))


@pytest.mark.parametrize(
    ("text", "error"),
    [("70-20-10", ValueError), ("image", ValueError), ("0:1:1", ValueError), ("1:2", ValueError),
     ("-1:1:1", ValueError), ("lists.json", FileNotFoundError), ("no/folder", FileNotFoundError), ("", ValueError)],
)  # fmt: skip
def test_words_that_mean_nothing(text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="split_by: expected"):
        rule_of(text)
    with pytest.raises(error, match="split_by: expected"):
        folder("anywhere", "train", split_by=text)


# ---- Lists


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_lists_of_classes(root: Path, tmp_path: Path, suffix: str) -> None:
    lists = {"train": ["c5", "c0", "c1"], "val": ["c7"], "test": ["c9", "c2"]}
    place = tmp_path / f"splits{suffix}"
    place.write_text(json.dumps(lists))
    with pytest.warns(UserWarning, match=r"4 classes are in no list of .* and left out \(c3, c4, c6 and 1 more\)"):
        train = folder(root, "train", split_by=str(place), progress=False)
    assert train.class_names == ("c0", "c1", "c5")
    lists["train"] += ["c3", "c4", "c6", "c8"]
    place.write_text(json.dumps(lists))
    assert sizes(root, split_by=str(place)) == {s: dict.fromkeys(sorted(lists[s]), 6) for s in SPLITS}
    del lists["val"]
    place.write_text(json.dumps(lists))
    with pytest.warns(UserWarning, match="1 classes are in no list"):
        assert folder(root, "test", split_by=str(place), progress=False).class_names == ("c2", "c9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected lists of classes under train, val and test in .*, found list"),
        ('{"val": ["c1"]}', r"found \['val'\]"),
        ('{"train": ["c1"], "dev": []}', r"found \['dev', 'train'\]"),
        ('{"train": "c1"}', "expected lists of classes"),
        ('{"train": ["c1"], "val": ["c1"]}', "expected each class in one split, found 'c1' twice"),
        ('{"train": ["c1", "x", "y"]}', "expected classes of .*, found 'x', 'y'"),
        ("{", "expected JSON in"),
        ("[" * 100_000, "expected JSON in"),
    ],
)
def test_lists_of_classes_that_do_not_fit(root: Path, tmp_path: Path, content: str, message: str) -> None:
    place = tmp_path / "splits.json"
    place.write_text(content)
    with pytest.raises(ValueError, match=message):
        folder(root, "train", split_by=str(place), progress=False)


def test_yaml_with_aliases_is_refused(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "splits.yaml"
    place.write_text("train: &a [c1, c2]\nval: *a\n")
    with pytest.raises(ValueError, match="YAML without aliases"):
        folder(root, "train", split_by=str(place), progress=False)


def write_lists(place: Path, **rows: list[tuple[str, str]]) -> str:
    place.mkdir(exist_ok=True)
    for split, pairs in rows.items():
        (place / f"{split}.csv").write_text("filename,label\n" + "".join(f"{name},{label}\n" for name, label in pairs))
    return str(place)


def test_lists_of_images_as_mini_imagenets_releases_have_them(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(8):
        write_image(root / f"n{number}.png", number)
    lists = write_lists(
        tmp_path / "lists",
        train=[("n0.png", "cat"), ("n1.png", "ant"), ("n2.png", "cat")],
        val=[("n3.png", "dog")],
        test=[("n4.png", "eel"), ("n5.png", "eel")],
    )
    with pytest.warns(UserWarning, match=r"2 images are in no list of .* and left out \(n6.png, n7.png\)"):
        train = folder(root, "train", split_by=lists, progress=False)
    assert train.class_names == ("ant", "cat") and train.class_sizes.tolist() == [1, 2]
    (root / "n6.png").unlink()
    (root / "n7.png").unlink()
    assert sizes(root, split_by=lists) == {"train": {"ant": 1, "cat": 2}, "val": {"dog": 1}, "test": {"eel": 2}}


def test_other_lists_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(3):
        write_image(root / f"{number}.png", number)
    first = [("0.png", "a"), ("1.png", "a"), ("2.png", "b")]
    assert sizes(root, split_by=write_lists(tmp_path / "lists", train=first))["train"] == {"a": 2, "b": 1}
    second = [("0.png", "a"), ("1.png", "b"), ("2.png", "b")]
    assert sizes(root, split_by=write_lists(tmp_path / "lists", train=second))["train"] == {"a": 1, "b": 2}


def test_a_colour_image_in_another_split_makes_all_splits_colour(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_image(root / "0.png", 0)
    write_image(root / "1.png", 1, channels=3)
    lists = write_lists(tmp_path / "lists", train=[("0.png", "a")])
    with pytest.warns(UserWarning, match="1 images are in no list"):
        assert folder(root, "train", split_by=lists, progress=False).image_shape == (1, 12, 12)
    write_lists(tmp_path / "lists", test=[("1.png", "b")])
    for split in ("train", "test"):
        assert folder(root, split, split_by=lists, progress=False).image_shape == (3, 12, 12)


def test_an_image_that_the_system_does_not_read_is_not_taken_for_damaged(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: FolderSource, file: SourceFile) -> bytes:
        raise OSError(errno.EIO, "Input/output error", file.path)

    monkeypatch.setattr(FolderSource, "read", broken)
    for size in (None, 12):
        with pytest.raises(ValueError, match="Input/output error"):
            folder(root, "train", skip_damaged=True, image_size=size, progress=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [("c0/00.png", "")]}, r"expected a filename and a label in line 2 of .*train.csv"),
        ({"train": [("gone.png", "a")]}, "expected images of .*train.csv, found 'gone.png'"),
        ({"train": [("c0/00.png", "a")], "test": [("c0/00.png", "b")]}, "each image once, found 'c0/00.png' again"),
        ({"train": [("00.png", "a")]}, "expected the path of '00.png', which several images"),
        ({"val": [("c0/00.png", "a")]}, "expected train.csv in"),
        ({"train": []}, "expected columns filename and label in .*, found no rows"),
    ],
)
def test_lists_of_images_that_do_not_fit(root: Path, tmp_path: Path, rows: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder(root, "train", split_by=write_lists(tmp_path / "lists", **rows), progress=False)


def test_split_folders_allow_no_other_split(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "own", {"train/a": 1, "val/b": 1, "test/c": 1})
    with pytest.raises(ValueError, match=r"split_by: expected None for a tree with split folders \(test, train, val\)"):
        folder(root, "train", split_by="70:20:10", progress=False)


# ---- Small classes and damaged images


def damage(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"\x89PNG\r\n\x1a\nbroken")


def test_damaged_images_are_an_error_or_left_out(root: Path) -> None:
    damage(root, "c0/01.png", "c0/03.png", "c4/00.png")
    with pytest.raises(ValueError, match=r"cannot decode 'c0/01\.png'"):
        folder(root, "train", split_by="1:0:0", progress=False)
    before = {name: count - {"c0": 2, "c4": 1}.get(name, 0) for name, count in TEN.items()}
    for _ in range(2):  # the second time from the cache
        with pytest.warns(
            UserWarning, match=r"images of 'train' that cannot be decoded are left out: 2 of c0, 1 of c4"
        ):
            images = folder(root, "train", split_by="1:0:0", skip_damaged=True, progress=False)
        assert dict(zip(images.class_names, images.class_sizes.tolist(), strict=True)) == before
    whole = write_tree(root.parent / "whole", TEN)
    expected = folder(whole, "train", split_by="1:0:0", progress=False).images
    kept = [row for row in range(60) if row not in (1, 3, 24)]
    assert images.images.equal(expected[kept])


def test_classes_that_become_too_small_are_left_out(root: Path) -> None:
    damage(root, "c0/01.png", "c0/03.png", "c4/00.png")
    with pytest.warns(UserWarning, match="1 classes then have too few images and are left out: c0"):
        images = folder(root, "train", split_by="1:0:0", skip_damaged=True, min_images=5, progress=False)
    assert images.classes == 9 and "c0" not in images.class_names
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="expected at least 1 classes"):
        folder(write_tree(root.parent / "few", {"a": 2}), "train", split_by="1:0:0", min_images=5, progress=False)


def test_nothing_but_damaged_images(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "own", {"a": 1, "b": 1})
    damage(root, "a/00.png", "b/00.png")
    for size in (None, 12):
        with pytest.raises(ValueError, match="that can be decoded"):
            folder(root, "train", split_by="1:0:0", skip_damaged=True, image_size=size, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_images": 0}, ValueError, "min_images"),
        ({"min_images": 1.5}, TypeError, "min_images"),
        ({"skip_damaged": 1}, TypeError, "skip_damaged: expected True or False, found 1"),
        ({"split_by": 3}, TypeError, "split_by"),
    ],
)
def test_arguments_out_of_range(root: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        folder(root, "train", progress=False, **options)


# ---- The command line


def test_training_on_the_same_classes_with_other_images(root: Path, tmp_path: Path) -> None:
    damage(root, *(f"c3/0{number}.png" for number in range(3)))  # at least one of the four that train
    write_tree(root, {"small": 2})
    words = shlex.split(
        f"train --data folder --data-root {root} --split-by images:4:1:1 --min-images 5 --skip-damaged --ways 3 "
        "--queries 1 --tasks 2 --model mlp --hidden 8 --iterations 2 --validate-every 0 --test-tasks 0 --device cpu "
        f"--no-tensorboard --quiet --out {tmp_path / 'run'}"
    )
    with pytest.warns(UserWarning) as said:
        assert cli.main(words) == 0
    heard = " ".join(str(warning.message) for warning in said)
    assert "small (2)" in heard and " of c3" in heard
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "split_by: images:4:1:1" in stored and "min_images: 5" in stored and "skip_damaged: true" in stored


@pytest.mark.slow
def test_data_commands_take_the_same_options(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root, "c3/02.png")
    words = ["--data-root", str(root), "--split-by", "8:0:2"]
    assert cli.main(["data", "verify", "folder", *words]) == 1
    assert "cannot decode 'c3/02.png'" in capsys.readouterr().out
    with pytest.warns(UserWarning):
        assert cli.main(["data", "verify", "folder", *words, "--skip-damaged"]) == 0
    said = capsys.readouterr().out
    assert "folder/train: 8 classes" in said and "folder/test: 2 classes" in said and "folder/val" not in said
    with pytest.warns(UserWarning):
        assert cli.main(["data", "fetch", "folder", *words, "--skip-damaged"]) == 0
    assert "folder/train: 8 classes" in capsys.readouterr().out
    whole, out = write_tree(root.parent / "whole", TEN), root.parent / "sheet.png"
    show = ["data", "show", "folder", "--data-root", str(whole), "--split-by", "images", "--out", str(out)]
    assert cli.main(show) == 0 and out.is_file()


@pytest.mark.parametrize("options", [{"split_by": "1:1:1"}, {"min_images": 2}, {"skip_damaged": True}])
def test_other_sets_have_their_own_splits(options: dict, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        load("glyphs", "train", progress=False, **options)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        TrainConfig(**options)
    flag = f"--{name.replace('_', '-')}"
    words = [flag] if name == "skip_damaged" else [flag, str(options[name])]
    assert cli.main(["data", "verify", "glyphs", *words]) == 2
    assert f"{name}: expected none for 'glyphs'" in capsys.readouterr().err
