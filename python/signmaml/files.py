"""Atomic file writes, and a folder lock that one process holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that a crash at any moment leaves either the previous or the new file, complete.

    Writes a temporary file in the same folder, forces it to disk, renames it to `path` and forces the folder to disk.

    Args:
        path: File to write; its folder must exist.
        content: Bytes, or text that is stored as UTF-8.

    Raises:
        OSError: Writing failed (no space, no permission, ...); the previous file is untouched and no temporary file
            is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of killed writers; call it only while holding the folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the system releases the lock however the process ends.

    Raises:
        BlockingIOError: Another process holds the lock; the message names it.
    """
    import fcntl

    with open(folder / LOCK_NAME, "a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise BlockingIOError(
                f"run folder: expected one that no other process trains in, found {folder} in use by process {holder}"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def first_free(wanted: Path) -> Path:
    """Creates and returns the first of `wanted`, `wanted-2`, `wanted-3`, ... that does not exist yet."""
    number = 1
    while True:
        candidate = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return candidate
