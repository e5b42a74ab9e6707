"""Settings of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import helpers.programs.installed  # noqa: F401 (before anything imports the package)

# Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SIGNMAML_TEST_THREADS", "1"))

import torch

from helpers.devices import backends
from helpers.programs import quick, shared, workers
from helpers.programs.one_thread import one_thread  # noqa: F401 (for all tests)
from helpers.programs.workers import pytest_cmdline_main  # noqa: F401 (a hook)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # only in the process that starts the workers
        config.add_cleanup(shared.make_folder())


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick.mark_the_rest_of_grids_slow(items)
    workers.sort_longest_first(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests record as `summary`."""
    passed = terminalreporter.stats.get("passed", [])
    lines = [value for report in passed for name, value in report.user_properties if name == "summary"]
    if lines:
        terminalreporter.section("what ran")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=backends.params(*backends.NAMES))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that serves batched modules; the same tests hold for all. See helpers/devices/backends.py."""
    with backends.selected(request.param):
        yield request.param
