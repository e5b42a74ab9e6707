"""Result files of `evidence.py`: means and intervals over tasks, paired differences, curves and the search's table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import evidence_plan as plan
import evidence_scores as scores
import numpy as np
from evidence_plan import PAIRS, SETTINGS, Job

from signmaml.stats import mean_and_ci95

Done = Callable[[Job], dict[str, Any] | None]


def of_setting(name: str, work: Path, done: Done) -> dict[str, Any] | None:
    """Everything that is done of one setting, as JSON values; None if no learner of it was tested.

    Args:
        name: The setting's.
        work: The folder of all runs.
        done: What a finished job left.
    """
    setting = SETTINGS[name]
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for method in setting.methods:
        found = {seed: done(plan.run_of(name, method, seed)) for seed in plan.SEEDS}
        runs[method] = {seed: each for seed, each in found.items() if each is not None}
    runs = {method: seeds for method, seeds in runs.items() if seeds}
    if not runs:
        return None
    answers = {
        method: {
            seed: scores.load(work / plan.run_of(name, method, seed).name / scores.FILE)
            for seed, each in seeds.items()
            if each["failed"] is None
        }
        for method, seeds in runs.items()
    }
    return {
        "setting": name,
        "title": setting.title,
        "config": shared_fields([each["config"] for seeds in runs.values() for each in seeds.values()]),
        "test_tasks": scores.TEST_TASKS,
        "search": search(name, done) if setting.search == name else None,
        "rates_from": setting.search,
        "runs": {
            method: {
                "inner_lr": first["inner_lr"],
                "outer_lr": first["outer_lr"],
                "backend": first["backend"],
                "failed": sum(each["failed"] is not None for each in seeds.values()),
                "seeds": {seed: of_seed(plan.run_of(name, method, seed), each, work) for seed, each in seeds.items()},
                "tests": tests(answers[method], setting.fields["ways"]),
                "curves": curves(answers[method].get(0), setting),
            }
            for method, seeds in runs.items()
            for first in [next(iter(seeds.values()))]
        },
        "pairs": [
            pair
            for of, to in PAIRS
            if answers.get(of) and answers.get(to)
            for pair in [compared(of, to, answers, setting)]
            if pair is not None
        ],
    }


def shared_fields(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields that have one value in all configurations."""
    first, others = configs[0], configs[1:]
    return {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}


def search(name: str, done: Done) -> list[dict[str, Any]]:
    """All finished trials: rates and validation accuracy."""
    rows = []
    for method in plan.INNER_LRS:
        for job in (*plan.first_trials(name, method), *plan.second_trials(name, method)):
            found = done(job)
            if found is not None:
                kept = {key: found[key] for key in ("inner_lr", "outer_lr", "validation", "failed")}
                rows.append({"method": method, **kept})
    return rows


def of_seed(job: Job, found: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """One run: how long it took, its best validation and its curve of validations."""
    kept = (
        "failed", "validation", "best_iteration", "iterations", "train_seconds", "threads", "processor", "torch",
        "commit",
    )  # fmt: skip
    records = [json.loads(line) for line in (work / job.name / "metrics.jsonl").read_text().splitlines()]
    curve = [
        [record["iteration"], round(record["accuracy"], 5), round(record["ci95"], 5)]
        for record in records
        if record["split"] == "val"
    ]
    return {key: found[key] for key in kept if key in found} | {"curve": curve}


def tests(of_seeds: Mapping[int, Mapping[str, np.ndarray]], ways: int) -> dict[str, Any]:
    """By kind of test: the mean over seeds and tasks, its interval over tasks, and the mean of each seed."""
    if not of_seeds:
        return {}
    first, *others = of_seeds.values()
    # A test that came later may be missing in some seeds: `evidence.py test` adds it.
    names = [name for name in first if name.startswith("test_") and all(name in other for other in others)]
    found = {}
    for name in names:
        accuracies = np.stack([each[name] for each in of_seeds.values()]) / (ways * queries_of(name))
        mean, ci95 = mean_and_ci95(accuracies.mean(0))
        by_seed = {seed: round(float(row.mean()), 5) for seed, row in zip(of_seeds, accuracies, strict=True)}
        found[name] = {"mean": round(mean, 5), "ci95": round(ci95, 5), "by_seed": by_seed}
    return found


def queries_of(test: str) -> int:
    """Query images a class in a kind of test, such as 15 of `test_batch_q15`."""
    return int(test.rsplit("_q", 1)[1])


def curves(answers: Mapping[str, np.ndarray] | None, setting: plan.Setting) -> dict[str, Any]:
    """Accuracies of seed 0 over inner steps and over shots, each with the half-width of its interval."""
    if answers is None:
        return {}
    most = setting.fields["ways"] * setting.test_queries[0]
    found: dict[str, dict[int, list[float]]] = {}
    for name, values in answers.items():
        kind, _, number = name.partition("_")
        if kind in ("steps", "shots"):
            mean, ci95 = mean_and_ci95(values / most)
            found.setdefault(kind, {})[int(number)] = [round(mean, 5), round(ci95, 5)]
    return found


def causes(work: Path, done: Done) -> dict[str, Any] | None:
    """The finished runs with one change, each compared with its method's run without it; None if there are none."""
    setting = SETTINGS[plan.CAUSES_OF]
    usual = f"test_batch_q{setting.test_queries[0]}"
    bases: dict[str, Any] = {}
    rows = []
    for name, (method, change, _) in plan.CAUSES.items():
        base, job = plan.run_of(setting.name, method, 0), plan.cause(name)
        left, changed = done(base), done(job)
        if left is None or left["failed"] is not None or changed is None:
            continue
        if changed["failed"] is not None:
            rows.append({"method": method, "change": change, "test": None, "difference": None})
            continue
        both = {"base": base, "changed": job}
        answers = {key: {0: scores.load(work / of.name / scores.FILE)} for key, of in both.items()}
        found = {key: tests(of_seed, setting.fields["ways"])[usual] for key, of_seed in answers.items()}
        bases[method] = found["base"]
        difference = compared("changed", "base", answers, setting)
        rows.append({"method": method, "change": change, "test": found["changed"], "difference": difference})
    return {"title": setting.title, "bases": bases, "rows": rows} if rows else None


def compared(
    of: str, to: str, answers: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]], setting: plan.Setting
) -> dict[str, Any] | None:
    """The paired difference of two methods over the same tasks; None without a seed that both have."""
    seeds = [seed for seed in answers[of] if seed in answers[to]]
    if not seeds:
        return None
    queries = setting.test_queries[0]
    name, most = f"test_batch_q{queries}", setting.fields["ways"] * queries
    differences = np.stack([answers[of][seed][name] - answers[to][seed][name] for seed in seeds]) / most
    mean, ci95 = mean_and_ci95(differences.mean(0))
    by_seed = {seed: round(float(row.mean()), 5) for seed, row in zip(seeds, differences, strict=True)}
    return {"of": of, "to": to, "difference": round(mean, 5), "ci95": round(ci95, 5), "by_seed": by_seed}
