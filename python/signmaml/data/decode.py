"""Decodes image files into an `ImageSet`: once, with Pillow in several threads, to uint8 of one size."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .arguments import a_few
from .image_set import ImageSet
from .progress import track
from .sources import FORMATS, MAX_FILE_BYTES, Source, SourceFile

IMAGE_SIZES = (8, 1024)  # least and greatest height and width that images may be resized to
# Errors of Pillow, zipfile and zlib on damaged files; Pillow's PNG reader raises SyntaxError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

_COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})


@dataclass(frozen=True)
class Decoding:
    """How an image becomes pixels.

    Attributes:
        image_size: Height and width; other sizes are resized to it (Lanczos, with antialiasing; the aspect ratio
            is not kept).
        channels: 1: grey (ITU-R 601 luma); 3: RGB.
        invert: 255 minus the pixel, after resizing.

    Transparent images are composited on white; EXIF rotation is applied; 16-bit grey keeps its high byte;
    floating-point grey is from 0, black, to 1.
    """

    image_size: int
    channels: int
    invert: bool = False

    def key(self) -> dict[str, Any]:
        """Its part of the cache's key."""
        return {"decoding": 1, **asdict(self)}


def decode(
    source: Source,
    classes: Mapping[str, Sequence[SourceFile]],
    decoding: Decoding,
    *,
    name: str,
    split: str,
    progress: bool,
    skip_damaged: bool = False,
    min_images: int = 1,
) -> ImageSet:
    """Decodes the files of each class.

    Args:
        source: Where the files are.
        classes: Class name -> its files, none empty.
        decoding: Size and channels.
        name: The set's name.
        split: The split's name.
        progress: Whether to show progress on stderr.
        skip_damaged: Whether files that cannot be decoded are left out.
        min_images: Classes that then have fewer images are left out.

    Raises:
        ValueError: A file cannot be decoded; the message names it. With `skip_damaged`: no class has enough images.
    """
    sizes = [len(files) for files in classes.values()]
    side = decoding.image_size
    images = torch.empty(sum(sizes), decoding.channels, side, side, dtype=torch.uint8, device="cpu")
    pixels = images.numpy()
    good = np.ones(len(pixels), dtype=bool)

    def decode_class(first: int, files: Sequence[SourceFile]) -> None:
        for row, file in enumerate(files, start=first):
            try:
                pixels[row] = decode_file(source, file, decoding)
            except ValueError as error:
                if not skip_damaged or _could_not_be_read(error):
                    raise
                good[row] = False

    starts = [0, *accumulate(sizes)][:-1]
    with decoding_threads() as pool:
        try:
            done = pool.map(decode_class, starts, classes.values())
            for _ in track(done, total=len(sizes), what=f"{name}/{split}: decoding", unit="classes", show=progress):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # report the error without decoding the rest
            raise
    names = list(classes)
    if not good.all():
        counts = [int(good[first : first + size].sum()) for first, size in zip(starts, sizes, strict=True)]
        for first, size, count in zip(starts, sizes, counts, strict=True):
            if count < min_images:
                good[first : first + size] = False
        kept = [(name, count) for name, count in zip(names, counts, strict=True) if count >= min_images]
        if not kept:
            raise ValueError(
                f"{source.label}: expected a class with at least {min_images} images of {split!r} that can be decoded, "
                "found none"
            )
        names, sizes = [name for name, _ in kept], [count for _, count in kept]
        images = images[torch.from_numpy(good)]
    counts_of_classes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    return ImageSet(name, split, images, tuple(names), counts_of_classes, decoding.invert)


def decode_file(source: Source, file: SourceFile, decoding: Decoding) -> np.ndarray:
    """One image, ``[C, H, W]`` uint8.

    Raises:
        ValueError: The file cannot be decoded; the message names it.
    """
    try:
        with source.open_image(file) as image:
            return to_pixels(image, decoding)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"{source.label}: cannot decode {file.path!r}: {error}") from error


