"""One thread for all tests: most networks are tiny, so a second thread costs more than it gains on shared cores.

Tests that fork need it too, because torch's other threads do not survive a fork. Tests of threads set their own number.
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
