"""A toy training run in one of several processes: python -m reliability.distributed_run FOLDER ITERATIONS [options].

It is started with torchrun's variables in the environment. It uses float64 and FO-MAML so that runs with different
numbers of processes stay close although they sum in different orders: a sign step would turn a rounding error near 0
into a full step.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from helpers.cases.toy_images import toy_images
from helpers.programs.toy_run import DropoutNet, toy_config
from signmaml import distributed
from signmaml.episodes import EpisodeSampler
from signmaml.signals import TrainingInterrupted
from signmaml.trainer import MetaTrainer

TESTS = Path(__file__).resolve().parents[1]


class DoubleSampler:
    """Episodes in float64. Every task whose number is in `poisoned` holds a NaN."""

    def __init__(self, split: str, tasks: int, poisoned: Sequence[int] = ()) -> None:
        self._sampler = EpisodeSampler(toy_images(split), ways=3, shots=1, queries=3, tasks=tasks, seed=3)
        self.tasks, self._poisoned = tasks, poisoned

    def draw(self, iteration: int) -> tuple[Tensor, ...]:
        return self.draw_tasks(iteration * self.tasks, self.tasks)

    def draw_tasks(self, first_task: int, tasks: int) -> tuple[Tensor, ...]:
        support_x, support_y, query_x, query_y = self._sampler.draw_tasks(first_task, tasks)
        support_x = support_x.double()
        for task in self._poisoned:
            if first_task <= task < first_task + tasks:
                support_x[task - first_task, 0] = torch.nan
        return support_x, support_y, query_x.double(), query_y


def make_trainer(
    folder: Path | str, iterations: int, *, tasks: int = 7, poisoned: Sequence[int] = (), **options: Any
) -> MetaTrainer:
    """Trains with seven tasks by default, so that two or three processes get uneven shares."""
    changes = {"tasks": tasks, "schedule": "constant", "nonfinite": "skip", "method": "fo-maml"}
    changes |= options.pop("changes", {})
    torch.manual_seed(11)
    trainer = MetaTrainer(
        toy_config(iterations, **changes),
        model=DropoutNet().double(),
        out=folder,
        progress=False,
        train=DoubleSampler("train", tasks, poisoned),
        val=DoubleSampler("val", tasks),
        test=DoubleSampler("test", tasks),
        **options,
    )
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    return trainer


def adapting(rule: str) -> dict[str, Any]:
    """Changes of the configuration for rates that are adapted online, fast enough to see within a few iterations."""
    hyper = {"learn_inner_lr": "none", "inner_hyper_lr": 1e-3, "outer_hyper_lr": 1e-4}
    return {} if rule == "none" else {"adapt_rates": rule, **hyper}


def start(processes: int, *words: object, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts this program in several processes on this machine, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reliability.distributed_run", *map(str, words)]
    started = []
    for rank in range(processes):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TESTS),
        }
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS,  # not the checkout, whose sources without a native module would hide the installed package
            env={**os.environ, **variables, **environment},
        )
        started.append(process)
    return started


def finish(started: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """Waits for the processes to end; returns the exit code and stderr of each rank."""
    ends = []
    for process in started:
        _, said = process.communicate(timeout=timeout)
        ends.append((process.returncode, said))
    return ends


def wait_for(process: subprocess.Popen[str], iteration: int) -> None:
    """Returns once a process has printed an iteration."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(iteration):
            return
    raise AssertionError(f"the process ended before iteration {iteration}: {process.communicate()[1]}")


def main() -> NoReturn:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("iterations", type=int)
    parser.add_argument("--tasks", type=int, default=7)
    parser.add_argument("--poisoned", type=int, nargs="*", default=[])
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--nonfinite", default="skip")
    parser.add_argument("--method", default="fo-maml")
    parser.add_argument("--adapt-rates", default="none")
    parser.add_argument("--multi-step-loss", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--own-weights", action="store_true", help="start from weights that differ by rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    group = distributed.join("cpu", options.timeout)
    trainer = make_trainer(
        options.folder,
        options.iterations,
        tasks=options.tasks,
        poisoned=options.poisoned,
        group=group,
        changes={
            "nonfinite": options.nonfinite,
            "method": options.method,
            "multi_step_loss": options.multi_step_loss,
            **adapting(options.adapt_rates),
        },
    )
    if options.own_weights and not group.first:
        with torch.no_grad():
            trainer.model.features.weight.add_(1.0)
    step = trainer._train_step

    def slow_step() -> None:
        step()
        print(trainer.iteration, flush=True)
        time.sleep(options.slow)

    trainer._train_step = slow_step  # type: ignore[method-assign]
    try:
        trainer.fit(resume=options.resume)
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr, flush=True)
        distributed.leave(interruption.exit_code)
    except (distributed.ProcessLost, FloatingPointError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        distributed.leave(1)
    group.close()
    distributed.leave(0)


def dying_command(words: Sequence[str]) -> int:
    """Runs the command `signmaml`; process RANK kills itself in iteration N unless it was restarted."""
    rank, iteration = int(words[0]), int(words[1])
    step = MetaTrainer._train_step

    def dying_step(trainer: MetaTrainer) -> None:
        if trainer.group.rank == rank and trainer.iteration == iteration and not distributed.restarted():
            print(f"process {rank} kills itself", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        step(trainer)

    MetaTrainer._train_step = dying_step  # type: ignore[method-assign]
    from signmaml.cli import main as command

    return command(words[2:])


if __name__ == "__main__":
    sys.exit(dying_command(sys.argv[2:]) if sys.argv[1] == "--dying" else main())