def decode_path(path: Path, decoding: Decoding) -> np.ndarray:
    """One image file, ``[C, H, W]`` uint8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be decoded; the message names it.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"image: expected a file, found {'a folder' if path.is_dir() else 'nothing'} at {path}")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"image: expected at most {MAX_FILE_BYTES} bytes, found {size} in {path}")
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            return to_pixels(image, decoding)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"image: cannot decode {path}: {error}") from error


def to_pixels(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """An opened image as ``[C, H, W]`` uint8.

    Raises:
        ValueError: The image has more pixels than Pillow's ``MAX_IMAGE_PIXELS`` (Pillow itself only warns), 32-bit
            integers, or floating-point pixels outside 0..1.
        OSError: The file is damaged.
    """
    _check_pixels(image)
    image = _upright_and_opaque(image)
    if image.mode.startswith("I"):
        image = _high_byte(image)
    elif image.mode == "F":
        image = _of_shares(image)
    image = image.convert("L" if decoding.channels == 1 else "RGB")
    side = decoding.image_size
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    pixels = pixels[None] if decoding.channels == 1 else pixels.transpose(2, 0, 1)
    return 255 - pixels if decoding.invert else pixels


@dataclass(frozen=True)
class Shapes:
    """Sizes and colour of many images, from their headers.

    Attributes:
        sizes: (width, height) -> number of images.
        colour: Whether any image has colour channels.
    """

    sizes: Counter[tuple[int, int]]
    colour: bool


def probe(
    source: Source, files: Sequence[SourceFile], *, what: str, progress: bool, skip_damaged: bool = False
) -> Shapes:
    """Reads the headers of images.

    Raises:
        ValueError: A file is not an image; the message names it. With `skip_damaged`: none is.
    """

    def header(file: SourceFile) -> tuple[tuple[int, int], str] | None:
        try:
            return _header(source, file)
        except ValueError as error:
            if not skip_damaged or _could_not_be_read(error):
                raise
            return None

    sizes: Counter[tuple[int, int]] = Counter()
    colour = False
    with decoding_threads() as pool:
        try:
            headers = pool.map(header, files)
            for found in track(headers, total=len(files), what=what, unit="images", show=progress):
                if found is not None:
                    sizes[found[0]] += 1
                    colour = colour or found[1] in _COLOUR_MODES
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not sizes:
        raise ValueError(f"{source.label}: expected an image that can be decoded, found none")
    return Shapes(sizes, colour)


def common_size(shapes: Shapes, what: str) -> int:
    """The side length of the images, which must all be squares of one size.

    Raises:
        ValueError: Images differ in size, or are not square.
    """
    found = [f"{width}x{height} ({count} images)" for (width, height), count in shapes.sizes.most_common()]
    (width, height), _ = shapes.sizes.most_common(1)[0]
    if len(found) > 1 or width != height or not IMAGE_SIZES[0] <= width <= IMAGE_SIZES[1]:
        raise ValueError(
            f"image_size: expected images of one square size in {IMAGE_SIZES[0]}..{IMAGE_SIZES[1]} in {what}, "
            f"found {a_few(found)}; give image_size to resize all images to"
        )
    return width


def _header(source: Source, file: SourceFile) -> tuple[tuple[int, int], str]:
    try:
        with source.open_image(file) as image:
            _check_pixels(image)
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            return (image.size[::-1] if turned else image.size), image.mode
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"{source.label}: cannot decode {file.path!r}: {error}") from error


def _could_not_be_read(error: ValueError) -> bool:
    """Whether the system refused to read the file, which says nothing about its content."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None


def _check_pixels(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than Pillow's limit of {limit}")


def _upright_and_opaque(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("expected 8 or 16 bits a channel, found 32-bit pixels")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _of_shares(image: Image.Image) -> Image.Image:
    """Floating-point grey from 0 to 1 as 8-bit grey."""
    values = np.asarray(image)
    least, greatest = float(values.min()), float(values.max())  # NaN if any is
    if not (least >= 0 and greatest <= 1):
        raise ValueError(f"expected floating-point pixels in 0..1, found {least:g} to {greatest:g}")
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def decoding_threads() -> ThreadPoolExecutor:
    """Threads that decode images."""
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="signmaml-decode")
