"""What the plots show, read back from the figures before they become pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import signmaml_ext
from helpers.cases.toy_images import toy_images
from signmaml import plots, sheets
from signmaml.episodes import EpisodeSampler, SinusoidSampler
from signmaml.models import MLP

STEP = {"inner_lr": 0.01, "inner_steps": 2}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects every figure that is saved; it is still written to its file."""
    saved: list[Figure] = []
    save = sheets.save_figure

    def keep(figure: Figure, out: Path) -> None:
        saved.append(figure)
        save(figure, out)

    monkeypatch.setattr(sheets, "save_figure", keep)
    monkeypatch.setattr(plots, "save_figure", keep)
    return saved


def write_metrics(path: Path, *, accuracy: bool = True) -> Path:
    lines = []
    for iteration in range(10, 110, 10):
        record = {"iteration": iteration, "split": "train", "loss": 1 / iteration}
        lines.append(record | ({"accuracy": iteration / 200} if accuracy else {}))
        if iteration % 50 == 0:
            record = {"iteration": iteration, "split": "val", "loss": 2 / iteration, "ci95": 0.02}
            lines.append(record | ({"accuracy": iteration / 250} if accuracy else {}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 400
        assert len(image.convert("RGB").getcolors(image.width * image.height) or []) > 10  # not blank


def test_curves_show_accuracy_and_loss_with_units(tmp_path: Path, figures: list[Figure]) -> None:
    plots.draw_curves(write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    accuracy, loss = figures[0].axes
    assert accuracy.get_ylabel() == "query accuracy (%)" and loss.get_ylabel() == "query cross-entropy (nats)"
    assert accuracy.get_xlabel() == loss.get_xlabel() == "meta-iteration"
    validation = next(line for line in accuracy.lines if "validation" in str(line.get_label()))
    assert validation.get_xydata().tolist() == [[50, 20], [100, 40]]  # per cent
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(18) and band.max() == pytest.approx(42)
    assert_picture(tmp_path / "curves.png")


def test_regression_curves_have_one_panel(tmp_path: Path, figures: list[Figure]) -> None:
    plots.draw_curves(write_metrics(tmp_path / "metrics.jsonl", accuracy=False), tmp_path / "curves.png")
    (loss,) = figures[0].axes
    assert loss.get_ylabel() == "query mean squared error"
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.04 + 0.02)


def test_rates_that_are_adapted_have_a_panel(tmp_path: Path, figures: list[Figure]) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if record["split"] == "train":
            record |= {"outer_lr_before_schedule": 1 / record["iteration"], "inner_lr": record["iteration"] / 1000}
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    plots.draw_curves(metrics, tmp_path / "curves.png")
    _, _, rates = figures[0].axes
    assert rates.get_ylabel() == "learning rate" and rates.get_yscale() == "log"
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["inner", "outer, before the schedule"]
    inner, outer = (line.get_xydata() for line in rates.lines)
    assert inner[0].tolist() == [10, 0.01] and outer[-1].tolist() == [100, 0.01] and len(inner) == len(outer) == 10
    assert_picture(tmp_path / "curves.png")
    plots.draw_curves({"one": metrics, "two": metrics}, tmp_path / "both.png")
    assert len(figures[1].axes) == 2


def test_several_runs_are_compared(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {name: write_metrics(tmp_path / f"{name}.jsonl") for name in ("sign", "maml")}
    plots.draw_curves(runs, tmp_path / "both.png")
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["sign (val)", "maml (val)"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="expected records of a run"):
        plots.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_episode_shows_every_prediction(tmp_path: Path, figures: list[Figure], channels: int) -> None:
    images = toy_images("test", channels=channels, noise=0.4)
    sampler = EpisodeSampler(images, ways=3, shots=2, queries=4, tasks=1)
    model = MLP(channels * 256, 3)
    assert plots.draw_task(model, sampler, tmp_path / "episode.png", task=5, title="toy", **STEP)
    episode = sampler.draw_tasks(5, 1)
    predicted = signmaml_ext.evaluate(model, *episode, **STEP).logits[0].argmax(-1)
    wrong = int((predicted != episode.query_y[0]).sum())
    assert 0 < wrong < 12  # else this test shows nothing
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    expected = [str(int(p)) if p == y else f"{p} (is {y})" for p, y in zip(predicted, episode.query_y[0], strict=True)]
    assert titles == expected
    red = [a for a in figures[0].axes if to_hex(a.spines["left"].get_edgecolor()) == sheets.WRONG]
    assert len(red) == wrong
    summary = f"3-way 2-shot: {12 - wrong} of 12 query images right after 2 inner steps"
    assert figures[0].get_suptitle() == f"toy, task 5\n{summary}"
    names = [sampler.class_name(int(number)) for number in sampler.draw_indices(5, 1)[0][0]]
    labels = [text.get_text() for axis in figures[0].axes for text in axis.texts]
    assert all(any(name in label for label in labels) for name in names)
    assert_picture(tmp_path / "episode.png")


@pytest.mark.slow
def test_a_large_episode_says_what_is_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    sampler = EpisodeSampler(toy_images("test", classes=12, images=14), ways=12, shots=2, queries=12, tasks=1)
    plots.draw_task(MLP(256, 12), sampler, tmp_path / "episode.png", **STEP)
    assert "first 10 of 12 classes" in figures[0].get_suptitle()
    assert len(figures[0].axes) == 10 * (2 + 10)


def test_fits_start_at_the_model_and_end_at_the_adapted_one(tmp_path: Path, figures: list[Figure]) -> None:
    sampler, model = SinusoidSampler(shots=6, queries=8, tasks=2), MLP(1, 1)
    assert plots.draw_task(model, sampler, tmp_path / "fits.png", task=2, loss="mse", **STEP)
    episode = sampler.draw_tasks(2, 3)
    adapted = signmaml_ext.adapt(model, episode.support_x, episode.support_y, loss="mse", **STEP)
    for number, axis in enumerate(figures[0].axes):
        lines = {str(line.get_label()): line for line in axis.lines}
        x = torch.tensor(lines["before adaptation"].get_xdata())[:, None]
        own = {name: value[number] for name, value in adapted.items()}
        with torch.no_grad():
            before, after = model(x), torch.func.functional_call(model, own, (x,))
        assert torch.allclose(torch.tensor(lines["before adaptation"].get_ydata()), before.flatten(), atol=1e-5)
        assert torch.allclose(torch.tensor(lines["after 2 steps"].get_ydata()), after.flatten(), atol=1e-5)
        assert lines["support"].get_xdata().tolist() == episode.support_x[number].flatten().tolist()
        assert axis.get_title() == f"task {2 + number}"
    assert_picture(tmp_path / "fits.png")


def test_fits_with_learned_rates(tmp_path: Path) -> None:
    rates = torch.tensor([0.1, 0.2], requires_grad=True)
    sampler = SinusoidSampler(shots=6, queries=8, tasks=2)
    assert plots.draw_task(MLP(1, 1), sampler, tmp_path / "fits.png", loss="mse", inner_lr=rates, inner_steps=2)


def test_other_tasks_have_no_picture(tmp_path: Path) -> None:
    class Vectors:
        def draw(self, iteration: int) -> tuple[torch.Tensor, ...]:
            x, y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
            return x, y, x, y

    assert not plots.draw_task(nn.Linear(5, 3), Vectors(), tmp_path / "x.png", **STEP)
    assert not (tmp_path / "x.png").exists()


def test_a_sheet_of_images(tmp_path: Path, figures: list[Figure]) -> None:
    sheets.draw_images(toy_images("train", classes=30), tmp_path / "sheet.png", classes=5, each=4)
    assert len(figures[0].axes) == 20
    labels = [text.get_text() for axis in figures[0].axes for text in axis.texts]
    assert labels == ["train00", "train06", "train12", "train18", "train24"]
    assert "5 of 30 classes" in figures[0].get_suptitle()
    assert_picture(tmp_path / "sheet.png")
