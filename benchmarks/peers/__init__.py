"""Other ways to compute the same meta-gradient, each optimised as far as its approach allows.

A peer is a module with
  NAME              its name in tables
  SUMMARY           one line of description
  why_not(problem)  None if it can run this problem here, else the reason to skip it
  prepare(problem)  a `Step` whose `run()` does one whole meta-step from the same weights
The package needs none of them; `requirements.txt` next to this folder installs them all.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A prepared meta-step that can run repeatedly.

    Attributes:
        run: Computes the mean meta-gradient; calls must not change any other state.
        gradients: Converts the result of `run` to name -> tensor in torch's layout; not timed.
        note: A choice that the peer made on this machine, for the record.
    """

    run: Callable[[], Any]
    gradients: Callable[[Any], Mapping[str, Tensor]] = dict
    note: str = ""


def missing(package: str) -> str | None:
    """The reason to skip a peer if its package is not installed, else None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def fastest(steps: Mapping[str, Step]) -> Step:
    """The fastest of several variants, each timed once after a warm-up; its name becomes the note."""

    def once(step: Step) -> float:
        step.run()
        begin = time.perf_counter()
        step.gradients(step.run())  # waits for the device
        return time.perf_counter() - begin

    times = {name: once(step) for name, step in steps.items()}
    best = min(times, key=times.__getitem__)
    return Step(steps[best].run, steps[best].gradients, note=best)
