"""Whole training iterations as graphs, with a stand-in for the device that records them: the same run, bit for bit."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.cases.toy_images import toy_images
from helpers.devices.replaying import ReplayingRecorder, ReplayingRecording, stand_in
from helpers.programs.toy_run import DropoutNet, toy_config
from signmaml import config as configs
from signmaml.config import TrainConfig
from signmaml.distributed import Group
from signmaml.iteration import Training, Window, outer_adam, why_no_graph
from signmaml.models import MLP, Conv4
from signmaml.signals import TrainingInterrupted
from signmaml.trainer import MetaTrainer
from signmaml_ext import graphs
from training.operators import FROM_HOST, WAITING, Recorder

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(256, 3, hidden=(16,)),
    "conv4": lambda: Conv4(ways=3, channels=1, filters=8, image_size=16),
}
SETS = {split: toy_images(split) for split in ("train", "val", "test")}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def trainer_of(folder: Path, count: int, *, model: str = "mlp", **changes: Any) -> MetaTrainer:
    torch.manual_seed(11)
    config = toy_config(count, **{"learn_inner_lr": "none"} | changes)
    trainer = MetaTrainer(config, model=MODELS[model](), out=folder, progress=False, **SETS)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    return trainer


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), f"{name}: {key}"


def replays() -> list[int]:
    """For each recorder that recorded something, how often the recording was replayed."""
    return [recorder.recording.replays for recorder in ReplayingRecorder.made if recorder.recording is not None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "conv4", "rotations": True, "normalize": "signed"},
        {"method": "fo-maml", "schedule": "constant"},
        {"method": "maml"},
        {"nonfinite": "skip", "adapt": ["classifier.*"]},
        {"outer_optimizer": "adamw", "outer_weight_decay": 0.1, "clip_gradient": 0.1, "warmup": 5},
        {"average": 0.9, "method": "fo-maml"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_graphs_give_the_same_run_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    graph = trainer_of(tmp_path / "graph", 13, graph=True, **changes)
    graph.fit()
    assert replays() == [13], "one recording serves the whole run, with validation and checkpoints in between"
    trainer_of(tmp_path / "eager", 13, graph=False, **changes).fit()
    assert_same_run(tmp_path / "graph", tmp_path / "eager")
    weights = load_file(tmp_path / "graph" / "last.safetensors")
    assert all(float(step) == 13 for name, step in weights.items() if name.endswith(".step"))


def test_auto_takes_graphs_where_it_can_and_says_so(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", 2)
    assert "graph    each iteration is one CUDA graph" in trainer.describe()
    trainer.fit()
    assert replays() == [2]


class Doubling:
    """A user-defined sampler without draw_at."""

    def draw(self, iteration: int) -> tuple[Tensor, ...]:
        x = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(iteration))
        return x[:, :4], 2 * x[:, :4], x[:, 4:], 2 * x[:, 4:]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": {"graph": False}}, "the configuration says no"),
        ({"config": {"learn_inner_lr": "scalar"}}, "inner_lr requires grad"),
        ({"config": {"nonfinite": "raise"}}, "makes the host wait"),
        ({"config": {"multi_step_loss": 1}}, "iterations differ, by multi_step_loss"),
        ({"config": {"method": "maml", "first_order_for": 1}}, "iterations differ, by first_order_for"),
        ({"model": DropoutNet}, "draws no random numbers"),
        ({"train": Doubling(), "model": lambda: nn.Linear(2, 2)}, r"Doubling draws on the host \(it has no draw_at\)"),
    ],
    ids=[
        "graph false",
        "learned rate",
        "nonfinite raise",
        "multi-step loss",
        "first order",
        "dropout",
        "a sampler without draw_at",
    ],
)
def test_what_cannot_be_a_graph_trains_without_and_says_why(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    options = {"learn_inner_lr": "none", "test_tasks": 0, "validate_every": 0} | changes.get("config", {})
    arguments: dict[str, Any] = {"train": changes.get("train", SETS["train"]), "progress": False}
    make = changes.get("model", MODELS["mlp"])
    trainer = MetaTrainer(toy_config(3, **options), model=make(), out=tmp_path / "run", **arguments)
    (line,) = [line for line in trainer.describe().splitlines() if line.startswith("graph")]
    assert re.search(words, line), line
    for _ in range(3):
        trainer._train_step()
    assert replays() == []
    if options.get("graph") is None:
        with pytest.raises(ValueError, match=f"graph: expected a run whose iterations .*{words}"):
            MetaTrainer(toy_config(3, **options, graph=True), model=make(), out=tmp_path / "no", **arguments)
        assert not (tmp_path / "no").exists()


def test_without_such_a_device_there_is_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    assert "graph    none (graphs are for CUDA devices, and the model is on cpu)" in trainer_of(tmp_path, 2).describe()
    with pytest.raises(ValueError, match=r"graph: expected a run .* the model is on cpu"):
        trainer_of(tmp_path, 2, graph=True)


def test_a_run_may_change_form_at_every_stop(tmp_path: Path) -> None:
    trainer_of(tmp_path / "whole", 9, graph=False).fit()
    for stop in range(2, 10, 2):
        trainer = trainer_of(tmp_path / "run", 9, graph=bool(stop % 4))
        stop_after(trainer, stop)
        if stop < 8:
            with pytest.raises(TrainingInterrupted):
                trainer.fit(resume=stop > 2)
        else:
            trainer.fit(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert replays() == [2, 2]


def stop_after(trainer: MetaTrainer, iteration: int) -> None:
    step = trainer._train_step

    def step_and_signal() -> None:
        step()
        if trainer.iteration == iteration < trainer.config.iterations - 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._train_step = step_and_signal  # type: ignore[method-assign]


def test_resuming_with_another_period_of_records_keeps_what_is_pending(tmp_path: Path) -> None:
    for folder, graph in (("graph", True), ("eager", False)):
        first = trainer_of(tmp_path / folder, 9, graph=graph, log_every=8, validate_every=0)
        stop_after(first, 7)
        with pytest.raises(TrainingInterrupted):
            first.fit()
        second = trainer_of(tmp_path / folder, 9, graph=graph, log_every=9, validate_every=0)
        second.fit(resume=True)
        assert len(second._iteration.window) == 0
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


def test_recorded_anew_when_a_tensor_lies_elsewhere(tmp_path: Path) -> None:
    """More iterations than the window has rows for, and a parameter's memory replaced."""
    trainers = [trainer_of(tmp_path / str(graph), 40, graph=graph, log_every=4) for graph in (True, False)]
    for trainer in trainers:
        for step in range(12):
            if step == 10:
                first = next(trainer.model.parameters())
                first.data = first.data.clone()
            trainer._train_step()
    assert replays() == [4, 4, 2, 2]
    ours, theirs = (trainer._iteration.window.present() for trainer in trainers)
    assert len(ours) == 12 and torch.equal(ours, theirs)
    for a, b in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(a, b)


