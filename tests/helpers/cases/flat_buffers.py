"""Flat buffers `[T, P]`: difficult values, odd alignments, and the native operators as plain torch expressions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
SIZES = (0, 1, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025, 1026, 1027)
TASKS = (1, 2, 3, 7)


def device_or_skip(name: str) -> torch.device:
    """The device; skips the test with the reason if there is none."""
    if name == "cuda":
        from signmaml_ext._loader import C

        if not C.built_with_cuda:
            pytest.skip("signmaml_ext was built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
    return torch.device(name)


def gradients(tasks: int, parameters: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Numbers of every kind except NaN and infinities; a third are zeros of both signs and subnormals."""
    grads = torch.randn(tasks, parameters, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([0.0, -0.0, tiny, -tiny], dtype=dtype)
    where = torch.rand(tasks, parameters) < 1 / 3
    grads[where] = special[torch.randint(0, 4, (int(where.sum()),))]
    return grads.to(device)


def shifted(value: Tensor, elements: int) -> Tensor:
    """A contiguous copy that starts `elements` elements after a 64-byte boundary."""
    room = 64 // value.element_size()
    memory = value.new_empty(value.numel() + elements + room)
    start = (-memory.data_ptr() % 64) // value.element_size() + elements
    copy = memory[start : start + value.numel()].view(value.shape)
    return copy.copy_(value)


def flags(tasks: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.zeros(tasks, dtype=torch.bool, device=device)


def sign(x: Tensor) -> Tensor:
    """Three-valued, and NaN for NaN."""
    return torch.where(x.isnan(), x, (x > 0).to(x.dtype) - (x < 0).to(x.dtype))


def by_column(table: Tensor, parameters: int, segment_offsets: Tensor | None) -> Tensor:
    """`[1]`, `[P]` or `[G]` spread over the columns."""
    if segment_offsets is not None and table.numel() == segment_offsets.numel() - 1:
        return table.repeat_interleave(segment_offsets.diff())
    return table.expand(parameters)


def expected_step(
    params: Tensor, grads: Tensor, lr: Tensor, segment_offsets: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The params after `sign_step_`, and the flags that it sets."""
    parameters = params.shape[1]
    stepped = params - by_column(lr, parameters, segment_offsets) * sign(grads)
    broken = ~grads.isfinite()
    if mask is None:
        return stepped, broken.any(1)
    looked_at = by_column(mask, parameters, segment_offsets)
    return torch.where(looked_at, stepped, params), (broken & looked_at).any(1)


def expected_accumulation(out: Tensor, grads: Tensor, nonfinite: Tensor, skip: bool) -> tuple[Tensor, Tensor]:
    """out and the flags after `meta_accumulate_`, adding tasks in order."""
    raised = nonfinite | ~grads.isfinite().all(1)
    live = [row for row, bad in zip(grads, raised.tolist(), strict=True) if not (skip and bad)]
    if not live:
        return out.clone(), raised
    total = torch.zeros_like(out)
    for row in live:
        total = total + row
    return out + total / len(live), raised


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal bit by bit, signs of zeros included; any NaN equals any other."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if found.is_floating_point():
        number = ~expected.isnan()
        assert torch.equal(found.signbit() & number, expected.signbit() & number), "the sign of a zero differs"
