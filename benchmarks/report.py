"""Makes tables and plots from result files: python benchmarks/report.py [--write] [--results DIR]

README.md, docs/benchmarks.md and docs/evidence.md have placeholders for tables, from `<!-- table: NAME -->` to
`<!-- end table -->`. Their content is generated from the JSON files below benchmarks/results and never edited by hand;
the text around them belongs to the page. Without --write, prints the tables. Fails unless all timings of a table are
from one machine and one version of torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_report as evidence
from report_parts import grid_of_axes, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/evidence.md")
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end table -->)", re.DOTALL)
NOTHING = "Nothing is recorded here for this version."
PLOTS = {"meta_step": "docs/meta_step_speed.png", "growth": "docs/meta_step_growth.png"}
TRAINING_PLOT = "docs/accuracy_over_time.png"
EVIDENCE_PLOTS = {name: f"docs/evidence_{name}.png" for name in ("time", "curves", "rates")}
METHODS = ("sign-maml", "fo-maml", "maml")
OURS, BASE = "signmaml_ext", "sequential loop"
SAME = ("device", "processor", "threads", "torch")
# Accuracies, which do not depend on the machine as timings do.
OF_ANY_MACHINE = ("evidence", "evidence_causes")
# Not in workloads.py, because that imports torch.
WORKLOADS = {
    "A": "Conv4-32 with max-pooling, 84 x 84 RGB; 5-way 1-shot, 1 query a class",
    "B": "Conv4-64 with stride 2, 28 x 28 gray; 5-way 1-shot, 15 queries a class",
    "C": "Conv4-64 with max-pooling, 32 x 32 RGB; 5-way 5-shot, 15 queries a class",
    "D": "MLP 1-40-40-1, sine waves; 10 support and 10 query points",
}

Result = Mapping[str, Any]


def read(kind: str, folder: Path = RESULTS) -> list[Result]:
    """All results of one benchmark, by file name; "second_machine/zoo" are those of a folder.

    Raises:
        ValueError: They are timings from different machines.
    """
    below, _, kind = kind.rpartition("/")
    folder = folder / below
    places = sorted([*folder.glob("*.json"), *folder.glob("evidence/*.json")])
    found = [json.loads(path.read_text()) for path in places]
    found = [result for result in found if result["benchmark"] == kind]
    for key in () if kind in OF_ANY_MACHINE else SAME:
        values = {str(result.get(key)) for result in found}
        if len(values) > 1:
            raise ValueError(f"{folder}: expected {kind} results of one machine, found {key} {sorted(values)}")
    return found


def machine(results: Sequence[Result]) -> str:
    """Where the results were measured, and the date and load of each."""
    first = results[0]
    commits = ", ".join(dict.fromkeys(result["commit"] for result in results))
    dates = ", ".join(sorted({result["date"][:10] for result in results}))
    loads = ", ".join(f"{result['load_before']:.1f}" for result in results)
    # Older results, from before the stamp had these keys, are still described.
    if first.get("device_type") == "cuda":
        kind = f" (driver {first['driver']})"
    else:
        kind = f", {first['instruction_set']}" if "instruction_set" in first else ""
    return (
        f"{first['device']}{kind}, {first['threads']} threads, torch {first['torch']}, Python {first['python']}, "
        f"commit {commits}, {dates}, load average before: {loads}"
    )


def commands(results: Sequence[Result]) -> str:
    """The commands that reproduce the results."""
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
    """Milliseconds, and the speed-up over the sequential loop."""

    def cell(row: Mapping[str, Any]) -> str:
        speedup = f"{number(row['speedup']['median'])}x" if "speedup" in row else "?"
        return f"{number(row['time_ms']['median'])} ms, {speedup}"

    return by_implementation("time, speed of the loop = 1", of_all(results), cell)


def counted_rates(results: Sequence[Result]) -> str:
    """Counted operations per second, and the rate of a large matrix product."""
    points = of_all(results)

    def cell(row: Mapping[str, Any]) -> str:
        return f"{row['gflops']['median']:.0f} ({row['share_of_matrix']['median']:.0%})"

    rows = by_implementation("counted GFLOP/s (share of the matrix product's)", points, cell)
    product = ["large matrix product", *(f"{point['matrix_gflops']['median']:.0f}" for point in points.values())]
    return f"{rows}\n| " + " | ".join(product) + " |"


def memories(results: Sequence[Result]) -> str:
    """MiB of one meta-step."""

    def cell(row: Mapping[str, Any]) -> str:
        return "-" if row.get("memory_mib") is None else f"{max(row['memory_mib'], 0):.0f}"

    return by_implementation("MiB", of_all(results), cell)


def by_implementation(
    title: str, points: Mapping[str, Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]
) -> str:
    """One row per implementation and one column per workload; rows without values are left out."""
    rows = []
    for name in names_of(points.values()):
        found = [point["implementations"].get(name) for point in points.values()]
        cells = ["-" if row is None else cell(row) for row in found]
        if set(cells) != {"-"}:
            rows.append([f"**{name}**" if name.startswith(OURS) else name, *cells])
    return table([title, *points], rows)


def best_of_ours(point: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The fastest backend of this package: its name and its row."""
    ours = {name: row for name, row in point["implementations"].items() if name.startswith(OURS)}
    name = min(ours, key=lambda each: ours[each]["time_ms"]["median"])
    return name.split(", ")[1], ours[name]


