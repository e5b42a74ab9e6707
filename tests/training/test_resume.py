"""However a run is stopped, resuming it ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.programs.toy_run import toy_trainer
from signmaml import checkpoint
from signmaml.signals import SignalGuard, TrainingInterrupted
from signmaml.trainer import MetaTrainer

ITERATIONS = 17
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    toy_trainer(folder, ITERATIONS).fit()
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    """A training process that prints each iteration once it is done, and then pauses."""
    command = [sys.executable, "-m", "helpers.programs.toy_run", str(folder), str(ITERATIONS), "--slow", "0.05"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder.parent, env=environment)


def wait_for(process: subprocess.Popen[str], iteration: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(iteration):
            return
    raise AssertionError(f"the process ended before iteration {iteration}")


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    read = checkpoint.load
    assert read(found / "best.safetensors")[1]["inner_rates"] == read(expected / "best.safetensors")[1]["inner_rates"]


# Before the first checkpoint, and when metrics and validation are ahead of the last checkpoint, of iteration 10.
@pytest.mark.slow
@pytest.mark.parametrize("iteration", [2, 13])
def test_kill_9_and_resume_is_bitwise_the_same(tmp_path: Path, whole: Path, iteration: int) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(process, iteration)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    toy_trainer(folder, ITERATIONS).fit(resume=True)
    assert_same_run(folder, whole)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(process, 8)
    process.terminate()
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.wait() == 143
    assert f"--resume {folder}" in said
    saved = checkpoint.load(folder / "last.safetensors", kind="training")[1]["iteration"]
    assert saved >= 8 and f"stopped after iteration {saved} of {ITERATIONS}" in said
    assert not (folder / "result.json").exists()
    toy_trainer(folder, ITERATIONS).fit(resume=True)
    assert_same_run(folder, whole)
    assert (folder / "result.json").is_file()


@pytest.mark.slow
def test_interrupted_at_every_iteration_in_turn(tmp_path: Path) -> None:
    """A run that stops after each iteration and resumes in a new trainer equals one that is not interrupted."""
    reference = toy_trainer(tmp_path / "reference", 9)
    reference.fit()
    folder = tmp_path / "run"
    for stop in range(1, 10):
        trainer = toy_trainer(folder, 9)
        number = (signal.SIGINT, signal.SIGTERM)[stop % 2]
        interrupt_at(trainer, stop, number)
        if stop < 9:
            with pytest.raises(TrainingInterrupted) as caught:
                trainer.fit(resume=stop > 1)
            assert caught.value.exit_code == 128 + number
        else:
            trainer.fit(resume=True)
    assert_same_run(folder, tmp_path / "reference")


def interrupt_at(trainer: MetaTrainer, iteration: int, number: signal.Signals) -> None:
    step = trainer._train_step

    def step_and_signal() -> None:
        step()
        if trainer.iteration == iteration < trainer.config.iterations:
            os.kill(os.getpid(), number)

    trainer._train_step = step_and_signal  # type: ignore[method-assign]


def test_resume_of_a_finished_run_only_tests_again(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path / "run", 6)
    result = first.fit()
    second = toy_trainer(tmp_path / "run", 6)
    second._train_step = None  # type: ignore[method-assign, assignment]  # not to be called
    again = second.fit(resume=True)
    assert again.test == result.test and again.best == result.best and again.iterations == 6


def test_a_longer_run_continues_a_finished_one(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", 6, schedule="constant").fit()
    longer = toy_trainer(tmp_path / "run", 12, schedule="constant")
    longer.fit(resume=True)
    whole = toy_trainer(tmp_path / "whole", 12, schedule="constant")
    whole.fit()
    for ours, theirs in zip(longer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert longer.run.read_config().iterations == 12


def test_a_signal_during_the_test_stops_it(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 3, test_tasks=400)
    evaluate = trainer.test

    def test_after_signal(progress: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(progress)  # type: ignore[arg-type]

    trainer.test = test_after_signal  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingInterrupted, match="after iteration 3 of 3"):
        trainer.fit()
    assert not trainer.run.result.exists()


@pytest.mark.slow
def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(process, 1)
    with pytest.raises(BlockingIOError, match=f"in use by process {process.pid}"):
        toy_trainer(folder, ITERATIONS).fit(resume=True)
    process.kill()
    process.wait()


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with SignalGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
