"""The outer loop: optimizers, clipped gradients, warm-up, losses of several steps, averages, early stopping."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import signmaml_ext
from helpers.cases.toy_images import toy_images
from helpers.programs.toy_run import toy_trainer
from signmaml import MLP, MetaTrainer, TrainConfig, checkpoint, cli
from signmaml.episodes import EpisodeSampler
from signmaml.schedule import learning_rate
from training.test_resume import assert_same_run


def config(**changes: Any) -> TrainConfig:
    values = {
        "ways": 3, "queries": 3, "tasks": 3, "inner_steps": 2, "inner_lr": 0.02, "iterations": 6, "outer_lr": 0.01,
        "validate_every": 0, "test_tasks": 0, "log_every": 1, "device": "cpu", "tensorboard": False, "seed": 5,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def network() -> MLP:
    torch.manual_seed(7)
    return MLP(256, 3, (12,))


def trained(folder: Path, **changes: Any) -> MetaTrainer:
    trainer = MetaTrainer(config(**changes), model=network(), train=toy_images(), out=folder, progress=False)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    trainer.fit()
    return trainer


def by_hand(optimizer: Any, *, clip: float | None = None, warmup: int = 0, schedule: str = "cosine") -> MLP:
    """The same training with torch's own parts."""
    wanted, model = config(), network()
    sampler = EpisodeSampler(toy_images(), ways=3, shots=1, queries=3, tasks=3, seed=wanted.seed)
    stepper = optimizer(model.parameters())
    for iteration in range(wanted.iterations):
        stepper.zero_grad()
        signmaml_ext.meta_step(model, *sampler.draw(iteration), inner_lr=0.02, inner_steps=2)
        if clip is not None:
            total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for parameter in model.parameters():
                parameter.grad *= min(1.0, clip / (float(total) + 1e-6))
        rise = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * iteration / 6)) if schedule == "cosine" else 1.0
        stepper.param_groups[0]["lr"] = 0.01 * rise * fall
        stepper.step()
    return model


def lose(trainer: MetaTrainer, iteration: int) -> None:
    """Starts a run that is lost after an iteration."""
    step = trainer._train_step

    def broken() -> None:
        if trainer.iteration == iteration:
            raise RuntimeError("lost")
        step()

    trainer._train_step = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit()


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("decay", [None, 0.0, 0.3])
def test_adamw_is_torchs(tmp_path: Path, decay: float | None) -> None:
    trainer = trained(tmp_path / "run", outer_optimizer="adamw", outer_weight_decay=decay)
    used = 0.01 if decay is None else decay
    assert_same_weights(trainer.model, by_hand(lambda p: torch.optim.AdamW(p, 0.01, weight_decay=used)))


def test_learned_rates_have_no_weight_decay(tmp_path: Path) -> None:
    options = {"learn_inner_lr": "per-layer", "schedule": "constant"}
    plain = trained(tmp_path / "adam", **options)
    decayed = trained(tmp_path / "adamw", outer_optimizer="adamw", outer_weight_decay=0.5, iterations=1, **options)
    one = trained(tmp_path / "one", iterations=1, **options)
    for name, log in decayed.rates.logs.items():
        assert torch.equal(log, one.rates.logs[name]), "a decay would move it towards 0, which is a rate of 1"
        assert not torch.equal(log, plain.rates.logs[name])
    assert not torch.equal(decayed.model.classifier.weight, one.model.classifier.weight)


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_gradients_are_clipped_by_their_common_norm(tmp_path: Path, clip: float) -> None:
    options = {"outer_optimizer": "sgd", "clip_gradient": clip}
    trainer = trained(tmp_path / "run", **options)
    assert_same_weights(trainer.model, by_hand(lambda p: torch.optim.SGD(p, 0.01), clip=clip))
    unclipped = trained(tmp_path / "plain", outer_optimizer="sgd")
    moved = [(a - b).abs().max() for a, b in zip(trainer.model.parameters(), unclipped.model.parameters(), strict=True)]
    assert (max(moved) > 0) == (clip < 1)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_warms_up(tmp_path: Path, schedule: str) -> None:
    trainer = trained(tmp_path / "run", outer_optimizer="sgd", warmup=4, schedule=schedule)
    assert_same_weights(trainer.model, by_hand(lambda p: torch.optim.SGD(p, 0.01), warmup=4, schedule=schedule))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["outer_lr"] for line in lines]
    assert rates == [learning_rate(schedule, 0.01, i, 6, 4) for i in range(6)]
    assert rates[0] < rates[1] and (
        schedule == "cosine" or rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 3)
    )


