"""MetaTrainer inside one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.cases.toy_images import toy_images
from helpers.programs.toy_run import toy_config, toy_trainer
from signmaml import checkpoint, cli, evaluate
from signmaml.config import TrainConfig
from signmaml.data import ImageSet
from signmaml.episodes import EpisodeSampler, SinusoidSampler
from signmaml.loggers import read_metrics
from signmaml.models import MLP, Conv4
from signmaml.trainer import MetaTrainer


def hard_images(split: str) -> ImageSet:
    return toy_images(split, classes=60 if split == "train" else 20, distracting=True)


def trainer_of(folder: Path, iterations: int = 18, **changes: Any) -> MetaTrainer:
    """A trainer on images that an untrained network adapts to badly."""
    sets = {split: hard_images(split) for split in ("train", "val", "test")}
    usual = {"schedule": "constant", "learn_inner_lr": "none", "outer_lr": 0.005}
    config = toy_config(iterations, model="mlp", hidden=(64, 64), tasks=8, **usual | changes)
    return MetaTrainer(config, out=folder, progress=False, **sets)


def test_training_learns_and_leaves_its_files(tmp_path: Path) -> None:
    seen: list[dict] = []
    trainer = trainer_of(tmp_path / "run", 120, inner_steps=3, test_tasks=100, validate_every=30)
    trainer._callbacks = (seen.append,)
    before = trainer.test().mean
    result = trainer.fit()
    assert result.test is not None and result.best is not None
    assert result.test.mean > before + 0.07
    assert result.test.data == "toy" and result.test.split == "test"
    names = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {
        "config.yaml", "metrics.jsonl", "last.safetensors", "best.safetensors", "result.json", "curves.png",
        "episode.png",
    }  # fmt: skip
    assert seen == read_metrics(trainer.run.metrics)
    train = [r["iteration"] for r in seen if r["split"] == "train"]
    assert train == list(range(4, 121, 4))
    assert [r["iteration"] for r in seen if r["split"] == "val"] == list(range(30, 121, 30))
    stored = json.loads(trainer.run.result.read_text())
    assert stored["test"] == result.test.to_dict() and stored["config"]["ways"] == 3


def test_the_best_weights_are_kept_and_tested(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    result = trainer.fit()
    validations = {r["iteration"]: r["accuracy"] for r in read_metrics(trainer.run.metrics) if r["split"] == "val"}
    best = max(validations, key=lambda iteration: (validations[iteration], -iteration))
    assert result.best is not None and (result.best.iteration, result.best.value) == (best, validations[best])
    model = MLP(256, 3, hidden=(64, 64))
    metadata = checkpoint.load_weights(model, trainer.run.best)
    assert metadata["iteration"] == best
    again = evaluate(
        model, hard_images("test"), ways=3, shots=1, queries=3, tasks=6, seed=3, inner_lr=0.01, inner_steps=2
    )
    assert result.test is not None and again.mean == result.test.mean
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_without_validation_the_last_weights_are_the_best(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 4, validate_every=0)
    result = trainer.fit()
    assert result.best is None
    best, _ = checkpoint.load(trainer.run.best)
    last, _ = checkpoint.load(trainer.run.last)
    assert all(torch.equal(best[name], last[f"model.{name}"]) for name in best)


def test_one_iteration_is_the_documented_update(tmp_path: Path) -> None:
    """Adam on the meta-gradient of meta_step, by hand."""
    import signmaml_ext

    trainer = trainer_of(tmp_path / "run", validate_every=0, test_tasks=0)
    model = MLP(256, 3, hidden=(64, 64))
    model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    sampler = EpisodeSampler(hard_images("train"), ways=3, shots=1, queries=3, tasks=8, seed=3)
    for iteration in range(2):
        optimizer.zero_grad()
        signmaml_ext.meta_step(model, *sampler.draw(iteration), inner_lr=0.01, inner_steps=2)
        optimizer.step()
        trainer._train_step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("learn", ["scalar", "per-step", "per-layer", "per-layer-per-step", "per-parameter"])
@pytest.mark.parametrize("method", ["sign-maml", pytest.param("maml", marks=pytest.mark.slow)])
def test_inner_rates_learn(tmp_path: Path, learn: str, method: str) -> None:
    """A rate that is far too small grows; shapes and test steps fit for every kind of rate."""
    changes = {"learn_inner_lr": learn, "method": method, "inner_lr": 1e-4, "outer_lr": 0.05, "test_steps": 4}
    trainer = MetaTrainer(
        toy_config(8, test_tasks=0, validate_tasks=3, validate_every=8, **changes), model=MLP(256, 3), progress=False,
        out=tmp_path / "run", train=toy_images(), val=toy_images("val"),
    )  # fmt: skip
    elements = sum(parameter.numel() for parameter in trainer.model.parameters())
    count = {"scalar": 1, "per-step": 2, "per-layer": 6, "per-layer-per-step": 12, "per-parameter": elements}[learn]
    assert sum(log.numel() for log in trainer.rates.parameters()) == count
    trainer.fit()
    learned = torch.cat([log.detach().exp().flatten() for log in trainer.rates.parameters()])
    # Of the rates of single elements many have no say in the loss.
    grown = learned.max() if learn == "per-parameter" else learned.mean()
    assert grown > 1.1e-4 and (learned > 0).all()
    record = [r for r in read_metrics(trainer.run.metrics) if r["split"] == "train"][-1]
    assert record["inner_lr_max"] >= record["inner_lr_mean"] >= record["inner_lr_min"] > 0


@pytest.mark.parametrize("learn", ["per-layer-per-step", "per-parameter"])
def test_learned_rates_travel_with_the_weights(tmp_path: Path, learn: str) -> None:
    trainer = toy_trainer(tmp_path / "run", 6, learn_inner_lr=learn, validate_every=0)
    trainer.fit()
    other = toy_trainer(tmp_path / "other", 6, learn_inner_lr=learn)
    other.load_weights(trainer.run.best)
    assert any((rate != rate.flatten()[0]).any() for rate in other.rates.parameters())
    assert all(torch.equal(a, b) for a, b in zip(trainer.rates.parameters(), other.rates.parameters(), strict=True))
    wrong = toy_trainer(tmp_path / "wrong", 6, learn_inner_lr="scalar")
    with pytest.raises(ValueError, match="inner rates: expected"):
        wrong.load_weights(trainer.run.best)


@pytest.mark.slow
def test_rates_of_all_elements_are_tensors_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Not lists in the file's header, and plain weights to whoever wants no rates."""
    words = (
        "train --data sinusoid --model mlp --learn-inner-lr per-parameter --iterations 4 --validate-every 2 --quiet "
        f"--validate-tasks 5 --test-tasks 6 --out {tmp_path / 'run'}"
    )
    assert cli.main(words.split()) == 0
    run = tmp_path / "run"
    tensors, metadata = checkpoint.load(run / "best.safetensors")
    assert set(metadata["inner_rates"]["logs"].values()) == {None}
    model = MLP(1, 1)
    checkpoint.load_weights(model, run / "best.safetensors")
    beside = {name: value.shape for name, value in tensors.items() if name.startswith("inner_rates/")}
    assert beside == {f"inner_rates/log_{index}": p.shape for index, p in enumerate(model.parameters())}
    capsys.readouterr()
    found = []
    for which in ("best", "last"):
        assert cli.main(["evaluate", str(run), "--checkpoint", which, "--tasks", "6", "--json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["mean"] == json.loads((run / "result.json").read_text())["test"]["mean"]
    assert found[1]["inner_lr"] == "learned"
    damaged = {name: value for name, value in tensors.items() if name != "inner_rates/log_0"}
    checkpoint.save(run / "best.safetensors", damaged, kind="weights", metadata=metadata)
    assert cli.main(["evaluate", str(run), "--tasks", "6"]) == 2
    assert "inner rates: expected" in capsys.readouterr().err


@pytest.mark.slow
def test_anil_adapts_only_the_head(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", 2, adapt=["classifier.*"])
    before = trainer.model.features[0].weight.detach().clone()
    trainer.fit()
    assert not torch.equal(before, trainer.model.features[0].weight)  # the outer loop still trains it
    assert trainer._arguments["adapt"] == ["classifier.*"]


def test_regression_keeps_the_lowest_error(tmp_path: Path) -> None:
    config = TrainConfig(
        data="sinusoid", model="mlp", shots=5, queries=5, tasks=4, iterations=20, validate_every=4, validate_tasks=10,
        test_tasks=5, device="cpu",
    )  # fmt: skip
    trainer = MetaTrainer(config, out=tmp_path / "run", progress=False)
    result = trainer.fit()
    errors = {r["iteration"]: r["loss"] for r in read_metrics(trainer.run.metrics) if r["split"] == "val"}
    assert result.best is not None and result.best.metric == "mse"
    assert result.best.value == min(errors.values()) == errors[result.best.iteration]
    assert (tmp_path / "run" / "episode.png").is_file()


def test_own_samplers_models_and_losses(tmp_path: Path) -> None:
    class Doubling:
        """Tasks y = a x; no attributes, plain tuples, only draw."""

        def draw(self, iteration: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(iteration)
            slope = torch.rand(3, 1, 1, generator=generator) + 1
            x = torch.randn(3, 8, 2, generator=generator)
            return x[:, :4], slope * x[:, :4], x[:, 4:], slope * x[:, 4:]

    model = nn.Linear(2, 2)
    config = TrainConfig(iterations=10, test_tasks=7, validate_every=0, log_every=2, device="cpu", outer_lr=0.05)
    trainer = MetaTrainer(
        config, model=model, train=Doubling(), test=Doubling(), out=tmp_path / "run", progress=False,
        loss=lambda prediction, target: (prediction - target).abs().mean(),
    )  # fmt: skip
    result = trainer.fit()
    losses = [r["loss"] for r in read_metrics(trainer.run.metrics)]
    assert losses[-1] < losses[0]
    assert result.test is not None and result.test.tasks == 7 and result.test.data == "Doubling"
    assert trainer.model is model and not (tmp_path / "run" / "episode.png").exists()


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = Conv4(ways=3, channels=1, filters=4, image_size=16)
    model.features[0].requires_grad_(False)
    before = model.features[0].conv.weight.clone()
    trainer = MetaTrainer(
        toy_config(3, learn_inner_lr="per-layer"), model=model, train=toy_images(), out=tmp_path / "run", progress=False
    )
    trainer.fit()
    assert torch.equal(before, model.features[0].conv.weight)
    assert "features.0.conv.weight" not in trainer.rates.logs


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", 2).fit()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    weights = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume .* --overwrite"):
        toy_trainer(tmp_path / "run", 2).fit()
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == weights
    toy_trainer(tmp_path / "run", 1).fit(overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert checkpoint.load(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 1


def test_resume_needs_a_run_and_the_same_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a run to resume"):
        toy_trainer(tmp_path / "none").fit(resume=True)
    toy_trainer(tmp_path / "run", 4).fit()
    stored = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="ways: 3 -> 4; seed: 3 -> 4"):
        MetaTrainer(toy_config(8, ways=4, seed=4), out=tmp_path / "run", train=toy_images(), progress=False).fit(
            resume=True
        )
    with pytest.raises(ValueError, match="iterations: expected at least the 4 that the run has done, found 3"):
        toy_trainer(tmp_path / "run", 3).fit(resume=True)
    with pytest.raises(ValueError, match="expected optimizer state of this model"):
        other = MetaTrainer(toy_config(8), model=MLP(256, 3), out=tmp_path / "run", train=toy_images(), progress=False)
        other.fit(resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == stored


def test_weights_that_turn_nan_do_not_replace_the_last_good_state(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 15, learn_inner_lr="none")
    step = trainer._train_step

    def step_with_fault() -> None:
        step()
        if trainer.iteration == 7:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(math.nan)

    trainer._train_step = step_with_fault  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"turned NaN or Inf by iteration 10.*last good state"):
        trainer.fit()
    assert checkpoint.load(trainer.run.last)[1]["iteration"] == 5


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path / "run", 12)
    save = checkpoint.save
    calls = []

    def failing_save(path: Path, *arguments: Any, **keywords: Any) -> None:
        calls.append(path)
        if path.name == "last.safetensors" and len(calls) > 1:
            monkeypatch.setattr("os.fsync", no_space)
        save(path, *arguments, **keywords)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", failing_save)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    monkeypatch.undo()
    assert checkpoint.load(trainer.run.last)[1]["iteration"] == 5
    reference = toy_trainer(tmp_path / "reference", 12)
    reference.fit()
    resumed = toy_trainer(tmp_path / "run", 12)
    resumed.fit(resume=True)
    assert resumed.run.metrics.read_bytes() == reference.run.metrics.read_bytes()


def test_the_loop_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path / "run", 12, learn_inner_lr="none")

    def forbidden(*_: object) -> None:
        raise AssertionError("a value was read inside the loop")

    trainer._train_step()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, forbidden)
    # Adam's step counter is a CPU tensor that torch reads itself; labels are checked by value on the CPU only.
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    monkeypatch.setattr("signmaml_ext.fused.check_labels", lambda *_: None)
    trainer._train_step()
    monkeypatch.undo()
    assert trainer.iteration == 2 and len(trainer._iteration.window) == 2


def test_bad_data_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ways: expected an integer in 2\.\.8"):
        MetaTrainer(toy_config(2, ways=9), out=tmp_path / "run", train=toy_images())
    with pytest.raises(ValueError, match="test: expected data"):
        MetaTrainer(toy_config(2), train=toy_images(), progress=False, out=tmp_path / "run").test()
    with pytest.raises(ValueError, match="device"):
        MetaTrainer(toy_config(2, device="cuda:93"), train=toy_images())
    with pytest.raises(ValueError, match="expected 'mlp' for examples that are no square images"):
        MetaTrainer(TrainConfig(), train=SinusoidSampler(shots=1, queries=1, tasks=1))
    assert not (tmp_path / "run").exists()


def test_only_training_images_are_changed(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", 2, augment=("crop", "flip"))
    assert trainer._train_sampler.augment == ("flip", "crop")
    assert trainer._val_sampler.augment == trainer._test_sampler.augment == ()
    assert "3 queries a class, images changed (flip, crop)" in trainer.describe()
    plain = toy_trainer(tmp_path / "plain", 2)
    changed, as_is = trainer._train_sampler.draw(0), plain._train_sampler.draw(0)
    assert not torch.equal(changed.support_x, as_is.support_x) and torch.equal(changed.query_y, as_is.query_y)
    trainer.fit()


def test_images_of_the_callers_own_sampler_are_not_changed(tmp_path: Path) -> None:
    config = toy_config(2, augment=("flip",))
    own = EpisodeSampler(toy_images(), ways=3, shots=1, queries=3, tasks=3)
    with pytest.raises(ValueError, match="augment: expected none for a sampler of your own, EpisodeSampler"):
        MetaTrainer(config, model=MLP(256, 3), train=own, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_describe_says_what_will_happen(tmp_path: Path) -> None:
    text = toy_trainer(tmp_path / "run").describe()
    for words in ("toy: 3-way 1-shot", "DropoutNet, ", "sign-maml: 2 inner steps", "backend", "cpu (", str(tmp_path)):
        assert words in text, words


@pytest.mark.parametrize(("model", "family"), [("conv4", "conv"), ("mlp", "mlp")])
def test_networks_of_the_package_train_and_test_natively(tmp_path: Path, model: str, family: str) -> None:
    """End to end on the backend that "auto" takes on a CPU; the test loss is close to the reference's."""
    sets = {split: toy_images(split) for split in ("train", "val", "test")}
    losses = {}
    for backend in ("auto", "torch"):
        config = toy_config(
            4, model=model, filters=8, hidden=(16,), learn_inner_lr="none", inner_steps=1, backend=backend
        )
        torch.manual_seed(0)
        trainer = MetaTrainer(config, out=tmp_path / backend, progress=False, **sets)
        trainer._draw_plots = lambda: None  # type: ignore[method-assign]
        assert trainer.explanation.family == (family if backend == "auto" else "reference")
        assert f"backend  {trainer.explanation.backend}, {trainer.explanation.family} (" in trainer.describe()
        result = trainer.fit()
        assert result.test.backend == ("cpu" if backend == "auto" else "torch")
        losses[backend] = result.test.loss
    assert abs(losses["auto"] - losses["torch"]) < 0.1 * losses["torch"]
