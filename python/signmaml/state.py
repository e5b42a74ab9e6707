"""The training state as named tensors: what last.safetensors holds, and how it comes back.

Names: `model.*` (the state dict), `rates.*` (logarithms of learned inner rates), `adam.<parameter>.<entry>`, and
`window`: `[iterations since the last record, 3]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import copy_into
from .rates import InnerRates


def pack(
    model: nn.Module,
    rates: InnerRates,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    window: Tensor,
) -> dict[str, Tensor]:
    """All tensors of a training state.

    Args:
        model: The model.
        rates: Its inner rates.
        trained: Everything the optimizer trains, by name.
        optimizer: The optimizer.
        window: `[iterations since the last record, 3]`, what the record will be made of.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"rates.{name}": value for name, value in rates.state_dict().items()}
    for name, parameter in trained.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{entry}"] = value
    if len(window):
        tensors["window"] = window
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    rates: InnerRates,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    where: str,
) -> Tensor:
    """Puts a packed state back and returns the window, which may be empty, on the CPU.

    Args:
        tensors: What `pack` gave, on the CPU.
        model, rates, trained, optimizer: As for `pack`; on any device.
        where: The file, for messages.

    Raises:
        ValueError: The state belongs to another model; the message lists the differences.
    """
    adam = _adam_states(_under(tensors, "adam."), trained, where)
    copy_into(
        {**_prefixed("model.", model.state_dict()), **_prefixed("rates.", rates.state_dict())},
        {name: value for name, value in tensors.items() if name.startswith(("model.", "rates."))},
        where,
    )
    for name, entries in adam.items():
        parameter = trained[name]
        # Adam keeps its step counter on the CPU, unless it is the fused one.
        stays = () if optimizer.defaults["fused"] else ("step",)
        optimizer.state[parameter] = {k: v if k in stays else v.to(parameter.device) for k, v in entries.items()}
    return tensors.get("window", torch.empty(0, 3, dtype=torch.float64))


def _adam_states(
    tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], where: str
) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        if name not in trained or (entry != "step" and value.shape != trained[name].shape):
            raise ValueError(
                f"checkpoint: expected optimizer state of this model's parameters, found {key!r} in {where}"
            )
        states.setdefault(name, {})[entry] = value
    return states


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}
