"""Result files to the README's tables and the plots: python benchmarks/report.py [--write] [--results DIR]

Everything between the markers in README.md comes from benchmarks/results/*.json and is never typed. Without --write the
tables are printed. All results of a table are from one machine and one version of torch, or this ends with an error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: benchmarks/report.py --write -->", "<!-- end measured -->"
PLOTS = {"meta_step": "docs/meta_step_speed.png", "growth": "docs/meta_step_growth.png"}
TRAINING_PLOT = "docs/accuracy_over_time.png"
OURS, BASE = "signmaml_ext", "sequential loop"
SAME = ("device", "processor", "threads", "torch")

Result = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(kind: str, folder: Path = RESULTS) -> list[Result]:
    """All results of one benchmark, by file name.

    Raises:
        ValueError: They are not of one machine.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if result["benchmark"] == kind]
    for key in SAME:
        values = {str(result.get(key)) for result in found}
        if len(values) > 1:
            raise ValueError(f"{folder}: expected {kind} results of one machine, found {key} {sorted(values)}")
    return found


def machine(results: Sequence[Result]) -> str:
    """Where results were measured, and when each began."""
    first = results[0]
    commits = ", ".join(dict.fromkeys(result["commit"] for result in results))
    dates = ", ".join(sorted({result["date"][:10] for result in results}))
    loads = ", ".join(f"{result['load_before']:.1f}" for result in results)
    # Results from before the stamp had these keys still say where they are from.
    if first.get("device_type") == "cuda":
        kind = f" (driver {first['driver']})"
    else:
        kind = f", {first['instruction_set']}" if "instruction_set" in first else ""
    return (
        f"{first['device']}{kind}, {first['threads']} threads, torch {first['torch']}, Python {first['python']}, "
        f"commit {commits}, {dates}, load average before: {loads}"
    )


def commands(results: Sequence[Result]) -> str:
    """How to measure it again."""
    return "```sh\n" + "\n".join(dict.fromkeys(result["command"] for result in results)) + "\n```"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# ---- meta-steps ----------------------------------------------------------------------------------------------------


def of_all(results: Sequence[Result]) -> dict[str, Mapping[str, Any]]:
    """The first point of each workload by its letter."""
    return {result["workload"]: result["points"][0] for result in results}


