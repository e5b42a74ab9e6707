"""Where a run goes, which of its validations is the best, and which runs the command line can rebuild."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.programs.toy_run import toy_config, toy_trainer
from signmaml import commands
from signmaml.config import TrainConfig
from signmaml.evaluation import Evaluation
from signmaml.results import Best
from signmaml.runs import RunFolder, choose_folder


def test_runs_are_named_after_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [choose_folder(None, "toy").path for _ in range(2)] == [Path("runs/toy"), Path("runs/toy-2")]
    assert choose_folder("elsewhere", "toy").path == Path("elsewhere")
    assert not Path("elsewhere").exists()
    trainer = toy_trainer("unused", 1)
    trainer._out = None
    assert trainer.run.path == Path("runs/toy-3")  # the data's name, although the configuration says glyphs


def test_clearing_a_folder_leaves_what_is_not_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config(toy_config(3))
    for path in (run.best, run.metrics, run.curves, tmp_path / "notes.txt"):
        path.write_text("x")
    run.tensorboard.mkdir()
    assert run.holds_run()
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert not run.holds_run()


def evaluation(metric: str, mean: float) -> Evaluation:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Evaluation)), 0)
    return Evaluation(**{**values, "metric": metric, "mean": mean})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "held", "found", "beaten"),
    [
        ("accuracy", 0.5, 0.6, True),
        ("accuracy", 0.5, 0.5, False),
        ("mse", 0.5, 0.4, True),
        ("mse", 0.5, 0.6, False),
        ("mse", 0.5, math.nan, False),
        ("mse", math.nan, 9.0, True),
        ("mse", math.nan, math.nan, False),
    ],
)
def test_the_best_validation(metric: str, held: float, found: float, beaten: bool) -> None:
    assert Best(10, metric, held).beaten_by(evaluation(metric, found)) is beaten


@pytest.mark.parametrize("which", ["best", "last"])
def test_own_models_and_data_are_not_mistaken_for_the_configured_ones(tmp_path: Path, which: str) -> None:
    toy_trainer(tmp_path / "run", 2).fit()
    with pytest.raises(ValueError, match=r"of a run with a model, data or a loss of its own; .*load_weights"):
        commands.read_weights(str(tmp_path / "run"), which)


@pytest.mark.parametrize(
    ("environment", "changes", "threads"),
    [
        ({}, {}, 3),
        ({}, {"data": "sinusoid", "model": "mlp"}, 3),
        ({}, {"backend": "torch"}, 1),
        ({}, {"data": "sinusoid", "model": "mlp", "backend": "torch"}, 1),
        ({}, {"method": "maml"}, 3),
        ({}, {"method": "maml", "data": "sinusoid", "model": "mlp"}, 3),
        ({}, {"learn_inner_lr": "scalar"}, 3),
        ({}, {"learn_inner_lr": "scalar", "data": "sinusoid", "model": "mlp"}, 3),
        ({}, {"sharpness_lower": 0.1}, 3),
        ({}, {"sharpness_upper": 0.1, "method": "maml"}, 3),
        ({}, {"sharpness_lower": 0.1, "method": "maml"}, 1),
        ({}, {"inner_rule": "lion"}, 1),
        ({}, {"inner_weight_decay": 0.1}, 1),
        ({}, {"backend": "torch", "image_size": 84}, 3),
        ({}, {"data": "mini_imagenet", "backend": "torch"}, 3),
        ({"OMP_NUM_THREADS": "3"}, {"backend": "torch"}, 3),
    ],
)
def test_small_images_are_not_spread_over_threads_in_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], changes: dict[str, Any], threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(3)
    try:
        commands.settle_threads(TrainConfig(**changes))  # type: ignore[arg-type]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)  # as in the other tests of this folder
