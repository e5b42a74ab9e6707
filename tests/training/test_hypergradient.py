"""Rates that are adapted online: the definition, the limits, and what a run makes of them."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.cases.toy_images import toy_images
from helpers.devices.replaying import ReplayingRecorder, stand_in
from helpers.programs.toy_run import toy_config, toy_trainer
from signmaml import checkpoint
from signmaml import config as configs
from signmaml.config import TrainConfig
from signmaml.hypergradient import OnlineRates
from signmaml.loggers import read_metrics
from signmaml.signals import TrainingInterrupted
from signmaml.trainer import MetaTrainer
from training.operators import FROM_HOST, WAITING, Recorder
from training.test_iteration import assert_same_run, fused_on_the_cpu, replays, trainer_of
from training.test_resume import interrupt_at

ITERATIONS, STEPS, TASKS = 6, 2, 3


class Waves:
    """Regression in float64: other slopes in every task."""

    tasks = TASKS

    def draw(self, iteration: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(iteration)
        x = torch.randn(TASKS, 9, 2, generator=generator, dtype=torch.float64)
        y = torch.tanh(x @ torch.randn(TASKS, 2, 1, generator=generator, dtype=torch.float64))
        return x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]

    def draw_tasks(self, first_task: int, tasks: int) -> tuple[Tensor, ...]:
        """Several tasks of one meta-batch."""
        iteration, first = divmod(first_task, TASKS)
        support_x, support_y, query_x, query_y = (part[first : first + tasks] for part in self.draw(iteration))
        return support_x, support_y, query_x, query_y


def wave_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def wave_trainer(folder: Path, *, iterations: int = ITERATIONS, **changes: Any) -> MetaTrainer:
    config = TrainConfig(
        inner_steps=STEPS, inner_lr=0.02, outer_lr=0.05, iterations=iterations, validate_every=0, test_tasks=0,
        device="cpu", tensorboard=False, **changes,
    )  # fmt: skip
    trainer = MetaTrainer(config, model=wave_model(), train=Waves(), out=folder, progress=False)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    return trainer


class ByHand(NamedTuple):
    """Where training by the definition ends.

    Attributes:
        weights: theta.
        alpha: The inner rate.
        beta: The outer rate before the schedule.
        path: alpha and beta after each iteration.
    """

    weights: list[Tensor]
    alpha: float
    beta: float
    path: list[tuple[float, float]]


def by_hand(config: TrainConfig, inner_hyper_lr: float, outer_hyper_lr: float) -> ByHand:
    """Straight-line autograd and the formulas of the module's docstring, without anything of the package."""
    model, waves, names = wave_model(), Waves(), [name for name, _ in wave_model().named_parameters()]
    theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
    alpha = torch.tensor(config.inner_lr, dtype=torch.float64)
    beta, direction, last_factor = config.outer_lr, [torch.zeros_like(p) for p in theta], 0.0
    m, v = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    path = []
    for iteration in range(ITERATIONS):
        alpha.requires_grad_()
        losses = []
        for sx, sy, qx, qy in zip(*waves.draw(iteration), strict=True):
            phi = list(theta)
            for _ in range(config.inner_steps):
                loss = (functional_call(model, dict(zip(names, phi, strict=True)), sx) - sy).square().mean()
                exact = config.method == "maml"
                gradients = torch.autograd.grad(loss, phi, create_graph=exact, retain_graph=True)
                if config.method == "sign-maml":
                    gradients = tuple(gradient.sign() for gradient in gradients)
                phi = [p - alpha * gradient for p, gradient in zip(phi, gradients, strict=True)]
            losses.append((functional_call(model, dict(zip(names, phi, strict=True)), qx) - qy).square().mean())
        *g, h_alpha = torch.autograd.grad(torch.stack(losses).mean(), [*theta, alpha])
        h_beta = -last_factor * float(sum((a * b).sum() for a, b in zip(g, direction, strict=True)))
        if config.adapt_rates == "multiplicative":
            alpha = alpha.detach() * math.exp(-inner_hyper_lr * float(alpha.detach() * h_alpha))
            beta = beta * math.exp(-outer_hyper_lr * beta * h_beta)
        else:
            alpha = alpha.detach() - inner_hyper_lr * h_alpha
            beta = beta - outer_hyper_lr * h_beta
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b**2 for a, b in zip(v, g, strict=True)]
        t = iteration + 1
        direction = list(g)
        if config.outer_optimizer == "adam":
            corrected = zip(m, v, strict=True)
            direction = [a / (1 - 0.9**t) / ((b / (1 - 0.999**t)).sqrt() + 1e-8) for a, b in corrected]
        factor = 1.0
        if config.schedule == "cosine":
            factor = (1 + math.cos(math.pi * iteration / ITERATIONS)) / 2
        last_factor = factor
        with torch.no_grad():
            for p, u in zip(theta, direction, strict=True):
                p -= factor * beta * u
        path.append((float(alpha), beta))
    return ByHand([p.detach() for p in theta], float(alpha), beta, path)


