"""Own images: trees and zips of class folders, both valid and hostile."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cases.images import picture, write_image, write_tree, zip_tree
from signmaml.data import decode, folder, sources
from signmaml.data.splitting import deal_out
from signmaml.episodes import EpisodeSampler

THREE = {"train/a": 3, "train/b": 2, "val/c": 2, "test/d": 1}
# Dealt from the classes "00" to "19" with seed 0.
DEALT_TEST = ["04", "07", "15", "18"]
DEALT_VAL = ["01", "10", "17"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "own"


# --- which images, which classes, which split ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_split_folders(root: Path, channels: int) -> None:
    write_tree(root, THREE, channels=channels)
    train = folder(root, "train", progress=False)
    assert train.class_names == ("a", "b") and train.class_sizes.tolist() == [3, 2]
    assert train.name == "folder" and train.split == "train"
    wanted = np.stack([np.atleast_3d(picture(number, channels=channels)) for number in range(5)]).transpose(0, 3, 1, 2)
    assert torch.equal(train.images, torch.from_numpy(wanted))
    assert folder(root, "val", progress=False).class_names == ("c",)
    assert folder(root, "test", progress=False).class_sizes.tolist() == [1]


def test_other_names_for_the_validation_split(root: Path) -> None:
    write_tree(root, {"train/a": 1, "valid/b": 1, "test/c": 1})
    assert folder(root, "val", progress=False).class_names == ("b",)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"), ("TRAIN", "VALID", "TEST"), ("training", "validation", "testing"),
        ("meta-train", "meta-val", "meta-test"), ("metatrain", "metaval", "metatest"),
        ("train_set", "dev-set", "TestSet"), ("trainImages", "val", "test"), ("base", "val", "novel"),
        ("Base classes", "Validation classes", "Novel classes"),
    ],
)  # fmt: skip
def test_names_of_split_folders(root: Path, names: tuple[str, str, str]) -> None:
    write_tree(root, {f"{name}/{kind}{i}": 1 for name, kind in zip(names, "abc", strict=True) for i in range(3)})
    for split, kind in zip(("train", "val", "test"), "abc", strict=True):
        assert folder(root, split, progress=False).class_names == (f"{kind}0", f"{kind}1", f"{kind}2")
    zipped = zip_tree(root, root.with_suffix(".zip"), prefix="data/")
    assert folder(zipped, "test", progress=False).class_names == ("c0", "c1", "c2")


def test_names_that_are_no_splits_by_themselves(root: Path) -> None:
    """Alphabets, of which one is called "novel", and one "latest"."""
    write_tree(root, {f"{top}/{name}": 1 for top in ("novel", "greek", "latest") for name in "abc"})
    names = sum((folder(root, split, progress=False).class_names for split in ("train", "val", "test")), ())
    assert sorted(names) == sorted(f"{top}/{name}" for top in ("novel", "greek", "latest") for name in "abc")


def test_without_split_folders_classes_are_dealt_out(root: Path, tmp_path: Path) -> None:
    names = {f"class {number}": 1 for number in range(25)}
    write_tree(root, names)
    write_tree(tmp_path / "again", dict(reversed(names.items())))
    parts = {split: folder(root, split, progress=False).class_names for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 16, "val": 4, "test": 5}
    assert sorted(sum(parts.values(), ())) == sorted(names)
    for split, part in parts.items():
        assert part == tuple(sorted(part))
        assert folder(tmp_path / "again", split, progress=False).class_names == part
    assert folder(root, "test", seed=1, progress=False).class_names != parts["test"]


def test_dealing_out_stays_as_it_is() -> None:
    """A change would put classes that a recorded run trained on into its test split."""
    parts = deal_out([f"{number:02d}" for number in range(20)], seed=0)
    assert parts["test"] == DEALT_TEST and parts["val"] == DEALT_VAL
    decomposed = deal_out([unicodedata.normalize("NFD", name) for name in ("é", "ü", "ñ", "ø", "å")], seed=3)
    composed = deal_out(["é", "ü", "ñ", "ø", "å"], seed=3)
    assert {s: [unicodedata.normalize("NFC", n) for n in part] for s, part in decomposed.items()} == {
        s: sorted(part, key=lambda n: unicodedata.normalize("NFD", n)) for s, part in composed.items()
    }


def test_nested_folders_make_names_with_slashes(root: Path) -> None:
    write_tree(root, {"train/latin/a": 1, "train/latin/b": 1, "train/greek/a": 1, "val/x": 1, "test/y": 1})
    assert folder(root, "train", progress=False).class_names == ("greek/a", "latin/a", "latin/b")


def test_unicode_names(root: Path) -> None:
    names = ["日本 語", "Ünïcode", "щ", "😀", 'it\'s, "quoted"']
    write_tree(root, {f"train/{name}": 1 for name in names} | {"val/v": 1, "test/t": 1})
    assert set(folder(root, "train", progress=False).class_names) == set(names)
    zipped = zip_tree(root, root.with_suffix(".zip"))
    assert set(folder(zipped, "train", progress=False).class_names) == set(names)


@pytest.mark.parametrize(
    "suffix",
    [
        ".png", ".PNG", ".bmp", ".webp", ".gif", ".jpg", ".JPEG", ".jfif", ".tif", ".TIFF", ".pgm", ".pnm", ".jp2",
        ".pcx",
    ],
)  # fmt: skip
def test_formats(root: Path, suffix: str) -> None:
    for split in ("train", "val", "test"):
        write_image(root / split / f"class of {split}" / f"1{suffix}", 7)
    pixels = folder(root, "train", channels=1, progress=False).images[0, 0].numpy().astype(int)
    tolerance = 25 if suffix.lower() in (".jpg", ".jpeg", ".jfif", ".webp") else 2
    assert np.abs(pixels - picture(7)).max() <= tolerance


def test_one_coloured_image_makes_all_splits_rgb(root: Path) -> None:
    write_tree(root, {"train/a": 2, "val/b": 1})
    write_image(root / "test" / "c" / "1.png", 1, channels=3)
    assert folder(root, "train", progress=False).image_shape == (3, 12, 12)
    assert folder(root, "train", channels=1, progress=False).image_shape == (1, 12, 12)


def test_images_of_different_sizes_need_a_size(root: Path) -> None:
    write_tree(root, {"train/a": 2, "val/b": 1})
    write_image(root / "test" / "c" / "1.png", 1, size=20)
    with pytest.raises(ValueError, match=r"image_size: .* 12x12 \(3 images\), 20x20 \(1 images\); give image_size"):
        folder(root, "train", progress=False)
    assert folder(root, "train", image_size=16, progress=False).image_shape == (1, 16, 16)
    wanted = np.asarray(Image.fromarray(picture(1, size=20)).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(folder(root, "test", image_size=16, progress=False).images[0, 0].numpy(), wanted)


def transparent() -> Image.Image:
    return Image.fromarray(np.dstack([np.full((12, 12, 3), 9, np.uint8), np.zeros((12, 12), np.uint8)]))


def deep() -> Image.Image:
    return Image.fromarray((picture(3).astype(np.uint16) << 8) + 77)


def shares() -> Image.Image:
    return Image.fromarray(picture(3).astype(np.float32) / 255)


def palette() -> Image.Image:
    return Image.fromarray(picture(3)).convert("P")


@pytest.mark.parametrize(
    ("make", "wanted"),
    [(deep, picture(3)), (palette, picture(3)), (shares, picture(3))],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pixel_formats(root: Path, make: Callable[[], Image.Image], wanted: np.ndarray, suffix: str) -> None:
    if make is shares and suffix == ".png":
        pytest.skip("PNG has no floating-point pixels")
    write_tree(root, {"val/b": 1, "test/c": 1})
    (root / "train" / "a").mkdir(parents=True)
    make().save(root / "train" / "a" / f"1{suffix}")
    assert np.array_equal(folder(root, "train", channels=1, progress=False).images[0, 0].numpy(), wanted)


def test_transparent_images_lie_on_white_and_a_set_without_contrast_is_reported(root: Path) -> None:
    write_tree(root, {"val/b": 1, "test/c": 1})
    (root / "train" / "a").mkdir(parents=True)
    transparent().save(root / "train" / "a" / "1.png")
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning, match="1 of 1 images of 'train' have the same value everywhere"):
            images = folder(root, "train", channels=1, progress=False).images
    assert bool((images == 255).all())


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_floating_point_pixels_outside_of_the_range_are_refused(root: Path, value: float) -> None:
    write_tree(root, {"val/b": 1, "test/c": 1})
    (root / "train" / "a").mkdir(parents=True)
    pixels = np.full((12, 12), 0.5, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(root / "train" / "a" / "1.tif")
    with pytest.raises(ValueError, match=r"cannot decode 'train/a/1.tif': expected floating-point pixels in 0\.\.1"):
        folder(root, "train", progress=False)


def test_exif_rotation_is_applied(root: Path) -> None:
    write_tree(root, {"val/b": 1, "test/c": 1})
    (root / "train" / "a").mkdir(parents=True)
    image, exif = Image.fromarray(picture(3)), Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees for display
    image.save(root / "train" / "a" / "1.png", exif=exif)
    pixels = folder(root, "train", progress=False).images[0, 0].numpy()
    assert np.array_equal(pixels, np.rot90(picture(3), -1))


# --- what is left out ---------------------------------------------------------------------------------------


def test_what_is_not_an_image_is_left_out_with_a_warning(root: Path) -> None:
    write_tree(root, THREE)
    (root / "train" / "notes.txt").write_text("hello")
    (root / "train" / "a" / "Thumbs.db").write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"2 files are not images and left out \(1 .db, 1 .txt\)|\(1 .txt, 1 .db\)"):
        assert folder(root, "train", progress=False).classes == 2


def test_hidden_files_do_not_count(root: Path) -> None:
    write_tree(root, THREE)
    write_image(root / "train" / "a" / "._01.png", 1)
    write_image(root / "__MACOSX" / "train" / "a" / "1.png", 1)
    write_image(root / ".git" / "x" / "1.png", 1)
    assert folder(root, "train", progress=False).class_sizes.tolist() == [3, 2]


def test_empty_class_folder_is_reported(root: Path) -> None:
    write_tree(root, THREE)
    (root / "train" / "nothing").mkdir()
    with pytest.warns(UserWarning, match="empty folders are left out: train/nothing"):
        assert folder(root, "train", progress=False).class_names == ("a", "b")


def test_stray_images_are_reported(root: Path) -> None:
    write_tree(root, {"a": 1, "b": 1, "c": 1})
    write_image(root / "stray.png", 4)
    with pytest.warns(UserWarning, match=r"1 images are in no class folder and left out, such as 'stray.png'"):
        folder(root, "train", progress=False)


def test_a_class_in_two_splits_is_reported(root: Path) -> None:
    write_tree(root, {"train/a": 1, "train/b": 1, "test/a": 1})
    with pytest.warns(UserWarning, match=r"1 classes are in more than one split \(a\)"):
        folder(root, "train", progress=False)


def test_a_class_of_one_image_loads_and_the_sampler_names_it(root: Path) -> None:
    write_tree(root, {"train/many": 4, "train/lonely": 1, "val/v": 1, "test/t": 1})
    images = folder(root, "train", progress=False)
    with pytest.raises(ValueError, match=r"needs at least 2 images .* 'lonely' \(1\)"):
        EpisodeSampler(images, ways=2, shots=1, queries=1, tasks=1)


def test_links_that_lead_back_up_end(root: Path) -> None:
    write_tree(root, THREE)
    try:
        (root / "train" / "a" / "up").symlink_to(root, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert folder(root, "train", progress=False).class_sizes.tolist() == [3, 2]


# --- refusals -----------------------------------------------------------------------------------------------


def test_nothing_there(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder or a \.zip archive, found nothing at .*own"):
        folder(root, "train")


def test_not_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "own.zip"
    path.write_text("not a zip")
    with pytest.raises(ValueError, match=r"expected a folder or a \.zip archive, found .*own\.zip"):
        folder(path, "train")


def test_no_class_folders(root: Path) -> None:
    root.mkdir()
    with pytest.raises(ValueError, match="expected one folder of images a class, found no images"):
        folder(root, "train")
    write_image(root / "1.png", 1)
    with pytest.raises(ValueError, match="found 1 images directly in it"):
        folder(root, "train")


def test_too_few_classes_to_split(root: Path) -> None:
    write_tree(root, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"at least 3 classes .* found 2; or make the folders train, val and test"):
        folder(root, "train")


def test_a_split_that_is_not_there(root: Path) -> None:
    write_tree(root, {"train/a": 1, "test/b": 1})
    with pytest.raises(ValueError, match="has no classes for 'val', it has train, test"):
        folder(root, "val")


def test_classes_inside_and_outside_of_split_folders(root: Path) -> None:
    write_tree(root, {"train/a": 1, "test/b": 1, "c": 1})
    with pytest.raises(ValueError, match=r"found both: 'test/b', but also c"):
        folder(root, "train")


def test_two_folders_of_one_split(root: Path) -> None:
    write_tree(root, {"train/a": 1, "Training/b": 1, "test/c": 1})
    with pytest.raises(ValueError, match="expected one folder of train classes, found Training, train"):
        folder(root, "train")


@pytest.mark.parametrize("top", ["train_1", "my-test", "fold 2 validation"])
def test_names_that_suggest_a_split(root: Path, top: str) -> None:
    write_tree(root, {f"{top}/{name}": 1 for name in "abc"} | {f"other/{name}": 1 for name in "abc"})
    with pytest.raises(ValueError, match=f"expected split folders named like 'train', .*, found '{top}'; rename it"):
        folder(root, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "training"}, "split: expected one of 'train', 'val', 'test', found 'training'"),
        ({"image_size": 4}, r"image_size: expected an integer in 8\.\.1024, found 4"),
        ({"channels": 2}, "channels: expected 1, 3 or None, found 2"),
        ({"seed": -1}, r"seed: .* found -1"),
    ],
)
def test_bad_arguments_before_anything_is_read(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder("/nowhere", **({"split": "train"} | change))  # type: ignore[arg-type]


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(3, size=40)).save(stream, "PNG")
    return stream.getvalue()


def wrong_checksum() -> bytes:
    content = bytearray(png())
    content[content.index(b"IDAT") + 20] ^= 255
    return bytes(content)


def huge() -> bytes:
    """An image whose header claims 100,000 x 100,000 pixels."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    return bytes(content)


