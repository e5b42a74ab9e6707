"""Progress of long preparations: a bar on a terminal, one plain line elsewhere, or nothing on request."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], *, total: int, what: str, unit: str, show: bool) -> Iterator[Item]:
    """Yields `items` and shows progress on stderr.

    Args:
        items: The items to iterate over.
        total: How many there are.
        what: Description of the work, such as ``"omniglot/train: decoding"``.
        unit: Name of the items, such as ``"classes"``.
        show: False: silent.
    """
    if show and not sys.stderr.isatty():
        print(f"{what} ({total} {unit}) ...", file=sys.stderr, flush=True)
    # disable=None: tqdm is silent without a terminal.
    yield from tqdm(items, total=total, desc=what, unit=f" {unit}", disable=None if show else True, leave=False)
