"""Where the operators run: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helpers.flat_buffers import device_or_skip
from signmaml_ext._loader import C


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_or_skip(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The CPU instruction sets that can be chosen here; puts the choice back."""
    before = C.cpu_isa()
    yield C.cpu_isas()
    C.select_cpu_isa(before)