def speed(results: Sequence[Result]) -> str:
    """One row per workload: its description, and this package against the loop and the best of pure PyTorch."""
    rows = []
    for letter, point in of_all(results).items():
        _, row = best_of_ours(point)
        loop = point["implementations"][BASE]
        ratios = [row.get(key) for key in ("speedup", "speedup_over_best_torch")]
        memory = [f"{max(each['memory_mib'], 0):.0f}" if each.get("memory_mib") else "-" for each in (row, loop)]
        rows.append(
            [
                f"**{letter}** {WORKLOADS[letter]}; T = {point['tasks']}",
                f"{number(row['time_ms']['median'])} ms",
                *(f"{number(ratio['median'])}x" if ratio else "-" for ratio in ratios),
                " / ".join(memory),
            ]
        )
    header = ["workload", "one meta-step", "over the loop", "over hand-tuned PyTorch", "MiB / the loop's"]
    return table(header, rows)


def workloads(results: Sequence[Result]) -> str:
    """The workloads."""
    rows = [
        [letter, WORKLOADS[letter], str(point["tasks"]), f"{point['gflop']:g}"]
        for letter, point in of_all(results).items()
    ]
    return table(["", "network, images and task", "T", "counted GFLOP"], rows)


def ratios(results: Sequence[Result]) -> str:
    """The fastest backend of this package against the loop and the best of pure PyTorch, with quartiles."""
    rows = []
    for letter, point in of_all(results).items():
        backend, row = best_of_ours(point)
        cells = [letter, backend]
        for key in ("speedup", "speedup_over_best_torch"):
            cells.append(with_quartiles(row[key]) if key in row else "-")
        memory, loop = row.get("memory_mib"), point["implementations"].get(BASE, {}).get("memory_mib")
        cells.append(f"{memory / loop:.2f}" if memory and loop and loop > 0 else "-")
        rows.append(cells)
    header = ["", "backend", "x the loop (quartiles)", "x hand-tuned PyTorch (quartiles)", "memory / the loop's"]
    return table(header, rows)


