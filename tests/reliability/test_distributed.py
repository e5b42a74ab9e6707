"""Several processes train as one does, and none of them keeps waiting for a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reliability.distributed_run import TESTS, adapting, finish, make_trainer, start, wait_for
from signmaml import checkpoint, distributed
from signmaml.loggers import read_metrics

POISONED = (9, 10, 25)  # tasks of iterations 1 and 3


def assert_close_runs(found: Path, expected: Path) -> None:
    """Weights, optimizer, metrics and results are equal up to the order of summation."""
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = checkpoint.load(found / name)[0], checkpoint.load(expected / name)[0]
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-12)
    records = read_metrics(expected / "metrics.jsonl")
    assert records
    for ours, theirs in zip(read_metrics(found / "metrics.jsonl"), records, strict=True):
        assert_close_records(ours, theirs)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (found, expected))
    assert_close_records(ours["test"], theirs["test"])
    assert_close_records(ours["validation"], theirs["validation"])


def assert_close_records(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process in which some tasks are left out."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    make_trainer(folder, 9, poisoned=POISONED).fit()
    assert sum(r.get("nonfinite_tasks", 0) for r in read_metrics(folder / "metrics.jsonl")) == len(POISONED)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, alone: Path) -> None:
    """With uneven shares, tasks left out, dropout and learned rates; rank 1 must take over rank 0's weights."""
    ends = finish(start(2, tmp_path / "run", 9, "--poisoned", *POISONED, "--own-weights"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close_runs(tmp_path / "run", alone)
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_adapt_their_rates_as_one(tmp_path: Path) -> None:
    make_trainer(tmp_path / "alone", 5, poisoned=POISONED, changes=adapting("alpha-maml")).fit()
    record = [r for r in read_metrics(tmp_path / "alone" / "metrics.jsonl") if r["split"] == "train"][-1]
    assert abs(record["inner_lr"] / 0.01 - 1) > 1e-3 and abs(record["outer_lr"] / 0.006 - 1) > 1e-3
    words = ("--poisoned", *POISONED, "--adapt-rates", "alpha-maml", "--own-weights")
    ends = finish(start(2, tmp_path / "run", 5, *words))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close_runs(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_sum_the_losses_of_all_steps_as_one(tmp_path: Path, alone: Path) -> None:
    make_trainer(tmp_path / "alone", 9, poisoned=POISONED, changes={"multi_step_loss": 6}).fit()
    ends = finish(start(2, tmp_path / "run", 9, "--poisoned", *POISONED, "--multi-step-loss", 6, "--own-weights"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close_runs(tmp_path / "run", tmp_path / "alone")
    assert read_metrics(tmp_path / "alone" / "metrics.jsonl") != read_metrics(alone / "metrics.jsonl")


@pytest.mark.slow
def test_resumed_with_other_numbers_of_processes(tmp_path: Path, alone: Path) -> None:
    folder, poisoned = tmp_path / "run", ("--poisoned", *POISONED)
    for processes, iterations in ((3, 4), (2, 7)):
        ends = finish(start(processes, folder, iterations, *poisoned, *(["--resume"] if processes == 2 else [])))
        assert {code for code, _ in ends} == {0}, ends
    make_trainer(folder, 9, poisoned=POISONED).fit(resume=True)
    longest = [r for r in read_metrics(folder / "metrics.jsonl") if r["iteration"] == 9]
    expected = [r for r in read_metrics(alone / "metrics.jsonl") if r["iteration"] == 9]
    for ours, theirs in zip(longest, expected, strict=True):
        if ours["split"] == "val":  # training records average since the previous one, here iteration 7, not 8
            assert_close_records(ours, theirs)
    ours, theirs = (checkpoint.load(path / "last.safetensors")[0] for path in (folder, alone))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_more_processes_than_tasks(tmp_path: Path) -> None:
    """Three processes for one task: two of them only take part in the sums, so the bits are those of one process."""
    make_trainer(tmp_path / "alone", 6, tasks=1, changes={"method": "sign-maml"}).fit()
    ends = finish(start(3, tmp_path / "run", 6, "--tasks", 1, "--method", "sign-maml"))
    assert {code for code, _ in ends} == {0}, ends
    assert_close_runs(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_raise_stops_all_processes_alike(tmp_path: Path) -> None:
    ends = finish(start(2, tmp_path / "run", 9, "--poisoned", 9, "--nonfinite", "raise"))
    assert [code for code, _ in ends] == [1, 1]
    for _, said in ends:
        assert "FloatingPointError: a NaN or an Inf in the losses or gradients of tasks [2]" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_the_others_with_a_message(tmp_path: Path, alone: Path, victim: int) -> None:
    started = start(3, tmp_path / "run", 9, "--poisoned", *POISONED, "--slow", 0.1)
    wait_for(started[victim], 6)
    started[victim].kill()
    ends = finish(started, timeout=60)
    assert ends[victim][0] == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        code, said = ends[rank]
        assert code == 1
        assert "ProcessLost: distributed: expected an answer of all 3 processes" in said
        assert f"noticed by process {rank}" in said and "--resume" in said
    # What was saved is whole, and one process finishes the run.
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 5
    make_trainer(tmp_path / "run", 9, poisoned=POISONED).fit(resume=True)
    assert_close_runs(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_hanging_process_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    started = start(2, tmp_path / "run", 200, "--slow", 0.05, "--timeout", 4)
    wait_for(started[0], 3)
    started[1].send_signal(signal.SIGSTOP)
    try:
        _, said = started[0].communicate(timeout=60)
        assert started[0].returncode == 1
        assert "ProcessLost: distributed: expected an answer of all 2 processes" in said
    finally:
        started[1].kill()
        started[1].communicate()


@pytest.mark.slow
def test_sigterm_to_one_stops_and_saves_all(tmp_path: Path) -> None:
    started = start(2, tmp_path / "run", 400, "--slow", 0.05)
    wait_for(started[1], 5)
    started[1].terminate()
    ends = finish(started)
    assert [code for code, _ in ends] == [143, 143], ends
    saved = checkpoint.load(tmp_path / "run" / "last.safetensors", kind="training")[1]["iteration"]
    assert saved % 4 == 0  # the processes agree on stopping every log_every iterations
    assert all(f"stopped after iteration {saved} of 400; everything is saved" in said for _, said in ends)


SINUSOID = (
    "train", "--preset", "sinusoid", "--iterations", "12", "--tasks", "5", "--checkpoint-every", "4",
    "--log-every", "3", "--validate-every", "6", "--validate-tasks", "10", "--test-tasks", "10", "--quiet",
    "--no-tensorboard", "--device", "cpu",
)  # fmt: skip


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS, timeout=120)


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Process 1 dies in iteration 9, after the checkpoint of iteration 8; torchrun restarts both."""
    dying = ("-m", "reliability.distributed_run", "--dying", 1, 9)
    lost = torchrun("--nproc-per-node=2", "--max-restarts=1", *dying, *SINUSOID, "--out", tmp_path / "run")
    assert lost.returncode == 0, lost.stderr
    assert lost.stderr.count("process 1 kills itself") == 1, lost.stderr
    assert "expected an answer of all 2 processes" in lost.stderr
    assert "terminate called" not in lost.stderr  # process 0 ends by itself and says why
    whole = torchrun("--nproc-per-node=2", "-m", "signmaml", *SINUSOID, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    # The same number of processes gives the same bits.
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for name in ("best.safetensors", "last.safetensors"):  # not their bytes: the headers name the run's folder
        ours, theirs = (checkpoint.load(tmp_path / run / name)[0] for run in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.slow
def test_without_restarts_a_death_is_a_failure_that_says_what_to_do(tmp_path: Path) -> None:
    dying = ("-m", "reliability.distributed_run", "--dying", 0, 9)
    lost = torchrun("--nproc-per-node=2", *dying, *SINUSOID, "--out", tmp_path / "run")
    assert lost.returncode == 1
    assert "terminate called" not in lost.stderr, lost.stderr
    assert "signmaml, process 1: ProcessLost: distributed: expected an answer of all 2 processes" in lost.stderr
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 8


@pytest.mark.slow
def test_the_command_starts_its_processes_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "signmaml", *SINUSOID, "--distributed", "--processes", "2", "--out=run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 12 iterations") == 1
    assert (tmp_path / "run" / "result.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Without other processes


def test_shares_cover_every_task_once() -> None:
    for size in range(1, 9):
        for tasks in range(0, 30):
            shares = [list(distributed.Group(rank, size).share_of(tasks)) for rank in range(size)]
            assert [task for share in shares for task in share] == list(range(tasks))
            lengths = [len(share) for share in shares]
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "expected torchrun's variables .* found no MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "expected a number in WORLD_SIZE, found 'two'"),
        ({"RANK": "5"}, "expected 0 <= RANK < WORLD_SIZE, found RANK 5 and WORLD_SIZE 2"),
    ],
)
def test_a_wrong_environment(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**good, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.join("cpu")


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--processes", "2"], {}, "--processes: expected --distributed with it, found none"),
        (["--distributed", "--processes", "0"], {}, "--processes: expected an integer >= 1"),
        (["--distributed"], {}, "--processes: expected an integer >= 1 .* found 0"),
        (["--distributed", "--processes", "1", "--max-restarts", "-1"], {}, "--max-restarts: expected an integer >= 0"),
        ([], {"TORCHELASTIC_MAX_RESTARTS": "1"}, "--out: expected a run folder with --max-restarts"),
        (["--out", "x", "--overwrite"], {"TORCHELASTIC_MAX_RESTARTS": "1"}, "--overwrite: expected none"),
    ],
)
def test_options_that_contradict(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    import re

    from signmaml.cli import main

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--preset", "sinusoid", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
