"""Sign-MAML in a training loop of your own: `meta_step` works like `backward()`.

python examples/own_loop.py [ITERATIONS]
"""

import sys

import torch

from signmaml import evaluate
from signmaml.data import glyphs
from signmaml.episodes import EpisodeSampler
from signmaml.models import Conv4
from signmaml_ext import meta_step

iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
torch.manual_seed(0)
model = Conv4(ways=5, channels=1, filters=32, image_size=28)
sampler = EpisodeSampler(glyphs("train"), ways=5, shots=1, queries=5, tasks=8, seed=0)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for iteration in range(iterations):
    optimizer.zero_grad()
    result = meta_step(model, *sampler.draw(iteration), inner_lr=0.01, inner_steps=3)
    optimizer.step()
    if iteration % 20 == 0:
        print(f"{iteration:5}  loss {result.query_loss.mean():.3f}  accuracy {result.query_accuracy.mean():.3f}")

print(evaluate(model, glyphs("test"), ways=5, shots=1, queries=5, tasks=200, inner_lr=0.01, inner_steps=3))
