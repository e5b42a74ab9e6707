"""torch's switches for TF32 during a call: strict, readable by a forward through the older and the newer flags, and as
the caller left them afterwards. They are process-wide settings and need no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from signmaml_ext import modes

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
NEWER = hasattr(cudnn, "conv")
pytestmark = pytest.mark.skipif(not NEWER, reason="this torch has the older flags only")

# What a caller may have set before.
ACTIONS: dict[str, Callable[[], Any]] = {
    "all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "conv ieee": lambda: setattr(cudnn.conv, "fp32_precision", "ieee"),
    "cudnn tf32": lambda: setattr(cudnn, "fp32_precision", "tf32"),
    "matmul tf32": lambda: setattr(matmul, "fp32_precision", "tf32"),
    "older cudnn off": lambda: setattr(cudnn, "allow_tf32", False),
    "older matmul on": lambda: setattr(matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
}
SEQUENCES = [names for count in (0, 1, 2) for names in itertools.product(ACTIONS, repeat=count)]


def state() -> dict[str, Any]:
    """Every flag; "unreadable" where the older and the newer ones disagree."""
    found: dict[str, Any] = {}
    flags: tuple[Any, ...] = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)
    names = ("all", "cudnn", "conv", "rnn", "matmul")
    for name, flag in zip(names, flags, strict=True):
        found[name] = flag.fp32_precision
    older: dict[str, Callable[[], Any]] = {
        "older cudnn": lambda: cudnn.allow_tf32,
        "older matmul": lambda: matmul.allow_tf32,
        "matmul precision": torch.get_float32_matmul_precision,
    }
    for name, read in older.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "unreadable"
    return found


def reset() -> None:
    torch.backends.fp32_precision = "none"
    cudnn.fp32_precision = "none"
    cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    reset()
    yield
    reset()


@pytest.mark.parametrize("allowed", [False, True])
def test_flags_are_as_the_call_wants_them_and_put_back(allowed):
    for names in SEQUENCES:
        reset()
        for name in names:
            ACTIONS[name]()
        before = state()
        with modes._tf32.of(allowed):
            inside = state()
        assert state() == before, names
        for flag in ("conv", "rnn", "matmul"):
            assert inside[flag] == ("tf32" if allowed else "ieee"), (names, inside)
        for flag in ("older cudnn", "older matmul"):
            assert inside[flag] is allowed or "unreadable" in before.values(), (names, before, inside)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_forward_may_use_the_older_flags(allowed):
    with modes._tf32.of(allowed), cudnn.flags(enabled=True, benchmark=False, allow_tf32=allowed):
        assert cudnn.allow_tf32 is allowed
