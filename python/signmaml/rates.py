"""The trainer's inner learning rates: a constant, one that is adapted online, or meta-learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import BESIDE_WEIGHTS


class InnerRates(nn.Module):
    """The inner learning rates of a run; pass `values()` to `signmaml_ext.meta_step` as `inner_lr`.

    Learned rates are stored as logarithms: they stay positive, and a step of the outer Adam changes them by a fraction
    of their size (an outer rate of 1e-3 changes them by 0.1% per iteration).

    Args:
        model: The model whose parameters the rates belong to.
        learn: "none", "scalar" (one rate), "per-step" (one for each inner step), "per-layer" (one for each adapted
            parameter tensor: a layer's weight and bias have separate rates, as in MAML++), "per-layer-per-step", or
            "per-parameter" (one for each element of the adapted tensors, as in Meta-SGD).
        start: The initial rate, > 0.
        steps: Inner steps in training (K).
        adapt: Name patterns of the adapted parameters; None: all that require grad.
        online: Whether the rate is one number that `signmaml.hypergradient` changes, not the optimizer; not with
            learned rates.

    Attributes:
        online: That number, a parameter `[]`; else None.

    Example:
        >>> rates = InnerRates(nn.Linear(3, 2), "per-layer", 0.01, 5)
        >>> sorted(rates.values())
        ['bias', 'weight']
    """

    def __init__(
        self,
        model: nn.Module,
        learn: str,
        start: float,
        steps: int,
        adapt: Sequence[str] | None = None,
        online: bool = False,
    ) -> None:
        super().__init__()
        self.learn, self.start, self.steps = learn, start, steps
        self.logs: dict[str, nn.Parameter] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        if learn == "per-parameter":
            shapes = {name: tuple(p.shape) for name, p in _adapted(model, adapt).items()}
        elif learn in ("scalar", "per-step"):
            shapes[""] = (steps,) if learn == "per-step" else ()
        elif learn in ("per-layer", "per-layer-per-step"):
            leading = (steps,) if learn == "per-layer-per-step" else ()
            shapes = {name: leading + (1,) * p.ndim for name, p in _adapted(model, adapt).items()}
        device = next(model.parameters()).device
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for index, (name, shape) in enumerate(shapes.items()):
            log = torch.full(shape, start, dtype=dtype, device=device).log()
            self.logs[name] = nn.Parameter(log)
            self.register_parameter(f"log_{index}", self.logs[name])  # a name may hold dots, an attribute may not
        self.online = nn.Parameter(torch.tensor(start, dtype=dtype, device=device)) if online else None

    def values(self, steps: int | None = None) -> float | Tensor | dict[str, Tensor]:
        """The rates, differentiable if they are learned, or adapted online and torch records gradients.

        Args:
            steps: Number of inner steps; None: as in training. More steps than in training repeat the last
                step's rate, fewer take the first ones.
        """
        if self.online is not None:
            # Evaluations get the number, as they do from a checkpoint.
            return self.online if torch.is_grad_enabled() else float(self.online.detach())
        if not self.logs:
            return self.start
        steps = self.steps if steps is None else steps
        rates = {name: self._for_steps(log.exp(), steps) for name, log in self.logs.items()}
        return rates.get("", rates)

    def _for_steps(self, rate: Tensor, steps: int) -> Tensor:
        if not self.learn.endswith("per-step") or steps == self.steps:
            return rate
        return rate[[min(step, self.steps - 1) for step in range(steps)]]

    def to_json(self) -> dict[str, Any]:
        """The exact logarithms as lists (null if `tensors` has them), with everything else that `load_json` needs."""
        many = self.tensors()
        logs = {name: None if many else log.detach().double().tolist() for name, log in self.logs.items()}
        start = self.start if self.online is None else float(self.online.detach())
        return {"learn": self.learn, "start": start, "steps": self.steps, "logs": logs}

    def tensors(self) -> dict[str, Tensor]:
        """Logarithms that are too many for JSON, under the names that they have beside a model's weights."""
        if self.learn != "per-parameter":
            return {}
        return {BESIDE_WEIGHTS + name: log.detach() for name, log in self.state_dict().items()}

    def load_json(self, stored: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Loads rates that `to_json` and `tensors` returned.

        Raises:
            ValueError: They are of another kind, or for other parameters or steps; nothing is changed.
        """
        own = (self.learn, self.steps, list(self.logs))
        try:
            found = (stored["learn"], stored["steps"], list(stored["logs"]))
            start = float(stored["start"])
            many = dict(zip(self.logs, self.tensors(), strict=False))
            logs = {
                name: (tensors or {})[many[name]]
                if name in many
                else torch.tensor(log, dtype=torch.float64, device="cpu")
                for name, log in stored["logs"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"inner rates: expected kind, start, steps and logs, found others ({error!r})") from error
        if own != found or any(logs[name].shape != log.shape for name, log in self.logs.items()):
            raise ValueError(f"inner rates: expected (kind, steps, names) {own}, found {found}")
        with torch.no_grad():
            self.start = start
            if self.online is not None:
                self.online.fill_(start)
            for name, log in self.logs.items():
                log.copy_(logs[name])


def _adapted(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Tensor]:
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if patterns is None:
        return trainable
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # a pattern may use any name of a tied parameter
    return {
        name: p
        for name, p in trainable.items()
        if any(fnmatchcase(alias, pattern) for alias in names[id(p)] for pattern in patterns)
    }
