"""How pixels become the numbers that a network takes: normalisation, alike for training and for new images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data.arguments import check_choice

Normalization = str | tuple[float | Sequence[float], float | Sequence[float]]

NORMALIZATIONS = ("zero-one", "signed", "raw")

# As `checked_normalization` returns it.
_Checked = str | tuple[tuple[float, ...], tuple[float, ...]]


class PixelNormalizer:
    """Maps uint8 pixels ``[..., C, H, W]`` to float32; see `EpisodeSampler` for the ways.

    The divisor is a tensor on the device because torch on CUDA divides by a Python number by multiplying with its
    reciprocal, which differs from the CPU's result in the last bit.

    Args:
        normalize: A result of `checked_normalization`.
        channels: C.
        device: Where the pixels are.
    """

    def __init__(self, normalize: _Checked, channels: int, device: torch.device) -> None:
        self._shift, self._scale = _shift_and_scale(normalize, channels, device)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32)
        if self._shift is not None:
            x.sub_(self._shift)
        if self._scale is not None:
            x.div_(self._scale)
        return x


def checked_normalization(value: Any, channels: int) -> _Checked:
    """The name, or mean and standard deviation with one number per channel each.

    Raises:
        TypeError, ValueError: It is neither a name nor such a pair, or numbers are out of range.
    """
    if isinstance(value, str):
        return check_choice("normalize", value, NORMALIZATIONS)
    expected = f"normalize: expected one of {', '.join(NORMALIZATIONS)} or a pair (mean, std)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{expected}, found {value!r}")
    parts = []
    for name, part in zip(("mean", "std"), value, strict=True):
        try:
            numbers = [float(v) for v in part] if isinstance(part, Sequence) else [float(part)] * channels
        except (TypeError, ValueError) as error:
            raise TypeError(f"normalize: expected {name} as numbers, found {part!r}") from error
        if len(numbers) != channels or not all(math.isfinite(v) for v in numbers):
            raise ValueError(f"normalize: expected {name} as {channels} finite numbers (channels), found {part!r}")
        parts.append(tuple(numbers))
    if min(parts[1]) <= 0:
        raise ValueError(f"normalize: expected std above 0, found {value[1]!r}")
    shift, scale = _shift_and_scale((parts[0], parts[1]), channels, torch.device("cpu"))
    assert shift is not None and scale is not None
    extremes = (torch.tensor([[[0.0, 255.0]]], device="cpu") - shift) / scale
    if not bool(extremes.isfinite().all()):
        raise ValueError(
            f"normalize: expected mean and std by which black and white stay finite in float32, found {value!r}"
        )
    return parts[0], parts[1]


def _shift_and_scale(
    normalize: _Checked, channels: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``[C, 1, 1]`` tensors s, d such that the normalised pixel is (x - s) / d; None if the operation is not needed."""

    def per_channel(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor([255.0 * value for value in values], dtype=torch.float32, device=device).view(-1, 1, 1)

    if normalize == "raw":
        return None, None
    if normalize == "zero-one":
        return None, per_channel([1.0] * channels)
    if isinstance(normalize, str):
        return per_channel([0.5] * channels), per_channel([0.5] * channels)
    mean, std = normalize
    return per_channel(mean), per_channel(std)
