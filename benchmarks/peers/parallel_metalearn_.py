"""parallel-metalearn: its MAML step, tasks by vmap or one by one, whichever is faster on this machine.

The model and the loss are wrapped as its notes on new tasks ask, and the sign is an inner optimiser derived from its
SGD. The outer optimiser gets a rate of 0, because a step always ends with an update.

Under vmap, maml needs its own BatchNorm. With torch's, the meta-gradient on B is wrong by 8e-4 of its norm in float64;
first order and the loop over tasks are exact with either.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from workloads import LOSSES, Problem

from peers import Step, fastest, missing

NAME = "parallel-metalearn"
SUMMARY = "the MAML class of parallel-metalearn, tasks by vmap or one by one"


def why_not(problem: Problem) -> str | None:
    return missing("metalearn")


def prepare(problem: Problem) -> Step:
    chunks = {problem.tasks}
    steps = {}
    if problem.device.type == "cpu" and problem.convolutional:
        chunks.add(min(4, problem.tasks))
        steps["one task after the other"] = _step(problem, backend="sequential")
    for chunk in sorted(chunks):
        steps[f"{chunk} tasks at a time"] = _step(problem, chunk_size=chunk)
    return fastest(steps)


def _with_its_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model, because its translator of models fails on BatchNorm in version 0.5.6."""
    from metalearn.nn_models.basic_layers import BatchNorm

    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                own = BatchNorm(child.num_features, child.eps, track_running_stats=False).to(child.weight)
                own.load_state_dict(child.state_dict())
                setattr(module, name, own)
    return copied


def _step(problem: Problem, **options: Any) -> Step:
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import BaseLoss

    one_by_one = options.get("backend") == "sequential"
    model = problem.model if one_by_one or problem.method != "maml" else _with_its_batch_norm(problem.model)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, **_: Any) -> dict[str, Any]:
            return {"logits": self.model(x), "buffers": {}}

        def get_fast_weights(self) -> dict[str, Tensor]:
            return dict(self.named_parameters())

    class Loss(BaseLoss):
        def forward(self, out_dict: Any, targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            error = LOSSES[problem.loss](out_dict["logits"], targets)
            return error, error.detach()  # the second is a metric for its log

    class InnerSignSGD(InnerSGD):
        def forward(self, fast_weights: Any, gradients: Any, state: Any, step: int, training: bool = True) -> Any:
            signs = {name: gradient.sign() for name, gradient in gradients.items()}
            return super().forward(fast_weights, signs, state, step, training)

    wrapped = Wrapped()
    inner_class = InnerSignSGD if problem.method == "sign-maml" else InnerSGD
    inner = inner_class(
        wrapped.get_fast_weights(),
        first_order=problem.method != "maml",
        inner_lr=problem.inner_lr,
        learn_lr=False,
    )
    with torch.no_grad():  # its rate was rounded to float32, too coarse for the float64 check
        inner.to(problem.data[0].dtype)
        for rate in inner.parameters():
            rate.fill_(problem.inner_lr)
    algorithm = MAML(
        model=wrapped,
        optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=Loss(),
        inner_steps=problem.steps,
        device=problem.device,
        **options,
    )

    def run() -> dict[str, Tensor]:
        algorithm.step(iter([problem.data]))
        return {name: p.grad for name, p in model.named_parameters()}

    return Step(run)
