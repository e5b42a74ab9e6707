"""The paper's claims, retested: trains every method on every setting and compares them on the same test tasks.

  python benchmarks/evidence.py run --data-root DIR --work WORK    trains and tests whatever WORK does not hold yet
  python benchmarks/evidence.py status --work WORK                 what is done
  python benchmarks/evidence.py test --data-root DIR --work WORK   tests that came after a run was done
  python benchmarks/evidence.py times --data-root DIR --work WORK --out OUT    milliseconds of an iteration, on a
                                                                   machine that does nothing else
  python benchmarks/evidence.py collect --work WORK --out OUT      result files from what is done
  python benchmarks/evidence.py example --work WORK --out examples   the weights of one learner, without any path

DIR holds the folders omniglot, fc100, cifar-fs and mini-imagenet, as far as the selected jobs need them. WORK keeps
every run. A run that was stopped by SIGTERM, or by a crash, goes on where it was, with bitwise the same result for the
same number of threads (cores over --jobs).
`evidence_plan.py` has the settings, the methods and the rule that chooses rates; docs/evidence.md explains them.
`--select PATTERN ...` takes only jobs whose names match, such as 'search/*' and 'runs/fc100_5w1s/*', in this order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import evidence_collect as collect
import evidence_plan as plan
import evidence_scores as scores
import harness
import torch
from evidence_plan import METHODS, SETTINGS, Job

from signmaml import checkpoint
from signmaml.building import load_images
from signmaml.config import TrainConfig
from signmaml.files import write_atomically
from signmaml.runs import RunFolder
from signmaml.signals import SignalGuard, TrainingInterrupted
from signmaml.trainer import MetaTrainer

DONE = "done.json"
TIMED_ITERATIONS, TIMED_ROUNDS = 40, 3
# The option that an action cannot do without, beside --work.
NEEDED = dict.fromkeys(("run", "job", "test", "times"), "data_root") | dict.fromkeys(("collect", "example"), "out")


def done(job: Job, work: Path) -> dict[str, Any] | None:
    """What a finished job left; None if it is not finished."""
    path = work / job.name / DONE
    return json.loads(path.read_text()) if path.is_file() else None


def best(trials: Iterable[Job], work: Path) -> dict[str, Any] | None:
    """The finished trial with the highest validation accuracy, the first of equal ones; None: one is not finished."""
    found = [done(job, work) for job in trials]
    finished = [each for each in found if each is not None]
    return max(finished, key=lambda each: each["validation"]) if len(finished) == len(found) else None


def chosen_rates(setting: str, method: str, work: Path, *, inner_only: bool = False) -> tuple[float, float] | None:
    """The inner and outer rate that the search of a base method found; None: it is not finished.

    With `inner_only`, the result of its first stage.
    """
    trials = plan.first_trials(setting, method)
    if not inner_only:
        trials += plan.second_trials(setting, method)
    found = best(trials, work)
    return None if found is None else (found["inner_lr"], found["outer_lr"])


def config_of(job: Job, work: Path) -> TrainConfig | None:
    """A job's configuration; None if the search that it waits for is not finished."""
    inner_lr, outer_lr = job.rates
    if inner_lr is None:
        setting = SETTINGS[job.setting]
        assert setting.search is not None, "a setting without a search has official rates"
        found = chosen_rates(setting.search, METHODS[job.method].base, work, inner_only=job.trial)
        if found is None:
            return None
        inner_lr, outer_lr = found[0], found[1] if outer_lr is None else outer_lr
    assert outer_lr is not None, "a job names both rates, the outer rate, or neither"
    return config_with(job, inner_lr, outer_lr)


def config_with(job: Job, inner_lr: float, outer_lr: float) -> TrainConfig:
    """A job's configuration with these rates."""
    config = SETTINGS[job.setting].config(job.method, inner_lr, outer_lr, job.seed).replace(**job.changes)
    if not job.trial:
        return config
    return config.replace(
        iterations=plan.SEARCH_ITERATIONS,
        validate_every=plan.SEARCH_ITERATIONS // plan.SEARCH_VALIDATIONS,
        validate_tasks=plan.SEARCH_TASKS,
    )


