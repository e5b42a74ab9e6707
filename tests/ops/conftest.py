"""Where the operators run: on the CPU, on the emulated GPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helpers.cases.flat_buffers import device_or_skip
from helpers.devices import backends
from signmaml_ext._loader import C


@pytest.fixture(params=backends.params("cpu", "emulated", "cuda"))
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The tensors' device. The reference that they are compared with is plain torch expressions."""
    if request.param != "emulated":
        yield device_or_skip(request.param)
        return
    backends.emulated_module().configure(seed=1, blocks_alive=2, multiprocessors=1)
    with backends.operators_emulated():
        yield torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The CPU instruction sets that can be chosen here; restores the choice."""
    before = C.cpu_isa()
    yield C.cpu_isas()
    C.select_cpu_isa(before)
