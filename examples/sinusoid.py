"""Regression of sine waves from 10 points (Finn et al. 2017): sign steps and gradient steps side by side.

python examples/sinusoid.py [ITERATIONS] [FOLDER]
"""

import sys
from pathlib import Path

from signmaml import MetaTrainer, TrainConfig
from signmaml.presets import PRESETS

iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")
# A sign step moves every parameter by inner_lr, a gradient step by inner_lr times the gradient.
for method, inner_lr in (("sign-maml", 0.01), ("fo-maml", 0.01), ("maml", 0.01)):
    config = TrainConfig.from_dict(
        {**PRESETS["sinusoid"], "method": method, "inner_lr": inner_lr, "iterations": iterations}
    )
    result = MetaTrainer(config, out=folder / f"sinusoid-{method}").fit(overwrite=True)
    print(f"{method}: {result.test}\n")
print(f"fits before and after adaptation: {folder}/sinusoid-*/episode.png")
