"""End to end on real images: `signmaml train --preset omniglot` learns to tell characters it has never seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cases.images import real_data


@pytest.mark.slow
def test_omniglot_above_80_percent_on_held_out_characters_in_a_fifth_of_the_preset(tmp_path):
    root = real_data("omniglot")
    run = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "signmaml"), "train", "--preset", "omniglot", "--iterations", "1000"]
    done = subprocess.run(
        [*command, "--data-root", str(root), "--out", str(run)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((run / "result.json").read_text())
    test = result["test"]
    assert (test["data"], test["split"], test["ways"], test["shots"]) == ("omniglot", "test", 5, 1)
    assert test["tasks"] >= 600
    assert test["mean"] - test["ci95"] > 0.80, test
    for name in ("curves.png", "episode.png", "best.safetensors", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
