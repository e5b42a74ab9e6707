"""One thread for all tests: most networks are tiny, so a second thread costs more than it gains on shared cores.

Tests that fork need it too, because torch's other threads do not survive a fork. Tests of threads set their own number.
SIGNMAML_TEST_THREADS is another number: tests of Conv-N on a GPU wait for large references on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("SIGNMAML_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(threads)