def with_data(config: TrainConfig, setting: str, data_root: Path) -> TrainConfig:
    """The configuration with the place of its setting's data."""
    folder = SETTINGS[setting].folder
    return config.replace(data_root=str(data_root / folder) if folder else None)


def check(jobs: Iterable[Job], work: Path) -> None:
    """Checks jobs before any starts.

    Raises:
        ValueError: A configuration is invalid, or a finished job had another one than the plan now says. Fields that
            one of them does not have are not compared.
    """
    for job in jobs:
        config_with(job, *(rate or 0.01 for rate in job.rates))
        left, now = done(job, work), config_of(job, work)
        if left is None or now is None:
            continue
        wanted = harness.public(now.to_dict())
        changed = [name for name, value in left["config"].items() if name in wanted and wanted[name] != value]
        if changed:
            raise ValueError(
                f"{job.name}: expected a run with the plan's {', '.join(changed)}, found another in {work / job.name}; "
                "move that folder away to run it anew"
            )


# ---- one job, in a process of its own ------------------------------------------------------------------------------


def train_and_test(job: Job, work: Path, data_root: Path) -> None:
    """Trains a job, goes on with it if it was stopped, tests its learner, and marks it as done.

    Raises:
        TrainingInterrupted: On SIGINT or SIGTERM, with everything saved.
    """
    config = config_of(job, work)
    if config is None:
        raise ValueError(f"job: expected one whose search is finished, found {job.name}")
    folder = work / job.name
    origin = {"commit": harness.commit(), "torch": torch.__version__, "processor": harness.processor()}
    config = with_data(config, job.setting, data_root)
    trainer = MetaTrainer(config, out=folder, progress=False)
    try:
        ended = trainer.fit(resume=trainer.run.holds_run())
        found = {"failed": None, "validation": ended.best.value, "best_iteration": ended.best.iteration}
        found |= {"iterations": ended.iterations, "train_seconds": round(ended.seconds, 1)}
    except FloatingPointError as error:
        # A rate so high that the weights turn NaN is an answer: the worst one.
        found = {"failed": str(error).split(";")[0], "validation": 0.0, "iterations": trainer.iteration}
    if not job.trial and found["failed"] is None:
        scores.save(folder / scores.FILE, answers(trainer, tests_of(job)))
    found |= {"inner_lr": config.inner_lr, "outer_lr": config.outer_lr, "backend": trainer.explanation.backend}
    found |= {**origin, "threads": torch.get_num_threads(), "config": harness.public(config.to_dict())}
    write_atomically(folder / DONE, json.dumps(found, indent=1) + "\n")


def tests_of(job: Job) -> dict[str, scores.Test]:
    """All tests of a job's learner."""
    setting = SETTINGS[job.setting]
    return scores.tests(setting, curves=setting.curves and job.seed == 0 and not job.changes)


def answers(trainer: MetaTrainer, tests: Mapping[str, scores.Test]) -> dict[str, Any]:
    """What a trainer's learner answers in tests, by their names."""
    images = load_images(trainer.config, "test")
    return {name: test(trainer, images) for name, test in tests.items()}


def test_again(jobs: Iterable[Job], work: Path, data_root: Path) -> None:
    """Adds to finished runs the tests that came later, by as many threads as the run had; changes nothing else."""
    for job in jobs:
        config, left = config_of(job, work), done(job, work)
        if job.trial or config is None or left is None or left["failed"] is not None:
            continue
        file = work / job.name / scores.FILE
        known = scores.load(file)
        missing = {name: test for name, test in tests_of(job).items() if name not in known}
        if missing:
            torch.set_num_threads(left["threads"])
            trainer = MetaTrainer(with_data(config, job.setting, data_root), out=work / job.name, progress=False)
            trainer.load_weights(trainer.run.best)
            scores.save(file, known | answers(trainer, missing))
        print(f"{job.name}: {', '.join(missing) or 'nothing new'}", flush=True)


# ---- all jobs ------------------------------------------------------------------------------------------------------


