"""Tables and plots of docs/evidence.md from the result files of `evidence.py`; `report.py` fills the page with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report_parts import grid_of_axes, table

Result = Mapping[str, Any]

NAMES = {
    "sign-maml": "Sign-MAML",
    "fo-maml": "FO-MAML",
    "maml": "MAML",
    "sharp": "Sharp-MAML (sign)",
    "alpha": "Alpha MAML (sign)",
    "learned": "Sign-MAML, learned rates",
    "anil": "ANIL",
}
COLORS = dict(zip(NAMES, (f"C{number}" for number in range(len(NAMES))), strict=True))
FEWEST_SEEDS = 3  # for a difference to be in bold
# The order of the settings on the page.
ORDER = (
    "mini_imagenet_5w1s", "fc100_5w1s", "fc100_5w5s", "cifar_fs_5w1s", "cifar_fs_5w5s", "omniglot_5w1s",
    "omniglot_20w1s",
)  # fmt: skip
# Per cent, with the same kind of network, and where they were published.
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "mini_imagenet_5w1s": {
        "maml": (48.7, "Finn et al. 2017"),
        "fo-maml": (48.07, "Finn et al. 2017"),
    },
    "cifar_fs_5w1s": {"maml": (58.9, "Bertinetto et al. 2019")},
    "cifar_fs_5w5s": {"maml": (71.5, "Bertinetto et al. 2019")},
    "omniglot_5w1s": {"maml": (98.7, "Finn et al. 2017"), "fo-maml": (98.3, "Nichol et al. 2018")},
    "omniglot_20w1s": {"maml": (95.8, "Finn et al. 2017"), "fo-maml": (89.4, "Nichol et al. 2018")},
}


def in_order(results: Sequence[Result]) -> list[Result]:
    """The settings in the page's order."""
    return sorted(results, key=lambda result: ORDER.index(result["setting"]))


def short(title: str) -> str:
    """A setting's title in two lines of a table's head."""
    return title.replace(", ", "<br>", 1)


def usual(result: Result) -> str:
    """The test that the tables show: transductive, with the setting's first number of queries."""
    return f"test_batch_q{result['config']['test_queries']}"


def percent(value: float) -> str:
    """A share in per cent, with one decimal."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def accuracies(results: Sequence[Result]) -> str:
    """Test accuracy by method and setting, with the interval over tasks, and the seeds' range."""
    results, rows = in_order(results), []
    for method in NAMES:
        cells = []
        for result in results:
            cells.append(run_in_words(result["runs"].get(method), usual(result)))
        if any(cell != "-" for cell in cells):
            rows.append([NAMES[method], *cells])
    return table(["test accuracy, %", *(short(result["title"]) for result in results)], rows)


def run_in_words(run: Mapping[str, Any] | None, test: str) -> str:
    """The accuracy of all seeds of a method; "-" if none ran, and said if some turned NaN."""
    if run is None:
        return "-"
    failed = f"{run['failed']} of {len(run['seeds'])} seeds turned NaN" if run["failed"] else ""
    words = accuracy_in_words(run["tests"][test]) if test in run["tests"] else ""
    return ", ".join(filter(None, (words, failed)))


def accuracy_in_words(found: Mapping[str, Any]) -> str:
    """Such as "37.2 ± 0.4 (36.9 to 37.5)"."""
    text = f"{percent(found['mean'])} ± {percent(found['ci95'])}"
    seeds = found["by_seed"].values()
    return text if len(seeds) == 1 else f"{text} ({percent(min(seeds))} to {percent(max(seeds))})"


def differences(results: Sequence[Result]) -> str:
    """Paired differences in points, with the interval over tasks, and the seeds' range."""
    results, rows = in_order(results), []
    pairs = dict.fromkeys((pair["of"], pair["to"]) for result in results for pair in result["pairs"])
    for of, to in pairs:
        cells = []
        for result in results:
            found = [pair for pair in result["pairs"] if (pair["of"], pair["to"]) == (of, to)]
            cells.append(difference_in_words(found[0]) if found else "-")
        rows.append([f"{NAMES[of]} less {NAMES[to]}", *cells])
    return table(["difference, points", *(short(result["title"]) for result in results)], rows)


def difference_in_words(pair: Mapping[str, Any]) -> str:
    """Such as "+0.3 ± 0.4 (+0.1 to +0.7)"; in bold if the interval leaves out 0 and at least three seeds agree."""
    text = f"{signed(pair['difference'])} ± {percent(pair['ci95'])}"
    seeds = pair["by_seed"].values()
    agree = len(seeds) >= FEWEST_SEEDS and (min(seeds) > 0 or max(seeds) < 0)
    if abs(pair["difference"]) > pair["ci95"] and agree:
        text = f"**{text}**"
    return text if len(seeds) == 1 else f"{text} ({signed(min(seeds))} to {signed(max(seeds))})"


