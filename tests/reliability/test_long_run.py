"""A long run that is killed again and again, shortened; `python -m tests.reliability_report` has the long one."""

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
    # An iteration that kept 1 KiB would add 1.2 MiB; torch and malloc settle within a few.
    assert found.memory_growth_mib < 8
