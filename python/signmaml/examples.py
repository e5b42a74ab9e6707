"""New examples as a trained model's inputs: image files, PIL images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.decode import DAMAGED, IMAGE_SIZES, Decoding, decode_file, decode_path, decoding_threads, to_pixels
from .data.sources import Source, SourceFile
from .pixels import Normalization, PixelNormalizer, checked_normalization

# So few images are decoded faster without threads.
_FEW = 16


@dataclass(frozen=True)
class ExampleFormat:
    """The inputs of a model, and how images become them.

    Attributes:
        shape: Shape of one input. ``(C, H, H)`` with C 1 or 3 is that of an image.
        normalize: How pixels are mapped, as in `EpisodeSampler`: ``"zero-one"``, ``"signed"``, ``"raw"`` or a pair
            (mean, std).
        invert: Whether images are inverted (255 minus the pixel) before, as Omniglot's dark ink on white is.

    Raises:
        TypeError, ValueError: An attribute is out of range.

    Example:
        >>> ExampleFormat((1, 28, 28)).inputs(np.full((2, 28, 28), 255, np.uint8)).unique()
        tensor([1.])
    """

    shape: tuple[int, ...]
    normalize: Normalization = "zero-one"
    invert: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, Sequence) else self.shape
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 1 for size in shape):
            raise ValueError(f"shape: expected the sizes of one input, integers >= 1, found {self.shape!r}")
        if not isinstance(self.invert, bool):
            raise TypeError(f"invert: expected True or False, found {self.invert!r}")
        object.__setattr__(self, "shape", shape)
        channels = shape[0] if len(shape) == 3 else 1
        object.__setattr__(self, "normalize", checked_normalization(self.normalize, channels))

    @property
    def decoding(self) -> Decoding | None:
        """How an image becomes pixels; None if the inputs are no images."""
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or self.shape[1] != self.shape[2]:
            return None
        if not IMAGE_SIZES[0] <= self.shape[1] <= IMAGE_SIZES[1]:
            return None
        return Decoding(self.shape[1], self.shape[0], self.invert)

    def __str__(self) -> str:
        if self.decoding is None:
            return f"examples of {_in_words(self.shape)}"
        colour = "grey" if self.shape[0] == 1 else "RGB"
        return f"images as {self.shape[1]} x {self.shape[2]} {colour}{', inverted' * self.invert}"

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        normalize = self.normalize if isinstance(self.normalize, str) else [list(part) for part in self.normalize]  # type: ignore[arg-type]
        return {"shape": list(self.shape), "normalize": normalize, "invert": self.invert}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ExampleFormat:
        """What `to_json` returned.

        Raises:
            ValueError: It is something else.
        """
        try:
            return cls(tuple(stored["shape"]), stored["normalize"], stored["invert"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"example: expected shape, normalize and invert, found {stored!r}") from error

    def inputs(self, examples: Any, name: str = "X") -> Tensor:
        """Examples of any kind as inputs ``[n, *shape]`` on the CPU: float32, or floating-point ones in their dtype.

        Args:
            examples: One of

                - paths of image files (`str` or `Path`), PIL images, or uint8 arrays or tensors of images, each
                  ``[H, W]``, ``[H, W, 1, 3 or 4]`` or ``[1 or 3, H, W]`` and of any size: they are resized, made grey
                  or RGB, inverted and normalised as the training images were;
                - floating-point arrays or tensors ``[n, *shape]``: taken as they are;
                - for inputs that are no images also integers.

                Inputs of one channel may be flattened, ``[n, features]``; those of several may not, because nothing
                says whether the channels came first or last.
            name: The argument's name in messages.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: They are something else.
            ValueError: There are none, they do not fit, or a file is damaged (the message names it).
        """
        values = _array_or_list(examples, name)
        if isinstance(values, list):
            return self._normalized(self._pixels_of_each(values, name))
        if values.dtype == torch.uint8 and self.decoding is not None:
            if values.ndim == 3 and values.shape[2] in (3, 4):
                raise ValueError(
                    f"{name}: expected several images [n, H, W, C], found {list(values.shape)}; one image?"
                )
            return self._normalized(self._pixels_of_each(list(values), name))
        if not values.is_floating_point() and (self.decoding is not None or values.is_complex()):
            raise TypeError(f"{name}: expected pixels as uint8 or floating-point inputs, found {_dtype(values)}")
        values = values if values.is_floating_point() else values.to(torch.float32)
        return self._shaped(_finite(values, name), name)

    def read(self, source: Source, files: Sequence[SourceFile]) -> Tensor:
        """Image files of a source as inputs.

        Raises:
            ValueError: A file is damaged; the message names it. The inputs are no images.
        """
        decoding = self._images("support")
        return self._normalized(_each(lambda file: decode_file(source, file, decoding), files))

    def _images(self, name: str) -> Decoding:
        decoding = self.decoding
        if decoding is None:
            raise ValueError(f"{name}: expected examples of {_in_words(self.shape)}, found images")
        return decoding

    def _pixels_of_each(self, values: Sequence[Any], name: str) -> list[np.ndarray]:
        decoding = self._images(name)

        def pixels(value: Any) -> np.ndarray:
            if isinstance(value, (str, os.PathLike)):
                return decode_path(Path(value), decoding)
            image = value if isinstance(value, Image.Image) else _picture(np.asarray(value), self.shape, name)
            try:
                return to_pixels(image, decoding)
            except (*DAMAGED, Image.DecompressionBombError) as error:
                raise ValueError(f"{name}: cannot decode an image: {error}") from error

        return _each(pixels, values)

    def _normalized(self, pixels: Sequence[np.ndarray]) -> Tensor:
        stacked = torch.from_numpy(np.stack(pixels))
        return PixelNormalizer(self.normalize, self.shape[0], stacked.device)(stacked)  # type: ignore[arg-type]

    def _shaped(self, values: Tensor, name: str) -> Tensor:
        """Floating-point inputs in the model's shape; only what is certainly the same numbers is reshaped."""
        found, wanted = tuple(values.shape[1:]), self.shape
        features = int(np.prod(wanted))
        flat_is_clear = not self._is_colour()
        if found == wanted:
            return values
        flat = flat_is_clear and (found == (features,) or (found == () and features == 1))
        if flat or found == tuple(size for size in wanted if size != 1):
            return values.reshape(-1, *wanted)
        if len(wanted) == 3 and found == (*wanted[1:], wanted[0]):
            return values.movedim(-1, 1)
        or_flat = f" or {features} features" if flat_is_clear else ""
        raise ValueError(f"{name}: expected examples of {_in_words(wanted)}{or_flat}, found {list(found)}")

    def _is_colour(self) -> bool:
        """Whether flattened inputs do not say which axis was the channels'."""
        return len(self.shape) > 2 and self.shape[0] > 1