def protocols(results: Sequence[Result]) -> str:
    """The same learners under other protocols: inductive, without inner steps, with the published number of queries."""
    rows = []
    for result in in_order(results):
        for method, run in result["runs"].items():
            found = run["tests"]
            if not found:
                continue
            first = usual(result)
            others = [name for name in found if name.startswith("test_batch") and name != first]
            own = f"{accuracy_in_words(found[others[0]])}, {others[0].rsplit('q', 1)[1]} a class" if others else "-"
            kinds = (first, first.replace("batch", "support"), first.replace("batch", "means"))
            cells = [accuracy_in_words(found[kind]) if kind in found else "-" for kind in kinds]
            rows.append([result["title"], NAMES[method], *cells, own])
    header = [
        "15 queries a class, but for the last column", "", "transductive", "inductive",
        "without inner steps: the nearest class mean", "transductive, queries as published",
    ]  # fmt: skip
    return table(header, rows)


def rates(results: Sequence[Result]) -> str:
    """The search: validation accuracy by inner rate, then by outer rate, and what was chosen."""
    rows = []
    for result in in_order(results):
        for method in dict.fromkeys(row["method"] for row in result["search"] or ()):
            trials = [row for row in result["search"] if row["method"] == method]
            inner = of_outer(trials, trials[0]["outer_lr"])
            outer = [row for row in trials if row not in inner]
            best = max(trials, key=lambda row: row["validation"])
            complete = len(outer) == 2  # the second stage starts when the first has ended
            chosen = f"{best['inner_lr']:g} and {best['outer_lr']:g}" if complete else "-"
            if complete and best["inner_lr"] in (inner[0]["inner_lr"], inner[-1]["inner_lr"]):
                chosen += " (the last of the inner rates tried)"
            cells = [
                ", ".join(f"{row[key]:g}: {trial_in_words(row)}" for row in part)
                for key, part in (("inner_lr", inner), ("outer_lr", outer))
            ]
            rows.append([result["title"], NAMES[method], *cells, chosen])
    header = ["", "", "inner rate: validation, %", "outer rate: validation, %", "chosen, inner and outer"]
    return table(header, rows)


def trial_in_words(row: Mapping[str, Any]) -> str:
    """A trial's validation accuracy, or that its weights turned NaN."""
    return percent(row["validation"]) if row["failed"] is None else "NaN"


def of_outer(trials: Sequence[Mapping[str, Any]], outer_lr: float) -> list[Mapping[str, Any]]:
    """The trials with one outer rate, by inner rate."""
    return sorted((row for row in trials if row["outer_lr"] == outer_lr), key=lambda row: row["inner_lr"])


def settings(results: Sequence[Result]) -> str:
    """How each setting trains."""
    rows = []
    for result in in_order(results):
        config = result["config"]
        training = (
            f"{config['iterations']:,} iterations of {config['tasks']} tasks, {config['queries']} queries a class"
        )
        network = f"Conv4-{config['filters']}, {config['normalize']} pixels"
        steps = f"{config['inner_steps']} and {config['test_steps'] or config['inner_steps']}"
        validations = f"{config['iterations'] // config['validate_every']} of {config['validate_tasks']} tasks"
        origin = "official" if result["rates_from"] is None else "searched"
        if result["rates_from"] not in (None, result["setting"]):
            origin = "as 5-way 1-shot"
        rows.append([result["title"], training, network, steps, config["schedule"], validations, origin])
    header = [
        "",
        "training",
        "network",
        "inner steps in training and test",
        "outer rate over time",
        "validations",
        "rates",
    ]
    return table(header, rows)


def published(results: Sequence[Result]) -> str:
    """Found and published accuracies side by side."""
    rows = []
    for result in in_order(results):
        for method, (value, source) in PUBLISHED.get(result["setting"], {}).items():
            found = result["runs"].get(method, {}).get("tests", {}).get(usual(result))
            if found is not None:
                rows.append([result["title"], NAMES[method], accuracy_in_words(found), f"{value:g}", source])
    return table(["", "", "here, %", "published, %", "by"], rows)


def causes(results: Sequence[Result]) -> str:
    """One change at a time: test accuracy, and the difference from the method's run without it."""
    rows = []
    for result in results:
        for method, base in result["bases"].items():
            rows.append([f"{NAMES[method]} on {result['title']}, as above", accuracy_in_words(base), ""])
            rows += [
                [row["change"], accuracy_in_words(row["test"]), difference_in_words(row["difference"])]
                if row["test"] is not None
                else [row["change"], "turned NaN", ""]
                for row in result["rows"]
                if row["method"] == method
            ]
    return table(["one change", "test accuracy, %", "difference, points"], rows)


def costs(results: Sequence[Result]) -> str:
    """Milliseconds an iteration by method and setting."""
    times: dict[str, Mapping[str, Any]] = {}
    for result in results:
        times |= result["times"]
    names = [name for name in ORDER if name in times]
    titles = {name: result["titles"][name] for result in results for name in result["titles"]}
    rows = [
        [NAMES[method], *(cost_in_words(times[name].get(method), times[name].get("sign-maml")) for name in names)]
        for method in NAMES
        if any(method in times[name] for name in names)
    ]
    return table(["ms an iteration", *(short(titles[name]) for name in names)], rows)