def test_a_warm_up_longer_than_the_run_never_ends() -> None:
    assert [learning_rate("constant", 1.0, i, 3, warmup=6) for i in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])


# ---- Multi-step losses, first order first


def meta_gradient_by_hand(
    model: MLP, episodes: Any, method: str, weights: dict[int, float], rates: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Of the parameters and rates, from the definition: sum_k w_k L_Q(phi_k), by torch's autograd."""
    theta, losses = dict(model.named_parameters()), []
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        phi, of_task = theta, {}
        for step in range(1, max(weights) + 1):
            loss = F.cross_entropy(functional_call(model, phi, (support_x,)), support_y)
            gradients = torch.autograd.grad(loss, phi.values(), create_graph=True)
            if method == "sign-maml":
                gradients = [gradient.sign() for gradient in gradients]
            phi = {
                name: value - rates[name][step - 1] * gradient
                for (name, value), gradient in zip(phi.items(), gradients, strict=True)
            }
            of_task[step] = F.cross_entropy(functional_call(model, phi, (query_x,)), query_y)
        losses.append(sum(weight * of_task[step] for step, weight in weights.items()))
    return list(torch.autograd.grad(torch.stack(losses).mean(), [*theta.values(), *rates.values()]))


@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_the_multi_step_loss_is_its_definition(tmp_path: Path, method: str) -> None:
    changes = {"method": method, "inner_steps": 3, "learn_inner_lr": "per-layer-per-step", "inner_lr": 0.1}
    wanted = config(multi_step_loss=4, outer_optimizer="sgd", schedule="constant", **changes)
    trainer = MetaTrainer(wanted, model=network().double(), train=Doubled(), out=tmp_path / "run", progress=False)
    for iteration in range(6):
        earlier = max(0.0, (1 - iteration / 4) / 3)
        weights = {1: earlier, 2: earlier, 3: 1 - 2 * earlier}
        logs = {name: log.detach().clone().requires_grad_() for name, log in trainer.rates.logs.items()}
        rates = {name: log.exp().flatten() for name, log in logs.items()}
        found = meta_gradient_by_hand(trainer.model, Doubled().draw(iteration), method, weights, rates)
        trainer._train_step()
        trained = [*trainer.model.parameters(), *trainer.rates.logs.values()]
        for parameter, gradient, rate in zip(trained, found, [None] * 4 + list(rates.values()), strict=True):
            # By the chain rule from a rate to its logarithm.
            expected = gradient if rate is None else (gradient * rate).view_as(parameter)
            torch.testing.assert_close(parameter.grad, expected.detach(), rtol=1e-9, atol=1e-12)


class Doubled:
    """Episodes in float64."""

    def draw(self, iteration: int) -> tuple[torch.Tensor, ...]:
        sampler = EpisodeSampler(toy_images(), ways=3, shots=1, queries=3, tasks=3, seed=5)
        return tuple(part.double() if part.is_floating_point() else part for part in sampler.draw(iteration))


def test_maml_begins_with_first_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "maml", "inner_lr": 0.1, "schedule": "constant"}
    first = trained(tmp_path / "first", iterations=3, **options | {"method": "fo-maml"})
    methods, meta_step = [], signmaml_ext.meta_step

    def noting(*args: Any, **arguments: Any) -> Any:
        methods.append(arguments["method"])
        return meta_step(*args, **arguments)

    monkeypatch.setattr(signmaml_ext, "meta_step", noting)
    trained(tmp_path / "noted", first_order_for=3, **options)
    assert methods == ["maml"] + ["fo-maml"] * 3 + ["maml"] * 3, "one meta-step is a trial"
    lose(stopped := toy_run(tmp_path / "stopped", first_order_for=3, **options), 3)
    assert_same_weights(stopped.model, first.model)


