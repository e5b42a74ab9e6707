"""Settings of the benchmark of training as words of a command line."""

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