def cost_in_words(found: Mapping[str, float] | None, base: Mapping[str, float] | None) -> str:
    """Such as "61.2 (2.1x)", the ratio to `base` if there is one."""
    if found is None:
        return "-"
    return f"{found['median']:.1f}" + ("" if base is None else f" ({found['median'] / base['median']:.2g}x)")


def where(results: Sequence[Result]) -> str:
    """Versions, machines, commits and commands."""
    runs = [seed for result in results for run in result["runs"].values() for seed in run["seeds"].values()]
    processors = ", ".join(dict.fromkeys(run["processor"] for run in runs if "processor" in run))
    versions = ", ".join(dict.fromkeys(run["torch"] for run in runs if "torch" in run))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    hours = sum(run.get("train_seconds", 0) for run in runs) / 3600
    first = results[0]
    return (
        f"Measured on {processors}, torch {versions or first['torch']}, commit {commits}: {len(runs)} runs, which "
        f"trained for {hours:.1f} hours, besides the searches:\n\n```sh\n{first['command']}\n```"
    )


# ---- plots ---------------------------------------------------------------------------------------------------------


def _common_legend(figure: Any, panels: Sequence[Any]) -> None:
    """Every method that any panel shows, once."""
    handles: dict[str, Any] = {}
    for axis in panels:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, fontsize=8)


def plot_time(results: Sequence[Result], times: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Validation accuracy of seed 0 over training time, one panel a setting; False if there is nothing to draw."""
    shown = [result for result in in_order(results) if result["setting"] in times]
    if not shown:
        return False
    figure, panels = grid_of_axes(len(shown), min(3, len(shown)), 4.4, 3.4)
    for axis, result in zip(panels, shown, strict=True):
        for method, run in result["runs"].items():
            curve, cost = run["seeds"].get("0", {}).get("curve"), times[result["setting"]].get(method)
            if curve and cost:
                seconds = [point[0] * cost["median"] / 1e3 for point in curve]
                axis.plot(
                    seconds, [100 * point[1] for point in curve], marker=".", color=COLORS[method], label=NAMES[method]
                )
        axis.set_title(result["title"], fontsize=10)
        axis.set_xlabel("training time, s")
        axis.set_ylabel("validation accuracy, %")
        axis.grid(alpha=0.3)
    _common_legend(figure, panels)
    figure.savefig(path, dpi=100)
    return True


def plot_curves(results: Sequence[Result], path: Path) -> bool:
    """Test accuracy over inner steps and over shots, one row a setting; False if there is nothing to draw."""
    shown = [result for result in in_order(results) if any(run["curves"] for run in result["runs"].values())]
    if not shown:
        return False
    figure, panels = grid_of_axes(2 * len(shown), 2, 4.6, 3.2)
    for number, result in enumerate(shown):
        for axis, kind, label in zip(panels[2 * number : 2 * number + 2], ("steps", "shots"), XLABELS, strict=True):
            for method, run in result["runs"].items():
                points = run["curves"].get(kind, {})
                x, y = [int(key) for key in points], [100 * value[0] for value in points.values()]
                error = [100 * value[1] for value in points.values()]
                if x:
                    axis.errorbar(
                        x, y, error, marker=".", capsize=2, linewidth=1, color=COLORS[method], label=NAMES[method]
                    )
            axis.set_title(result["title"], fontsize=10)
            axis.set_xlabel(label)
            axis.set_ylabel("test accuracy, %")
            axis.grid(alpha=0.3)
    _common_legend(figure, panels)
    figure.savefig(path, dpi=100)
    return True


XLABELS = ("inner steps in the test", "support images a class in the test")


def plot_rates(results: Sequence[Result], path: Path) -> bool:
    """Validation accuracy of the search over the inner rate, one panel a data set; False if there is none to draw."""
    shown = [result for result in in_order(results) if result["search"]]
    if not shown:
        return False
    figure, panels = grid_of_axes(len(shown), min(3, len(shown)), 4.0, 3.2)
    for axis, result in zip(panels, shown, strict=True):
        for method in dict.fromkeys(row["method"] for row in result["search"]):
            trials = [row for row in result["search"] if row["method"] == method]
            points = of_outer(trials, trials[0]["outer_lr"])
            axis.plot(
                [row["inner_lr"] for row in points],
                [100 * row["validation"] for row in points],
                marker="o",
                color=COLORS[method],
                label=NAMES[method],
            )
        axis.set_xscale("log")
        axis.set_title(result["title"], fontsize=10)
        axis.set_xlabel("inner rate in training and test")
        axis.set_ylabel("validation accuracy, %")
        axis.grid(alpha=0.3)
    _common_legend(figure, panels)
    figure.savefig(path, dpi=100)
    return True
