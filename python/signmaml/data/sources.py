"""Sources of images: a folder tree or a zip archive, listed and read without unpacking anything to disk.

A source lists its image files by path, with '/' on every system, and opens them one by one from any thread. Hidden
files and folders, and the `__MACOSX` folders of archives, are ignored. Other files that are not images are listed
separately, so that callers can report what was left out.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

# Formats that Pillow may open, and their suffixes; all others are rejected.
SUFFIXES = {
    "PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "BMP": (".bmp", ".dib"), "GIF": (".gif",),
    "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"), "PCX": (".pcx",),
}  # fmt: skip
FORMATS = tuple(SUFFIXES)
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
MAX_FILE_BYTES = 64 * 2**20  # per image; an uncompressed 4600 x 4600 bitmap
MAX_INNER_ARCHIVE_BYTES = 512 * 2**20
# Images hardly compress, and bilevel bitmaps by about 100 times. An archive beyond this is a zip bomb.
MAX_EXPANSION = 200
SMALL_ARCHIVE_BYTES = 2**30  # an archive that expands to less is harmless at any ratio


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: Path below the root, with '/'.
        size: Bytes, uncompressed.
        stamp: Changes when the content does: modification time in ns, or the CRC-32 in an archive.
    """

    path: str
    size: int
    stamp: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The path's components."""
        return PurePosixPath(self.path).parts


