"""A moving average of what is trained (Polyak and Juditsky 1992, in the exponential form), on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def decay_of(decay: float, iteration: int) -> float:
    """The decay in one iteration, 0-based: less at first, so that the start soon has no weight.

    Example:
        >>> [round(decay_of(0.999, i), 3) for i in (0, 10, 100_000)]
        [0.1, 0.55, 0.999]
    """
    return min(decay, (1 + iteration) / (10 + iteration))


class Average:
    """The moving average: after every iteration a <- d a + (1 - d) w, with d of `decay_of`.

    Args:
        trained: What is averaged, by name; the average starts there.
        decay: In 0..1, below 1.
        iterations: Length of the run.

    Attributes:
        tensors: The average by name, on the device of what is averaged.
        decays: ``[iterations]`` float64 on that device, for `update`.
    """

    def __init__(self, trained: Mapping[str, Tensor], decay: float, iterations: int) -> None:
        self._trained = dict(trained)
        self.tensors = {name: tensor.detach().clone() for name, tensor in trained.items()}
        device = next(iter(self.tensors.values())).device
        decays = [decay_of(decay, iteration) for iteration in range(iterations)]
        self.decays = torch.tensor(decays, dtype=torch.float64, device=device)

    def restart(self) -> None:
        """Begins again at what is trained now."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self._trained[name].detach())

    @torch.no_grad()
    def update(self, decay: Tensor) -> None:
        """Takes one step; never waits for the device.

        Args:
            decay: ``[]``, of `decays`.
        """
        for name, average in self.tensors.items():
            average.lerp_(self._trained[name].detach(), (1 - decay).to(average.dtype))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """What is trained has the average's values meanwhile, in its own memory."""
        held = {name: tensor.detach().clone() for name, tensor in self._trained.items()}
        with torch.no_grad():
            for name, tensor in self._trained.items():
                tensor.copy_(self.tensors[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._trained.items():
                    tensor.copy_(held[name])
