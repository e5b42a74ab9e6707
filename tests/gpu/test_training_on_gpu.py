"""Whole training iterations as CUDA graphs against the same iterations launched one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.cases.toy_images import toy_images
from helpers.programs.toy_run import toy_config
from signmaml.episodes import EpisodeSampler, SinusoidSampler
from signmaml.models import MLP, Conv4
from signmaml.trainer import MetaTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("deterministic_cudnn"),  # bits are compared
]

MODELS = {
    "mlp": lambda: MLP(256, 3, hidden=(16,)),
    "conv4": lambda: Conv4(ways=3, channels=1, filters=8, image_size=16),
}
SETS = {split: toy_images(split) for split in ("train", "val", "test")}


def trainer_of(folder: Path, count: int, *, model: str = "mlp", device: str = "cuda", **changes: Any) -> MetaTrainer:
    torch.manual_seed(11)
    config = toy_config(count, **{"learn_inner_lr": "none", "device": device} | changes)
    trainer = MetaTrainer(config, model=MODELS[model](), out=folder, progress=False, **SETS)
    trainer._draw_plots = lambda: None  # type: ignore[method-assign]
    return trainer


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    ours, theirs = load_file(found / "last.safetensors"), load_file(expected / "last.safetensors")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


OUTER_RATE = {"adapt_rates": "alpha-maml", "inner_hyper_lr": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "fo-maml"},
        {"rotations": True, "nonfinite": "skip"},
        OUTER_RATE,
        {"outer_optimizer": "sgd", "outer_lr": 0.1} | OUTER_RATE,
    ],
    ids=str,
)
@pytest.mark.parametrize("model", MODELS)
def test_100_iterations_as_graphs_are_100_iterations(tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    graph = trainer_of(tmp_path / "graph", 100, model=model, graph=True, **changes)
    assert "each iteration is one CUDA graph" in graph.describe()
    graph.fit()
    trainer_of(tmp_path / "eager", 100, model=model, graph=False, **changes).fit()
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


def test_the_loop_does_not_wait_for_the_device(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 20, model="conv4", graph=True)
    trainer._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer._iteration.window) == 11


def test_an_iteration_is_one_launch_from_the_host(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 20, model="conv4", graph=True, log_every=20)
    for _ in range(3):
        trainer._train_step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        for _ in range(5):
            trainer._train_step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names.count("cudaGraphLaunch") == 5
    assert not [name for name in names if name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy"))]


def test_auto_uses_graphs_and_a_run_changes_form_on_resume(tmp_path: Path) -> None:
    trainer_of(tmp_path / "whole", 12, graph=False).fit()
    trainer = trainer_of(tmp_path / "run", 12)
    assert trainer._iteration.why_no_graph is None
    step = trainer._train_step

    def step_and_stop() -> None:
        step()
        if trainer.iteration == 10:
            raise KeyboardInterrupt

    trainer._train_step = step_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer_of(tmp_path / "run", 12, graph=False).fit(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_device_that_is_not_the_current_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    for graph in (True, False):
        trainer_of(tmp_path / str(graph), 20, model="conv4", device="cuda:1", graph=graph).fit()
    assert torch.cuda.current_device() == 0
    assert_same_run(tmp_path / "True", tmp_path / "False")


def test_a_model_with_dropout_trains_without_a_graph(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 3))
    config = toy_config(3, learn_inner_lr="none", device="cuda", validate_every=0, test_tasks=0)
    trainer = MetaTrainer(config, model=model, train=SETS["train"], out=tmp_path, progress=False)
    assert "draws no random numbers" in trainer.describe()
    trainer._train_step()
    assert trainer._iteration.why_no_graph is not None


@pytest.mark.parametrize("kind", ["images", "sinusoids"])
def test_draw_at_is_draw_and_can_be_captured(kind: str) -> None:
    if kind == "images":
        sampler: Any = EpisodeSampler(
            SETS["train"], ways=3, shots=2, queries=3, tasks=4, seed=5, rotations=True, device="cuda"
        )
    else:
        sampler = SinusoidSampler(shots=3, queries=4, tasks=5, seed=5, device="cuda")
    number = torch.zeros((), dtype=torch.int64, device="cuda")
    sampler.draw_at(number)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampler.draw_at(number)
        number += 1
    for iteration in range(50):
        graph.replay()
        for found, expected in zip(captured, sampler.draw(iteration), strict=True):
            assert torch.equal(found, expected), iteration
