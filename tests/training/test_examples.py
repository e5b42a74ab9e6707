"""The examples, shortened and without the fonts of `glyphs`, run, and what they show is true."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.cases.toy_images import toy_images
from signmaml import Learner, evaluate
from signmaml.data import ImageSet, glyphs
from signmaml.learner import read_weights

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_own_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def small_images(split: str) -> ImageSet:
        return toy_images(split, classes=6, size=28)

    monkeypatch.setattr("signmaml.data.glyphs", small_images)
    run_example("own_loop.py", monkeypatch, "2")
    said = capsys.readouterr().out
    assert "    0  loss" in said
    assert "test accuracy" in said and "200 tasks" in said and "toy/test" in said


@pytest.mark.slow
def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_model.py", monkeypatch, "2", str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "RowReader" in said and "gratings/test" in said
    assert (tmp_path / "run" / "episode.png").is_file()


def sinusoid(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    run_example("sinusoid.py", monkeypatch, "--out", str(folder), *arguments)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())["results"]
    return result


@pytest.mark.slow
def test_sinusoid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rates in ("constant", "tensor"):
        result = sinusoid(tmp_path, monkeypatch, "--iterations", "1", "--shots", "5", "--rates", rates)
    assert set(result["5-shot"]) == {"constant", "tensor", "best"}, "results of the first call are kept"
    for method in ("sign-maml", "fo-maml"):
        tensor = result["5-shot"]["tensor"][method]
        assert tensor["test_tasks"] == 4000 and tensor["test_mse"] > 1
        assert str(tensor["start"]) == min(tensor["validation_mse"], key=tensor["validation_mse"].get)
        assert (tmp_path / f"fits-5-tensor-{method}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_sign_steps_beat_gradient_steps_on_sine_waves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of examples/sinusoid.py after fewer iterations; the whole one is in benchmarks/results."""
    result = sinusoid(tmp_path, monkeypatch, "--iterations", "300", "--shots", "10", "--rates", "constant", "parameter")
    sign, gradient = (result["10-shot"]["best"][method] for method in ("sign-maml", "fo-maml"))
    assert sign["test_mse"] <= gradient["test_mse"]
    assert sign["test_mse"] < 3.0, "about 3.7 is what predicting without adaptation reaches"


def test_recorded_comparison_on_sine_waves() -> None:
    """What the README shows: with rates chosen the same way, sign steps are at least as good at 5 and at 10 points."""
    recorded = json.loads((EXAMPLES.parent / "benchmarks" / "results" / "sinusoid_cpu.json").read_text())
    assert set(recorded["results"]) == {"5-shot", "10-shot"}
    for of_kind in recorded["results"].values():
        assert set(of_kind) == {"parameter", "constant", "best"}
        assert of_kind["best"]["sign-maml"]["test_mse"] <= of_kind["best"]["fo-maml"]["test_mse"]
        for method, chosen in of_kind["best"].items():
            validated = {
                kind: min(of_kind[kind][method]["validation_mse"].values()) for kind in of_kind if kind != "best"
            }
            assert chosen["rates"] == min(validated, key=validated.get), "by validation, not by test"


@pytest.mark.slow
def test_qmaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--qubits",
        "3",
        "--layers",
        "1",
        "--gradients",
        "40",
        "--inner-steps",
        "3",
        "--steps",
        "6",
        "--tasks",
        "20",
    ]
    run_example("qmaml.py", monkeypatch, *sizes, "--out", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    starts = ["zero", "uniform", "Gaussian", "published, 40", "published, 10", "3 sign steps, 10"]
    said = capsys.readouterr().out
    for mode in ("gradient descent", "sign steps"):
        assert list(result["results"][mode]) == starts
        for name, record in result["results"][mode].items():
            means = {step: mean for step, (mean, _) in record["mean_and_ci95_percent"].items()}
            assert list(means) == ["0", "1", "5", "6"] and min(means.values()) >= 0, "never below the ground state"
            assert any(line.startswith(name) and f"{means['6']:.2f} +-" in line for line in said.splitlines())
    assert [len(record["inner_rates"]) for record in result["pre-training"].values()] == [0, 0, 3]
    before = {record["mean_and_ci95_percent"]["0"][0] for record in result["results"]["sign steps"].values()}
    assert len(before) == len(starts), "every start is another"
    assert said.count("'3 sign steps, 10' is ") == 4
    assert (tmp_path / "energies.png").stat().st_size > 10_000


@pytest.mark.parametrize("words", [["--inner-steps", "0"], ["--gradients", "5"], ["--qubits", "11"], ["--tasks", "1"]])
def test_qmaml_refuses_what_it_cannot_compare(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_example("qmaml.py", monkeypatch, *words)


@pytest.mark.slow
def test_the_trained_learner_knows_characters_that_it_has_never_seen() -> None:
    path = EXAMPLES / "omniglot_5w1s.safetensors"
    stored = read_weights(path)
    assert (stored.config.data, stored.config.data_root, stored.config.out) == ("omniglot", None, None)
    learner = Learner.load(path, device="cpu")
    found = evaluate(learner.model, glyphs("test", progress=False), tasks=100, **learner.arguments)
    assert found.mean > 0.85
    assert path.stat().st_size < 200_000
