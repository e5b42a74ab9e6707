"""Decoded image sets on disk: written atomically, verified when read, rebuilt when damaged.

A cached set is one safetensors file (no pickle) in `cache_dir()`. Its name contains a hash of the key and its header
the key: what was decoded (a fingerprint of the source) and how (the options). The header also has the SHA-256 of the
content.

If two processes build the same set at once, each writes its own temporary file and renames it into place. The later one
wins, with equal content. No process ever reads a half-written file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .image_set import ImageSet

FORMAT = "signmaml image set 2"
_TEMPORARY = ".tmp"


def cache_dir() -> Path:
    """Where decoded sets and downloads are kept.

    ``$SIGNMAML_CACHE`` if set, else ``$XDG_CACHE_HOME/signmaml``, else ``~/.cache/signmaml``. The folder may not exist
    yet; it is created when something is written.
    """
    chosen = os.environ.get("SIGNMAML_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says to ignore relative paths.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "signmaml"


def cached(key: Mapping[str, Any], build: Callable[[], ImageSet]) -> ImageSet:
    """The set cached under `key`, or the result of `build`, which is then cached.

    Args:
        key: Everything that determines the content, JSON types only; includes "name" and "split".
        build: Builds the set.

    Returns:
        The set. A damaged cache file or a folder that cannot be written causes a `UserWarning`, never an error.
    """
    path = cache_path(key)
    stored = _read(path, key)
    if stored is not None:
        return stored
    built = build()
    _write(path, key, built)
    return built


def cache_path(key: Mapping[str, Any]) -> Path:
    """The file for the set with this key, whether it exists or not."""
    digest = hashlib.sha256(_canonical(key).encode()).hexdigest()
    return cache_dir() / f"{key['name']}-{key['split']}-{digest[:16]}.safetensors"


def content_digest(image_set: ImageSet) -> str:
    """SHA-256 over pixels, class sizes and class names, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in (image_set.images, image_set.class_sizes):
        digest.update(str(list(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    digest.update(json.dumps(image_set.class_names).encode())
    return digest.hexdigest()


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **key}, sort_keys=True, ensure_ascii=True)


def _read(path: Path, key: Mapping[str, Any]) -> ImageSet | None:
    """The set in `path`; None if there is no file, or, with a warning, if it cannot be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("key") != _canonical(key):
                raise ValueError("it was made for something else")
            image_set = ImageSet(
                name=str(key["name"]),
                split=str(key["split"]),
                images=file.get_tensor("images"),
                class_names=tuple(json.loads(header["class_names"])),
                class_sizes=file.get_tensor("class_sizes"),
                inverted=bool(json.loads(header["inverted"])),
            )
        if content_digest(image_set) != header["sha256"]:
            raise ValueError("its checksum is wrong")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        warnings.warn(f"cache file {path} cannot be used ({error}); building it again", stacklevel=2)
        return None
    return image_set


def _write(path: Path, key: Mapping[str, Any], image_set: ImageSet) -> None:
    header = {
        "key": _canonical(key),
        "class_names": json.dumps(image_set.class_names),
        "inverted": json.dumps(image_set.inverted),
        "sha256": content_digest(image_set),
    }
    tensors = {"images": image_set.images.contiguous(), "class_sizes": image_set.class_sizes}
    try:
        _write_atomically(path, tensors, header)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{image_set.name}/{image_set.split} is not cached: {error}", stacklevel=2)


def _write_atomically(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=header)
        temporary.chmod(usual_mode)  # safetensors' own mode would lock out other users of the cache
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files of killed writers; one younger than a day may still be in use."""
    yesterday = time.time() - 24 * 3600
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):  # another process may remove it first
            if leftover.stat().st_mtime < yesterday:
                leftover.unlink()


def _flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