def test_an_iteration_out_of_turn_is_the_one_asked_for(tmp_path: Path) -> None:
    trainers = [trainer_of(tmp_path / str(graph), 40, graph=graph) for graph in (True, False)]
    for number in (5, 6, 2, 30):
        for trainer in trainers:
            trainer._iteration.run(number)
    ours, theirs = (trainer._iteration.window.present() for trainer in trainers)
    assert torch.equal(ours, theirs) and len(ours.unique(dim=0)) == 4


class Refusing(ReplayingRecorder):
    def record(self, function: graphs.Function) -> ReplayingRecording:
        raise graphs.GraphRefused("graph: expected luck, found none")


def test_a_recording_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Refusing)
    trainer = trainer_of(tmp_path / "auto", 6)
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph: graph: expected luck"):
        trainer.fit()
    assert len(ReplayingRecorder.made) == 1 and "graph    none (graph: expected luck" in trainer.describe()
    trainer_of(tmp_path / "eager", 6, graph=False).fit()
    assert_same_run(tmp_path / "auto", tmp_path / "eager")
    with pytest.raises(graphs.GraphRefused, match="luck"):
        trainer_of(tmp_path / "must", 6, graph=True).fit()


def fused_on_the_cpu(parameters: Any, lr: float, device: torch.device) -> torch.optim.Adam:
    """What `outer_adam` returns on a CUDA device."""
    return torch.optim.Adam(parameters, lr=torch.tensor(lr), fused=True)


