"""Which cases of a large grid belong to the quick tests."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import pytest

QUICK_CASES = 4


def mark_the_rest_of_grids_slow(items: Sequence[pytest.Item]) -> None:
    """Marks all cases of a test as slow but for QUICK_CASES of them.

    A checksum of their names chooses them: everywhere the same ones, and of every parameter several values, which
    every n-th case of a grid would not give. Cases that are skipped or need a GPU do not count, because they cost
    nothing where they do not run.
    """
    grids: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        skipped = any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif"))
        if not skipped and not any(item.get_closest_marker(name) for name in ("slow", "skip", "gpu")):
            grids[item.nodeid.split("[", 1)[0]].append(item)
    for cases in grids.values():
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[QUICK_CASES:]:
            item.add_marker(pytest.mark.slow)