def test_a_task_that_is_not_finite_after_an_early_step_is_counted(tmp_path: Path) -> None:
    """After one step its query loss is Inf, after two it is not."""

    class Overflowing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hot = (self.weight.detach() - x).abs() < 0.01  # where the inner loop is after its first step
            return self.weight + torch.where(hot, torch.inf, 0.0)

    class Steps:
        def draw(self, iteration: int) -> tuple[torch.Tensor, ...]:
            ones = torch.ones(1, 1, 1)
            # One step of the squared error's sign moves the weight to 0.5, the second one to 1.
            return 9 * ones, 9 * ones, 0.5 * ones, ones

    options = {"multi_step_loss": 9, "inner_lr": 0.5, "nonfinite": "skip", "iterations": 1, "outer_lr": 1e-9}
    trainer = MetaTrainer(config(**options), model=Overflowing(), train=Steps(), out=tmp_path / "run", progress=False)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    trainer.fit()
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record["nonfinite_tasks"] == 1 and math.isfinite(record["loss"])


def toy_run(folder: Path, **changes: Any) -> MetaTrainer:
    return MetaTrainer(config(**changes), model=network(), train=toy_images(), out=folder, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"multi_step_loss": 4, "learn_inner_lr": "per-step"}, {"method": "maml", "first_order_for": 4}], ids=str
)
@pytest.mark.parametrize("lost_after", [2, 5])
def test_an_interrupted_run_anneals_alike(tmp_path: Path, changes: dict[str, Any], lost_after: int) -> None:
    changes = changes | {"checkpoint_every": 1}
    toy_trainer(tmp_path / "whole", 8, **changes).fit()
    lose(toy_trainer(tmp_path / "parts", 8, **changes), lost_after)
    toy_trainer(tmp_path / "parts", 8, **changes).fit(resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ---- Averaged weights


def averaged_by_hand(decay: float, **changes: Any) -> dict[str, torch.Tensor]:
    """The average after the last iteration, from the weights after each."""
    average: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = MetaTrainer(
            config(**changes), model=network(), train=toy_images(), out=f"{folder}/run", progress=False
        )
        trainer._draw_plots = lambda: None  # type: ignore[method-assign]
        average |= {name: tensor.detach().clone() for name, tensor in trainer._trained.items()}
        step = trainer._train_step

        def followed() -> None:
            step()
            i = trainer.iteration - 1
            share = min(decay, (1 + i) / (10 + i))
            for name, tensor in trainer._trained.items():
                average[name] = share * average[name] + (1 - share) * tensor.detach()

        trainer._train_step = followed  # type: ignore[method-assign]
        trainer.fit()
    return average


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9])
def test_the_best_weights_are_the_average(tmp_path: Path, decay: float) -> None:
    options = {"learn_inner_lr": "per-layer", "outer_lr": 0.05}
    trainer = trained(tmp_path / "run", average=decay, **options)
    expected = averaged_by_hand(decay, **options)
    for name, tensor in trainer._trained.items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-5, atol=1e-6)
    last = checkpoint.load(tmp_path / "run" / "last.safetensors")[0]
    plain = trained(tmp_path / "plain", **options)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(last[f"model.{name}"], tensor), "training itself goes on from the weights"
        assert torch.equal(last[f"average.{name}"], tensor) == (decay == 0)