def second_order(results: Sequence[Result]) -> str:
    """The fastest backend of this package against the loop, the fastest peer and its own sign-maml, with quartiles."""
    rows = []
    for letter, point in of_all(results).items():
        backend, row = best_of_ours(point)
        cells = [letter, backend, f"{number(row['time_ms']['median'])} ms"]
        for key in ("speedup", "speedup_over_best_peer", "times_sign_maml"):
            cells.append(with_quartiles(row[key]) if key in row else "-")
        cells[4] += f", {point['best_peer']}" if point["best_peer"] else ""
        rows.append(cells)
    header = [
        "",
        "backend",
        "one meta-step",
        "x the loop (quartiles)",
        "x the fastest peer",
        "time / that of sign-maml",
    ]
    return table(header, rows)


def with_quartiles(ratio: Mapping[str, float]) -> str:
    """A ratio's median and quartiles."""
    return f"{number(ratio['median'])} ({number(ratio['low'])} to {number(ratio['high'])})"


def skipped(results: Sequence[Result]) -> str:
    """Implementations that were not measured, and why."""
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
            base, best = point["implementations"][BASE], best_of_ours(point)[1]
            rows.append(
                [
                    result["workload"],
                    str(point["tasks"]),
                    str(point["steps"]),
                    number(base["time_ms"]["median"]),
                    number(best["time_ms"]["median"]),
                    f"{best['speedup']['median']:.1f}",
                    *(
                        "-" if row.get("memory_mib") is None else f"{max(row['memory_mib'], 0):.0f}"
                        for row in (base, best)
                    ),
                ]
            )
    return table(["", "T", "K", "loop, ms", "signmaml_ext, ms", "x", "loop, MiB", "signmaml_ext, MiB"], rows)


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


# Old names of stages in earlier results.
RENAMED_STAGES = {"halved_sums": "grad_sums"}


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
        stage, comma, block = name.partition(",")
        rows.append([RENAMED_STAGES.get(stage, stage) + comma + block, *cells])
    header = [
        f"{letter} ({part['images']} images; matrix product {part['matrix_gflops']['median']:.0f} GFLOP/s)"
        for letter, part in found.items()
    ]
    return table(["stage, one thread (share of the matrix product's rate)", *header], rows)


# ---- training ------------------------------------------------------------------------------------------------------


def training(results: Sequence[Result]) -> str:
    """Test accuracies with their full protocol."""
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
    """Errors of both methods for every kind of inner rates, and for the kind that validation chose for each."""
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


# ---- any module ----------------------------------------------------------------------------------------------------


def zoo(results: list[dict[str, Any]]) -> str:
    """A Markdown table: one row per model, one column per method and number of threads."""
    kinds = sorted({(r["threads"], METHODS.index(r["method"])) for r in results})
    with_memory = any("memory" in r for r in results)
    header = ["model", *(f"{METHODS[m]}, {t} thread{'s' * (t > 1)}" for t, m in kinds)]
    lines = []
    for name in dict.fromkeys(r["model"] for r in results):
        of_model = {(r["threads"], METHODS.index(r["method"])): r for r in results if r["model"] == name}
        cells = []
        for kind in kinds:
            ratio = of_model[kind]["ratio"] if kind in of_model else None
            cells.append("-" if ratio is None else f"{ratio['median']:.2f}")
        if with_memory:
            both = [r["memory"] for r in of_model.values() if "memory" in r]
            cells.append(", ".join(f"{one['ours'] / max(one['loop'], 0.1):.2f}" for one in both) or "-")
        lines.append([name, *cells])
    return table([*header, *(["memory / the loop's"] if with_memory else [])], lines)


def zoo_compiled(results: list[dict[str, Any]]) -> str:
    """A Markdown table of `measure_compiled`: one row per model."""
    threads = sorted({r["threads"] for r in results})
    many = [f"{t} thread{'s' * (t > 1)}" for t in threads]
    header = ["model", *(f"over `compile=False`, {t}" for t in many), *(f"over the compiled loop, {t}" for t in many)]
    lines = []
    for name in dict.fromkeys(r["model"] for r in results):
        of_model = {r["threads"]: r for r in results if r["model"] == name}
        cells = [f"{of_model[t]['ratios'][o]['median']:.2f}" for o in ("ours", "compiled loop") for t in threads]
        lines.append([name, *cells, f"{of_model[threads[0]]['first_call_s']:.0f} s"])
    return table([*header, "first call, code cached on disk"], lines)


