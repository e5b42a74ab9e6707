"""One small call of every CUDA kernel, for compute-sanitizer, at sizes with tails; checks results against the CPU."""

from __future__ import annotations

import copy

import torch

import signmaml_ext
from signmaml.models import MLP, Conv4


def operators() -> None:
    """The flat-buffer kernels at sizes with heads and tails."""
    for tasks, parameters in ((1, 1), (3, 1023), (7, 1027)):
        params, grads = (torch.randn(tasks, parameters, device="cuda") for _ in range(2))
        flags, lr = torch.zeros(tasks, dtype=torch.bool, device="cuda"), torch.full((1,), 0.5, device="cuda")
        expected = params - 0.5 * grads.sign()
        signmaml_ext.sign_step_(params, grads, lr, nonfinite=flags)
        torch.testing.assert_close(params, expected)
        out = torch.zeros(parameters, device="cuda")
        signmaml_ext.meta_accumulate_(out, grads, nonfinite=flags)
        torch.testing.assert_close(out, grads.mean(0))


def meta_steps() -> None:
    """Each fused family against the reference on the CPU; one step so small that a flipped sign hardly matters."""
    labels = torch.arange(5).repeat(2, 1)
    cases = (
        (MLP(1, 1, hidden=(17, 5)), torch.randn(3, 6, 1), torch.randn(3, 6, 1), "mse"),
        (Conv4(5, 3, 8, 21), torch.rand(2, 5, 3, 21, 21), labels, "cross_entropy"),
        (Conv4(5, 1, 16, 28, pooling="stride"), torch.rand(2, 5, 1, 28, 28), labels, "cross_entropy"),
    )
    for model, x, y, loss in cases:
        options = {"inner_lr": 1e-5, "inner_steps": 1, "loss": loss}
        there = copy.deepcopy(model).cuda()
        signmaml_ext.meta_step(model, x, y, x, y, backend="torch", **options)
        result = signmaml_ext.meta_step(there, *(part.cuda() for part in (x, y, x, y)), **options)
        assert result.backend == "cuda", signmaml_ext.explain(there)
        own, other = (torch.cat([p.grad.flatten().cpu() for p in m.parameters()]) for m in (there, model))
        assert (own - other).norm() < 0.02 * other.norm(), (own - other).norm() / other.norm()


if __name__ == "__main__":
    torch.manual_seed(0)
    operators()
    meta_steps()
    torch.cuda.synchronize()
    print("all kernels ran")
