"""The losses: those that have a name, and what is known about the user's callables."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("cross_entropy", "mse")
# The default `ignore_index` of torch's cross-entropy.
IGNORED = -100

LossFunction = Callable[..., Tensor]
Loss = str | LossFunction


def named(loss: Loss, targets: list[object]) -> Loss:
    """The name of a loss that is one of torch's in its plain form, so that kernels serve it; else the loss itself.

    Args:
        loss: As the caller gave it.
        targets: The targets of all sets. Cross-entropy gets its name only for labels `[T, S]` and, if these are on the
            CPU, only if none equals torch's default `ignore_index`.
    """
    tensors = [target for target in targets if isinstance(target, Tensor)]
    if _is_plain_cross_entropy(loss):
        labels = all(y.dtype == torch.int64 and y.ndim == 2 for y in tensors)
        if labels and not any(y.device.type == "cpu" and bool((y == IGNORED).any()) for y in tensors):
            return "cross_entropy"
    elif loss is F.mse_loss or (_is_exactly(loss, nn.MSELoss) and getattr(loss, "reduction", "") == "mean"):
        return "mse"
    return loss


def _is_plain_cross_entropy(loss: Loss) -> bool:
    if loss is F.cross_entropy:
        return True
    if not _is_exactly(loss, nn.CrossEntropyLoss):
        return False
    assert isinstance(loss, nn.CrossEntropyLoss)
    settings = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
    return settings == (None, IGNORED, "mean", 0.0)


def _is_exactly(loss: Loss, kind: type[nn.Module]) -> bool:
    """Whether a loss is a module of a kind, as torch has it: no subclass, no hooks, no replaced forward."""
    if type(loss) is not kind:
        return False
    assert isinstance(loss, nn.Module)
    return not (loss._forward_hooks or loss._forward_pre_hooks or "forward" in vars(loss))


def no_targets(tasks: int, examples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for the targets of a set that has none, `[T, S, 0]`; the loss then takes the prediction alone."""
    return torch.empty(tasks, examples, 0, dtype=dtype, device=device)


def takes_targets(target: Tensor) -> bool:
    """Whether a loss is called with these targets; see `no_targets`. A caller's own targets are never empty."""
    return target.numel() > 0


def ignored_label(loss: Loss) -> int | None:
    """The label that a loss ignores; None if all count."""
    if isinstance(loss, str):
        return None
    if isinstance(loss, functools.partial):
        if "ignore_index" in loss.keywords:
            return int(loss.keywords["ignore_index"])
        return ignored_label(loss.func)
    return int(getattr(loss, "ignore_index", IGNORED))


def accuracy(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor | None:
    """Share of correct predictions among labels that count, `[t]`; None if these are not class labels and scores.

    NaN for a task without a label that counts.
    """
    if target.dtype != torch.int64 or target.ndim != 2 or prediction.ndim != 3 or prediction.is_complex():
        return None
    right = (prediction.detach().argmax(-1) == target).to(torch.float32)
    ignored = ignored_label(loss)
    if ignored is None:
        return right.mean(1)
    counts = (target != ignored).to(torch.float32)
    return (right * counts).sum(1) / counts.sum(1)


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean softmax cross-entropy of one task; NaN if a label is out of range.

    For a wrong label torch's own CUDA kernel would fail a device assertion, after which the process can no longer use
    the device. A NaN loss flags the task instead.
    """
    classes = prediction.shape[-1]
    in_range = ((target >= 0) & (target < classes)).all()
    loss = F.cross_entropy(prediction, target.clamp(0, classes - 1))
    return loss * torch.where(in_range, 1.0, torch.nan).to(loss.dtype)
