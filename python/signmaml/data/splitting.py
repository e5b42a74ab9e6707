"""How own images become splits when their folders do not say it: by shares of classes or images, or by lists."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import parse_yaml
from .arguments import SPLITS, a_few
from .sources import Source, SourceFile

Classes = Mapping[str, list[SourceFile]]  # class name -> its files
SHARES = (0.64, 0.16, 0.20)  # of train, val and test, as in mini-ImageNet
MAX_LIST_BYTES = 64 * 2**20
EXPECTED = (
    "shares of classes such as '70:15:15', 'images' or 'images:70:15:15' for the same classes with other images, a "
    ".json or .yaml file with the classes of each split, or a folder with train.csv, val.csv and test.csv"
)


@dataclass(frozen=True)
class Rule:
    """A checked `split_by`.

    Attributes:
        of: "classes", "images" or "lists".
        shares: Of train, val and test; they add up to 1.
        place: The file or folder of lists.
    """

    of: str
    shares: tuple[float, float, float] = SHARES
    place: Path | None = None


def rule_of(split_by: str) -> Rule:
    """Reads a `split_by`.

    Raises:
        ValueError: It is none of `EXPECTED`.
        FileNotFoundError: It names a file that is not there.

    Example:
        >>> rule_of("images:3:1:1").shares
        (0.6, 0.2, 0.2)
    """
    if not isinstance(split_by, str):
        raise TypeError(f"split_by: expected {EXPECTED}, found {split_by!r}")
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"(?:(classes|images):)?{number}:{number}:{number}", split_by)
    if found:
        parts = [float(part) for part in found.groups()[1:]]
        if parts[0] == 0 or not math.isfinite(sum(parts)):
            raise ValueError(f"split_by: expected a share above 0 for train, found {split_by!r}")
        train, val, test = (part / sum(parts) for part in parts)
        return Rule(found[1] or "classes", (train, val, test))
    if split_by in ("images", "classes"):
        return Rule(split_by)
    place = Path(split_by).expanduser()
    if split_by and (place.is_dir() or (place.is_file() and place.suffix in (".json", ".yaml", ".yml"))):
        return Rule("lists", place=place)
    if place.suffix in (".json", ".yaml", ".yml", ".csv") or "/" in split_by:
        here = "a file that is no list" if place.is_file() else "nothing"
        raise FileNotFoundError(f"split_by: expected {EXPECTED}, found {here} at {split_by!r}")
    raise ValueError(f"split_by: expected {EXPECTED}, found {split_by!r}")


def deal_out(
    names: Sequence[str], seed: int, shares: Sequence[float] = SHARES, what: str = "classes"
) -> dict[str, list[str]]:
    """Names by split, determined by name and seed alone; see `folder`.

    Raises:
        ValueError: There are too few names for the splits that have a share; `what` they are, for the message.

    Example:
        >>> deal_out(["a", "b", "c", "d", "e"], seed=0)
        {'train': ['b', 'c', 'e'], 'val': ['a'], 'test': ['d']}
    """
    into = [split for split, share in zip(SPLITS, shares, strict=True) if share > 0]
    if len(names) < len(into):
        listed = " and ".join(filter(None, (", ".join(into[:-1]), into[-1])))
        raise ValueError(f"expected at least {len(into)} {what} to split into {listed}, found {len(names)}")

    def rank(name: str) -> bytes:
        composed = unicodedata.normalize("NFC", name)
        return hashlib.sha256(f"{seed}:{composed}".encode("utf-8", "surrogateescape")).digest()

    ranked = sorted(names, key=rank)
    val, test = (max(1, round(share * len(names))) if share > 0 else 0 for share in shares[1:])
    test = min(test, len(names) - 1 - (val > 0))  # at least one is left for each
    val = min(val, len(names) - 1 - test)
    parts = {"train": ranked[test + val :], "val": ranked[test : test + val], "test": ranked[:test]}
    return {split: sorted(part) for split, part in parts.items()}


def by_classes(classes: Classes, seed: int, shares: Sequence[float]) -> dict[str, Classes]:
    """Deals whole classes out. Errors: `deal_out`."""
    parts = deal_out(list(classes), seed, shares)
    return {split: {name: classes[name] for name in names} for split, names in parts.items()}


def by_images(classes: Classes, seed: int, shares: Sequence[float]) -> dict[str, Classes]:
    """Deals the images of each class out, so that every split has every class. Errors: `deal_out`."""
    splits: dict[str, dict[str, list[SourceFile]]] = {split: {} for split in SPLITS}
    for name, files in classes.items():
        by_path = {file.path: file for file in files}
        parts = deal_out(list(by_path), seed, shares, f"images of class {name!r}")
        for split, paths in parts.items():
            if paths:
                splits[split][name] = [by_path[path] for path in paths]
    return {split: dict(found) for split, found in splits.items()}


def by_lists(classes: Classes, source: Source, place: Path) -> tuple[dict[str, Classes], list[str]]:
    """Splits by lists: of classes in one file, or of images in three.

    Returns:
        The splits, and what no list names: classes, or images.

    Raises:
        ValueError: A list is damaged, names something that is not there, or names it twice.
    """
    if place.is_dir():
        return _by_image_lists(source, place)
    lists = _class_lists(place)
    seen: dict[str, str] = {}
    for split, names in lists.items():
        for name in names:
            if name in seen:
                raise ValueError(f"split_by: expected each class in one split, found {name!r} twice in {place}")
            seen[name] = split
    absent = [repr(name) for name in seen if name not in classes]
    if absent:
        raise ValueError(f"split_by: expected classes of {source.label} in {place}, found {a_few(absent)}")
    splits: dict[str, Classes] = {split: {name: classes[name] for name in sorted(lists[split])} for split in SPLITS}
    return splits, [name for name in classes if name not in seen]


def _class_lists(place: Path) -> dict[str, list[str]]:
    text = _text_of(place)
    if place.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"split_by: expected JSON in {place}, found {error}") from error
    else:
        found = parse_yaml(text, place)
    fits = isinstance(found, dict) and "train" in found and set(found) <= set(SPLITS)
    if not fits or not all(isinstance(names, list) for names in found.values()):
        shown = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"split_by: expected lists of classes under train, val and test in {place}, found {shown}")
    return {split: [str(name) for name in found.get(split, [])] for split in SPLITS}


def _by_image_lists(source: Source, place: Path) -> tuple[dict[str, Classes], list[str]]:
    """Of train.csv, val.csv and test.csv with the columns filename and label, as mini-ImageNet's releases have them."""
    by_path = {file.path: file for file in source.images}
    by_name: dict[str, list[SourceFile]] = {}
    for file in source.images:
        by_name.setdefault(file.parts[-1], []).append(file)
    splits: dict[str, dict[str, list[SourceFile]]] = {split: {} for split in SPLITS}
    used: set[str] = set()
    for split in SPLITS:
        listing = place / f"{split}.csv"
        if not listing.is_file():
            continue
        rows = list(csv.DictReader(io.StringIO(_text_of(listing))))
        if not rows or not {"filename", "label"} <= set(rows[0]):
            found = list(rows[0]) if rows else "no rows"
            raise ValueError(f"split_by: expected columns filename and label in {listing}, found {found}")
        absent = []
        for number, row in enumerate(rows, start=2):
            name = row["filename"]
            if not name or not row["label"]:
                raise ValueError(
                    f"split_by: expected a filename and a label in line {number} of {listing}, found {row}"
                )
            files = [by_path[name]] if name in by_path else by_name.get(name, [])
            if len(files) > 1:
                raise ValueError(f"split_by: expected the path of {name!r}, which several images in "
                                 f"{source.label} are named, found the name alone in {listing}")  # fmt: skip
            if not files:
                absent.append(repr(name))
                continue
            if files[0].path in used:
                raise ValueError(f"split_by: expected each image once, found {name!r} again in {listing}")
            used.add(files[0].path)
            splits[split].setdefault(row["label"], []).append(files[0])
        if absent:
            raise ValueError(f"split_by: expected images of {source.label} in {listing}, found {a_few(absent)}")
    if not splits["train"]:
        raise ValueError(f"split_by: expected train.csv in {place}, found none")
    left = [path for path in by_path if path not in used]
    return {split: dict(sorted(found.items())) for split, found in splits.items()}, left


def _text_of(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_LIST_BYTES:
        raise ValueError(f"split_by: expected at most {MAX_LIST_BYTES} bytes, found {size} in {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"split_by: expected text in UTF-8, found {error} in {path}") from error