@pytest.mark.parametrize("content", [png()[:-60], b"", b"GIF89a no image", wrong_checksum(), huge()])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_image_is_named(root: Path, content: bytes, zipped: bool) -> None:
    write_tree(root, THREE, size=40)
    (root / "train" / "a" / "broken.png").write_bytes(content)
    place = zip_tree(root, root.with_suffix(".zip")) if zipped else root
    with pytest.raises(ValueError, match=r"own.*: cannot decode 'train/a/broken\.png': "):
        folder(place, "train", image_size=40, channels=1, progress=False)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_pillow_allows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, THREE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 143)
    with pytest.raises(ValueError, match=r"cannot decode .*12 x 12 pixels are more than Pillow's limit of 143"):
        folder(root, "train", progress=False)


def test_a_file_beyond_the_size_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, THREE)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 50)
    with pytest.raises(ValueError, match=r"bytes, more than the 50 allowed"):
        folder(root, "train", progress=False)


# --- zips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "own/", "deep/down/"])
def test_a_zip_is_as_good_as_the_tree_and_is_not_unpacked(root: Path, tmp_path: Path, prefix: str) -> None:
    write_tree(root, THREE)
    archive = zip_tree(root, tmp_path / "archive.zip", prefix)
    before = set(tmp_path.rglob("*"))
    for split in ("train", "val", "test"):
        tree, zipped = folder(root, split, progress=False), folder(archive, split, progress=False)
        assert torch.equal(tree.images, zipped.images) and tree.class_names == zipped.class_names
    new = set(tmp_path.rglob("*")) - before
    assert all(path == tmp_path / "cache" or path.parent == tmp_path / "cache" for path in new)


