"""A real call of meta_step, saved and replayed under a profiler.

  python benchmarks/capture.py save FILE [--call N] -- train --preset omniglot --data-root DIR
      runs `signmaml` with the arguments after --, saves the model and the arguments of its N-th meta_step, and stops
  python benchmarks/capture.py workload FILE --workload A
      saves the call of a workload of bench_meta_step.py instead
  python benchmarks/capture.py replay FILE [--calls 10]
      repeats that call and prints its time; profile_nsys.sh and profile_ncu.sh run this. On CUDA the profiler is on
      only for the timed calls (cudaProfilerStart). On the CPU: perf record -- python ... replay FILE

A file contains a pickled module: replay only files that you saved yourself.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from workloads import WORKLOADS

import signmaml_ext
from signmaml import cli


class Saved(BaseException):
    """Ends the program that made the call. A BaseException, so that handlers of ordinary errors do not catch it."""


def save(path: Path, call: int, words: list[str]) -> None:
    """Runs a command of `signmaml` up to its N-th meta-step."""
    original = signmaml_ext.meta_step
    seen = 0

    def recorder(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen < call:
            return original(*args, **options)
        write(path, dict(inspect.signature(original).bind(*args, **options).arguments))
        raise Saved

    try:
        with mock.patch.object(signmaml_ext, "meta_step", recorder):
            code = cli.main(words)
    except Saved:
        return
    raise SystemExit(f"the command ended (exit {code}) after {seen} calls of meta_step, before number {call}")


def write(path: Path, arguments: dict[str, Any]) -> None:
    """Saves the arguments of one call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, path)
    shapes = {name: list(v.shape) for name, v in arguments.items() if isinstance(v, torch.Tensor)}
    print(f"saved {path}: {type(arguments['model']).__name__}, {shapes}")


def of_workload(path: Path, workload: str, device: torch.device) -> None:
    """Saves the call that bench_meta_step.py times for a workload."""
    chosen = WORKLOADS[workload]
    problem = chosen.problem(tasks=chosen.tasks, steps=5, device=device)
    names = ("support_x", "support_y", "query_x", "query_y")
    options = {"inner_lr": problem.inner_lr, "inner_steps": problem.steps, "loss": problem.loss}
    write(path, {"model": problem.model, **dict(zip(names, problem.data, strict=True)), **options})


def replay(path: Path, calls: int, backend: str | None) -> None:
    """Repeats the saved call and prints its time."""
    arguments = torch.load(path, weights_only=False)
    if backend is not None:
        arguments["backend"] = backend
    model, device = arguments["model"], arguments["support_x"].device

    def once() -> str:
        model.zero_grad()
        return signmaml_ext.meta_step(**arguments).backend

    for _ in range(3):
        used = once()
    on_cuda = device.type == "cuda"
    times = []
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
    for _ in range(calls):
        began = time.perf_counter()
        once()
        if on_cuda:
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) * 1e3)
    if on_cuda:
        torch.cuda.profiler.stop()
    found = harness.Summary.of(times)
    print(f"backend {used}: {found.median:.3f} ms ({found.low:.3f} .. {found.high:.3f}), {calls} calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    saving = actions.add_parser("save", usage="%(prog)s [--call N] FILE -- COMMAND OF signmaml")
    saving.add_argument("--call", type=int, default=2, help="which call; a trainer's first is on one task, to try")
    making = actions.add_parser("workload")
    making.add_argument("--workload", choices=list(WORKLOADS), default="A")
    making.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    replaying = actions.add_parser("replay")
    replaying.add_argument("--calls", type=int, default=10)
    replaying.add_argument("--backend", help="instead of the one that was asked for")
    for action in (saving, making, replaying):
        action.add_argument("file", type=Path)
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    command = words[cut + 1 :]
    arguments = parser.parse_args(words[:cut])
    if arguments.action == "save":
        save(arguments.file, arguments.call, command)
    elif arguments.action == "workload":
        of_workload(arguments.file, arguments.workload, torch.device(arguments.device))
    else:
        replay(arguments.file, arguments.calls, arguments.backend)


if __name__ == "__main__":
    main()
