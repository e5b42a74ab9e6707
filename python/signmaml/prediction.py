"""`signmaml predict`: classes of new images, from a few examples of each."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.arguments import a_few
from .data.folder import class_folders
from .data.sources import IMAGE_SUFFIXES, Source, open_source
from .estimators import FewShotClassifier
from .examples import ExampleFormat


@dataclass(frozen=True)
class Support:
    """A support set that was read.

    Attributes:
        inputs: `[S, C, H, W]`.
        labels: The class of each, by name.
        files: The files that hold them; empty for an archive.
    """

    inputs: Tensor
    labels: list[str]
    files: frozenset[Path]


@dataclass(frozen=True)
class Queries:
    """Images to classify.

    Attributes:
        inputs: `[n, C, H, W]`.
        names: Their names in reports.
        files: The files that hold them.
        folders: The folder of each below the one that was named; "" if a file was named.
    """

    inputs: Tensor
    names: list[str]
    files: list[Path]
    folders: list[str]


@dataclass(frozen=True)
class Predictions:
    """Classified images; `str()` is a table.

    Attributes:
        classes: The classes.
        names: The images' names `[n]`.
        probabilities: `[n, classes]`.
        truth: The class of each image whose folder is named like one, else None.
        how: How they were classified, in words by name.
    """

    classes: list[str]
    names: list[str]
    probabilities: np.ndarray
    truth: list[str | None]
    how: Mapping[str, Any]

    @property
    def predicted(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(1)]

    def right(self) -> tuple[int, int]:
        """How many images are classified as their folder says, and how many folders say a class."""
        pairs = [(p, t) for p, t in zip(self.predicted, self.truth, strict=True) if t is not None]
        return sum(p == t for p, t in pairs), len(pairs)

    def __str__(self) -> str:
        width = max(20, shutil.get_terminal_size().columns - 2)
        column = min(max(5, *map(len, self.classes)), width // 3)
        left = min(max(4, *map(len, self.names)), width - column - 15)
        lines = [f"{'file':<{left}}  {'class':<{column}}  probability"]
        for name, predicted, row in zip(self.names, self.predicted, self.probabilities, strict=True):
            lines.append(f"{_end_of(name, left):<{left}}  {_end_of(predicted, column):<{column}}  {row.max():>11.3f}")
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        """What was done, in lines."""
        lines = [f"{len(self.names)} images, {len(self.classes)} classes; {'; '.join(map(str, self.how.values()))}"]
        right, known = self.right()
        if known:
            share = f"{100 * right / known:.1f}%"
            lines.append(f"{right} of {known} ({share}) agree with the name of their folder")
        return lines

    def to_csv(self) -> str:
        """One row an image: file, class, probability, the folder's class if any is known, and every probability."""
        known = any(truth is not None for truth in self.truth)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        of_folder = ["folder's class"] if known else []
        writer.writerow(["file", "class", "probability", *of_folder, *(f"p({name})" for name in self.classes)])
        for name, predicted, truth, row in zip(self.names, self.predicted, self.truth, self.probabilities, strict=True):
            values = [f"{value:.6g}" for value in row]
            writer.writerow([name, predicted, f"{row.max():.6g}", *([truth or ""] if known else []), *values])
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        images = []
        for name, predicted, truth, row in zip(self.names, self.predicted, self.truth, self.probabilities, strict=True):
            of_image: dict[str, Any] = {"file": name, "class": predicted, "probability": float(row.max())}
            if truth is not None:
                of_image["folder"] = truth
            of_image["probabilities"] = dict(zip(self.classes, map(float, row), strict=True))
            images.append(of_image)
        return {"classes": self.classes, **self.how, "images": images}


def read_support(root: str | os.PathLike[str], example: ExampleFormat) -> Support:
    """Reads a support set: a folder, or a .zip, with one folder of images for each class.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: There are fewer than two classes, or an image is damaged (the message names it).
    """
    with open_source(root, name="--support") as source:
        classes = class_folders(source)
        if len(classes) < 2:
            raise ValueError(
                f"--support: expected folders of images for at least 2 classes in {source.label}, found "
                f"{a_few(list(classes))} alone"
            )
        files = [file for of_class in classes.values() for file in of_class]
        inputs = example.read(source, files)
        labels = [name for name, of_class in classes.items() for _ in of_class]
        return Support(inputs, labels, frozenset(_on_disk(source, root)))


def read_queries(places: Sequence[str], example: ExampleFormat) -> Queries:
    """Reads the images in folders and archives, at any depth, and single files.

    Raises:
        FileNotFoundError: Nothing is at a place.
        ValueError: A place has no image, or an image is damaged (the message names it).
    """
    inputs, names, files, folders = [], [], [], []
    for place in places:
        path = Path(place).expanduser()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            inputs.append(example.inputs([path], "--query"))
            names.append(str(place))
            files.append(path.resolve())
            folders.append("")
            continue
        if path.is_file() and path.suffix.lower() != ".zip":
            raise ValueError(f"--query: expected an image, a folder or a .zip, found {place}")
        with open_source(path, name="--query") as source:
            if not source.images:
                raise ValueError(f"--query: expected images in {source.label}, found none")
            inputs.append(example.read(source, source.images))
            names += [os.path.join(place, file.path) for file in source.images]
            files += _on_disk(source, path) or [path.resolve()] * len(source.images)
            folders += [file.path.rpartition("/")[0] for file in source.images]
    return Queries(torch.cat(inputs), names, files, folders)


def predictions(classifier: FewShotClassifier, queries: Queries, how: Mapping[str, Any]) -> Predictions:
    """Classifies images with a fitted classifier."""
    classes = [str(name) for name in classifier.classes_]
    truth = [_class_of(folder, classes) for folder in queries.folders]
    return Predictions(classes, queries.names, classifier.predict_proba(queries.inputs), truth, how)


def with_inversion(example: ExampleFormat, invert: bool | None) -> ExampleFormat:
    """The format with inversion as asked; None: as it is."""
    return example if invert is None else dataclasses.replace(example, invert=invert)


def json_of(found: Predictions) -> str:
    return json.dumps(found.to_dict(), indent=2) + "\n"


def _class_of(folder: str, classes: Sequence[str]) -> str | None:
    """The class that a folder below a query folder is named like."""
    fits = [name for name in classes if folder == name or folder.endswith(f"/{name}")]
    return max(fits, key=len) if fits else None


def _on_disk(source: Source, root: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder's images; none for an archive."""
    base = Path(root).expanduser()
    return [(base / file.path).resolve() for file in source.images] if base.is_dir() else []


def _end_of(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[-(width - 3) :]
