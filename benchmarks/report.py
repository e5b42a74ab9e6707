"""Result files to the README's tables: python benchmarks/report.py [--write]

Everything between the markers in README.md comes from benchmarks/results/*.json and is never typed. Without --write the
tables are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: benchmarks/report.py --write -->", "<!-- end measured -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(kind: str) -> list[dict[str, Any]]:
    """All results of one benchmark, by file name."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if result["benchmark"] == kind]


def machine(result: dict[str, Any]) -> str:
    """Where a result was measured."""
    return f"{result['device']}, torch {result['torch']}, {result['threads']} threads, commit {result['commit']}"


def training(results: list[dict[str, Any]]) -> str:
    """Test accuracies with their whole protocol."""
    rows = []
    for result in results:
        test = result["test"]
        accuracy = f"{100 * test['mean']:.2f} ± {100 * test['ci95']:.2f} %"
        protocol = (
            f"{test['ways']}-way {test['shots']}-shot, {test['queries']} queries a class, {test['tasks']} test tasks, "
            f"{test['test_steps']} test steps, BatchNorm: {test['batch_norm']}, seed {test['seed']}"
        )
        time = f"{result['iterations']} iterations, {result['train_seconds'] / 60:.1f} min"
        rows.append([f"`{result['command']}`", accuracy, protocol, time, result["device"]])
    return table(["command", "test accuracy (95% t-interval)", "protocol", "training", "on"], rows)


def meta_steps(result: dict[str, Any]) -> str:
    """Milliseconds of a meta-step, and how many times faster than the sequential loop."""
    names = list(dict.fromkeys(name for workload in result["workloads"].values() for name in workload["timings"]))
    rows = []
    for name in names:
        cells = []
        for workload in result["workloads"].values():
            timing, base = workload["timings"].get(name), workload["timings"]["sequential loop"]
            cells.append(
                "-" if timing is None else f"{timing['median_ms']:.0f} ({base['median_ms'] / timing['median_ms']:.2f}x)"
            )
        rows.append([name, *cells])
    return table(["ms a meta-step (times the loop's speed)", *result["workloads"]], rows)


def kernels(result: dict[str, Any]) -> str:
    """GB/s of the operators."""
    names = list(next(iter(result["sizes"].values())))
    rows = [
        [size.replace("x", " x "), *(f"{row[name]['gb_per_s']:.1f}" for name in names)]
        for size, row in result["sizes"].items()
    ]
    return table(["T x P, GB/s", *names], rows)


def sinusoid(result: dict[str, Any]) -> str:
    """Errors of both methods for every kind of inner rates, and with the kind that each chose by validation."""
    kinds = {"constant": "constant rate", "parameter": "learned, a parameter and step", "best": "chosen by validation"}
    rows = []
    for shots, of_kind in result["results"].items():
        for method in ("sign-maml", "fo-maml"):
            found = [of_kind[kind][method] for kind in kinds]
            rows.append([shots, method, *(f"{each['test_mse']:.3f} ± {each['test_ci95']:.3f}" for each in found)])
    return table(["test MSE (95% t-interval)", "inner rates:", *kinds.values()], rows)


def memory(result: dict[str, Any]) -> str:
    """MiB of the adapted models and at the peak."""

    def mib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.0f}"

    rows = [[case, mib(found["held_bytes"]), mib(found["peak_bytes"])] for case, found in result["cases"].items()]
    return table(["MiB", "adapted models of all tasks", "peak of the call"], rows)


def section() -> str:
    """The README's section."""
    parts = []
    if trainings := read("training"):
        parts += ["Training, from a command to a number:", training(trainings)]
        parts.append("![training and validation accuracy over the iterations, Omniglot](docs/omniglot_curves.png)")
    for result in read("meta_step"):
        parts += [
            "Meta-steps of sign-maml, K = 5, median (`python benchmarks/bench_meta_step.py` describes the workloads); "
            "the sequential loop is the way learn2learn and the official code go, in plain PyTorch:",
            meta_steps(result),
            f"({machine(result)})",
        ]
    for result in read("kernels"):
        parts += [
            "Operators on flat buffers (`python benchmarks/bench_kernels.py`); bytes that must move, counted once, so "
            "what fits the caches is faster than memory:",
            kernels(result),
            f"({machine(result)})",
        ]
    for result in read("sinusoid"):
        parts += [
            f"Regression of sine waves, {result['iterations']} meta-iterations of {result['tasks']} tasks and "
            f"{result['inner_steps']} inner steps for either method (`{result['command']}`):",
            sinusoid(result),
            "![fits before and after adaptation](docs/sinusoid_fits.png)",
        ]
    for result in read("memory"):
        parts += [
            f"Memory of {result['tasks']} tasks of {result['parameters']} parameters in full precision and as int8 "
            f"step counts (`{result['command']}`):",
            memory(result),
            "Counts hold adapted models in a quarter of the bytes. What a meta-step saves at its peak, it saves by "
            "working on one chunk of tasks after the other; the counts themselves add nothing to that.",
            f"({machine(result)})",
        ]
    parts.append(
        "Convolutional networks run on a CPU task by task, as in the loop; what the package adds there (NaN flags, "
        "NaN-safe signs) costs the difference."
    )
    parts.append("No GPU was at hand for this version: there are no GPU figures here, measured or modelled.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    if not arguments.write:
        print(section())
        return
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}")
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
