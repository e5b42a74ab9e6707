"""Records a training run as a result file: python benchmarks/record_run.py --out FILE -- [arguments of signmaml train]

Runs `signmaml train` in a separate process and stores its result with a description of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--curves", type=Path, help="where the plot of the curves goes")
    parser.add_argument("--shown", help="the command as a reader would type it, if paths here are of no use to them")
    parser.add_argument("train", nargs="*", help="arguments of signmaml train, after --")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = harness.stamp(device)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [str(Path(sys.executable).parent / "signmaml"), "train", *arguments.train]
        subprocess.run([*command, "--out", str(run)], check=True)
        result = json.loads((run / "result.json").read_text())
        if arguments.curves:
            arguments.curves.parent.mkdir(parents=True, exist_ok=True)
            arguments.curves.write_bytes((run / "curves.png").read_bytes())
    shown = arguments.shown or f"signmaml train {' '.join(arguments.train)}"
    kept = {key: result[key] for key in ("test", "iterations", "train_seconds", "parameters", "config")}
    kept["config"] = harness.public(kept["config"])
    harness.write(arguments.out, {"benchmark": "training", **stamp, "shown": shown, **kept})


if __name__ == "__main__":
    main()