class Source:
    """A listed place to read images from; use as a context manager.

    Attributes:
        label: Its name in messages.
        images: Image files, by path.
        others: The files that are not images, by path.
        empty_folders: Folders without files or folders, hidden ones aside, by path.
    """

    label: str
    images: tuple[SourceFile, ...]
    others: tuple[SourceFile, ...]
    empty_folders: tuple[str, ...] = ()

    def read(self, file: SourceFile) -> bytes:
        """The content of a file."""
        raise NotImplementedError

    def open_image(self, file: SourceFile) -> Image.Image:
        """The image, opened but not decoded.

        Raises:
            OSError: It is not an image that Pillow reads, or cannot be read.
        """
        return Image.open(io.BytesIO(self.read(file)), formats=FORMATS)

    def identity(self) -> str:
        """Distinguishes this source from others with equal paths, sizes and stamps."""
        return self.label

    def close(self) -> None:
        """Closes open files."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(root: str | os.PathLike[str], *, inner_archives: Collection[str] = (), name: str = "root") -> Source:
    """Lists a folder or a zip archive.

    Args:
        root: The folder or the ``.zip`` file.
        inner_archives: File names of zip archives inside that count as folders (Omniglot's release has two).
        name: What messages call the root: the argument or option by which the caller was given it.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is neither a folder nor a zip archive, or an archive that is rejected (see `ZipSource`).
    """
    path = Path(root).expanduser()
    source: Source
    if path.is_dir():
        source = FolderSource(path)
    elif not path.exists():
        raise FileNotFoundError(f"{name}: expected a folder or a .zip archive, found nothing at {path}")
    else:
        source = ZipSource(path, str(path), name)
    inner = [file for file in source.others if file.parts[-1] in inner_archives]
    if not inner:
        return source
    return _NestedSource(source, {file.path: _open_inner(source, file) for file in inner})


def fingerprint(source: Source, files: Iterable[SourceFile]) -> str:
    """SHA-256 over the source's identity and the paths, sizes and stamps of files, as hexadecimal digits."""
    digest = hashlib.sha256(source.identity().encode("utf-8", "surrogateescape"))
    for file in files:
        digest.update(f"\0{file.path}\0{file.size}\0{file.stamp}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def by_folder(files: Iterable[SourceFile]) -> dict[str, list[SourceFile]]:
    """Files grouped by the path of the folder that holds them ('' for the root), both in order."""
    folders: dict[str, list[SourceFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        folders.setdefault(file.path.rpartition("/")[0], []).append(file)
    return dict(sorted(folders.items()))


class FolderSource(Source):
    """A folder and all folders below it; links are followed unless they lead to an enclosing folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.label = str(root)
        empty: list[str] = []
        files = list(self._walk(self.root, "", frozenset(), empty))
        self.images, self.others = _sorted_by_kind(files)
        self.empty_folders = tuple(sorted(empty))

    def read(self, file: SourceFile) -> bytes:
        _check_size(file)
        return (self.root / file.path).read_bytes()

    def identity(self) -> str:
        return str(self.root)

    def _walk(
        self, folder: Path, prefix: str, above: frozenset[tuple[int, int]], empty: list[str]
    ) -> Iterator[SourceFile]:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to an enclosing folder would recurse forever
            return
        nothing = True
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    nothing = False
                    yield from self._walk(Path(entry.path), path + "/", above | {here}, empty)
                elif entry.is_file():
                    nothing = False
                    found = entry.stat()
                    yield SourceFile(path, found.st_size, found.st_mtime_ns)
        if nothing and prefix:
            empty.append(prefix.rstrip("/"))


# Errors of reading an archive member: damage, or a compression method that Python does not support.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class ZipSource(Source):
    """A zip archive, read in place; `name` as in `open_source`.

    Raises:
        ValueError: It is not a zip archive; a member's path is absolute or contains '..'; the members together
            expand to more than 1 GiB and to more than 200 times the archive's size; a member is encrypted.
    """

    def __init__(self, file: Path | io.BytesIO, label: str, name: str = "root") -> None:
        self.label = label
        self._name = name
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{name}: expected a folder or a .zip archive, found {label}: {error}") from error
        members = [member for member in self._archive.infolist() if not member.is_dir()]
        packed = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else file.stat().st_size
        try:
            _check_members(members, packed, label)
        except ValueError:
            self._archive.close()
            raise
        members = [member for member in members if not any(map(_is_hidden, PurePosixPath(member.filename).parts))]
        self._members = {_clean(member.filename): member for member in members}
        files = [SourceFile(path, member.file_size, member.CRC) for path, member in self._members.items()]
        self.images, self.others = _sorted_by_kind(files)

    def read(self, file: SourceFile) -> bytes:
        _check_size(file)
        # zipfile stops at the size given in the directory, so a member cannot expand beyond the checked size.
        try:
            return self._archive.read(self._members[file.path])
        except UNREADABLE as error:
            raise ValueError(
                f"{self._name}: expected a .zip archive that can be read, found {file.path}: {error}"
            ) from error

    def identity(self) -> str:
        return ""  # the CRCs identify the content, wherever the archive is

    def close(self) -> None:
        self._archive.close()


class _NestedSource(Source):
    """A source whose inner archives count as folders named like the archives."""

    def __init__(self, outer: Source, inner: Mapping[str, Source]) -> None:
        self.label = outer.label
        self._outer = outer
        self._inner = dict(inner)
        self._origin: dict[str, tuple[Source, SourceFile]] = {}
        images = list(outer.images)
        others = [file for file in outer.others if file.path not in inner]
        for prefix, source in inner.items():
            for kind, collected in ((source.images, images), (source.others, others)):
                for file in kind:
                    moved = SourceFile(f"{prefix}/{file.path}", file.size, file.stamp)
                    self._origin[moved.path] = (source, file)
                    collected.append(moved)
        self.images = tuple(sorted(images, key=lambda file: file.path))
        self.others = tuple(sorted(others, key=lambda file: file.path))
        self.empty_folders = outer.empty_folders

    def read(self, file: SourceFile) -> bytes:
        source, original = self._origin.get(file.path, (self._outer, file))
        return source.read(original)

    def identity(self) -> str:
        return self._outer.identity()

    def close(self) -> None:
        for source in self._inner.values():
            source.close()
        self._outer.close()


def _open_inner(source: Source, file: SourceFile) -> ZipSource:
    if isinstance(source, FolderSource):
        path = source.root / file.path
        return ZipSource(path, str(path))
    return ZipSource(io.BytesIO(source.read(file)), f"{source.label}/{file.path}")


def _check_members(members: Sequence[zipfile.ZipInfo], packed: int, label: str) -> None:
    for member in members:
        name = member.filename
        climbs = ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts
        if climbs or name.startswith("/") or PureWindowsPath(name).drive or PureWindowsPath(name).root:
            raise ValueError(f"{label}: refused, it holds a path outside the archive: {name!r}")
        if member.flag_bits & 1:
            raise ValueError(f"{label}: refused, {name!r} is encrypted")
    expanded = sum(member.file_size for member in members)
    if expanded > SMALL_ARCHIVE_BYTES and expanded > MAX_EXPANSION * packed:
        raise ValueError(
            f"{label}: refused, {packed} bytes expand to {expanded}, more than {MAX_EXPANSION} times as much"
        )


def _check_size(file: SourceFile) -> None:
    limit = MAX_FILE_BYTES if _is_image(file.path) else MAX_INNER_ARCHIVE_BYTES
    if file.size > limit:
        raise ValueError(f"{file.path} has {file.size} bytes, more than the {limit} allowed")


def _clean(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _sorted_by_kind(files: Iterable[SourceFile]) -> tuple[tuple[SourceFile, ...], tuple[SourceFile, ...]]:
    """Images and other files, each sorted by path."""
    ordered = sorted(files, key=lambda file: file.path)
    images = tuple(file for file in ordered if _is_image(file.path))
    return images, tuple(file for file in ordered if not _is_image(file.path))