HOSTILE_NAMES = ["../evil.png", "a/../../evil.png", "/etc/evil.png", "C:/evil.png", "a\\..\\..\\evil.png", "\\evil.png"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_paths_that_lead_outside_are_refused(root: Path, name: str) -> None:
    write_tree(root, THREE)
    archive = zip_tree(root, root.with_suffix(".zip"))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(zipfile.ZipInfo(name), png())
    with pytest.raises(ValueError, match="refused, it holds a path outside the archive"):
        folder(archive, "train")


def test_bombs_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL_ARCHIVE_BYTES", 2**20)
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/a/1.png", bytes(2**22))
    with pytest.raises(ValueError, match=r"refused, \d+ bytes expand to 4194304, more than 200 times as much"):
        folder(archive, "train")


def test_a_member_larger_than_the_directory_says_is_damaged(root: Path) -> None:
    write_tree(root, THREE)
    archive = zip_tree(root, root.with_suffix(".zip"))
    with zipfile.ZipFile(archive) as file:
        size = file.getinfo("train/a/00.png").file_size
    content = archive.read_bytes()
    at = content.rindex(b"train/a/00.png") - 46 + 24  # "uncompressed size" in the central directory
    assert struct.unpack_from("<I", content, at)[0] == size
    archive.write_bytes(content[:at] + struct.pack("<I", size - 30) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"cannot decode 'train/a/00\.png'"):
        folder(archive, "train", image_size=12, channels=1, progress=False)


def test_encrypted_members_are_refused(root: Path) -> None:
    write_tree(root, THREE)
    archive = zip_tree(root, root.with_suffix(".zip"))
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"train/a/00.png") - 46 + 8  # the flags in the central directory
    content[at] |= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"refused, 'train/a/00\.png' is encrypted"):
        folder(archive, "train")


# --- the cache ----------------------------------------------------------------------------------------------


def test_images_are_decoded_once_until_they_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, THREE)
    decoded: list[str] = []
    decode_file = decode.decode_file

    def counting(source: sources.Source, file: sources.SourceFile, decoding: decode.Decoding) -> np.ndarray:
        decoded.append(file.path)
        return decode_file(source, file, decoding)

    monkeypatch.setattr(decode, "decode_file", counting)
    first = folder(root, "train", progress=False)
    assert len(decoded) == 5
    assert torch.equal(folder(root, "train", progress=False).images, first.images) and len(decoded) == 5
    changed = write_image(root / "train" / "b" / "00.png", 99)
    os.utime(changed, ns=(1, 1))
    again = folder(root, "train", progress=False)
    assert len(decoded) == 10 and np.array_equal(again.images[3, 0].numpy(), picture(99))


def test_progress_goes_to_standard_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(root, THREE)
    folder(root, "train")
    shown = capsys.readouterr()
    assert shown.out == "" and "folder/train: decoding (2 classes)" in shown.err
    folder(root, "val", progress=False)
    assert capsys.readouterr() == ("", "")