def test_validations_are_of_the_average(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 12, average=0.9)
    seen = []
    validate = trainer.validate

    def watched() -> Any:
        seen.append([tensor.detach().clone() for tensor in trainer._trained.values()])
        return validate()

    trainer.validate = watched  # type: ignore[method-assign]
    trainer.fit()
    last = checkpoint.load(tmp_path / "run" / "last.safetensors")[0]
    for found, name in zip(seen[-1], trainer._trained, strict=True):
        assert torch.equal(found, last[f"average.{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("lost_after", [3, 8])
def test_an_interrupted_run_has_the_same_average(tmp_path: Path, lost_after: int) -> None:
    toy_trainer(tmp_path / "whole", 12, average=0.9).fit()
    lose(toy_trainer(tmp_path / "run", 12, average=0.9), lost_after)
    toy_trainer(tmp_path / "run", 12, average=0.9).fit(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_error_in_a_validation_leaves_the_weights(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 6, average=0.5)

    def broken() -> Any:
        raise RuntimeError("validation")

    trainer.validate = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="validation"):
        trainer.fit()
    plain = toy_trainer(tmp_path / "plain", 6)
    plain._val_sampler = None
    for _ in range(6):
        plain._train_step()
    for mine, theirs in zip(trainer._trained.values(), plain._trained.values(), strict=True):
        assert torch.equal(mine, theirs)


# ---- Early stopping

# The best validation is the first, of iteration 6: the outer rate is so high that training only spoils the model.
PATIENT: dict[str, Any] = {"patience": 2, "iterations": 60, "outer_lr": 1e-30, "schedule": "constant"}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_stops_when_validations_do_not_improve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An outer rate of nearly 0 changes nothing, so every validation equals the first, of iteration 6."""
    trainer = toy_trainer(tmp_path / "run", **PATIENT)
    result = trainer.fit()
    assert result.iterations == trainer.iteration == 18 and result.best is not None and result.best.iteration == 6
    assert result.test is not None, "the test is made all the same"
    found = records(tmp_path / "run")
    assert [r["iteration"] for r in found if r["split"] == "val"] == [6, 12, 18]
    assert [r["iteration"] for r in found if r["split"] == "train"] == [4, 8, 12, 16, 18], "the last ones are recorded"
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 18
    assert trainer._why_early() == "stopped early at iteration 18: 2 validations since the best one, at 6"


@pytest.mark.slow
def test_it_does_not_stop_while_they_improve(tmp_path: Path) -> None:
    values = iter([0.3, 0.2, 0.5, 0.4, 0.6, 0.1, 0.2, 0.3])

    trainer = toy_trainer(tmp_path / "run", **PATIENT)
    validate = trainer.validate

    def validated() -> Any:
        import dataclasses

        return dataclasses.replace(validate(), mean=next(values))

    trainer.validate = validated  # type: ignore[method-assign]
    result = trainer.fit()
    assert result.best is not None and (result.best.iteration, result.best.value) == (30, 0.6)
    assert result.iterations == 42


def test_patience_that_is_not_used_up_changes_nothing(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "with", 12, patience=50).fit()
    toy_trainer(tmp_path / "without", 12).fit()
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
@pytest.mark.parametrize("lost_after", [3, 11, 17])
def test_an_interrupted_run_stops_at_the_same_place(tmp_path: Path, lost_after: int) -> None:
    toy_trainer(tmp_path / "whole", **PATIENT).fit()
    lose(toy_trainer(tmp_path / "run", **PATIENT), lost_after)
    toy_trainer(tmp_path / "run", **PATIENT).fit(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_stopped_early_goes_on_only_with_more_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_trainer(tmp_path / "run", **PATIENT).fit()
    trainer = toy_trainer(tmp_path / "run", **PATIENT)
    trainer._show_progress = True
    assert trainer.fit(resume=True).iterations == 18
    assert "stopped early at iteration 18" in capsys.readouterr().out
    longer = toy_trainer(tmp_path / "run", **PATIENT | {"patience": 3}).fit(resume=True)
    assert longer.iterations == 24


def test_patience_needs_validation_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patience: expected 0 without validation data \(val=\), found 2"):
        trained(tmp_path / "run", patience=2, validate_every=2)
    assert not (tmp_path / "run").exists()


# ---- Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer_weight_decay": 0.1}, "outer_weight_decay: expected none with outer_optimizer 'adam', found 0.1"),
        ({"outer_optimizer": "adamw", "adapt_rates": "alpha-maml"}, "outer_optimizer: expected 'adam' or 'sgd' with"),
        ({"clip_gradient": 1.0, "adapt_rates": "alpha-maml"}, "clip_gradient: expected none with adapt_rates"),
        ({"average": 1.0}, "average: expected a number below 1, found 1.0"),
        ({"average": 0.9, "adapt_rates": "alpha-maml"}, "average: expected none with adapt_rates"),
        ({"clip_gradient": 0.0}, "clip_gradient: expected a number > 0"),
        ({"multi_step_loss": 5, "inner_steps": 0}, "multi_step_loss: expected 0 with inner_steps 0"),
        ({"first_order_for": 5}, "first_order_for: expected 0 for method 'sign-maml'"),
        ({"patience": 2}, r"patience: expected 0 without validations \(validate_every 0\), found 2"),
        ({"warmup": -1}, "warmup: expected an integer >= 0"),
    ],
)
def test_configurations_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.slow
def test_the_command_line_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "train --preset sinusoid --iterations 40 --validate-every 2 --validate-tasks 4 --test-tasks 4 --outer-lr 1e-30 "
        f"--outer-optimizer adamw --warmup 3 --clip-gradient 10 --patience 2 --device cpu --out {tmp_path / 'run'}"
    )
    assert cli.main(words.split()) == 0
    said = capsys.readouterr().out
    assert "AdamW 1e-30" in said and ", warm-up 3, gradients of at most 10, patience 2" in said
    assert "stopped early at iteration 6: 2 validations since the best one, at 2" in said
    assert "trained 6 iterations" in said
