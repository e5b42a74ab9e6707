"""Own images: a tree or zip of class folders, with or without split folders."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .arguments import SPLITS, a_few, check_integer, check_split
from .cache import cached
from .decode import IMAGE_SIZES, Decoding, common_size, decode, probe
from .image_set import ImageSet
from .sources import Source, SourceFile, by_folder, fingerprint, open_source
from .splitting import SHARES, Classes, Rule, by_classes, by_images, by_lists, rule_of

# Names of split folders, in lower case and without "meta" before and "set", "data" and the like after them.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
# Names that may as well be a class's: they are split folders if all folders on top are.
PERHAPS_SPLIT_FOLDERS = {"base": "train", "novel": "test", "dev": "val"}


def folder(
    root: str | os.PathLike[str],
    split: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    split_by: str | None = None,
    min_images: int = 1,
    skip_damaged: bool = False,
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
        seed: Determines the split if the tree has no split folders, or images are split. Default 0.
        split_by: How the splits are made. None: by folders, as above. ``"70:15:15"``: shares of the classes for train,
            val and test; 0 for none. ``"images"`` or ``"images:70:15:15"``: every split has all classes, with other
            images of each: for a task of your own, not for new classes. The path of a .json or .yaml file with a list
            of classes under each of ``train``, ``val`` and ``test``. The path of a folder with ``train.csv``,
            ``val.csv`` and ``test.csv``, whose columns ``filename`` and ``label`` list images, as mini-ImageNet's
            releases do; the images may then lie anywhere. Split folders in the tree allow None, or lists of images,
            alone. Images and classes that no list names are left out, with a warning.
        min_images: Classes with fewer images are left out, with a warning; before classes are split.
        skip_damaged: Whether images that cannot be decoded are left out, with a warning, instead of being an error.
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
    selection = Selection(split_by, min_images, skip_damaged)
    with open_source(root) as source:
        found = find_classes(source, selection, seed=seed)
        _report_left_out(source)
        return decode_own(
            source, found, split, image_size=image_size, channels=channels, selection=selection, progress=progress
        )


@dataclass(frozen=True)
class Selection:
    """Which of own images are in which split; see `folder`.

    Raises:
        TypeError, ValueError, FileNotFoundError: An attribute is out of range.
    """

    split_by: str | None = None
    min_images: int = 1
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        check_integer("min_images", self.min_images, 1)
        if not isinstance(self.skip_damaged, bool):
            raise TypeError(f"skip_damaged: expected True or False, found {self.skip_damaged!r}")
        if self.split_by is not None:
            rule_of(self.split_by)

    def least_of_a_split(self) -> int:
        """The least number of images of a class in one split: any, if the images of a class are in several."""
        shared = self.split_by is not None and rule_of(self.split_by).of == "images"
        return 1 if shared else self.min_images


def find_classes(source: Source, selection: Selection | None = None, *, seed: int = 0) -> dict[str, Classes]:
    """Split -> its classes in order; see `folder` for the rules and errors."""
    selection = selection or Selection()
    rule = None if selection.split_by is None else rule_of(selection.split_by)
    if rule is not None and rule.place is not None and rule.place.is_dir():
        splits, left = by_lists({}, source, rule.place)
        _warn_of_unlisted(source.label, rule.place, left, "images")
        return {split: _large(classes, selection.min_images, source.label) for split, classes in splits.items()}
    classes: Classes = _class_folders(source)
    of_top = _splits_of_tops(classes, source.label)
    in_split = {name for name in classes if name.partition("/")[0] in of_top and "/" in name}
    if in_split and len(in_split) < len(classes):
        rest = sorted(set(classes) - in_split)
        raise ValueError(
            f"{source.label}: expected class folders in split folders (train, val, test) or no split folders at "
            f"all, found both: {min(in_split)!r}, but also {a_few(rest, 3)}"
        )
    if in_split and rule is not None:
        raise ValueError(
            f"split_by: expected None for a tree with split folders ({', '.join(sorted(of_top))}), found "
            f"{selection.split_by!r}"
        )
    classes = _large(classes, selection.min_images, source.label)
    if not in_split:
        return _divided(classes, source, seed, rule)
    by_split: dict[str, dict[str, list[SourceFile]]] = {split: {} for split in SPLITS}
    for name, files in classes.items():
        top, _, name_in_split = name.partition("/")
        by_split[of_top[top]][name_in_split] = list(files)
    _warn_of_shared_classes(by_split, source.label)
    return {split: dict(sorted(found.items())) for split, found in by_split.items()}


def _divided(classes: Classes, source: Source, seed: int, rule: Rule | None) -> dict[str, Classes]:
    """The splits of a tree without split folders."""
    if rule is not None and rule.place is not None:
        splits, left = by_lists(classes, source, rule.place)
        _warn_of_unlisted(source.label, rule.place, left, "classes")
        return splits
    divide = by_images if rule is not None and rule.of == "images" else by_classes
    try:
        return divide(classes, seed, SHARES if rule is None else rule.shares)
    except ValueError as error:
        advice = "; or make the folders train, val and test" if rule is None else ""
        raise ValueError(f"{source.label}: {error}{advice}") from error


def _large(classes: Classes, min_images: int, label: str) -> Classes:
    """The classes that have enough images."""
    small = [f"{name} ({len(files)})" for name, files in classes.items() if len(files) < min_images]
    if small:
        _warn(f"{label}: {len(small)} classes have fewer than {min_images} images and are left out: {a_few(small)}")
    return {name: files for name, files in classes.items() if len(files) >= min_images}


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
    selection: Selection | None = None,
    use_cache: bool = True,
) -> ImageSet:
    """Decodes one split of an open source, or takes it from the cache."""
    selection = selection or Selection()
    classes = found[split]
    if not classes:
        have = ", ".join(s for s in SPLITS if found[s]) or "none"
        raise ValueError(f"split: {source.label} has no classes for {split!r}, it has {have}")
    every = [file for group in found.values() for part in group.values() for file in part]
    key = {
        "name": "folder",
        "split": split,
        "source": fingerprint(source, source.images),
        "files": fingerprint(source, [file for files in classes.values() for file in files]),
        "classes": [[name, len(files)] for name, files in classes.items()],
        # Their headers settle size and colour.
        "probed": fingerprint(source, every) if image_size is None or channels is None else None,
        "image_size": image_size,
        "channels": channels,
        "selection": [selection.least_of_a_split(), selection.skip_damaged],
        "decoding": 1,
    }

    def build() -> ImageSet:
        size, depth = image_size, channels
        if size is None or depth is None:
            # Look at all splits, so that a network trained on one can be tested on another.
            what = "folder: reading headers"
            shapes = probe(source, every, what=what, progress=progress, skip_damaged=selection.skip_damaged)
            size = common_size(shapes, source.label) if size is None else size
            depth = (3 if shapes.colour else 1) if depth is None else depth
        return decode(
            source,
            classes,
            Decoding(size, depth),
            name="folder",
            split=split,
            progress=progress,
            skip_damaged=selection.skip_damaged,
            min_images=selection.least_of_a_split(),
        )

    found_images = cached(key, build) if use_cache else build()
    _warn_of_damaged(classes, found_images, source.label)
    _warn_of_constant_images(found_images, source.label)
    return found_images


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


def _warn_of_damaged(classes: Classes, images: ImageSet, label: str) -> None:
    """Says what `skip_damaged` left out, also of a set that comes from the cache."""
    here = dict(zip(images.class_names, images.class_sizes.tolist(), strict=True))
    lost = {name: len(files) - here.get(name, 0) for name, files in classes.items()}
    if not any(lost.values()):
        return
    shown = a_few([f"{count} of {name}" for name, count in lost.items() if count])
    gone = [name for name in classes if name not in here]
    classes_lost = f"; {len(gone)} classes then have too few images and are left out: {a_few(gone)}" if gone else ""
    _warn(f"{label}: images of {images.split!r} that cannot be decoded are left out: {shown}{classes_lost}")


def _warn_of_unlisted(label: str, place: Path, names: Sequence[str], what: str) -> None:
    if names:
        _warn(f"{label}: {len(names)} {what} are in no list of {place} and left out ({a_few(names, 3)})")


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