# Hyper-rates large enough that both rates move by per cents, and no limit is met.
HYPER = {"sign-maml": (2e-4, 1e-3), "fo-maml": (5e-4, 1e-3), "maml": (5e-4, 1e-3)}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_the_trainer_is_the_definition(tmp_path: Path, method: str, optimizer: str) -> None:
    inner, outer = HYPER[method]
    outer *= 10 if optimizer == "sgd" else 1
    trainer = wave_trainer(
        tmp_path / "run", adapt_rates="alpha-maml", method=method, outer_optimizer=optimizer, inner_hyper_lr=inner,
        outer_hyper_lr=outer, schedule="constant",
    )  # fmt: skip
    assert_defined(trainer, by_hand(trainer.config, inner, outer))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_schedule_multiplies_the_rate_and_its_hypergradient(tmp_path: Path, optimizer: str) -> None:
    trainer = wave_trainer(
        tmp_path / "run", adapt_rates="alpha-maml", outer_optimizer=optimizer, inner_hyper_lr=2e-4, schedule="cosine",
        outer_hyper_lr=1e-2 if optimizer == "sgd" else 1e-3,
    )  # fmt: skip
    assert trainer.config.outer_hyper_lr is not None
    assert_defined(trainer, by_hand(trainer.config, 2e-4, trainer.config.outer_hyper_lr))


def test_the_multiplicative_rule(tmp_path: Path) -> None:
    hyper = {"inner_hyper_lr": 0.5, "outer_hyper_lr": 0.5}
    trainer = wave_trainer(tmp_path / "run", adapt_rates="multiplicative", **hyper)
    assert_defined(trainer, by_hand(trainer.config, *hyper.values()))


def assert_defined(trainer: MetaTrainer, expected: ByHand) -> None:
    config, seen = trainer.config, []
    assert trainer.online is not None and trainer.rates.online is not None
    for _ in range(ITERATIONS):
        trainer._train_step()
        seen.append((float(trainer.rates.online.detach()), float(trainer.online.outer_lr)))
    starts = [(config.inner_lr, config.outer_lr), *expected.path]
    for (old_alpha, old_beta), (alpha, beta) in zip(starts, expected.path, strict=False):
        assert 0.55 < alpha / old_alpha < 1.8 and 0.55 < beta / old_beta < 1.8, "a limit would hide the definition"
    for which, start in ((0, config.inner_lr), (1, config.outer_lr)):
        reach = max(abs(rates[which] / start - 1) for rates in expected.path)
        assert reach > 0.01, f"rate {which} hardly moves: {expected.path}"
    assert expected.path[0][1] == config.outer_lr, "there is no step before the first"
    for found, right in zip(seen, expected.path, strict=True):
        assert found == pytest.approx(right, rel=1e-9)
    for found, right in zip(trainer.model.parameters(), expected.weights, strict=True):
        torch.testing.assert_close(found.detach(), right, rtol=1e-9, atol=1e-11)


def test_defaults_begin_alike_for_both_rules(tmp_path: Path) -> None:
    """Hyper-rates that are not given: k = 0.1 inside and 0.3 outside, times rate^2 for the rule that adds."""
    found = {}
    config = TrainConfig(adapt_rates="multiplicative", inner_lr=0.02, outer_lr=0.05, inner_steps=STEPS)
    alpha, beta = by_hand(config.replace(schedule="constant"), 0.1, 0.3).path[1]
    for rule in ("alpha-maml", "multiplicative"):
        trainer = wave_trainer(tmp_path / rule, adapt_rates=rule, schedule="constant")
        for _ in range(2):
            trainer._train_step()
        assert trainer.online is not None and trainer.rates.online is not None
        found[rule] = float(trainer.rates.online.detach()) / 0.02 - 1, float(trainer.online.outer_lr) / 0.05 - 1
    assert found["multiplicative"] == pytest.approx((alpha / 0.02 - 1, beta / 0.05 - 1), rel=1e-9)
    assert found["alpha-maml"] == pytest.approx(found["multiplicative"], rel=0.05)


