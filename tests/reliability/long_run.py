"""A run that is killed at random moments and resumed: python -m reliability.long_run FOLDER ITERATIONS.

Run as a program it trains (or resumes) to the end, and notes its memory and CPU time every NOTE_EVERY iterations.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from signmaml.config import TrainConfig
from signmaml.loggers import read_metrics
from signmaml.trainer import MetaTrainer

TESTS = Path(__file__).resolve().parents[1]
NOTE_EVERY = 100


@dataclass(frozen=True)
class LongRun:
    """The outcome of a long run.

    Attributes:
        iterations: Iterations of the run.
        kills: Number of SIGKILLs that ended its process.
        records_expected: Number of records that metrics.jsonl must have.
        records_found: Number of different records that it has.
        same_as_uninterrupted: Whether metrics and weights are bitwise those of an uninterrupted run.
        memory_growth_mib: Median resident memory of the uninterrupted process, last fifth minus second fifth.
        rate_change: Iterations per CPU second in the last fifth over those in the second, minus 1.
    """

    iterations: int
    kills: int
    records_expected: int
    records_found: int
    same_as_uninterrupted: bool
    memory_growth_mib: float
    rate_change: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def config_of(iterations: int) -> TrainConfig:
    return TrainConfig(
        data="sinusoid",
        model="mlp",
        hidden=(8, 8),
        shots=3,
        queries=3,
        tasks=2,
        inner_steps=1,
        iterations=iterations,
        log_every=50,
        checkpoint_every=100,
        validate_every=500,
        validate_tasks=4,
        test_tasks=4,
        tensorboard=False,
        device="cpu",
        backend="cpu",
        schedule="constant",
    )


def resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(folder: Path, iterations: int) -> None:
    """Trains to the end; writes one line of memory and CPU time for every NOTE_EVERY iterations."""
    torch.set_num_threads(1)
    trainer = MetaTrainer(config_of(iterations), out=folder, progress=False)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    step = trainer._train_step
    notes = open(f"{folder}.notes", "a", encoding="ascii")  # noqa: SIM115 (open until the process ends)

    def noted_step() -> None:
        step()
        if trainer.iteration % NOTE_EVERY == 0:
            print(trainer.iteration, resident_mib(), time.process_time(), file=notes, flush=True)

    trainer._train_step = noted_step  # type: ignore[method-assign]
    trainer.fit(resume=folder.exists())


def start(folder: Path, iterations: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reliability.long_run", str(folder), str(iterations)]
    return subprocess.Popen(command, env=environment, cwd=TESTS)


def notes_of(folder: Path) -> list[list[float]]:
    path = Path(f"{folder}.notes")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return [[float(word) for word in line.split()] for line in lines]


def long_run(place: Path, iterations: int, kills: int, seed: int = 0) -> LongRun:
    """Runs twice, once in one piece and once killed at random iterations, and compares the results."""
    whole, hit = place / "whole", place / "hit"
    assert start(whole, iterations).wait() == 0
    generator, killed = random.Random(seed), 0
    moments = sorted(generator.sample(range(NOTE_EVERY, iterations - NOTE_EVERY), kills))
    for moment in moments:
        process = start(hit, iterations)
        target = moment // NOTE_EVERY * NOTE_EVERY
        while process.poll() is None and not any(note[0] >= target for note in notes_of(hit)[-1:]):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert start(hit, iterations).wait() == 0
    records, expected = (read_metrics(folder / "metrics.jsonl") for folder in (hit, whole))
    same = all(
        (hit / name).read_bytes() == (whole / name).read_bytes() for name in ("metrics.jsonl", "best.safetensors")
    )
    config = config_of(iterations)
    return LongRun(
        iterations=iterations,
        kills=killed,
        records_expected=iterations // config.log_every + -(-iterations // config.validate_every),
        records_found=len({(record["iteration"], record["split"]) for record in records}),
        same_as_uninterrupted=same and records == expected,
        **_course(notes_of(whole)),
    )


def _course(notes: list[list[float]]) -> dict[str, float]:
    fifth = len(notes) // 5
    early, late = notes[fifth : 2 * fifth], notes[-fifth:]
    memory = [statistics.median(note[1] for note in part) for part in (early, late)]
    rates = [(part[-1][0] - part[0][0]) / (part[-1][2] - part[0][2]) for part in (early, late)]
    return {"memory_growth_mib": memory[1] - memory[0], "rate_change": rates[1] / rates[0] - 1}


if __name__ == "__main__":
    if sys.argv[1] == "--both":
        print(json.dumps(long_run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])).to_dict()))
    else:
        train(Path(sys.argv[1]), int(sys.argv[2]))