def test_the_fused_adam_of_cuda_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate is float32 and its kernel differs, so it is equal up to rounding; graph and eager are bitwise equal."""
    plain = trainer_of(tmp_path / "plain", 7, graph=False)
    plain.fit()
    monkeypatch.setattr("signmaml.trainer.outer_adam", fused_on_the_cpu)
    for graph in (True, False):
        trainer_of(tmp_path / str(graph), 7, graph=graph).fit()
    assert_same_run(tmp_path / "True", tmp_path / "False")
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("True", "plain"))
    assert {(n, t.dtype, t.shape) for n, t in ours.items()} == {(n, t.dtype, t.shape) for n, t in theirs.items()}
    for name in (name for name in ours if name.startswith("model.")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_serves_both_kinds_of_adam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path / "run", 8, graph=False)
    stop_after(trainer, 4)
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    monkeypatch.setattr("signmaml.trainer.outer_adam", fused_on_the_cpu)
    trainer = trainer_of(tmp_path / "run", 8, graph=True)
    trainer.fit(resume=True)
    steps = [state["step"] for state in trainer.optimizer.state.values()]
    assert len(steps) == 4 and all(float(step) == 8 for step in steps)


def test_adam_with_its_rate_in_a_tensor_is_adam(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, device = torch.randn(50), torch.device("cpu")
    kinds = {
        "float": lambda p: torch.optim.Adam([p], lr=0.1),
        "tensor": lambda p: outer_adam([p], 0.1, device),
        "fused": lambda p: fused_on_the_cpu([p], 0.1, device),
    }
    found = {}
    for name, make in kinds.items():
        parameter = nn.Parameter(start.clone())
        optimizer = make(parameter)
        for step in range(20):
            lr = 0.1 / (1 + step)
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        found[name] = parameter.detach()
    assert torch.equal(found["tensor"], found["float"])
    torch.testing.assert_close(found["fused"], found["float"], rtol=1e-5, atol=1e-6)


def test_the_window_counts_alike_on_host_and_device() -> None:
    window = Window(2, torch.device("cpu"))
    rows = [torch.tensor([float(i), 0.0, 1.0], dtype=torch.float64) for i in range(5)]
    for row in rows:
        window.make_room()
        window.append(row)
        window.appended()
    assert torch.equal(window.present(), torch.stack(rows)) and int(window.filled) == len(window) == 5
    window.fill(torch.stack(rows[:3]))
    assert int(window.filled) == len(window) == 3
    window.fill(window.present()[:0])
    assert int(window.filled) == len(window) == 0


def test_the_field_may_change_on_resume() -> None:
    assert configs.differences(TrainConfig(graph=True), TrainConfig(graph=False)) == []
    assert TrainConfig().graph is None and TrainConfig.from_dict({"graph": True}).graph is True
    with pytest.raises(ValueError, match="graph"):
        TrainConfig(graph="sometimes")  # type: ignore[arg-type]


def test_regression_is_a_graph_too(tmp_path: Path) -> None:
    config = TrainConfig(
        data="sinusoid", model="mlp", hidden=(8,), shots=5, queries=5, tasks=4, iterations=8, validate_tasks=10,
        test_tasks=5, device="cpu", log_every=3,
    )  # fmt: skip
    for graph in (True, False):
        trainer = MetaTrainer(config.replace(graph=graph), out=tmp_path / str(graph), progress=False)
        trainer._draw_plots = lambda: None  # type: ignore[method-assign]
        trainer.fit()
    assert replays() == [8]
    assert_same_run(tmp_path / "True", tmp_path / "False")


def fused_adamw_on_the_cpu(
    parameters: list[Tensor], undecayed: list[Tensor], lr: float, device: torch.device, weight_decay: float
) -> torch.optim.AdamW:
    """What `outer_adamw` returns on a CUDA device."""
    return torch.optim.AdamW(parameters + undecayed, lr=torch.tensor(lr), weight_decay=weight_decay, fused=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "changes", [{}, {"outer_optimizer": "adamw", "clip_gradient": 0.1, "average": 0.9}], ids=["plain", "all"]
)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_in_an_iteration_waits_or_comes_from_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, backend: str, changes: dict[str, Any]
) -> None:
    """The operators called show that a CUDA graph could hold an iteration; the second run is the one to record."""
    monkeypatch.setattr("signmaml.trainer.outer_adam", fused_on_the_cpu)
    monkeypatch.setattr("signmaml.trainer.outer_adamw", fused_adamw_on_the_cpu)
    # Label values are checked on the CPU only.
    monkeypatch.setattr("signmaml_ext.reference.check_labels", lambda *_: None)
    monkeypatch.setattr("signmaml_ext.fused.check_labels", lambda *_: None)
    iteration = trainer_of(tmp_path, 9, model=model, backend=backend, **changes)._iteration
    iteration._whole()
    with Recorder() as recorder:
        iteration._whole()
    assert len(recorder.called) > 100
    assert not (WAITING | FROM_HOST).intersection(recorder.called)


def test_several_processes_train_without_graphs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 2)
    parts = (trainer.config, trainer.model, trainer.rates, trainer._train_sampler, trainer._arguments)
    one_task = trainer._train_sampler.draw(0).part(0, 1)
    assert why_no_graph(Training(*parts, Group()), one_task) is None
    assert why_no_graph(Training(*parts, Group(1, 2)), one_task) == "2 processes train together"