# ---- Limits, and training loops of one's own


def rates_of(rule: str, inner_hyper_lr: float = 1.0) -> tuple[OnlineRates, Tensor, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(3))
    inner = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.25)
    return OnlineRates(optimizer, inner, rule=rule, inner_hyper_lr=inner_hyper_lr, outer_hyper_lr=1.0), inner, weight


@pytest.mark.parametrize("rule", ["alpha-maml", "multiplicative"])
def test_rates_stay_positive_whatever_comes(rule: str) -> None:
    rates, inner, weight = rates_of(rule, 1e6)
    for iteration in range(60):
        weight.grad = torch.full((3,), 1e4 * (-1) ** iteration)  # each step against the one before
        inner.grad = torch.tensor(1e4)
        before = inner.item(), rates.outer_lr.item()
        rates.update()
        found = inner.item(), rates.outer_lr.item()
        if iteration in range(1, 15):
            assert found == pytest.approx((before[0] / 2, before[1] / 2)), "halved, not turned negative"
    assert found == pytest.approx((0.5e-6, 0.25e-6)), "a millionth of where they started"


@pytest.mark.parametrize("rule", ["alpha-maml", "multiplicative"])
def test_rates_at_most_double_in_one_iteration(rule: str) -> None:
    rates, inner, weight = rates_of(rule, 1e6)
    for _ in range(2):
        weight.grad, inner.grad = torch.full((3,), 1e4), torch.tensor(-1e4)
        rates.update()
    assert (inner.item(), rates.outer_lr.item()) == (2.0, 0.5)


def test_a_nan_stays_visible() -> None:
    rates, inner, _ = rates_of("alpha-maml")
    inner.grad = torch.tensor(torch.nan)
    rates.update()
    assert math.isnan(inner.item())


def test_the_optimizer_gets_the_rate_and_the_gradient_is_used_up() -> None:
    """Also if its rate is a number, and if a schedule has a factor; b0 = 1."""
    rates, inner, weight = rates_of("alpha-maml", 0.125)
    weight.grad, inner.grad = torch.tensor([0.1, 0.2, 0.0]), torch.tensor(1.0)
    rates.update(0.5)
    assert inner.item() == 0.375 and inner.grad is None
    assert rates._optimizer.param_groups[0]["lr"] == 0.125
    weight.grad = torch.tensor([1.0, 0.5, 7.0])
    assert rates.outer_hypergradient().item() == pytest.approx(-0.5 * 0.2)
    rates.update(0.5)
    assert rates._optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.35)
    assert inner.item() == 0.375, "there was no gradient"


def test_a_parameter_without_a_gradient_has_no_part() -> None:
    for make in (torch.optim.SGD, torch.optim.Adam):
        used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = make([used, unused], lr=0.25)
        rates = OnlineRates(optimizer)
        for _ in range(2):
            used.grad = torch.ones(2)
            rates.update()
            optimizer.step()
        assert rates.outer_hypergradient().item() == pytest.approx(-2.0), make


def test_a_parameter_that_the_last_step_left_alone_has_no_part() -> None:
    rates, _, weight = rates_of("alpha-maml")
    for gradient in (torch.ones(3), None):
        weight.grad = gradient
        rates.update()
    weight.grad = torch.ones(3)
    assert rates.outer_hypergradient().item() == 0