def as_inputs(examples: Any, example: ExampleFormat | None, name: str = "X") -> Tensor:
    """`ExampleFormat.inputs`, or without a format arrays and tensors as they are.

    Raises:
        TypeError, ValueError: As `ExampleFormat.inputs`; or images are given and no format says what they become.
    """
    if example is not None:
        return example.inputs(examples, name)
    values = _array_or_list(examples, name)
    if isinstance(values, list) or values.dtype == torch.uint8:
        found = type(values[0]).__name__ if isinstance(values, list) else "uint8"
        raise TypeError(
            f"{name}: expected arrays or tensors of the model's inputs, found {found}; a learner of a module takes "
            "images if it has an ExampleFormat: Learner.of(module, example=ExampleFormat((3, 84, 84)), ...)"
        )
    return _finite(values, name)


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, found NaN or Inf")
    return values


def _array_or_list(examples: Any, name: str) -> Tensor | list[Any]:
    """Numbers as one tensor ``[n, ...]`` on the CPU, anything else as a list; at least one example."""
    if hasattr(examples, "to_numpy"):  # pandas, polars
        examples = examples.to_numpy()
    if isinstance(examples, (str, bytes, os.PathLike, Image.Image, Mapping)):
        raise TypeError(f"{name}: expected several examples, such as a list, found one {type(examples).__name__}")
    if isinstance(examples, np.ndarray):
        if examples.ndim == 0:
            raise ValueError(f"{name}: expected examples [n, ...], found a single value")
        if examples.dtype.kind not in "biufc":
            examples = list(examples)
        elif examples.dtype == np.longdouble:
            examples = examples.astype(np.float64)
        elif not examples.dtype.isnative:
            examples = examples.astype(examples.dtype.newbyteorder("="))
    if not isinstance(examples, (Tensor, np.ndarray)):
        try:
            examples = list(examples)
        except TypeError as error:
            raise TypeError(
                f"{name}: expected an array, a tensor or a list, found {type(examples).__name__}"
            ) from error
        examples = _stacked(examples, name)
    values = torch.from_numpy(np.ascontiguousarray(examples)) if isinstance(examples, np.ndarray) else examples
    if isinstance(values, Tensor):
        if values.ndim == 0:
            raise ValueError(f"{name}: expected examples [n, ...], found a single number")
        values = values.detach().cpu()
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one example, found none")
    return values


def _stacked(examples: list[Any], name: str) -> list[Any] | Tensor | np.ndarray:
    """Numbers as one array; files, pictures and arrays of pixels of several sizes stay a list."""
    picture = (str, os.PathLike, Image.Image)
    if not examples or isinstance(examples[0], picture):
        for number, value in enumerate(examples):
            if not isinstance(value, picture):
                raise TypeError(f"{name}: expected files or images, found {type(value).__name__} at {number}")
        return examples
    bytes_too = [isinstance(value, (Tensor, np.ndarray)) and str(value.dtype).endswith("uint8") for value in examples]
    if all(bytes_too):
        return [value.cpu() if isinstance(value, Tensor) else value for value in examples]
    if any(bytes_too):
        raise TypeError(f"{name}: expected examples of one kind, found uint8 beside others")
    try:
        if isinstance(examples[0], Tensor):
            return torch.stack(examples)
        array = np.asarray(examples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected examples of one kind and shape, found others: {error}") from error
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name}: expected numbers, images or paths of files, found {type(examples[0]).__name__}")
    return array


def _picture(pixels: np.ndarray, shape: tuple[int, ...], name: str) -> Image.Image:
    """A uint8 array as an image; channels may come first or last."""
    found = pixels.shape
    if pixels.ndim == 1 and shape[0] == 1 and pixels.size == int(np.prod(shape)):  # flattened
        pixels = pixels.reshape(shape)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and (pixels.shape == shape or pixels.shape[2] not in (1, 3, 4)):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(
            f"{name}: expected images [H, W], [H, W, C] or [C, H, W] of uint8, found {pixels.dtype} {list(found)}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _each(function: Any, values: Sequence[Any]) -> list[np.ndarray]:
    if len(values) <= _FEW:
        return [function(value) for value in values]
    with decoding_threads() as pool:
        return list(pool.map(function, values))


def _in_words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "one number"


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