def names_of(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Implementations in the order of their first appearance."""
    return list(dict.fromkeys(name for point in points for name in point["implementations"]))


def meta_steps(results: Sequence[Result]) -> str:
    """Milliseconds, speed-up over the sequential loop, share of the matrix rate."""
    points = of_all(results)
    rows = []
    for name in names_of(points.values()):
        cells = []
        for point in points.values():
            row = point["implementations"].get(name)
            if row is None:
                cells.append("-")
                continue
            ratio = f"{number(row['speedup']['median'])}x" if "speedup" in row else "?"
            cells.append(f"{number(row['time_ms']['median'])} ms, {ratio}, {row['share_of_matrix']['median']:.0%}")
        rows.append([f"**{name}**" if name.startswith(OURS) else name, *cells])
    header = [f"{letter} (T = {p['tasks']}, {p['gflop']:g} GFLOP)" for letter, p in points.items()]
    return table(["time, speed of the loop = 1, share of the matrix rate", *header], rows)


def memories(results: Sequence[Result]) -> str:
    """MiB of one meta-step."""
    points = of_all(results)
    rows = []
    for name in names_of(points.values()):
        found = [point["implementations"].get(name, {}).get("memory_mib") for point in points.values()]
        if any(value is not None for value in found):
            cells = ["-" if value is None else f"{max(value, 0):.0f}" for value in found]
            rows.append([f"**{name}**" if name.startswith(OURS) else name, *cells])
    return table(["MiB of one meta-step", *points], rows)


def ratios(results: Sequence[Result]) -> str:
    """The fastest backend of this package against the loop and the best of pure PyTorch, with quartiles."""
    rows = []
    for letter, point in of_all(results).items():
        implementations = point["implementations"]
        ours = {name: row for name, row in implementations.items() if name.startswith(OURS)}
        name = min(ours, key=lambda each: ours[each]["time_ms"]["median"])
        row = ours[name]
        cells = [letter, name.split(", ")[1]]
        for key in ("speedup", "speedup_over_best_torch"):
            ratio = row.get(key)
            cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-")
        matrix, rate = point["matrix_gflops"]["median"], row["gflops"]["median"]
        cells += [f"{rate:.0f} of {matrix:.0f} GFLOP/s", f"{row['share_of_matrix']['median']:.0%}"]
        memory, loop = row.get("memory_mib"), implementations.get(BASE, {}).get("memory_mib")
        cells.append(f"{memory / loop:.2f}" if memory and loop and loop > 0 else "-")
        rows.append(cells)
    header = ["", "backend", "x the loop (quartiles)", "x hand-tuned PyTorch (quartiles)", "rate", "of the matrix rate"]
    return table([*header, "memory / the loop's"], rows)


def skipped(results: Sequence[Result]) -> str:
    """What was not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for letter, point in of_all(results).items():
        for name, reason in point["skipped"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(letter)
    return "Not measured: " + "; ".join(f"{text} ({', '.join(on)})" for text, on in reasons.items()) + "."


def growth(results: Sequence[Result]) -> str:
    """Time and memory over T and over K, of the loop and of the fastest backend."""
    rows = []
    for result in results:
        for point in result["points"]:
            implementations = point["implementations"]
            ours = {name: row for name, row in implementations.items() if name.startswith(OURS)}
            best = ours[min(ours, key=lambda each: ours[each]["time_ms"]["median"])]
            base = implementations[BASE]
            rows.append(
                [
                    result["workload"],
                    str(point["tasks"]),
                    str(point["steps"]),
                    number(base["time_ms"]["median"]),
                    number(best["time_ms"]["median"]),
                    f"{best['speedup']['median']:.1f}",
                    f"{best['share_of_matrix']['median']:.0%}",
                    *(
                        "-" if row.get("memory_mib") is None else f"{max(row['memory_mib'], 0):.0f}"
                        for row in (base, best)
                    ),
                ]
            )
    header = ["", "T", "K", "loop, ms", "signmaml_ext, ms", "x", "of the matrix rate", "loop, MiB", "signmaml_ext, MiB"]
    return table(header, rows)


# ---- kernels -------------------------------------------------------------------------------------------------------


def kernels(result: Result) -> str:
    """GB/s of the operators and their share of a copy."""
    sizes = result["sizes"] | result["tail_sizes"]
    names = list(next(iter(sizes.values())))
    rows = [
        [
            size.replace("x", " x "),
            *(
                f"{row[name]['gb_per_s']['median']:.1f}"
                + ("" if name == "copy" else f" ({row[name]['share_of_copy']['median']:.0%})")
                for name in names
            ),
        ]
        for size, row in sizes.items()
    ]
    return table(["T x P, GB/s (of the copy's)", *names], rows)


def stages(result: Result) -> str:
    """GFLOP/s of the CPU's convolution stages."""
    found = result["stages"]
    names = list(dict.fromkeys(name for part in found.values() for name in part["stages"]))
    rows = []
    for name in names:
        cells = []
        for part in found.values():
            row = part["stages"].get(name)
            if row is None:
                cells.append("-")
            elif "gflops" in row:
                cells.append(f"{row['gflops']['median']:.0f} GFLOP/s, {row['share_of_matrix']['median']:.0%}")
            else:
                cells.append(f"{row['time_ms']['median'] * 1e3:.1f} us, {row['gb_per_s']['median']:.1f} GB/s")
        rows.append([name, *cells])
    header = [
        f"{letter} ({part['images']} images; matrix product {part['matrix_gflops']['median']:.0f} GFLOP/s)"
        for letter, part in found.items()
    ]
    return table(["stage, one thread (share of the matrix product's rate)", *header], rows)


# ---- training ------------------------------------------------------------------------------------------------------


def training(results: Sequence[Result]) -> str:
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
        rows.append([f"`{result['shown']}`", accuracy, protocol, time])
    return table(["command", "test accuracy (95% t-interval)", "protocol", "training"], rows)


def trade_off(results: Sequence[Result]) -> str:
    """Methods compared on the same tasks: whole iterations, and time to accuracies."""
    rows = []
    for result in results:
        for name, run in result["runs"].items():
            reached = run["seconds_to"]
            test = run["test"]
            rows.append(
                [
                    name,
                    run["backend"],
                    f"{run['ms_per_iteration']:.1f}",
                    *(f"{reached[key]:.0f} s" if reached[key] is not None else "-" for key in reached),
                    f"{100 * test['mean']:.1f} ± {100 * test['ci95']:.1f} %",
                    f"{run['iterations']} in {run['train_seconds']:.0f} s",
                ]
            )
    targets = next(iter(results[0]["runs"].values()))["seconds_to"]
    goals = [f"to {float(key):.0%} validation" for key in targets]
    header = ["method", "backend", "ms an iteration", *goals, "test accuracy", "iterations"]
    return table(header, rows)


def sinusoid(result: Result) -> str:
    """Errors of both methods for every kind of inner rates, and with the kind that each chose by validation."""
    kinds = {"constant": "constant rate", "parameter": "learned, a parameter and step", "best": "chosen by validation"}
    rows = []
    for shots, of_kind in result["results"].items():
        for method in ("sign-maml", "fo-maml"):
            found = [of_kind[kind][method] for kind in kinds]
            rows.append([shots, method, *(f"{each['test_mse']:.3f} ± {each['test_ci95']:.3f}" for each in found)])
    return table(["test MSE (95% t-interval)", "inner rates:", *kinds.values()], rows)


def memory(result: Result) -> str:
    """MiB of the adapted models and at the peak."""

    def mib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.0f}"

    rows = [[case, mib(found["held_bytes"]), mib(found["peak_bytes"])] for case, found in result["cases"].items()]
    return table(["MiB", "adapted models of all tasks", "peak of the call"], rows)


# ---- plots ---------------------------------------------------------------------------------------------------------


def _axes(columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def plot_meta_steps(results: Sequence[Result], path: Path) -> None:
    """Bars: how many times faster than the loop, with quartiles."""
    points = of_all(results)
    figure, axes = _axes(len(points), 4.6)
    for axis, (letter, point) in zip(axes, points.items(), strict=True):
        rows = {name: row for name, row in point["implementations"].items() if "speedup" in row}
        middle = [row["speedup"]["median"] for row in rows.values()]
        errors = [
            [row["speedup"]["median"] - row["speedup"]["low"] for row in rows.values()],
            [row["speedup"]["high"] - row["speedup"]["median"] for row in rows.values()],
        ]
        colors = ["tab:orange" if name.startswith(OURS) else "tab:gray" for name in rows]
        axis.barh(list(rows), middle, xerr=errors, color=colors)
        axis.invert_yaxis()
        axis.set_title(f"{letter}: T = {point['tasks']}, K = {point['steps']}")
        axis.set_xlabel("times faster than the sequential loop")
        if max(middle) > 20 * min(middle):
            axis.set_xscale("log")
    figure.suptitle(results[0]["device"], fontsize=9)
    figure.savefig(path, dpi=110)


def plot_growth(results: Sequence[Result], path: Path) -> None:
    """Time over T and, where it was measured, memory."""
    panels = [(result, "time_ms", "ms") for result in results]
    panels += [(result, "memory_mib", "MiB") for result in results if _curves(result, "memory_mib")]
    figure, axes = _axes(len(panels), 3.6)
    for axis, (result, key, label) in zip(axes, panels, strict=True):
        for name, (tasks, values) in _curves(result, key).items():
            style = {"linewidth": 2.5} if name.startswith(OURS) else {"linestyle": "--"}
            axis.plot(tasks, values, marker="o", label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if key == "time_ms" else "linear")
        axis.set_xlabel("tasks T")
        axis.set_ylabel(f"{label} a meta-step")
        axis.set_title(result["workload"])
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _curves(result: Result, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """By implementation: T, and a figure of the points at K = 5 that have it."""
    usual = [point for point in result["points"] if point["steps"] == 5]
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name in names_of(usual):
        for point in usual:
            value = point["implementations"].get(name, {}).get(key)
            if value is not None:
                tasks, values = found.setdefault(name, ([], []))
                tasks.append(point["tasks"])
                values.append(value if key == "memory_mib" else value["median"])
    return found


def plot_trade_off(results: Sequence[Result], path: Path) -> None:
    """Validation accuracy over training time, one line a method."""
    figure, axes = _axes(1, 7, 4.4)
    (axis,) = axes
    for result in results:
        for name, run in result["runs"].items():
            curve = run["curve"]
            x, y = [p["seconds"] for p in curve], [100 * p["accuracy"] for p in curve]
            band = [100 * p["ci95"] for p in curve]
            (line,) = axis.plot(x, y, marker=".", label=f"{name} (backend {run['backend']})")
            low, high = ([a + sign * b for a, b in zip(y, band, strict=True)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("seconds of training (validation not counted)")
    axis.set_ylabel("validation accuracy, %")
    axis.set_title(f"{results[0]['summary']}\n{results[0]['device']}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


# ---- the README ----------------------------------------------------------------------------------------------------


def section(folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    parts = []
    if found := read("meta_step", folder):
        best = (
            "Whole meta-steps of sign-maml, K = 5, float32, medians of interleaved rounds. The loop is the way "
            "learn2learn and the official code go, in plain PyTorch; hand-tuned PyTorch is the best that we could make "
            "of PyTorch's own operators. The matrix rate is that of a large matrix product in the same rounds; "
            "operations are those of a direct convolution. Every implementation is checked to give the same "
            "meta-gradient before it is timed."
        )
        parts += ["### Meta-steps", best, ratios(found), meta_steps(found), memories(found), skipped(found)]
        if (ROOT / PLOTS["meta_step"]).is_file():
            parts.append(f"![times faster than the sequential loop, by workload]({PLOTS['meta_step']})")
        parts += [f"({machine(found)})", commands(found)]
    else:
        parts.append(
            "No timings of meta-steps are recorded for this version. `benchmarks/reproduce.sh` measures them on your "
            "machine."
        )
    if found := read("growth", folder):
        parts += ["Growth with T and K:", growth(found)]
        if (ROOT / PLOTS["growth"]).is_file():
            parts.append(f"![time and memory over the number of tasks]({PLOTS['growth']})")
        parts += [f"({machine(found)})", commands(found)]
    if found := read("training", folder):
        parts += ["### Training", "From a command to a number:", training(found)]
        parts.append("![training and validation accuracy over the iterations, Omniglot](docs/omniglot_curves.png)")
        parts.append(f"({machine(found)})")
    if found := read("methods", folder):
        parts += [
            "What the order of the method costs and brings, on the same tasks and budget of time "
            f"({found[0]['summary']}):",
            trade_off(found),
            f"![validation accuracy over training time, by method]({TRAINING_PLOT})",
            f"({machine(found)})",
            commands(found),
        ]
    for result in read("kernels", folder):
        parts += [
            "### Kernels",
            "Operators on flat buffers with cold caches; bytes that must move, counted once:",
            kernels(result),
        ]
        if "stages" in result:
            parts += ["Stages of the CPU's convolutional family on one task, caches warm:", stages(result)]
        parts += [f"({machine([result])})", commands([result])]
    for result in read("sinusoid", folder):
        parts += [
            f"Regression of sine waves, {result['iterations']} meta-iterations of {result['tasks']} tasks and "
            f"{result['inner_steps']} inner steps for either method (`{result['command']}`):",
            sinusoid(result),
            "![fits before and after adaptation](docs/sinusoid_fits.png)",
        ]
    for result in read("memory", folder):
        parts += [
            f"Memory of {result['tasks']} tasks of {result['parameters']} parameters in full precision and as int8 "
            f"step counts (`{result['command']}`):",
            memory(result),
            "Counts hold adapted models in a quarter of the bytes. What a meta-step saves at its peak, it saves by "
            "working on one chunk of tasks after the other; the counts themselves add nothing to that.",
            f"({machine([result])})",
        ]
    parts.append(
        "All tables above are made from `benchmarks/results/*.json` by `python benchmarks/report.py --write`; "
        "`benchmarks/reproduce.sh` measures everything again on your machine. What the columns mean, and how to "
        "measure a GPU: [benchmarks/README.md](benchmarks/README.md)."
    )
    if not any(result["device_type"] == "cuda" for kind in ("meta_step", "kernels") for result in read(kind, folder)):
        parts.append("No GPU was at hand for this version: there are no GPU figures here, measured or modelled.")
    return "\n\n".join(parts)


def plots(folder: Path, root: Path) -> list[Path]:
    """Draws the plots of the results that there are."""
    drawn = []
    for kind, draw, name in (
        ("meta_step", plot_meta_steps, PLOTS["meta_step"]),
        ("growth", plot_growth, PLOTS["growth"]),
        ("methods", plot_trade_off, TRAINING_PLOT),
    ):
        if found := read(kind, folder):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            draw(found, root / name)
            drawn.append(root / name)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="draw the plots and put the tables into README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of result files")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="only draw the plots, below this folder")
    arguments = parser.parse_args()
    if arguments.plots:
        print("\n".join(map(str, plots(arguments.results, arguments.plots))))
        return
    if not arguments.write:
        print(section(arguments.results))
        return
    plots(arguments.results, ROOT)
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{section(arguments.results)}\n\n{END}{after}")
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