def one_weight() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OnlineRates(torch.optim.AdamW(one_weight())),
            "expected torch.optim.Adam or torch.optim.SGD, found Ad",
        ),
        (lambda: OnlineRates(torch.optim.SGD(one_weight(), momentum=0.9)), "expected SGD without momentum, found 0.9"),
        (lambda: OnlineRates(torch.optim.Adam(one_weight(), weight_decay=0.1)), "expected Adam without weight_decay"),
        (
            lambda: OnlineRates(torch.optim.SGD([{"params": one_weight()}, {"params": one_weight(), "lr": 1}], lr=1)),
            "expected one group of parameters, found 2",
        ),
        (lambda: OnlineRates(torch.optim.SGD(one_weight()), rule="additive"), "rule: expected 'alpha-maml' or 'multi"),
        (lambda: OnlineRates(torch.optim.SGD(one_weight()), outer_hyper_lr=-1.0), "outer_hyper_lr: expected a number"),
        (lambda: OnlineRates(torch.optim.SGD(one_weight()), outer_hyper_lr=math.nan), "outer_hyper_lr: expected a num"),
        (lambda: OnlineRates(torch.optim.SGD(one_weight()), torch.tensor(0.1)), "requires_grad: False"),
        (
            lambda: OnlineRates(torch.optim.SGD(one_weight()), torch.ones(3, requires_grad=True)),
            r"expected a leaf tensor \[\] that requires grad, found shape \[3\]",
        ),
    ],
)
def test_what_it_does_not_serve(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapt_rates": "alpha_maml"}, r"adapt_rates: expected one of .*\(did you mean 'alpha-maml'\?\)"),
        ({"inner_hyper_lr": 0.1}, "inner_hyper_lr: expected none without adapt_rates, found 0.1"),
        ({"outer_hyper_lr": 0}, "outer_hyper_lr: expected none without adapt_rates, found 0"),
        ({"adapt_rates": "alpha-maml", "outer_hyper_lr": -1}, "outer_hyper_lr: expected a number >= 0, found -1"),
        (
            {"adapt_rates": "alpha-maml", "learn_inner_lr": "scalar"},
            "learn_inner_lr: expected 'none' with adapt_rates 'alpha-maml'",
        ),
        (
            {"adapt_rates": "multiplicative", "inner_hyper_lr": 0, "outer_hyper_lr": 0},
            "adapt_rates: expected 'none' where both hyper-rates are 0",
        ),
        ({"adapt_rates": "alpha-maml", "inner_steps": 0}, "inner_hyper_lr: expected 0 with inner_steps 0"),
        ({"outer_optimizer": "sgdm"}, r"outer_optimizer: expected one of .*\(did you mean 'sgd'\?\)"),
    ],
)
def test_combinations_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_combinations_that_do_not() -> None:
    assert TrainConfig(adapt_rates="alpha-maml").adapts_inner_lr()
    assert not TrainConfig(adapt_rates="alpha-maml", inner_steps=0, inner_hyper_lr=0).adapts_inner_lr()
    assert not TrainConfig().adapts_inner_lr()


def test_a_resumed_run_keeps_its_rule_and_hyper_rates() -> None:
    old = TrainConfig(adapt_rates="alpha-maml")
    new = old.replace(adapt_rates="multiplicative", inner_hyper_lr=0.1, outer_hyper_lr=0.1, outer_optimizer="sgd")
    changed = [line.split(":")[0] for line in configs.differences(old, new)]
    assert changed == ["outer_optimizer", "adapt_rates", "inner_hyper_lr", "outer_hyper_lr"]


# ---- Runs


