"""After any fault around a run, what it had saved is intact, and resuming ends with the same bits."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import signmaml_ext
from helpers.programs.toy_run import toy_trainer
from reliability.distributed_run import make_trainer
from reliability.faults import Steps, die, in_child, no_space
from signmaml import checkpoint
from signmaml.cli import main
from signmaml.loggers import read_metrics
from signmaml.trainer import MetaTrainer

ITERATIONS = 6
PERIODS = {"checkpoint_every": 2, "validate_every": 3, "log_every": 2, "validate_tasks": 2, "test_tasks": 2}


def trainer(folder: Path) -> MetaTrainer:
    return toy_trainer(folder, ITERATIONS, **PERIODS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder).fit()
    return folder


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list(found.glob(".*.tmp"))


def saved_iteration(folder: Path) -> int:
    """The iteration of the state on disk, which must be complete; 0 if there is none."""
    path = folder / "last.safetensors"
    return checkpoint.load(path, kind="training")[1]["iteration"] if path.exists() else 0


def steps_of_a_run(folder: Path) -> list[str]:
    steps = Steps(None, die)
    with pytest.MonkeyPatch.context() as patch:
        steps.install(patch)
        trainer(folder).fit()
    return steps.taken


def step_numbers(folder: Path, every: int) -> Iterator[int]:
    """Every `every`-th step of a run."""
    taken = steps_of_a_run(folder)
    assert {"write", "fsync", "replace", "open metrics.jsonl"} <= set(taken)
    assert sum(step == "replace" for step in taken) >= 7
    yield from range(0, len(taken), every)


def check_killed_at(folder: Path, whole: Path, number: int) -> None:
    """Kills a run at one step: what is saved is complete, and the resumed run ends with the same bits."""

    def run_and_die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            Steps(number, die).install(patch)
            trainer(folder).fit()

    assert in_child(run_and_die) == -signal.SIGKILL
    saved = saved_iteration(folder)
    assert saved in (0, 2, 4, 6)
    if (folder / "best.safetensors").exists():
        checkpoint.load(folder / "best.safetensors", kind="weights")
    if (folder / "result.json").exists():
        assert (folder / "result.json").read_bytes()
    began = (folder / "config.yaml").exists()
    trainer(folder).fit(resume=began)
    assert_same_run(folder, whole)


def check_no_space_at(folder: Path, whole: Path, number: int) -> None:
    """Reports a full disk at one step: the run's OSError says so, and nothing saved is lost."""
    with pytest.MonkeyPatch.context() as patch:
        Steps(number, no_space).install(patch)
        with pytest.raises(OSError, match="No space left on device") as caught:
            trainer(folder).fit()
    assert caught.value.errno == errno.ENOSPC
    saved_iteration(folder)
    trainer(folder).fit(resume=(folder / "config.yaml").exists())
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_killed_at, check_no_space_at])
def test_a_fault_at_some_steps(tmp_path: Path, whole: Path, check: Any) -> None:
    for number in step_numbers(tmp_path / "count", every=11):
        check(tmp_path / str(number), whole, number)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_killed_at, check_no_space_at])
def test_a_fault_at_every_step(tmp_path: Path, whole: Path, check: Any) -> None:
    for number in step_numbers(tmp_path / "count", every=1):
        check(tmp_path / str(number), whole, number)
        shutil.rmtree(tmp_path / str(number))


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"mounting is not allowed here ({mount.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(tiny_disk: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk really is full while checkpoints are written; with room again the run resumes."""
    ballast = tiny_disk / "ballast"
    run = trainer(tiny_disk / "run")
    step = run._train_step

    def fill_up() -> None:
        step()
        if run.iteration == 3:
            with open(ballast, "wb") as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(1024))
                    file.flush()

    run._train_step = fill_up  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"No space left on device.*iteration 2|No space left on device"):
        run.fit()
    assert saved_iteration(tiny_disk / "run") == 2
    ballast.unlink()
    trainer(tiny_disk / "run").fit(resume=True)
    assert_same_run(tiny_disk / "run", whole)


