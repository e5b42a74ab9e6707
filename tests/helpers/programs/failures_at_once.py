"""pytest -p helpers.programs.failures_at_once: prints each failure as it happens.

pytest prints failures at its end, and so never if a time limit ends it first. tests/ must be on PYTHONPATH, because
plugins are imported before pytest reads its configuration.
"""

from __future__ import annotations

import pytest


class FailuresAtOnce:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter

    @pytest.hookimpl(trylast=True)  # after the reporter's own line
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"FAILED NOW: {report.nodeid} ({report.when})")
            self.reporter.write_line(report.longreprtext, flush=True)


@pytest.hookimpl(trylast=True)  # after the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(FailuresAtOnce(reporter))
