"""Sums up junit files of pytest: python benchmarks/junit_counts.py FILE...

One line for each file: how many tests passed, failed and were skipped; then the names of those that failed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path


def lines(path: Path) -> list[str]:
    """The lines of one file; also of one that pytest did not live to write."""
    if not path.is_file():
        return [f"  {path.stem}: no result, ended before its end; its failures so far are in the log"]
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError as error:
        return [f"  {path.stem}: no result, its file is damaged ({error})"]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = dict.fromkeys(case.get("name", "") for case in bad)  # an error of a teardown is a second entry
    passed = len(cases) - len(bad) - len(skipped)
    counts = f"  {path.stem}: {passed} passed, {len(names)} failed, {len(skipped)} skipped"
    return [counts, *(f"    failed: {name}" for name in names)]


def main(words: Sequence[str]) -> None:
    for word in words:
        print("\n".join(lines(Path(word))))


if __name__ == "__main__":
    main(sys.argv[1:])
