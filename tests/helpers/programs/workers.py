"""The number of test processes and the order of test files, for pytest-xdist if it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

MEMORY_OF_WORKER = 3 * 2**30
# The slowest files, slowest first: started late, one of them would keep one process busy after the others finish.
LONGEST = (
    "tests/ptx/test_ptx.py",
    "tests/emulated/test_mutations.py",
    "tests/reliability/test_native.py",
    "tests/ops/test_second_order_mutants.py",
    "tests/emulated/test_emulated_conv_errors.py",
    "tests/benchmarks/test_gpu_check.py",
    "tests/packaging/test_installs.py",
    "tests/packaging/test_distributions.py",
    "tests/training/test_omniglot_training.py",
    # Before test_compiled.py: it forks, and after torch.compile torch refuses to differentiate in forks of the process.
    "tests/reliability/test_faults.py",
    "tests/reference/test_compiled.py",
    "tests/training/test_data_real.py",
    "tests/zoo/test_zoo.py",
    "tests/training/test_examples.py",
    "tests/reliability/test_distributed.py",
    "tests/reliability/test_long_run.py",
    "tests/emulated/test_emulated_mlp.py",
    "tests/ops/test_conv_meta_step_cpu.py",
    "tests/compile/test_compile_resources.py",
    "tests/reliability/test_two_machines.py",
    "tests/emulated/test_sanitizers.py",
    "tests/emulated/test_emulated_conv.py",
)


def memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def number_of_workers(config: pytest.Config) -> int:
    """How many processes to start; 0 to leave pytest's options alone.

    It is 0 if the user gives -n or other options of xdist; if the tests are selected one by one or are from one file,
    which cannot be distributed; with a debugger or uncaptured output; and with a GPU, because there is only one.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return 0
    if option.numprocesses is not None or option.tx or option.dist != "no" or option.distload:
        return 0
    if option.usepdb or option.capture == "no" or option.collectonly or torch.cuda.is_available():
        return 0
    if any("::" in name for name in config.args) or [Path(name).suffix for name in config.args] == [".py"]:
        return 0
    processors = len(os.sched_getaffinity(0))
    workers = min(processors, memory() // MEMORY_OF_WORKER)
    return workers if workers > 1 else 0


@pytest.hookimpl(tryfirst=True)  # before xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    workers = number_of_workers(config)
    if workers:
        config.option.numprocesses = workers
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def sort_longest_first(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the slowest files first; all processes must get the same order. It also holds for a single process."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(config.rootpath).as_posix(), len(place)))
