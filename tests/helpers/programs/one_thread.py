"""For all tests: most networks are tiny, and a second thread costs more than it gives, above all on shared cores.

What forks a process needs it too: torch's other threads do not come along. Tests of threads choose how many.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
