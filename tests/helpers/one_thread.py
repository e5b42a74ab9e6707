"""For tests whose networks are tiny: a second thread costs more than it gives, above all where cores are shared.

A conftest.py that imports the fixture has it for all tests of its folder. What forks a process needs it too: torch's
other threads do not come along.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