def test_a_file_size_limit(tmp_path: Path, whole: Path) -> None:
    """Writing fails in the middle of a file, as it does with quotas."""

    def limited() -> None:
        limit = (whole / "last.safetensors").stat().st_size // 2
        run = trainer(tmp_path / "run")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large"):
            run.fit()

    assert in_child(limited) == 0
    assert saved_iteration(tmp_path / "run") == 0 and not list((tmp_path / "run").glob(".*.tmp"))
    trainer(tmp_path / "run").fit(resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_read_only_folder(tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    words = ["train", "--preset", "sinusoid", "--iterations", "2", "--quiet", "--no-tensorboard"]
    assert main([*words, "--out", str(tiny_disk / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("signmaml: ") and "Read-only file system" in said and str(tiny_disk / "run") in said


def test_a_full_disk_is_reported_with_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save = checkpoint.save

    def full(path: Path, *arguments: Any, **keywords: Any) -> None:
        if path.exists():
            no_space()
        save(path, *arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save", full)
    words = ["train", "--preset", "sinusoid", "--iterations", "9", "--checkpoint-every", "3", "--validate-every", "0"]
    assert main([*words, "--quiet", "--no-tensorboard", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "iteration 6 is not saved; the last good state is run/last.safetensors" in said


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def test_a_run_does_not_depend_on_the_clock(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks jump by years in both directions at every reading."""
    jumps = random.Random(0)
    for name in ("time", "monotonic", "perf_counter"):
        really = getattr(time, name)
        monkeypatch.setattr(time, name, lambda really=really: really() + jumps.uniform(-1e8, 1e8))
    run = trainer(tmp_path / "run")
    run._show_progress = True
    run.fit()
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder


@pytest.mark.slow
def test_the_second_command_in_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--preset", "sinusoid", "--no-tensorboard", "--out", str(tmp_path / "run")]
    long = [*words, "--iterations", "100000", "--log-every", "1", "--quiet"]
    first = subprocess.Popen([sys.executable, "-m", "signmaml", *long], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        for extra in ([], ["--overwrite"]):
            assert main([*words, "--iterations", "5", "--quiet", *extra]) == 2
            assert f"in use by process {first.pid}" in capsys.readouterr().err
        assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 2
        assert f"in use by process {first.pid}" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()


# ---------------------------------------------------------------------------------------------------------------------
# A NaN in one task of one step


def test_a_nan_task_is_left_out_and_reported(tmp_path: Path) -> None:
    """Task 1 of iteration 1 has a NaN; the step is that of the other six tasks."""
    run = make_trainer(tmp_path / "run", 4, poisoned=[8], changes={"test_tasks": 0, "validate_every": 0})
    run.fit()
    (record,) = read_metrics(run.run.metrics)
    assert record["nonfinite_tasks"] == 1
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_a_nan_task_stops_the_run_if_it_is_to(tmp_path: Path) -> None:
    changes = {"nonfinite": "raise", "checkpoint_every": 1, "test_tasks": 0, "validate_every": 0}
    run = make_trainer(tmp_path / "run", 4, poisoned=[15], changes=changes)
    with pytest.raises(FloatingPointError, match=r"tasks \[1\] \(nonfinite='raise'\)"):
        run.fit()
    assert saved_iteration(tmp_path / "run") == 2  # the state before the step of iteration 2


def test_a_nan_task_that_is_passed_on_does_not_reach_the_disk(tmp_path: Path) -> None:
    changes = {"nonfinite": "propagate", "checkpoint_every": 1, "test_tasks": 0, "validate_every": 0}
    run = make_trainer(tmp_path / "run", 4, poisoned=[15], changes=changes)
    with pytest.raises(FloatingPointError, match=r"turned NaN or Inf by iteration 3 .*nonfinite='skip'"):
        run.fit()
    assert saved_iteration(tmp_path / "run") == 2
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "last.safetensors").values())


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


class SmallMemory:
    """Makes calls of signmaml_ext with more than `fit` tasks run out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
        self.tasks: list[int] = []
        for name in ("meta_step", "evaluate"):
            monkeypatch.setattr(signmaml_ext, name, self._limited(getattr(signmaml_ext, name), fit))

    def _limited(self, really: Any, fit: int) -> Any:
        def call(model: Any, support_x: Any, *arguments: Any, **keywords: Any) -> Any:
            self.tasks.append(len(support_x))
            if len(support_x) > fit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")
            return really(model, support_x, *arguments, **keywords)

        return call


@pytest.mark.parametrize("fit", [1, 2, 3, 6])
def test_out_of_memory_goes_on_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    """Seven tasks at once do not fit. The run is the same up to the order of summation."""
    make_trainer(tmp_path / "whole", 4, poisoned=[8]).fit()
    memory = SmallMemory(monkeypatch, fit)
    make_trainer(tmp_path / "run", 4, poisoned=[8]).fit()
    # The size that fits is remembered: each size that does not is tried once in training and once per evaluation.
    sizes = [tasks for tasks in memory.tasks if tasks > fit]
    assert sizes.count(7) <= 3 and len(sizes) <= 9
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-12)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == len(
        read_metrics(tmp_path / "whole" / "metrics.jsonl")
    )


def test_one_task_that_does_not_fit_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_trainer(tmp_path / "run", 4)
    before = [p.clone() for p in run.model.parameters()]
    SmallMemory(monkeypatch, 0)
    expected = (
        r"memory: expected room for at least one task \(support \[3, 1, 16, 16\], query \[9, 1, 16, 16\]\) on cpu, "
        r"found too little: CUDA out of memory. Tried to allocate 20.00 GiB\.\. .*now 3 and 9.*halve one of them"
    )
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        run.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert all(p.grad is None for p in run.model.parameters())
