"""Runs all kernels once on a CUDA device, at small odd sizes. compute-sanitizer runs this file as a program."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def run_all() -> None:
    """Every family, odd sizes and alignments, flagged tasks, both task states."""
    from helpers.cases import nets
    from helpers.cases.flat_buffers import flags, gradients, shifted
    from signmaml_ext import compact_sign_step_, meta_accumulate_, meta_step, sign_step_

    device = torch.device("cuda")
    for dtype in (torch.float32, torch.float64):
        for tasks, parameters, shift in ((3, 1027, 0), (2, 5, 1), (1, 1, 0), (9, 4200, 1)):
            grads = shifted(gradients(tasks, parameters, dtype, device), shift)
            params = shifted(torch.randn(tasks, parameters, dtype=dtype, device=device), shift)
            nonfinite, lr = flags(tasks, device), torch.rand(1, dtype=dtype, device=device)
            offsets = torch.tensor([0, parameters // 2, parameters], device=device)
            sign_step_(params, grads, lr, nonfinite=nonfinite)
            sign_step_(params, grads, lr.expand(2).contiguous(), segment_offsets=offsets, nonfinite=nonfinite)
            counts = torch.zeros(tasks, parameters, dtype=torch.int8, device=device)
            theta = torch.randn(parameters, dtype=dtype, device=device)
            compact_sign_step_(counts, params, theta, grads, lr, nonfinite=nonfinite)
            for skip in (False, True):
                out = shifted(torch.zeros(parameters, dtype=dtype, device=device), shift)
                meta_accumulate_(out, grads, nonfinite=nonfinite, skip_nonfinite=skip)
    for make, draw, options in (
        (nets.mlp, nets.vector_tasks, {}),
        (nets.mlp, nets.vector_tasks, {"method": "fo-maml", "nonfinite": "skip"}),
        (nets.Tied, nets.vector_tasks, {"task_state": "int8"}),
        (nets.conv4, nets.image_tasks, {}),
    ):
        model = make().to(device)
        data = [value.to(device) for value in draw(tasks=5, dtype=torch.float32)]
        meta_step(model, *data, inner_lr=0.02, inner_steps=2, **options)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    torch.manual_seed(0)
    run_all()
    print("all kernels ran")
