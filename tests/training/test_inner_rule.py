"""Inner rules in the trainer: the same steps as in a loop of one's own, reported and resumed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import signmaml
import signmaml_ext
from helpers.programs.toy_run import toy_trainer
from signmaml import MLP, EpisodeSampler, building, cli
from signmaml.config import INNER_RULES, TrainConfig
from signmaml_ext import Adam, InnerRule, Lion, Momentum, Plain, Signum
from training.test_trainer import hard_images, trainer_of

CONFIGURED: list[tuple[dict[str, Any], InnerRule | None]] = [
    ({}, None),
    ({"inner_weight_decay": 0.2}, Plain(0.2)),
    ({"inner_rule": "signum"}, Signum()),
    ({"inner_rule": "lion", "inner_momentum": 0.8, "inner_weight_decay": 0.1}, Lion(0.8, weight_decay=0.1)),
    ({"method": "fo-maml", "inner_rule": "momentum", "inner_momentum": 0.0}, Momentum(0.0)),
    ({"method": "maml", "inner_rule": "adam", "inner_weight_decay": 0.1}, Adam(weight_decay=0.1)),
    ({"method": "maml", "inner_rule": "adam", "inner_eps": 1e-3}, Adam(eps=1e-3)),
]


@pytest.mark.parametrize(("changes", "rule"), CONFIGURED, ids=lambda value: str(value))
def test_fields_name_a_rule(changes: dict[str, Any], rule: InnerRule | None) -> None:
    config = TrainConfig(**changes)
    assert building.inner_rule(config) == rule
    assert config.takes_plain_steps() == (rule is None)


def test_the_configuration_knows_the_methods_of_each_rule() -> None:
    """It imports no torch, so it has a table of its own."""
    rules: dict[str, type[InnerRule]] = {
        "plain": Plain, "signum": Signum, "lion": Lion, "momentum": Momentum, "adam": Adam,
    }  # fmt: skip
    assert {name: rule.methods for name, rule in rules.items()} == INNER_RULES


@pytest.mark.parametrize(("changes", "rule"), CONFIGURED[1:], ids=lambda value: str(value))
def test_iterations_are_those_of_an_own_loop(tmp_path: Path, changes: dict[str, Any], rule: InnerRule) -> None:
    trainer = trainer_of(tmp_path / "run", 4, validate_every=0, test_tasks=0, **changes)
    model = MLP(256, 3, hidden=(64, 64))
    model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    sampler = EpisodeSampler(hard_images("train"), ways=3, shots=1, queries=3, tasks=8, seed=3)
    options: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 2, "method": trainer.config.method, "inner_rule": rule}
    for iteration in range(2):
        optimizer.zero_grad()
        signmaml_ext.meta_step(model, *sampler.draw(iteration), **options)
        optimizer.step()
        trainer._train_step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_tests_follow_the_rule_and_say_so(tmp_path: Path) -> None:
    changes = {"inner_rule": "signum", "inner_momentum": 0.8, "inner_weight_decay": 0.5, "sharpness_lower": 0.05}
    trainer = trainer_of(tmp_path / "run", 4, **changes)
    found = trainer.test()
    options: dict[str, Any] = {
        "ways": 3, "shots": 1, "queries": 3, "tasks": 6, "seed": 3, "inner_lr": 0.01, "inner_steps": 2,
        "sharpness": 0.05,
    }  # fmt: skip
    rule = Signum(0.8, weight_decay=0.5)
    again = signmaml.evaluate(trainer.model, hard_images("test"), **options, inner_rule=rule)
    plain = signmaml.evaluate(trainer.model, hard_images("test"), **options, inner_rule=Plain())
    assert found.loss == again.loss != plain.loss
    assert found.inner_rule == str(rule) and plain.inner_rule == "none"
    assert f"sign-maml with {rule} and sharpness 0.05 (l2), 2 test steps" in found.protocol()
    assert "sign-maml with sharpness 0.05 (l2), 2 test steps" in plain.protocol()
    assert f"rule     {rule}\n" in trainer.describe()


def test_a_run_that_is_resumed_keeps_its_rule(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", 4, inner_rule="lion").fit()
    with pytest.raises(ValueError, match=r"inner_rule: 'lion' -> 'signum'"):
        toy_trainer(tmp_path / "run", 8, inner_rule="signum").fit(resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_rule": "adam"}, "inner_rule: expected one of 'plain', 'signum', 'lion' for method 'sign-maml'"),
        ({"inner_rule": "lion", "method": "maml"}, "inner_rule: expected one of 'plain', 'momentum', 'adam' for"),
        ({"inner_rule": "sgd"}, "inner_rule: expected one of 'plain', 'signum', 'lion', 'momentum', 'adam', found"),
        ({"inner_momentum": 0.5}, "inner_momentum: expected none with inner_rule 'plain', found 0.5"),
        ({"inner_rule": "lion", "inner_momentum": 1.0}, "inner_momentum: expected a number below 1, found 1.0"),
        ({"inner_rule": "lion", "inner_momentum": -0.1}, "inner_momentum: expected a number >= 0, found -0.1"),
        ({"inner_rule": "lion", "inner_eps": 1e-3}, "inner_eps: expected none with inner_rule 'lion', found 0.001"),
        ({"method": "maml", "inner_rule": "adam", "inner_eps": 0}, "inner_eps: expected a number > 0, found 0"),
        ({"inner_weight_decay": -1.0}, "inner_weight_decay: expected a number >= 0, found -1.0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_native_backend_that_cannot_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"backend: expected one that serves this call, found 'cpu': .*inner_rule is Li"
    ):
        trainer_of(tmp_path / "run", 4, inner_rule="lion", backend="cpu", batch_norm="support")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    small = ["--iterations", "2", "--validate-tasks", "2", "--test-tasks", "4", "--out", str(out), "--quiet"]
    assert cli.main(["train", "--inner-rule", "lion", "--inner-weight-decay", "0.1", *small]) == 0
    assert f"; sign-maml with {Lion(weight_decay=0.1)}, " in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--tasks", "4", "--inner-rule", "signum"]) == 0
    assert f"; sign-maml with {Signum(weight_decay=0.1)}, " in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--tasks", "4", "--method", "maml"]) == 2
    assert "inner_rule: expected one of 'plain', 'momentum', 'adam'" in capsys.readouterr().err
