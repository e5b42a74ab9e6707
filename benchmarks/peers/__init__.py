"""Other ways to compute the same meta-gradient, each as good as its own idea allows.

A peer is a module with
  NAME              what tables call it
  SUMMARY           one line for people
  why_not(problem)  None if it can run this problem here, else the reason it is skipped
  prepare(problem)  a `Step` whose `run()` does one whole meta-step from the same weights
None is needed by the package; `requirements.txt` beside this folder installs them all.
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
    """A meta-step that is ready to run again and again.

    Attributes:
        run: Computes the mean meta-gradient; nothing else may change from call to call.
        gradients: What `run` returned as name -> tensor, in torch's layout; not timed.
        note: A choice that the peer made on this machine, for the record.
    """

    run: Callable[[], Any]
    gradients: Callable[[Any], Mapping[str, Tensor]] = dict
    note: str = ""


def missing(package: str) -> str | None:
    """The reason to skip a peer whose package is not there."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def fastest(steps: Mapping[str, Step]) -> Step:
    """The fastest of several ways to run one idea, tried once each after a warm-up; its name becomes the note."""

    def once(step: Step) -> float:
        step.run()
        begin = time.perf_counter()
        step.gradients(step.run())  # waits for the device
        return time.perf_counter() - begin

    times = {name: once(step) for name, step in steps.items()}
    best = min(times, key=times.__getitem__)
    return Step(steps[best].run, steps[best].gradients, note=best)
