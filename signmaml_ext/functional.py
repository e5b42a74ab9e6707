"""A module's forward with other tensors in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """`model(x)` with the given parameters and buffers, by their first names; the others stay as they are.

    `torch.func.functional_call` does so too, but leaves a module that is registered under two names (as learn2learn's
    OmniglotCNN registers its blocks) with the tensors of the call for good: it puts them in once for each name, and the
    second time takes what it put in the first time for the module's own. Here each module counts once, and a tensor
    that several modules share is replaced in all of them.
    """
    first_names = {id(t): name for name, t in chain(model.named_parameters(), model.named_buffers())}
    replaced: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for attribute, own in chain(module._parameters.items(), module._buffers.items()):
            if own is not None and first_names[id(own)] in tensors:
                replaced[f"{path}.{attribute}" if path else attribute] = tensors[first_names[id(own)]]
    return torch.func.functional_call(model, replaced, (x,), tie_weights=False)
