"""Two machines, simulated by network namespaces: torchrun on each, gloo over the cable between them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from reliability.distributed_run import TESTS
from reliability.two_machines import ADDRESSES, CABLE, TwoMachines, two_machines
from signmaml import checkpoint
from signmaml.loggers import read_metrics

pytestmark = pytest.mark.slow


def start(machines: TwoMachines, machine: int, folder: Path, iterations: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += [f"--node-rank={machine}", f"--master-addr={ADDRESSES[0]}", "--master-port=29700", "-m", "signmaml"]
    command += ["train", "--preset", "sinusoid", "--tasks=5", f"--iterations={iterations}", "--validate-every=0"]
    command += ["--test-tasks=30", "--checkpoint-every=5", "--quiet", "--no-tensorboard", f"--out={folder}", *words]
    settings = {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return machines.start(machine, command, **settings)


def test_two_machines_train_as_one(tmp_path: Path) -> None:
    with two_machines() as machines:
        started = [start(machines, machine, tmp_path / "run", 20) for machine in (0, 1)]
        ends = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0, 0], ends
        assert "trained 20 iterations" in ends[0][0] and ends[1][0] == ""
    from signmaml.cli import main

    words = ["--preset", "sinusoid", "--tasks=5", "--iterations=20", "--validate-every=0", "--test-tasks=30"]
    assert main(["train", *words, "--quiet", "--no-tensorboard", f"--out={tmp_path / 'alone'}"]) == 0
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert len(ours) == len(theirs) == 2
    for found, expected in zip(ours, theirs, strict=True):  # in float32 the order of summation matters
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_cut_cable_ends_both_sides_with_a_message(tmp_path: Path) -> None:
    with two_machines() as machines:
        started = [start(machines, machine, tmp_path / "run", 100_000, "--timeout=5") for machine in (0, 1)]
        checkpoints = tmp_path / "run" / "last.safetensors"
        deadline = time.monotonic() + 90
        while not checkpoints.is_file():
            assert time.monotonic() < deadline, [process.poll() for process in started]
            time.sleep(0.1)
        machines.pull_the_cable()
        said = [process.communicate(timeout=120)[1] for process in started]
        assert all(process.returncode != 0 for process in started)
    assert "ProcessLost: distributed: expected an answer of all 2 processes" in said[0], said[0]
    assert "ProcessLost: distributed: expected an answer of all 2 processes" in said[1], said[1]
    assert checkpoint.load(checkpoints, kind="training")[1]["iteration"] % 5 == 0
