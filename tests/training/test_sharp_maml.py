"""Sharp-MAML in the trainer: both steps, their report, resuming, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import signmaml
import signmaml_ext
from helpers.cases.toy_images import toy_images
from helpers.programs.toy_run import DropoutNet, toy_config, toy_trainer
from signmaml import MLP, EpisodeSampler, cli
from signmaml.config import TrainConfig
from signmaml.trainer import MetaTrainer
from signmaml_ext import Sharpness
from training.test_trainer import hard_images
from training.test_trainer import trainer_of as few_iterations

BOTH: dict[str, Any] = {"sharpness_lower": 0.05, "sharpness_upper": 0.1}


def trainer_of(folder: Path, **changes: Any) -> MetaTrainer:
    return few_iterations(folder, 4, **changes)


@pytest.mark.parametrize("upper", [0.0, 0.1])
@pytest.mark.parametrize("lower", [0.0, 0.05])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_iterations_are_those_of_an_own_loop(tmp_path: Path, lower: float, upper: float, norm: str) -> None:
    changes = {"sharpness_lower": lower, "sharpness_upper": upper, "sharpness_norm": norm}
    trainer = trainer_of(tmp_path / "run", validate_every=0, test_tasks=0, **changes)
    model = MLP(256, 3, hidden=(64, 64))
    model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    sampler = EpisodeSampler(hard_images("train"), ways=3, shots=1, queries=3, tasks=8, seed=3)
    options: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 2, "sharpness": Sharpness(lower, norm)}
    for iteration in range(3):
        optimizer.zero_grad()
        signmaml_ext.meta_step(model, *sampler.draw(iteration), **options)
        if upper > 0:
            with signmaml_ext.perturbed(model.parameters(), Sharpness(upper, norm)):
                signmaml_ext.meta_step(model, *sampler.draw(iteration), **options)
        optimizer.step()
        trainer._train_step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_the_recorded_loss_is_that_of_the_weights_themselves(tmp_path: Path) -> None:
    losses = []
    for name, upper in (("plain", 0.0), ("upper", 1.0)):
        trainer = trainer_of(tmp_path / name, validate_every=0, test_tasks=0, sharpness_upper=upper)
        trainer._train_step()
        losses.append(trainer._iteration.window.present()[0, 0].item())
    assert losses[0] == losses[1]


def test_learned_rates_get_the_gradient_at_the_sharpest_place_alone(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path / "run", validate_every=0, test_tasks=0, sharpness_upper=0.1, learn_inner_lr="scalar", method="fo-maml"
    )
    model = MLP(256, 3, hidden=(64, 64))
    model.load_state_dict(trainer.model.state_dict())
    log = torch.tensor(0.01).log().requires_grad_()
    tasks = EpisodeSampler(hard_images("train"), ways=3, shots=1, queries=3, tasks=8, seed=3).draw(0)
    options: dict[str, Any] = {"inner_steps": 2, "method": "fo-maml"}
    signmaml_ext.meta_step(model, *tasks, inner_lr=log.exp(), **options)
    with signmaml_ext.perturbed(model.parameters(), 0.1):
        log.grad = None
        signmaml_ext.meta_step(model, *tasks, inner_lr=log.exp(), **options)
    trainer._train_step()
    (own,) = trainer.rates.parameters()
    assert torch.equal(own.grad, log.grad)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_resuming_is_bitwise_the_same(tmp_path: Path, method: str) -> None:
    """With dropout, learned rates and both steps."""
    changes = BOTH | {"method": method, "sharpness_norm": "linf", "sharpness_adaptive": True}
    toy_trainer(tmp_path / "whole", 12, **changes).fit()
    stopped = toy_trainer(tmp_path / "stopped", 12, **changes)
    step = stopped._train_step

    def failing_step() -> None:
        if stopped.iteration == 7:
            raise KeyboardInterrupt
        step()

    stopped._train_step = failing_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    toy_trainer(tmp_path / "stopped", 12, **changes).fit(resume=True)
    found, expected = (load_file(tmp_path / name / "last.safetensors") for name in ("stopped", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_tests_take_the_lower_step_and_say_so(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", **BOTH)
    found = trainer.test()
    options: dict[str, Any] = {
        "ways": 3, "shots": 1, "queries": 3, "tasks": 6, "seed": 3, "inner_lr": 0.01, "inner_steps": 2,
    }  # fmt: skip
    again = signmaml.evaluate(trainer.model, hard_images("test"), **options, sharpness=0.05)
    plain = signmaml.evaluate(trainer.model, hard_images("test"), **options)
    assert found.loss == again.loss != plain.loss
    assert "sign-maml with sharpness 0.05 (l2), 2 test steps" in found.protocol()
    assert "sharpness" not in plain.protocol() and plain.sharpness == "none"
    assert "sharp    lower 0.05, upper 0.1 (l2)" in trainer.describe()


def test_a_run_that_is_resumed_keeps_its_radii(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", 4, **BOTH).fit()
    with pytest.raises(ValueError, match=r"sharpness_upper: 0\.1 -> 0\.2"):
        toy_trainer(tmp_path / "run", 8, **BOTH | {"sharpness_upper": 0.2}).fit(resume=True)


@pytest.mark.parametrize("field", ["sharpness_lower", "sharpness_upper"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "wide"])
def test_what_is_no_radius_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected "):
        TrainConfig(**{field: value})


def test_a_task_that_fails_only_at_the_sharpest_place_is_counted(tmp_path: Path) -> None:
    """There the weights are so large that the loss overflows."""
    torch.manual_seed(0)
    trainer = MetaTrainer(
        toy_config(2, learn_inner_lr="none", sharpness_upper=1e38, validate_every=0, test_tasks=0), model=DropoutNet(),
        train=toy_images(), out=tmp_path / "run", progress=False,
    )  # fmt: skip
    trainer._train_step()
    assert trainer._iteration.window.present()[0, 2].item() > 0


@pytest.mark.slow
def test_the_preset_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    small = ["--iterations", "4", "--validate-tasks", "4", "--test-tasks", "8", "--out", str(out), "--quiet"]
    assert cli.main(["train", "--preset", "sharp-maml", *small]) == 0
    assert "; maml with sharpness 0.05 (l2), " in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--tasks", "8", "--sharpness-norm", "linf"]) == 0
    assert "; maml with sharpness 0.05 (linf), " in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--tasks", "8", "--sharpness-lower", "0"]) == 0
    assert "sharpness" not in capsys.readouterr().out
