"""bench_training: settings given on the command line."""

from __future__ import annotations

import pytest


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