# ---- learnable rates -----------------------------------------------------------------------------------------------


def rates(results: Sequence[Result]) -> str:
    """One row per workload and method: a meta-step with a constant rate, and how much longer learnable ones take."""
    found = [(result["device_type"], row) for result in results for row in result["results"]]
    kinds = list(found[0][1]["ratio"])
    rows = [
        [
            f"{row['workload']}, {row['method']}" + (", CUDA" if device == "cuda" else ""),
            f"{number(row['ms']['median'])} ms",
            *(f"{row['ratio'][kind]['median']:.2f}" for kind in kinds),
        ]
        for device, row in found
    ]
    return table(["", "constant rate", *kinds], rows)


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot_meta_steps(results: Sequence[Result], path: Path) -> None:
    """Bars: how many times faster than the loop, with quartiles."""
    points = of_all(results)
    figure, axes = grid_of_axes(len(points), min(2, len(points)), 4.6, 2.8)
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
    """Time and, if measured, memory over T."""
    panels = [(result, "time_ms", "ms") for result in results]
    panels += [(result, "memory_mib", "MiB") for result in results if _curves(result, "memory_mib")]
    figure, axes = grid_of_axes(len(panels), min(3, len(panels)), 3.2, 2.8)
    for axis, (result, key, label) in zip(axes, panels, strict=True):
        for name, (tasks, values) in _curves(result, key).items():
            style = {"linewidth": 2.5} if name.startswith(OURS) else {"linestyle": "--"}
            axis.plot(tasks, values, marker="o", label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if key == "time_ms" else "linear")
        axis.set_xlabel("tasks T")
        axis.set_ylabel(f"{label} a meta-step")
        axis.set_title(f"{result['workload']}: {'time' if key == 'time_ms' else 'memory'}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)


def _curves(result: Result, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """By implementation: T and the value of `key`, for the points at K = 5 that have it."""
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
    """Validation accuracy over training time, one line per method."""
    figure, axes = grid_of_axes(1, 1, 7, 4.4)
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


# ---- the pages -----------------------------------------------------------------------------------------------------


def of_zoo(show: Callable[[list[dict[str, Any]]], str]) -> Callable[[Sequence[Result]], str]:
    """One table of the rows of all result files."""
    return lambda results: show([row for result in results for row in result["results"]])


def where(results: Sequence[Result]) -> str:
    """The machine and the commands of a measurement."""
    return f"Measured on {machine(results)}:\n\n{commands(results)}"


def with_stages(results: Sequence[Result]) -> str:
    """Stages, for the results that have them."""
    return "\n\n".join(stages(result) for result in results if "stages" in result) or NOTHING


# By name: the kind of result, and the function that makes a table of all such results.
TABLES: dict[str, tuple[str, Callable[[Sequence[Result]], str]]] = {
    "speed": ("meta_step", speed),
    "workloads": ("meta_step", workloads),
    "meta-steps": ("meta_step", ratios),
    "meta-steps by implementation": ("meta_step", meta_steps),
    "meta-steps, memory": ("meta_step", memories),
    "meta-steps, counted operations": ("meta_step", counted_rates),
    "meta-steps, left out": ("meta_step", skipped),
    "meta-steps, where": ("meta_step", where),
    "meta-steps of maml": ("meta_step_maml", second_order),
    "meta-steps of maml by implementation": ("meta_step_maml", meta_steps),
    "meta-steps of maml, memory": ("meta_step_maml", memories),
    "meta-steps of maml, left out": ("meta_step_maml", skipped),
    "meta-steps of maml, where": ("meta_step_maml", where),
    "meta-steps of maml on C": ("second_machine/meta_step_maml", second_order),
    "meta-steps of maml on C by implementation": ("second_machine/meta_step_maml", meta_steps),
    "meta-steps of maml on C, memory": ("second_machine/meta_step_maml", memories),
    "meta-steps of maml on C, left out": ("second_machine/meta_step_maml", skipped),
    "meta-steps of maml on C, where": ("second_machine/meta_step_maml", where),
    "growth of maml": ("growth_maml", growth),
    "growth of maml, where": ("growth_maml", where),
    "rates": ("rates", rates),
    "rates, where": ("rates", where),
    "growth": ("growth", growth),
    "growth, where": ("growth", where),
    "training": ("training", training),
    "training, where": ("training", where),
    "methods": ("methods", trade_off),
    "methods, where": ("methods", where),
    "sinusoid": ("sinusoid", lambda results: sinusoid(results[0])),
    "operators": ("kernels", lambda results: kernels(results[0])),
    "stages": ("kernels", with_stages),
    "kernels, where": ("kernels", where),
    "int8": ("memory", lambda results: memory(results[0])),
    "int8, where": ("memory", where),
    "any module": ("zoo", of_zoo(zoo)),
    "any module, where": ("zoo", where),
    "residual networks": ("second_machine/zoo", of_zoo(zoo)),
    "residual networks, where": ("second_machine/zoo", where),
    "compiled": ("zoo-compiled", of_zoo(zoo_compiled)),
    "compiled, where": ("zoo-compiled", where),
    "evidence: settings": ("evidence", evidence.settings),
    "evidence: accuracies": ("evidence", evidence.accuracies),
    "evidence: differences": ("evidence", evidence.differences),
    "evidence: protocols": ("evidence", evidence.protocols),
    "evidence: published": ("evidence", evidence.published),
    "evidence: causes": ("evidence_causes", evidence.causes),
    "evidence: rates": ("evidence", evidence.rates),
    "evidence: costs": ("evidence_times", evidence.costs),
    "evidence: costs, where": ("evidence_times", where),
    "evidence, where": ("evidence", evidence.where),
}


def content(name: str, folder: Path = RESULTS) -> str:
    """The content of the placeholder with this name."""
    kind, make = TABLES[name]
    found = read(kind, folder)
    return make(found) if found else NOTHING


def filled(text: str, folder: Path = RESULTS) -> str:
    """A page's text with all its placeholders filled."""
    return PLACE.sub(lambda place: f"{place[1]}{content(place[2], folder)}\n{place[3]}", text)


def printed(folder: Path) -> str:
    """All tables for which there are results, under their names."""
    found = {name: content(name, folder) for name in TABLES}
    return "\n\n".join(f"### {name}\n\n{text}" for name, text in found.items() if text != NOTHING) or NOTHING


def plots(folder: Path, root: Path) -> list[Path]:
    """Draws the plots for which there are results."""
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
    if found := read("evidence", folder):
        (root / "docs").mkdir(parents=True, exist_ok=True)
        timed = read("evidence_times", folder)
        places = {name: root / path for name, path in EVIDENCE_PLOTS.items()}
        for name, done in (
            ("rates", evidence.plot_rates(found, places["rates"])),
            ("curves", evidence.plot_curves(found, places["curves"])),
            ("time", evidence.plot_time(found, timed[0]["times"] if timed else {}, places["time"])),
        ):
            drawn += [places[name]] if done else []
            if not done:
                places[name].unlink(missing_ok=True)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"draw the plots and fill {' and '.join(PAGES)}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of result files")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="only draw the plots, below this folder")
    arguments = parser.parse_args()
    if arguments.plots:
        print("\n".join(map(str, plots(arguments.results, arguments.plots))))
        return
    if not arguments.write:
        print(printed(arguments.results))
        return
    plots(arguments.results, ROOT)
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(filled(text, arguments.results), encoding="utf-8")
        print(f"wrote {ROOT / page}")


if __name__ == "__main__":
    main()
