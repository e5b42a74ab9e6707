"""Records which torch operators code calls: this shows waits for the device without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Records every operator called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        by_mask = name == "aten::index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.called.append(name + (" by a mask" if by_mask else ""))
        return func(*args, **(kwargs or {}))


# The shape of their result, or the Python number they return, depends on data: on a GPU the host would wait for it.
WAITING = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::index by a mask", "aten::repeat_interleave"),
}
# `torch.tensor` of Python numbers: on a GPU a copy from the host, which no CUDA graph can hold.
FROM_HOST = {"aten::lift_fresh"}
