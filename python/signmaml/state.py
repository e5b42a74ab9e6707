"""The training state as named tensors: packing it for last.safetensors and restoring it.

Names: `model.*` (the state dict), `rates.*` (logarithms of learned inner rates, or one that is adapted online),
`adam.<parameter>.<entry>`, `online.*` (see `OnlineRates.tensors`), `average.*` (see `Average`), and `window`:
`[iterations since the last record, 3]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import copy_into
from .rates import InnerRates
from .results import Best

_MOMENTS = ("exp_avg", "exp_avg_sq")


def pack(
    model: nn.Module,
    rates: InnerRates,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    window: Tensor,
    online: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All tensors of a training state.

    Args:
        model: The model.
        rates: Its inner rates.
        trained: Everything the optimizer trains, by name.
        optimizer: The optimizer.
        window: `[iterations since the last record, 3]`, the rows of the next record.
        online: The tensors of rates that are adapted online; empty if none are.
        average: The moving average of what is trained; empty if there is none.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"rates.{name}": value for name, value in rates.state_dict().items()}
    for name, parameter in trained.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{entry}"] = value
    tensors |= _prefixed("online.", online) | _prefixed("average.", average)
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
    online: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
) -> Tensor:
    """Restores a packed state and returns the window, which may be empty, on the CPU.

    Args:
        tensors: The result of `pack`, on the CPU.
        model, rates, trained, optimizer: As for `pack`; on any device.
        where: The file, for messages.
        online, average: As for `pack`.

    Raises:
        ValueError: The state belongs to another model; the message lists the differences.
    """
    copied = ("model.", "rates.", "online.", "average.")
    foreign = [name for name in tensors if not name.startswith((*copied, "adam.")) and name != "window"]
    if foreign:
        raise ValueError(
            "checkpoint: expected a state of model, rates, adam, online, average and window, found "
            f"{foreign[0]!r} in {where}"
        )
    adam = _adam_states(_under(tensors, "adam."), trained, where)
    window = tensors.get("window")
    if window is not None and (window.ndim != 2 or window.shape[1] != 3 or window.dtype != torch.float64):
        found = f"{window.dtype} {list(window.shape)}"
        raise ValueError(f"checkpoint: expected a float64 window [iterations, 3], found {found} in {where}")
    copy_into(
        _prefixed("model.", model.state_dict())
        | _prefixed("rates.", rates.state_dict())
        | _prefixed("online.", online)
        | _prefixed("average.", average),
        {name: value for name, value in tensors.items() if name.startswith(copied)},
        where,
    )
    for name, entries in adam.items():
        parameter = trained[name]
        # Adam keeps its step counter on the CPU, except for the fused implementation.
        stays = () if optimizer.defaults["fused"] else ("step",)
        optimizer.state[parameter] = {k: v if k in stays else v.to(parameter.device) for k, v in entries.items()}
    return torch.empty(0, 3, dtype=torch.float64, device="cpu") if window is None else window


def checked_metadata(metadata: Mapping[str, Any], where: str) -> tuple[int, float, Best | None]:
    """Iteration, seconds and best validation of a training state's header.

    Raises:
        ValueError: One of them is missing or has the wrong type.
    """
    expected = {"iteration": "an integer >= 0", "seconds": "a number", "best": "none or iteration, metric and value"}
    for name, kind in expected.items():
        if name not in metadata:
            raise ValueError(f"checkpoint: expected {name} ({kind}) in the header of {where}, found none")
    iteration, seconds, best = metadata["iteration"], metadata["seconds"], metadata["best"]
    good = {
        "iteration": type(iteration) is int and iteration >= 0,
        "seconds": type(seconds) in (int, float),
        "best": best is None or _is_best(best),
    }
    for name, fits in good.items():
        if not fits:
            raise ValueError(f"checkpoint: expected {name} to be {expected[name]}, found {metadata[name]!r} in {where}")
    return iteration, seconds, None if best is None else Best(**best)


def _is_best(value: Any) -> bool:
    kinds = {"iteration": (int,), "metric": (str,), "value": (int, float)}
    return isinstance(value, dict) and value.keys() == kinds.keys() and all(type(value[k]) in kinds[k] for k in kinds)


def _adam_states(
    tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], where: str
) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        if entry == "step":
            fits = name in trained and value.shape == () and value.dtype == torch.float32
        else:
            like = trained.get(name)
            fits = like is not None and entry in _MOMENTS and (value.shape, value.dtype) == (like.shape, like.dtype)
        if not fits:
            raise ValueError(
                f"checkpoint: expected optimizer state of this model's parameters, found {key!r} in {where}"
            )
        states.setdefault(name, {})[entry] = value
    for name, entries in states.items():
        absent = {"step", *_MOMENTS} - entries.keys()
        if absent:
            raise ValueError(f"checkpoint: expected adam.{name}.{min(absent)} beside the others, found none in {where}")
    return states


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}
