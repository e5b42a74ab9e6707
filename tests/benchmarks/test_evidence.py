"""evidence.py: the plan is fair, jobs survive interruptions, and the figures are those of the answers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TINY = {
    "data": "glyphs",
    "ways": 3,
    "shots": 1,
    "queries": 2,
    "tasks": 2,
    "filters": 4,
    "inner_steps": 1,
    "iterations": 6,
    "validate_every": 3,
    "validate_tasks": 4,
    "checkpoint_every": 2,
}


@pytest.fixture
def tiny(monkeypatch):
    """A plan of one setting that takes seconds: two methods, one seed, two rates."""
    import evidence_plan
    import evidence_scores

    setting = evidence_plan.Setting("tiny", "Tiny", "", TINY, search="tiny", test_queries=(3,), curves=True)
    setting = dataclasses.replace(setting, methods=("sign-maml", "fo-maml"))
    monkeypatch.setattr(evidence_plan, "SETTINGS", {"tiny": setting})
    for module in ("evidence", "evidence_collect"):
        monkeypatch.setattr(f"{module}.SETTINGS", {"tiny": setting})
    monkeypatch.setattr(evidence_plan, "INNER_LRS", {"sign-maml": (0.01, 0.03), "fo-maml": (0.1, 0.3)})
    monkeypatch.setattr(evidence_plan, "OTHER_OUTER_LRS", (0.01,))
    monkeypatch.setattr(evidence_plan, "CAUSES_OF", "tiny")
    monkeypatch.setattr(evidence_plan, "CAUSES", {"longer": ("fo-maml", "twice the iterations", {"iterations": 12})})
    for name, value in {"SEARCH_ITERATIONS": 2, "SEARCH_VALIDATIONS": 1, "SEARCH_TASKS": 4, "SEEDS": (0,)}.items():
        monkeypatch.setattr(evidence_plan, name, value)
    for name, value in {"TEST_TASKS": 30, "CURVE_TASKS": 4, "STEPS": (0, 2), "SHOTS": (1, 2)}.items():
        monkeypatch.setattr(evidence_scores, name, value)
    return setting


def finish(work: Path, job, **found):
    """Writes what a finished job leaves."""
    import evidence

    folder = work / job.name
    folder.mkdir(parents=True)
    left = {"failed": None, "inner_lr": job.rates[0], "outer_lr": job.rates[1], "validation": 0.5, **found}
    (folder / evidence.DONE).write_text(json.dumps(left))


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_every_job_has_a_valid_configuration_and_a_name_of_its_own():
    import evidence_plan as plan

    jobs = list(plan.jobs())
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        inner, outer = (rate or 0.01 for rate in job.rates)
        config = plan.SETTINGS[job.setting].config(job.method, inner, outer, job.seed)
        assert (config.inner_lr, config.outer_lr, config.seed, config.test_tasks) == (inner, outer, job.seed, 0)
    assert {job.method for job in jobs} == set(plan.METHODS)


def test_methods_of_a_setting_differ_in_their_own_fields_alone():
    import evidence_plan as plan

    for setting in plan.SETTINGS.values():
        base = setting.config("sign-maml", 0.01, 0.001, 0).to_dict()
        for method in setting.methods:
            found = setting.config(method, 0.01, 0.001, 0).to_dict()
            changed = {key for key in found if found[key] != base[key]}
            assert changed <= {"method", *plan.METHODS[method].fields}, method


def test_every_base_method_gets_the_same_search():
    import evidence_plan as plan

    for name in {setting.search for setting in plan.SETTINGS.values()} - {None}:
        trials = {m: [*plan.first_trials(name, m), *plan.second_trials(name, m)] for m in plan.INNER_LRS}
        assert len({len(found) for found in trials.values()}) == 1
        steps = {m: np.round(np.diff(np.log10(rates)), 1).tolist() for m, rates in plan.INNER_LRS.items()}
        assert len(set(map(str, steps.values()))) == 1, "equally wide and equally fine"
    assert {method.base for method in plan.METHODS.values()} == set(plan.INNER_LRS)


def test_official_rates_are_those_of_the_preset():
    import evidence_plan as plan

    from signmaml.presets import PRESETS

    official = plan.SETTINGS["mini_imagenet_5w1s"]
    assert official.rates["sign-maml"] == PRESETS["official"]["inner_lr"]
    assert plan.run_of(official.name, "maml", 0).rates == (0.14, PRESETS["official"]["outer_lr"])


def test_pages_name_the_methods_as_the_plan_does():
    import evidence_plan
    import evidence_report

    assert {name: method.title for name, method in evidence_plan.METHODS.items()} == evidence_report.NAMES
    assert sorted(evidence_report.ORDER) == sorted(evidence_plan.SETTINGS)
    assert set(evidence_report.PUBLISHED) <= set(evidence_plan.SETTINGS)


# ---- what waits for what -------------------------------------------------------------------------------------------


def test_the_search_decides_the_rates(tiny, tmp_path):
    import evidence
    import evidence_plan as plan

    first, second = plan.first_trials("tiny", "sign-maml"), plan.second_trials("tiny", "sign-maml")
    run = plan.run_of("tiny", "sign-maml", 0)
    finish(tmp_path, first[0], validation=0.4)
    assert evidence.config_of(second[0], tmp_path) is None, "half of the first stage is missing"
    finish(tmp_path, first[1], validation=0.6)
    config = evidence.config_of(second[0], tmp_path)
    assert (config.inner_lr, config.outer_lr, config.iterations) == (0.03, 0.01, 2)
    assert evidence.config_of(run, tmp_path) is None, "the second stage is missing"
    finish(tmp_path, dataclasses.replace(second[0], rates=(0.03, 0.01)), validation=0.6)
    config = evidence.config_of(run, tmp_path)
    assert (config.inner_lr, config.outer_lr) == (0.03, plan.OUTER_LR), "the first of two equal ones"


def test_a_finished_job_of_another_plan_is_refused(tiny, tmp_path, monkeypatch):
    import evidence
    import evidence_plan as plan
    import harness

    job = plan.first_trials("tiny", "fo-maml")[0]
    finish(tmp_path, job, config=harness.public(evidence.config_of(job, tmp_path).to_dict()))
    evidence.check(plan.jobs(), tmp_path)
    monkeypatch.setattr(plan, "SEARCH_ITERATIONS", 4)
    with pytest.raises(
        ValueError, match=r"inner_0.1_outer_0.003: expected a run with the plan's iterations, validate_"
    ):
        evidence.check(plan.jobs(), tmp_path)


def test_a_plan_that_cannot_run_is_refused_before_anything_starts(tiny, tmp_path, monkeypatch):
    import evidence
    import evidence_plan as plan

    monkeypatch.setattr(plan, "CAUSES", {"longer": ("fo-maml", "no iterations", {"iterations": 0})})
    with pytest.raises(ValueError, match="iterations: expected an integer >= 1, found 0"):
        evidence.check(plan.jobs(), tmp_path)


@pytest.mark.slow
def test_jobs_start_in_order_and_only_when_they_can(tiny, tmp_path, monkeypatch):
    import evidence
    import evidence_plan as plan

    started = []

    def start(job, work, data_root, threads):
        config = evidence.config_of(job, work)
        started.append(job.name)
        finish(work, dataclasses.replace(job, rates=(config.inner_lr, config.outer_lr)), train_seconds=1.0)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(evidence, "_started", start)
    assert evidence.run_all(evidence.selected(["*"]), tmp_path, tmp_path, 2) == 0
    assert started == [job.name for job in plan.jobs()]
    assert evidence.run_all(evidence.selected(["*"]), tmp_path, tmp_path, 2) == 0
    assert len(started) == len(set(started)), "nothing runs twice"


def test_selected_jobs_come_in_the_order_of_the_patterns(tiny):
    import evidence

    names = [job.name for job in evidence.selected(["runs/*/fo-maml/*", "search/*/inner_0.1_*", "*/fo-maml/*"])]
    assert names[:2] == ["runs/tiny/fo-maml/seed_0", "search/tiny/fo-maml/inner_0.1_outer_0.003"]
    assert names[2] == "search/tiny/fo-maml/inner_0.3_outer_0.003" and len(names) == len(set(names)) == 4


def test_a_failure_ends_the_run_and_names_the_log(tiny, tmp_path, monkeypatch, capsys):
    import evidence

    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(evidence, "_started", lambda *_: subprocess.Popen(failing))
    assert evidence.run_all(evidence.selected(["search/*"]), tmp_path, tmp_path, 1) == 1
    assert "log.txt" in capsys.readouterr().out


def test_what_waits_for_an_unselected_search_is_said(tiny, tmp_path, capsys):
    import evidence

    assert evidence.run_all(evidence.selected(["runs/*"]), tmp_path, tmp_path, 1) == 1
    assert "wait for a search that is not selected, such as runs/tiny/sign-maml/seed_0" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--select: expected patterns of job names such as .*, found \['x'\]"):
        evidence.selected(["x"])


@pytest.mark.slow
def test_a_signal_stops_all_jobs(tiny, tmp_path, monkeypatch):
    import evidence

    started = []

    def start(*_):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(evidence, "_started", start)
    assert evidence.run_all(evidence.selected(["search/*"]), tmp_path, tmp_path, 2) == 128 + signal.SIGTERM
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_a_signal_after_a_failure_still_stops_the_others(tiny, tmp_path, monkeypatch):
    import evidence

    started = []

    def start(*_):
        code = "raise SystemExit(3)" if not started else "import time; time.sleep(60)"
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    def pause(_):
        if len(started) == 2 and started[0].returncode is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            pausing(0.05)

    pausing = time.sleep
    monkeypatch.setattr(evidence, "_started", start)
    monkeypatch.setattr(evidence.time, "sleep", pause)
    assert evidence.run_all(evidence.selected(["search/*"]), tmp_path, tmp_path, 2) == 128 + signal.SIGTERM
    assert [process.returncode for process in started] == [3, -signal.SIGTERM]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_only_tests_that_all_seeds_have_are_joined():
    import evidence_collect

    one, other = {"test_batch_q3": np.array([3, 6]), "steps_0": np.array([1])}, {"test_batch_q3": np.array([6, 9])}
    for seeds in ({0: one | {"test_means_q3": np.array([1, 2])}, 1: other}, {0: other, 1: one}):
        found = evidence_collect.tests(seeds, ways=3)
        assert found.keys() == {"test_batch_q3"} and found["test_batch_q3"]["mean"] == round(24 / 4 / 9, 5)


def pair_of(difference, ci95, *seeds):
    return {"difference": difference, "ci95": ci95, "by_seed": dict(enumerate(seeds))}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (pair_of(0.01, 0.004, 0.01), "+1.0 ± 0.4"),
        (pair_of(0.01, 0.004, 0.012, 0.008), "+1.0 ± 0.4 (+0.8 to +1.2)"),
        (pair_of(0.01, 0.004, 0.012, 0.01, 0.008), "**+1.0 ± 0.4** (+0.8 to +1.2)"),
        (pair_of(-0.01, 0.004, -0.012, -0.01, -0.008), "**\N{MINUS SIGN}1.0 ± 0.4** (\N{MINUS SIGN}1.2 to "
                                                       "\N{MINUS SIGN}0.8)"),
        (pair_of(0.01, 0.004, 0.021, 0.01, -0.001), "+1.0 ± 0.4 (\N{MINUS SIGN}0.1 to +2.1)"),
        (pair_of(0.01, 0.02, 0.012, 0.01, 0.008), "+1.0 ± 2.0 (+0.8 to +1.2)"),
    ],
)  # fmt: skip
def test_only_what_three_seeds_agree_on_is_bold(pair, words):
    import evidence_report

    assert evidence_report.difference_in_words(pair) == words


def test_seeds_that_turned_nan_are_said():
    import evidence_report

    found = {"mean": 0.5, "ci95": 0.01, "by_seed": {0: 0.49, 1: 0.51}}
    run = {"failed": 1, "seeds": {0: {}, 1: {}, 2: {}}, "tests": {"t": found}}
    assert evidence_report.run_in_words(run, "t") == "50.0 ± 1.0 (49.0 to 51.0), 1 of 3 seeds turned NaN"
    assert evidence_report.run_in_words({**run, "failed": 3, "tests": {}}, "t") == "3 of 3 seeds turned NaN"
    assert evidence_report.run_in_words(None, "t") == "-"


def test_a_search_says_what_it_has_not_found():
    import evidence_report

    def row(inner_lr, validation, outer_lr=0.003, failed=None):
        return {
            "method": "maml", "inner_lr": inner_lr, "outer_lr": outer_lr, "validation": validation, "failed": failed,
        }  # fmt: skip

    trials = [row(0.1, 0.4), row(0.01, 0.3), row(1.0, 0.0, failed="NaN")]
    result = {"setting": "fc100_5w1s", "title": "FC100", "search": trials}
    assert "| FC100 | MAML | 0.01: 30.0, 0.1: 40.0, 1: NaN |  | - |" in evidence_report.rates([result])
    result["search"] = [*trials, row(0.1, 0.5, 0.001), row(0.1, 0.2, 0.01)]
    assert "| 0.001: 50.0, 0.01: 20.0 | 0.1 and 0.001 |" in evidence_report.rates([result])
    result["search"][1] = row(0.01, 0.6)
    assert "| 0.01 and 0.003 (the last of the inner rates tried) |" in evidence_report.rates([result])


def test_nothing_to_draw_draws_nothing(tmp_path):
    import evidence_report

    result = {"setting": "fc100_5w1s", "title": "FC100", "search": None, "runs": {"maml": {"curves": {}, "seeds": {}}}}
    assert not evidence_report.plot_rates([result], tmp_path / "a.png")
    assert not evidence_report.plot_curves([result], tmp_path / "b.png")
    assert not evidence_report.plot_time([result], {}, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


# ---- whole jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_search_to_pages(tiny, tmp_path, monkeypatch):
    import evidence
    import evidence_collect
    import evidence_plan as plan
    import evidence_report
    import evidence_scores as scores

    for job in plan.jobs():
        evidence.train_and_test(job, tmp_path, tmp_path)
    found = evidence_collect.of_setting("tiny", tmp_path, lambda job: evidence.done(job, tmp_path))
    assert found["config"]["ways"] == 3 and "method" not in found["config"] and "data_root" not in found["config"]
    assert len(found["search"]) == 6
    answers = {m: scores.load(tmp_path / f"runs/tiny/{m}/seed_0" / scores.FILE) for m in tiny.methods}
    for method, run in found["runs"].items():
        rates = [(row["inner_lr"], row["outer_lr"]) for row in found["search"] if row["method"] == method]
        assert (run["inner_lr"], run["outer_lr"]) in rates
        values = answers[method]["test_batch_q3"] / 9
        assert run["tests"]["test_batch_q3"]["mean"] == round(values.mean(), 5)
        assert set(run["curves"]["steps"]) == {0, 2} and set(run["curves"]["shots"]) == {1, 2}
        assert [point[0] for point in run["seeds"][0]["curve"]] == [3, 6]
    (pair,) = found["pairs"]
    difference = (answers["sign-maml"]["test_batch_q3"] - answers["fo-maml"]["test_batch_q3"]) / 9
    assert pair["difference"] == round(difference.mean(), 5)
    assert 0 < pair["ci95"] < 1

    causes = evidence_collect.causes(tmp_path, lambda job: evidence.done(job, tmp_path))
    (cause,) = causes["rows"]
    longer = scores.load(tmp_path / "causes/longer" / scores.FILE)["test_batch_q3"]
    difference = (longer - answers["fo-maml"]["test_batch_q3"]) / 9
    assert cause["difference"]["difference"] == round(difference.mean(), 5)
    assert evidence.done(plan.cause("longer"), tmp_path)["iterations"] == 12
    assert "| twice the iterations |" in evidence_report.causes([causes])

    monkeypatch.setattr(evidence_report, "ORDER", ("tiny",))
    result = json.loads(json.dumps({**found, "torch": "2.14", "command": "python"}))
    table = evidence_report.accuracies([result])
    assert evidence_report.percent(found["runs"]["fo-maml"]["tests"]["test_batch_q3"]["mean"]) in table
    assert "Sign-MAML less FO-MAML" in evidence_report.differences([result])
    evidence_report.plot_curves([result], tmp_path / "curves.png")
    evidence_report.plot_rates([result], tmp_path / "rates.png")
    times = {"tiny": {method: {"median": 2.0} for method in tiny.methods}}
    evidence_report.plot_time([result], times, tmp_path / "time.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("curves", "rates", "time"))


@pytest.mark.slow
def test_a_stopped_job_ends_with_the_same_answers(tiny, tmp_path, monkeypatch):
    import evidence
    import evidence_plan as plan
    import evidence_scores as scores

    from signmaml.signals import TrainingInterrupted
    from signmaml.trainer import MetaTrainer

    job = dataclasses.replace(plan.run_of("tiny", "sign-maml", 0), rates=(0.03, 0.003))
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    evidence.train_and_test(job, tmp_path / "whole", tmp_path)
    step = MetaTrainer._train_step

    def stop_after_four(trainer):
        step(trainer)
        if trainer.iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(TrainingInterrupted):
        patched.setattr(MetaTrainer, "_train_step", stop_after_four)
        evidence.train_and_test(job, tmp_path / "parts", tmp_path)
    assert evidence.done(job, tmp_path / "parts") is None
    evidence.train_and_test(job, tmp_path / "parts", tmp_path)
    whole, parts = (scores.load(tmp_path / part / job.name / scores.FILE) for part in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_a_finished_run_gets_the_tests_that_came_later(tiny, tmp_path):
    import evidence
    import evidence_plan as plan
    import evidence_scores as scores

    job = dataclasses.replace(plan.run_of("tiny", "sign-maml", 0), rates=(0.03, 0.003))
    evidence.train_and_test(job, tmp_path, tmp_path)
    file = tmp_path / job.name / scores.FILE
    others = [path for path in file.parent.iterdir() if path.is_file() and path != file]
    whole, before = scores.load(file), {path.name: path.read_bytes() for path in others}
    kept = {name: values for name, values in whole.items() if name in ("test_batch_q3", "steps_0")}
    scores.save(file, kept | {"test_batch_q3": kept["test_batch_q3"] + 100})
    unfinished = dataclasses.replace(job, name="runs/tiny/other")
    evidence.test_again([job, unfinished], tmp_path, tmp_path)
    found = scores.load(file)
    assert np.array_equal(found.pop("test_batch_q3"), whole.pop("test_batch_q3") + 100), "tested again"
    assert found.keys() == whole.keys() and all(np.array_equal(found[name], whole[name]) for name in whole)
    assert {path.name: path.read_bytes() for path in others} == before


def test_the_nearest_mean_is_that_of_features(tiny, tmp_path):
    import evidence_scores as scores
    import torch
    from torch.nn.functional import cosine_similarity

    from signmaml.building import load_images
    from signmaml.trainer import MetaTrainer

    config = tiny.config("fo-maml", 0.01, 0.001, 0).replace(shots=2)
    trainer = MetaTrainer(config, out=tmp_path / "run", progress=False)
    images = load_images(config, "test")
    found = scores.answers_of_nearest_mean(trainer, images, queries=3)
    assert found.shape == (scores.TEST_TASKS,)
    (episodes,) = scores._test_tasks(trainer, images, 3, tasks=5)
    for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*episodes, strict=True)):
        with torch.no_grad():
            support, query = (trainer.model.features(x).flatten(1) for x in (support_x, query_x))
        means = [support[support_y == label].mean(0) for label in range(config.ways)]
        nearest = torch.stack([cosine_similarity(query, mean[None]) for mean in means]).argmax(0)
        assert found[task] == (nearest == query_y).sum()


@pytest.mark.slow
def test_a_rate_that_breaks_the_weights_is_the_worst_and_not_an_error(tiny, tmp_path):
    import evidence
    import evidence_plan as plan

    broken = dataclasses.replace(plan.trial("tiny", "fo-maml", 0.1, 0.003), rates=(1e30, 1e30))
    evidence.train_and_test(broken, tmp_path, tmp_path)
    found = evidence.done(broken, tmp_path)
    assert found["validation"] == 0 and "NaN or Inf" in found["failed"]


@pytest.mark.slow
def test_all_learners_get_the_same_test_tasks(tiny, tmp_path, monkeypatch):
    import evidence_scores as scores

    import signmaml_ext
    from signmaml.building import load_images
    from signmaml.trainer import MetaTrainer

    seen = []
    evaluate = signmaml_ext.evaluate

    def noting(model, *episodes, **arguments):
        seen.append([tensor.clone() for tensor in episodes])
        return evaluate(model, *episodes, **arguments)

    monkeypatch.setattr(signmaml_ext, "evaluate", noting)
    for number, (method, seed) in enumerate((("sign-maml", 0), ("fo-maml", 7))):
        config = tiny.config(method, 0.01, 0.001, seed)
        trainer = MetaTrainer(config, out=tmp_path / str(number), progress=False)
        answers = scores.correct_answers(trainer, load_images(config, "test"), queries=3, tasks=30)
        assert answers.shape == (30,) and 0 <= answers.min() <= answers.max() <= 9
    assert len(seen) == 4, "two chunks each"
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