def selected(patterns: Sequence[str]) -> list[Job]:
    """The jobs whose names match one of the patterns: those of the first pattern first, each in the plan's order.

    Raises:
        ValueError: None does.
    """
    jobs = list(plan.jobs())
    matching = [job for pattern in patterns for job in jobs if fnmatchcase(job.name, pattern)]
    found = list({job.name: job for job in matching}.values())
    if not found:
        names = sorted({job.name.rsplit("/", 1)[0] for job in plan.jobs()})
        raise ValueError(f"--select: expected patterns of job names such as {names[0]}/*, found {list(patterns)}")
    return found


def run_all(waiting: list[Job], work: Path, data_root: Path, at_once: int) -> int:
    """Runs jobs in processes of their own until all are done, one failed, or a signal came.

    Returns:
        The exit code: 0, 1 after a failure, 128 + the signal's number after a signal.
    """
    waiting = [job for job in waiting if done(job, work) is None]
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    running: dict[subprocess.Popen[bytes], Job] = {}
    code, told = 0, False
    with SignalGuard() as guard, _ended(running):
        while running or (waiting and code == 0):
            if guard.received is not None and not told:
                code, told = 128 + guard.received, True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            while code == 0 and len(running) < at_once and (job := _next(waiting, work)) is not None:
                waiting.remove(job)
                running[_started(job, work, data_root, threads)] = job
            if not running and waiting and code == 0:
                print(f"{len(waiting)} jobs wait for a search that is not selected, such as {waiting[0].name}")
                return 1
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if process.returncode == 0:
                    print(f"{time.strftime('%H:%M:%S')} {job.name}: {summary(job, work)}", flush=True)
                elif guard.received is None:
                    print(f"{job.name} failed: see {work / job.name / 'log.txt'}", flush=True)
                    code = 1
            time.sleep(0.2)
    return code


@contextlib.contextmanager
def _ended(running: Mapping[subprocess.Popen[bytes], Job]) -> Iterator[None]:
    """Whatever happens, no job outlives this."""
    try:
        yield
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()


def _next(waiting: Sequence[Job], work: Path) -> Job | None:
    return next((job for job in waiting if config_of(job, work) is not None), None)


def _started(job: Job, work: Path, data_root: Path, threads: int) -> subprocess.Popen[bytes]:
    folder = work / job.name
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "job", job.name, "--work", str(work), "--data-root", str(data_root)]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen([*words, "--threads", str(threads)], stdout=log, stderr=log, start_new_session=True)


def summary(job: Job, work: Path) -> str:
    """One line about a finished job."""
    found = done(job, work)
    assert found is not None
    if found["failed"] is not None:
        return found["failed"]
    text = f"validation {100 * found['validation']:.2f}%, {found['train_seconds']:.0f} s"
    if not (work / job.name / scores.FILE).is_file():
        return text
    name = f"test_batch_q{SETTINGS[job.setting].test_queries[0]}"
    answers = SETTINGS[job.setting].fields["ways"] * SETTINGS[job.setting].test_queries[0]
    return f"{text}, test {100 * scores.load(work / job.name / scores.FILE)[name].mean() / answers:.2f}%"


# ---- times ---------------------------------------------------------------------------------------------------------


