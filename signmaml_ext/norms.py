"""BatchNorm on the statistics of another set: queries normalised by their task's support set.

A prediction then depends only on its query and the support set (inductive), not on the other queries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checks import refuse
from .replica import BatchNorm

Moments = tuple[Tensor, Tensor]  # mean and biased variance, `[C]`


class SupportStatistics:
    """The statistics of a model's BatchNorms in one forward pass of a private copy, for use in another."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[Moments]] = defaultdict(list)  # by path: one for each use in the pass
        self._used: Counter[str] = Counter()
        self._recorded = False

    def record(self, copy: nn.Module) -> None:
        """Makes a copy's BatchNorms record the statistics of their inputs."""
        for path, norm in _norms(copy).items():
            vars(norm)["forward"] = self._recording(path, norm.forward)

    def use(self, copy: nn.Module) -> None:
        """Makes a copy's BatchNorms normalise by the recorded statistics, with gradients through them."""
        self._recorded = True  # the first pass may be recomputed in the backward pass; that is not recorded
        for path, norm in _norms(copy).items():
            vars(norm)["forward"] = self._using(path, norm)

    def buffers(self, copy: nn.Module) -> dict[str, Tensor]:
        """The statistics under the names of the running ones, so that `model.eval()` normalises by them.

        Also for a norm that keeps no running statistics: `functional_call` sets them all the same.
        """
        found: dict[str, Tensor] = {}
        for path in _norms(copy):
            if not self._seen[path]:
                continue
            if len(self._seen[path]) > 1:
                refuse("batch_norm", f"'batch' for a model that uses {path!r} more than once", "'support'")
            mean, variance = self._seen[path][0]
            found |= {f"{path}.running_mean": mean.detach(), f"{path}.running_var": variance.detach()}
        return found

    def _recording(self, path: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def normalise(x: Tensor) -> Tensor:
            moments = _moments(x)  # also if recomputed: checkpointing counts tensors
            if not self._recorded:
                self._seen[path].append(moments)
            return forward(x)

        return normalise

    def _using(self, path: str, norm: nn.modules.batchnorm._BatchNorm) -> Callable[[Tensor], Tensor]:
        def normalise(x: Tensor) -> Tensor:
            if not self._seen[path]:
                refuse("batch_norm", f"'batch' for a model whose forward does not always use {path!r}", "'support'")
            shape = [1, -1] + [1] * (x.ndim - 2)
            # Each use takes the next statistics. A checkpointed forward runs again in the backward pass, and nothing
            # tells which of several uses that is.
            if len(self._seen[path]) > 1 and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
                refuse(
                    "batch_norm", f"'batch' for a model that uses {path!r} more than once, checkpointed", "'support'"
                )
            moments = self._seen[path][self._used[path] % len(self._seen[path])]
            self._used[path] += 1
            mean, variance = (moment.view(shape) for moment in moments)
            y = (x - mean) * torch.rsqrt(variance + norm.eps)
            if norm.weight is not None:
                y = y * norm.weight.view(shape)
            return y if norm.bias is None else y + norm.bias.view(shape)

        return normalise


def _norms(copy: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {path: module for path, module in copy.named_modules() if isinstance(module, BatchNorm)}


def _moments(x: Tensor) -> Moments:
    """Mean and biased variance over all axes except that of the channels."""
    axes = [0, *range(2, x.ndim)]
    if x.dtype not in (torch.float32, torch.float64) or not x.is_cpu:
        return x.mean(axes), x.var(axes, unbiased=False)
    mean = x.mean(axes, keepdim=True)  # on a CPU this takes a sixth of the time of torch's own variance
    return mean.view(-1), (x - mean).square().mean(axes)
