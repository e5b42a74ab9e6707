"""A shortened long run that is killed again and again; `python -m tests.reliability_report` does the full one."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.long_run import long_run


@pytest.mark.slow
def test_memory_stays_and_metrics_are_whole_after_kills(tmp_path: Path) -> None:
    found = long_run(tmp_path, iterations=1200, kills=4)
    assert found.kills == 4
    assert found.records_expected == found.records_found
    assert found.same_as_uninterrupted
    # torch and malloc vary by a few MiB, so this catches leaks from 7 KiB per iteration on; the full run, smaller ones.
    assert found.memory_growth_mib < 8
