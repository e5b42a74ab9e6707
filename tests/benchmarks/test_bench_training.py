"""bench_training: settings given on the command line."""

from __future__ import annotations

import json
import sys

import pytest
import torch


def test_settings_are_fields_of_the_configuration():
    import bench_training

    words = ["data=glyphs", "image_size=84", "rotations=false", "inner_lr=1e-3"]
    found = bench_training.settings(words)
    assert found == {"data": "glyphs", "image_size": 84, "rotations": False, "inner_lr": 1e-3}
    assert bench_training.TrainConfig(**found).rotations is False


def test_bad_settings_name_the_field():
    import bench_training

    with pytest.raises(ValueError, match="rotations: expected true or false, found 'maybe'"):
        bench_training.settings(["rotations=maybe"])
    with pytest.raises(SystemExit, match="rotation=true"):
        bench_training.settings(["rotation=true"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_a_budget_of_time_and_a_curve(method):
    import bench_training

    fields = {"tasks": 3, "test_tasks": 4, "validate_tasks": 4, "tensorboard": False}
    config = bench_training.TrainConfig(**{**bench_training.PRESETS["sinusoid"], **fields, "method": method})
    assert bench_training.iterations_in(config, seconds=1, enough=0.05) >= 20
    result = bench_training.measure(config.replace(iterations=12), None, 3, (0.5,))
    assert result["iterations"] == 12 and result["train_seconds"] > 0
    assert [point["iteration"] for point in result["curve"]] == [4, 8, 12]
    assert result["seconds_to"] == {"0.5": None} and result["test"]["loss"] > 0


def test_every_method_has_a_configuration_and_a_rate_of_its_own():
    import bench_training

    base = bench_training.TrainConfig(**{**bench_training.PRESETS["omniglot"], "method": "sign-maml"})
    found = {method: bench_training.configuration(base, method) for method in bench_training.METHODS}
    assert found["sign-maml"] == base
    assert found["sharp-sign-maml"].inner_lr == base.inner_lr and found["sharp-sign-maml"].sharpness_upper > 0
    assert found["alpha-maml"] == found["maml"].replace(adapt_rates="alpha-maml")
    assert len(set(map(str, found.values()))) == len(found)


def test_random_images_have_the_classes_of_mini_imagenet():
    import bench_training

    found = bench_training.random_images(6, images=3)
    assert {split: images.classes for split, images in found.items()} == {"train": 64, "val": 16, "test": 20}
    for split, images in found.items():
        assert images.split == split and images.images.shape == (3 * images.classes, 3, 6, 6)
    assert found["val"].images.min() < 5 and found["val"].images.max() > 250
    assert torch.equal(bench_training.random_images(6, images=3)["test"].images, found["test"].images)


@pytest.mark.slow
def test_a_result_says_that_its_images_are_random(tmp_path, monkeypatch):
    import bench_training

    settings = "image_size=16 filters=8 tasks=2 validate_tasks=2 test_tasks=2 device=cpu tensorboard=false"
    words = ["--images", "random", "--iterations", "2", "--validations", "1", "--out", str(tmp_path), "--set"]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *words, *settings.split()])
    bench_training.main()
    result = json.loads((tmp_path / "methods_official_cpu.json").read_text())
    assert result["summary"].startswith("random images, 5-way 1-shot")
    run = result["runs"]["sign-maml"]
    assert run["config"]["data"] == "random images" and run["iterations"] == 2 and run["ms_per_iteration"] > 0
