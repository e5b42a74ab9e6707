"""Own images: a tree or zip of class folders, with or without split folders."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

from .arguments import SPLITS, a_few, check_integer, check_split
from .cache import cached
from .decode import IMAGE_SIZES, Decoding, common_size, decode, probe
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder, fingerprint, open_source

# Names of split folders, in lower case and without "meta" before and "set", "data" and the like after them.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
# Names that may as well be a class's: they are split folders if all folders on top are.
PERHAPS_SPLIT_FOLDERS = {"base": "train", "novel": "test", "dev": "val"}
SHARES = {"val": 0.16, "test": 0.20}  # of the classes; the other 64 % are for training, as in mini-ImageNet


Classes = Mapping[str, list[SourceFile]]  # class name -> its files


def folder(
    root: str | os.PathLike[str],
    split: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImageSet:
    """Own images, one folder per class: PNG, JPEG, BMP, GIF (first frame), WebP, TIFF, PPM, PGM, PBM, JPEG 2000 or PCX.

    ``ROOT/{train,val,test}/CLASS/*`` defines the splits. Such folders may also be named like ``Training``,
    ``meta-train``, ``test_set``, ``validation`` or, together, ``base``, ``val`` and ``novel``; see `split_of`. Without
    split folders, ``ROOT/CLASS/*``, classes are divided 64 / 16 / 20 %: sorted by the SHA-256 of ``"SEED:CLASS"`` (the
    name in Unicode's composed form), the first 20 % of them (rounded, at least one) are test classes and the next 16 %
    are val classes. Few-shot tests thus use classes that training has not seen. Folders may be nested: the class of
    ``latin/a/1.png`` is ``latin/a``. Hidden files and ``__MACOSX`` are ignored; other files that are not images, and
    empty folders, are skipped with a warning.

    Args:
        root: The folder, or a .zip of it.
        split: ``"train"``, ``"val"`` or ``"test"``.
        image_size: Height and width, 8 to 1024, that images are resized to (antialiased, the aspect ratio is not
            kept). None: the images' own size, which must be square and the same in all splits.
        channels: 1: grey; 3: RGB; None: RGB if any image of any split has colour channels, else grey.
        seed: Determines the split if the tree has no split folders. Default 0.
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[M, channels, image_size, image_size]`` uint8, classes by name.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: An argument is out of range; there are no class folders, or too few to split; the split has no
            folder, or two; a folder's name suggests a split and does not say which; images have no common size and
            `image_size` is None; an image is damaged (the message names it); an archive is rejected (paths that lead
            outside, encryption, expansion far beyond its size).
    """
    check_split(split)
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    if image_size is not None:
        image_size = check_integer("image_size", image_size, *IMAGE_SIZES)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: expected 1, 3 or None, found {channels!r}")
    with open_source(root) as source:
        found = find_classes(source, seed=seed)
        _report_left_out(source)
        return decode_own(source, found, split, image_size=image_size, channels=channels, progress=progress)


def find_classes(source: Source, *, seed: int = 0) -> dict[str, Classes]:
    """Split -> its classes in order; see `folder` for the rules and errors."""
    classes = _class_folders(source)
    of_top = _splits_of_tops(classes, source.label)
    in_split = {name for name in classes if name.partition("/")[0] in of_top and "/" in name}
    if in_split and len(in_split) < len(classes):
        rest = sorted(set(classes) - in_split)
        raise ValueError(
            f"{source.label}: expected class folders in split folders (train, val, test) or no split folders at "
            f"all, found both: {min(in_split)!r}, but also {a_few(rest, 3)}"
        )
    if not in_split:
        return _dealt_out(classes, seed, source.label)
    splits: dict[str, dict[str, list[SourceFile]]] = {split: {} for split in SPLITS}
    for name, files in classes.items():
        top, _, name_in_split = name.partition("/")
        splits[of_top[top]][name_in_split] = list(files)
    _warn_of_shared_classes(splits, source.label)
    return {split: dict(sorted(found.items())) for split, found in splits.items()}


def class_folders(source: Source) -> Classes:
    """The classes of a set without splits, in order: one folder of images each.

    Raises:
        ValueError: There are no class folders, or they lie in split folders.
    """
    classes = _class_folders(source)
    tops = {name.partition("/")[0] for name in classes if "/" in name}
    splits = sorted(top for top in tops if split_of(top) is not None)
    if splits:
        raise ValueError(
            f"{source.label}: expected one folder of images a class, found folders of splits: {a_few(splits)}; "
            f"give one of them"
        )
    return dict(sorted(classes.items()))


def _class_folders(source: Source) -> dict[str, list[SourceFile]]:
    """Class name -> its files, without folders that contain all classes."""
    folders = by_folder(source.images)
    stray = folders.pop("", [])
    if not folders:
        lying = f"{len(stray)} images directly in it" if stray else "no images"
        others = f" and {len(source.others)} other files" if source.others else ""
        raise ValueError(f"{source.label}: expected one folder of images a class, found {lying}{others}")
    if stray:
        _warn(f"{source.label}: {len(stray)} images are in no class folder and left out, such as {stray[0].path!r}")
    return _without_common_folders(folders)


def split_of(name: str) -> str | None:
    """The split that a folder's name says; None if it says none.

    Example:
        >>> [split_of(name) for name in ("Train", "meta-val", "Test_Set", "trainImages", "novel", "latest")]
        ['train', 'val', 'test', 'train', None, None]
    """
    return SPLIT_FOLDERS.get(_bare(name))


def _bare(name: str) -> str:
    word = re.sub(r"[\W_]", "", name.casefold()).removeprefix("meta")
    for end in ("set", "data", "images", "classes", "split"):
        if word.endswith(end) and word != end:
            return word.removesuffix(end)
    return word


def _splits_of_tops(classes: Classes, label: str) -> dict[str, str]:
    """The splits of the folders on top that hold class folders, as far as their names say one.

    Raises:
        ValueError: Two folders are the same split, or a name suggests a split without being one.
    """
    tops = sorted({name.partition("/")[0] for name in classes if "/" in name})
    perhaps = {top: split_of(top) or PERHAPS_SPLIT_FOLDERS.get(_bare(top)) for top in tops}
    all_are = None not in perhaps.values() and all("/" in name for name in classes)
    found = {top: split for top in tops if (split := perhaps[top] if all_are else split_of(top)) is not None}
    for split in SPLITS:
        named = [top for top, of_top in found.items() if of_top == split]
        if len(named) > 1:
            raise ValueError(f"{label}: expected one folder of {split} classes, found {a_few(named)}")
    for top in tops:
        if top not in found and not SPLIT_FOLDERS.keys().isdisjoint(re.findall("[a-z]+", top.casefold())):
            raise ValueError(
                f"{label}: expected split folders named like 'train', 'val' and 'test', found {top!r}; rename it, "
                "also if it is no split"
            )
    return found


def decode_own(
    source: Source,
    found: Mapping[str, Classes],
    split: str,
    *,
    image_size: int | None,
    channels: int | None,
    progress: bool,
    use_cache: bool = True,
) -> ImageSet:
    """Decodes one split of an open source, or takes it from the cache."""
    classes = found[split]
    if not classes:
        have = ", ".join(s for s in SPLITS if found[s])
        raise ValueError(f"split: {source.label} has no classes for {split!r}, it has {have}")
    key = {
        "name": "folder",
        "split": split,
        "source": fingerprint(source, source.images),
        "classes": list(classes),
        "image_size": image_size,
        "channels": channels,
        "decoding": 1,
    }

    def build() -> ImageSet:
        size, depth = image_size, channels
        if size is None or depth is None:
            # Look at all splits, so that a network trained on one can be tested on another.
            files = [file for group in found.values() for part in group.values() for file in part]
            shapes = probe(source, files, what="folder: reading headers", progress=progress)
            size = common_size(shapes, source.label) if size is None else size
            depth = (3 if shapes.colour else 1) if depth is None else depth
        return decode(source, classes, Decoding(size, depth), name="folder", split=split, progress=progress)

    found_images = cached(key, build) if use_cache else build()
    _warn_of_constant_images(found_images, source.label)
    return found_images


def deal_out(names: list[str], seed: int) -> dict[str, list[str]]:
    """Classes by split, 64 / 16 / 20 %, determined by name and seed alone; see `folder`.

    Raises:
        ValueError: Fewer than three classes.

    Example:
        >>> deal_out(["a", "b", "c", "d", "e"], seed=0)
        {'train': ['b', 'c', 'e'], 'val': ['a'], 'test': ['d']}
    """
    if len(names) < len(SPLITS):
        raise ValueError(
            f"expected at least {len(SPLITS)} classes to split into train, val and test, found {len(names)}"
        )

    def rank(name: str) -> bytes:
        composed = unicodedata.normalize("NFC", name)
        return hashlib.sha256(f"{seed}:{composed}".encode("utf-8", "surrogateescape")).digest()

    ranked = sorted(names, key=rank)
    test, val = (max(1, round(SHARES[split] * len(names))) for split in ("test", "val"))
    parts = {"train": ranked[test + val :], "val": ranked[test : test + val], "test": ranked[:test]}
    return {split: sorted(part) for split, part in parts.items()}


def _dealt_out(classes: Classes, seed: int, label: str) -> dict[str, Classes]:
    try:
        parts = deal_out(list(classes), seed)
    except ValueError as error:
        raise ValueError(f"{label}: {error}; or make the folders train, val and test") from error
    return {split: {name: classes[name] for name in names} for split, names in parts.items()}


def _without_common_folders(folders: dict[str, list[SourceFile]]) -> dict[str, list[SourceFile]]:
    """Strips folders that contain all classes, such as the top folder that archivers add."""
    while len(folders) > 1:
        tops = {name.partition("/")[0] for name in folders}
        if len(tops) > 1 or any(map(split_of, tops)) or any("/" not in name for name in folders):
            break
        folders = {name.partition("/")[2]: files for name, files in folders.items()}
    return folders


def _warn_of_shared_classes(splits: Mapping[str, Classes], label: str) -> None:
    seen = Counter(name for classes in splits.values() for name in classes)
    shared = sorted(name for name, count in seen.items() if count > 1)
    if shared:
        _warn(
            f"{label}: {len(shared)} classes are in more than one split ({a_few(shared, 3)}); a few-shot test is meant "
            "to be on classes that training has not seen"
        )


def _warn_of_constant_images(images: ImageSet, label: str) -> None:
    pixels = images.images.flatten(1)
    constant = int((pixels.amin(1) == pixels.amax(1)).sum())
    if 2 * constant > len(pixels):
        _warn(
            f"{label}: {constant} of {len(pixels)} images of {images.split!r} have the same value everywhere once they "
            "are 8 bits a channel; do they use a small part of their range?"
        )


def _report_left_out(source: Source) -> None:
    if source.others:
        kinds = Counter(PurePosixPath(file.path).suffix.lower() or "no suffix" for file in source.others)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        _warn(f"{source.label}: {len(source.others)} files are not images and left out ({named})")
    if source.empty_folders:
        _warn(f"{source.label}: empty folders are left out: {a_few(source.empty_folders)}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