def times(names: Sequence[str], data_root: Path, work: Path) -> dict[str, dict[str, harness.Summary]]:
    """Milliseconds of an iteration by setting and method: drawing the tasks, the meta-step and the outer step.

    Methods take turns, TIMED_ROUNDS times, every other round in reverse. A method whose search is not finished is left
    out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        setting = SETTINGS[name]
        configs = {method: config_of(plan.run_of(name, method, 0), work) for method in setting.methods}
        samples: dict[str, list[float]] = {method: [] for method, config in configs.items() if config is not None}
        for number in range(TIMED_ROUNDS):
            for method in list(samples)[:: -1 if number % 2 else 1]:
                config = configs[method]
                assert config is not None
                short = with_data(config, name, data_root).replace(iterations=TIMED_ITERATIONS, validate_every=0)
                with tempfile.TemporaryDirectory() as folder:
                    ended = MetaTrainer(short, out=Path(folder) / "run", progress=False).fit()
                samples[method].append(1e3 * ended.seconds / TIMED_ITERATIONS)
        found[name] = {method: harness.Summary.of(values) for method, values in samples.items()}
        print(name, {method: round(each.median, 1) for method, each in found[name].items()}, flush=True)
    return found


# ---- the command line ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "status", "test", "times", "collect", "example", "job"])
    parser.add_argument("name", nargs="?", help="the job's name, for 'job' (which 'run' calls)")
    parser.add_argument("--work", type=Path, required=True, metavar="WORK", help="folder that keeps every run")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets' folders")
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder for the result files (JSON)")
    parser.add_argument("--select", nargs="+", default=["*"], metavar="PATTERN", help="names of jobs, with wildcards")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="jobs at a time; default: cores")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    needed = NEEDED.get(arguments.action)
    if needed is not None and getattr(arguments, needed) is None:
        parser.error(f"{arguments.action} needs --{needed.replace('_', '-')}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, found {arguments.jobs}")
    if arguments.action == "job":
        return _one(arguments)
    if arguments.action == "example":
        print(write_example(arguments.work, arguments.out))
        return 0
    try:
        found = selected(arguments.select)
        if arguments.action in ("run", "test", "collect"):
            check(found, arguments.work)
    except ValueError as error:
        parser.error(str(error))
    if arguments.action == "run":
        return run_all(found, arguments.work, arguments.data_root, arguments.jobs)
    if arguments.action == "status":
        for job in found:
            print(f"{job.name}: {'-' if done(job, arguments.work) is None else summary(job, arguments.work)}")
        return 0
    if arguments.action == "test":
        test_again(found, arguments.work, arguments.data_root)
        return 0
    names = [name for name in SETTINGS if any(job.setting == name and not job.trial for job in found)]
    if arguments.action == "times":
        write_times(names, arguments)
    else:
        write_results(names, arguments)
    return 0


def write_times(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """The result file of `times`."""
    stamp = harness.stamp(torch.device("cpu")) | {
        "command": "python benchmarks/evidence.py times --data-root DIR --work WORK --out DIR"
    }
    found = times(names, arguments.data_root, arguments.work)
    titles = {name: SETTINGS[name].title for name in found}
    harness.write(
        arguments.out / "times.json", {"benchmark": "evidence_times", **stamp, "titles": titles, "times": found}
    )


def write_results(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """A result file for each setting of which something is tested."""
    command = "\n".join(
        (
            "python benchmarks/evidence.py run --data-root DIR --work WORK",
            "python benchmarks/evidence.py collect --work WORK --out DIR",
        )
    )
    stamp = harness.stamp(torch.device("cpu")) | {"command": command}

    def left(job: Job) -> dict[str, Any] | None:
        return done(job, arguments.work)

    for name in names:
        found = collect.of_setting(name, arguments.work, left)
        if found is not None:
            harness.write(arguments.out / f"{name}.json", {"benchmark": "evidence", **stamp, **found})
    causes = collect.causes(arguments.work, left)
    if causes is not None:
        harness.write(arguments.out / "causes.json", {"benchmark": "evidence_causes", **stamp, **causes})


def write_example(work: Path, out: Path) -> Path:
    """The weights of the EXAMPLE run with the best validation, as a file for everybody; returns where it is."""
    found = {seed: done(plan.run_of(*plan.EXAMPLE, seed), work) for seed in plan.SEEDS}
    validations = {seed: each["validation"] for seed, each in found.items() if each is not None}
    if not validations:
        raise SystemExit(f"example: expected a finished run of {' '.join(plan.EXAMPLE)}, found none in {work}")
    seed = max(validations, key=lambda seed: validations[seed])
    run = RunFolder(work / plan.run_of(*plan.EXAMPLE, seed).name)
    tensors, metadata = checkpoint.load(run.best, kind="weights")
    metadata["config"] |= {"data_root": None, "out": None}
    kept = {key: value for key, value in metadata.items() if key not in ("kind", "version")}
    place = out / f"{plan.EXAMPLE[0]}.safetensors"
    checkpoint.save(place, tensors, kind="weights", metadata=kept)
    return place


def _one(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    job = {job.name: job for job in plan.jobs()}[arguments.name]
    try:
        train_and_test(job, arguments.work, arguments.data_root)
    except TrainingInterrupted as stopped:
        print(stopped)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
