"""Python's garbage collector and torch's generators: tasks on threads neither deadlock nor keep garbage."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.cases import nets
from signmaml_ext import evaluate, meta_step

OPTIONS: dict[str, Any] = {"inner_lr": 0.02, "inner_steps": 3, "batching": "one-by-one"}

# Threads create reference cycles that hold autograd graphs and read the generator's state, as checkpointing does,
# while the collector runs every few objects. In torch alone they deadlock within a second or so.
WAITS_FOR_EVER = """
import faulthandler, gc, threading, sys, torch
faulthandler.dump_traceback_later(100, exit=True)

class Cycle:
    def __init__(self, held):
        self.held, self.itself = held, self

class Model(torch.nn.Linear):
    def forward(self, x):
        assert float(x.sum()) < 1e9  # no kernel of its own takes its place
        for _ in range(100):
            torch.get_rng_state()
            Cycle((x @ self.weight.T).relu().sum())
        return super().forward(x)

from signmaml_ext import evaluate
torch.manual_seed(0)
model, x, y = Model(50, 5), torch.randn(8, 20, 50), torch.randint(5, (8, 20))
gc.set_threshold(20)

def work():
    for _ in range(6):
        evaluate(model, x, y, x, y, inner_lr=0.01, inner_steps=3, batching="one-by-one")

torch.set_num_threads(int(sys.argv[1]))
callers = [threading.Thread(target=work) for _ in range(int(sys.argv[2]))]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
print("done", gc.isenabled())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads, callers", [(2, 1), (1, 2), (2, 2)])
def test_threads_that_ask_for_the_generators_state_do_not_wait_for_each_other(threads, callers):
    command = [sys.executable, "-c", WAITS_FOR_EVER, str(threads), str(callers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.stdout == "done True\n", done.stderr[-2000:]


class Cyclic(nn.Module):
    """Every forward leaves behind a cycle that holds a tensor; `WATCHED.all` has those that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.sum()) < 1e9  # branches on a value, so that no native kernel replaces it
        WATCHED.enabled.append(gc.isenabled())
        cycle: list[Any] = [torch.tanh(self.body(x)).detach(), Watched()]
        cycle.append(cycle)
        WATCHED.all.add(cycle[1])
        WATCHED.most = max(WATCHED.most, len(WATCHED.all))
        return self.head(torch.tanh(self.body(x)))


class Watched:
    """Something that a weak reference can point to."""


class Watch:
    def __init__(self) -> None:
        self.all: weakref.WeakSet[Watched] = weakref.WeakSet()
        self.most = 0
        self.enabled: list[bool] = []


WATCHED = Watch()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    gc.collect()
    found = Watch()
    monkeypatch.setattr(sys.modules[__name__], "WATCHED", found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_afterwards_as_it_was(watched, threads, on):
    model, data = Cyclic().double(), nets.vector_tasks()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if not on:
            gc.disable()
        meta_step(model, *data, **OPTIONS)
        assert gc.isenabled() is on
        with pytest.raises(ValueError, match="backend"):
            meta_step(model, *data, **OPTIONS, backend="cuda")
        assert gc.isenabled() is on
    finally:
        gc.enable()
        torch.set_num_threads(before)
    assert watched.enabled and not any(watched.enabled)


@pytest.mark.slow
def test_cycles_are_collected_during_a_call(watched):
    """Not only at its end: a pass may leave activations behind in cycles."""
    model = Cyclic().double()
    x, y = torch.randn(40, 6, 4, dtype=torch.float64), torch.randint(3, (40, 6))
    evaluate(model, x, y, x, y, **(OPTIONS | {"inner_steps": 20}))
    passes = len(watched.enabled)
    assert passes >= 40 * 21
    assert watched.most < passes / 2


def test_a_collector_that_is_off_stays_off(watched):
    model = Cyclic().double()
    x, y = torch.randn(4, 6, 4, dtype=torch.float64), torch.randint(3, (4, 6))
    gc.disable()
    try:
        evaluate(model, x, y, x, y, **(OPTIONS | {"inner_steps": 20}))
    finally:
        gc.enable()
    assert watched.most == len(watched.enabled)  # nothing was collected


def test_calls_of_several_threads_share_it(watched):
    """The first call to end does not switch the collector on while others still run."""
    model, data = Cyclic().double(), nets.vector_tasks()
    callers = [threading.Thread(target=lambda: meta_step(model, *data, **OPTIONS)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert gc.isenabled() and not any(watched.enabled)