def adapting(folder: Path, iterations: int = 9, **changes: Any) -> MetaTrainer:
    options = {"learn_inner_lr": "none", "adapt_rates": "alpha-maml", "inner_hyper_lr": 1e-3, "outer_hyper_lr": 1e-5}
    return toy_trainer(folder, iterations, **options | changes)


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "sgd"])
def test_interrupted_at_every_iteration_the_bits_are_the_same(tmp_path: Path, optimizer: str) -> None:
    options = {"outer_optimizer": optimizer}
    reference = adapting(tmp_path / "reference", 7, **options)
    reference.fit()
    records = [r for r in read_metrics(reference.run.metrics) if r["split"] == "train"]
    assert len({r["inner_lr"] for r in records}) == len(records) > 1
    for stop in range(1, 8):
        trainer = adapting(tmp_path / "run", 7, **options)
        interrupt_at(trainer, stop, signal.SIGINT)
        if stop < 7:
            with pytest.raises(TrainingInterrupted):
                trainer.fit(resume=stop > 1)
        else:
            trainer.fit(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_checkpoints_hold_both_rates_exactly(tmp_path: Path, optimizer: str) -> None:
    trainer = adapting(tmp_path / "run", 5, outer_optimizer=optimizer, validate_every=0, test_tasks=0)
    trainer.fit()
    assert trainer.online is not None and trainer.rates.online is not None
    last, _ = checkpoint.load(trainer.run.last, kind="training")
    assert last["online.outer_lr"].dtype == torch.float64 and last["online.outer_lr"].item() != 0.006
    assert torch.equal(last["online.outer_lr"], trainer.online.outer_lr)
    assert torch.equal(last["rates.online"], trainer.rates.online)
    moments = {"adam.classifier.bias.exp_avg"} if optimizer == "adam" else {"online.last_gradient.0"}
    others = {"adam.classifier.bias.exp_avg", "online.last_gradient.0"} - moments
    assert moments <= last.keys() and not others & last.keys()
    _, best = checkpoint.load(trainer.run.best, kind="weights")
    alpha = float(trainer.rates.online.detach())
    assert best["inner_rates"] == {"learn": "none", "start": alpha, "steps": 2, "logs": {}}
    assert abs(alpha / 0.01 - 1) > 1e-3


def test_the_weights_bring_their_inner_rate(tmp_path: Path) -> None:
    trainer = adapting(tmp_path / "run", 5)
    trainer.fit()
    adapted = read_metrics(trainer.run.metrics)
    assert adapted[-1]["split"] == "val"
    for other in (adapting(tmp_path / "again", 5), toy_trainer(tmp_path / "plain", 5, learn_inner_lr="none")):
        other.load_weights(trainer.run.best)
        assert other.rates.to_json() == trainer.rates.to_json()
        assert other.test() == trainer.test()
    assert trainer.test().inner_lr == trainer.rates.to_json()["start"] != pytest.approx(0.01, rel=1e-3)


def test_a_state_without_rates_is_refused(tmp_path: Path) -> None:
    trainer = adapting(tmp_path / "run", 5)
    trainer.fit()
    tensors, metadata = checkpoint.load(trainer.run.last)
    kept = {name: value for name, value in tensors.items() if not name.startswith("online.")}
    checkpoint.save(trainer.run.last, kept, kind="training", metadata=metadata)
    with pytest.raises(ValueError, match=r"nothing for 'online.outer_lr'"):
        adapting(tmp_path / "run", 5).fit(resume=True)


def test_a_run_without_adapted_rates_saves_what_it_always_did(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 3, learn_inner_lr="none")
    trainer.fit()
    assert {name.split(".")[0] for name in checkpoint.load(trainer.run.last)[0]} == {"model", "adam"}
    assert "inner_lr" not in read_metrics(trainer.run.metrics)[0]


def test_sgd_outside_without_adapted_rates(tmp_path: Path) -> None:
    trainer = wave_trainer(tmp_path / "run", outer_optimizer="sgd", schedule="cosine")
    config = trainer.config.replace(adapt_rates="alpha-maml")
    expected = by_hand(config, 0.0, 0.0)
    trainer.fit()
    for found, right in zip(trainer.model.parameters(), expected.weights, strict=True):
        torch.testing.assert_close(found.detach(), right, rtol=1e-10, atol=1e-12)
    assert "SGD 0.05 cosine" in trainer.describe()


def test_pieces_of_a_meta_batch_give_the_mean_hypergradient(tmp_path: Path) -> None:
    """As processes do: their gradients are summed by the same code."""
    hyper: dict[str, Any] = {"inner_hyper_lr": 2e-2, "outer_hyper_lr": 2e-4, "method": "fo-maml"}
    whole, pieces = (wave_trainer(tmp_path / name, adapt_rates="alpha-maml", **hyper) for name in ("whole", "pieces"))
    pieces._iteration._step.at_once = 1
    for _ in range(4):
        whole._train_step()
        pieces._train_step()
    assert whole.online is not None and pieces.online is not None
    assert whole.online.outer_lr.item() != 0.05
    torch.testing.assert_close(pieces.online.outer_lr, whole.online.outer_lr, rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces.rates.online, whole.rates.online, rtol=1e-12, atol=0)


def test_records_and_words(tmp_path: Path) -> None:
    trainer = wave_trainer(tmp_path / "run", adapt_rates="alpha-maml", log_every=3, schedule="cosine")
    assert "Adam 0.05 cosine, rates adapted online (alpha-maml)" in trainer.describe()
    trainer.fit()
    records = read_metrics(trainer.run.metrics)
    assert [r["iteration"] for r in records] == [3, 6]
    assert trainer.online is not None and trainer.rates.online is not None
    assert records[-1]["inner_lr"] == float(trainer.rates.online.detach())
    assert records[-1]["outer_lr_before_schedule"] == trainer.online.outer_lr.item()
    used = trainer.online.outer_lr.item() * (1 + math.cos(math.pi * 5 / 6)) / 2
    assert records[-1]["outer_lr"] == pytest.approx(used, rel=1e-12)


# ---- Graphs


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_with_the_outer_rate_alone_an_iteration_is_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    stand_in(monkeypatch)
    changes = {"adapt_rates": "alpha-maml", "inner_hyper_lr": 0, "outer_hyper_lr": 1e-4, "outer_optimizer": optimizer}
    graph = trainer_of(tmp_path / "graph", 9, graph=True, **changes)
    graph.fit()
    assert replays() == [9]
    assert graph.online is not None and graph.online.outer_lr.item() not in (0.0, 0.006)
    trainer_of(tmp_path / "eager", 9, graph=False, **changes).fit()
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


def test_with_the_inner_rate_there_is_no_graph_and_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    trainer = trainer_of(tmp_path / "run", 2, adapt_rates="alpha-maml")
    assert "graph    none (inner_lr requires grad)" in trainer.describe()
    with pytest.raises(ValueError, match=r"graph: expected a run .* inner_lr requires grad"):
        trainer_of(tmp_path / "no", 2, adapt_rates="alpha-maml", graph=True)
    assert not any(recorder.recording for recorder in ReplayingRecorder.made)


def fused_sgd_on_the_cpu(parameters: Any, lr: float, device: torch.device) -> torch.optim.SGD:
    """What `outer_sgd` returns on a CUDA device."""
    return torch.optim.SGD(parameters, lr=torch.tensor(lr), fused=True)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("rule", ["alpha-maml", "multiplicative"])
def test_nothing_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, optimizer: str
) -> None:
    """Neither in an iteration that a graph holds nor in one that also changes the inner rate."""
    stand_in(monkeypatch)
    monkeypatch.setattr("signmaml.trainer.outer_adam", fused_on_the_cpu)
    monkeypatch.setattr("signmaml.trainer.outer_sgd", fused_sgd_on_the_cpu)
    monkeypatch.setattr("signmaml_ext.reference.check_labels", lambda *_: None)
    monkeypatch.setattr("signmaml_ext.fused.check_labels", lambda *_: None)
    changes = {"adapt_rates": rule, "outer_optimizer": optimizer, "backend": "torch"}
    outer = trainer_of(tmp_path / "outer", 9, inner_hyper_lr=0, **changes)._iteration
    outer._whole()
    with Recorder() as recorder:
        outer._whole()
    assert len(recorder.called) > 100
    assert not (WAITING | FROM_HOST).intersection(recorder.called)
    both = trainer_of(tmp_path / "both", 9, **changes)
    both._train_step()
    assert both.online is not None and both.rates.online is not None
    for parameter in (*both.model.parameters(), both.rates.online):
        parameter.grad = torch.ones_like(parameter)
    with Recorder() as recorder:
        both.online.update(torch.ones((), dtype=torch.float64))
        both.optimizer.step()
    assert "aten::exp" in recorder.called if rule == "multiplicative" else "aten::exp" not in recorder.called
    assert not WAITING.intersection(recorder.called)


def test_the_network_of_a_run_serves_the_inner_rate_natively(tmp_path: Path) -> None:
    """Conv-N differentiates the rate in native code on the CPU."""
    changes = {"learn_inner_lr": "none", "adapt_rates": "alpha-maml", "model": "conv4", "filters": 8}
    config = toy_config(2, validate_every=0, test_tasks=0, **changes)
    trainer = MetaTrainer(config, train=toy_images(), out=tmp_path / "run", progress=False)
    assert trainer.explanation.backend == "cpu" and trainer.explanation.family == "conv"
    trainer._train_step()
    assert trainer.rates.to_json()["start"] != pytest.approx(config.inner_lr, rel=1e-4)
