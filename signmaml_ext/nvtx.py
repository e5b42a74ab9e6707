"""Names for profilers: a native CUDA call runs inside an NVTX range named by the operation's stem."""

from __future__ import annotations

from types import TracebackType

import torch


class Range:
    """Pushes an NVTX range on entry and pops it on exit, on CUDA only; without a profiler that costs next to nothing.

    Args:
        name: The operation's stem, such as "sign_step".
        device: Where the operation runs.
    """

    __slots__ = ("name", "on")

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.on = device.type == "cuda"

    def __enter__(self) -> None:
        if self.on:
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on:
            torch.cuda.nvtx.range_pop()
