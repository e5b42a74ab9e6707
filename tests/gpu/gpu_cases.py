"""Runs all kernels once on a CUDA device, at small odd sizes: python tests/gpu/gpu_cases.py [--own]

Checks results roughly against the CPU, so it is a test by itself. compute-sanitizer runs it too (sanitizer.py). With
--own it runs no model that needs kernels of other libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.cases import conv_cases, nets
from helpers.cases.emulated_cases import OF_EVERY_KIND
from helpers.cases.flat_buffers import expected_accumulation, expected_step, flags, gradients, shifted

PRECISIONS = ("fp32", "tf32", "bf16")
# How far a gradient may be from float64's, relative to its norm. A few activations of these small networks decide
# differently in ReLU and pooling. A wrong kernel is about 1 away.
FAR = {"fp32": 0.02, "tf32": 0.15, "bf16": 0.5}


def operators(device: torch.device) -> None:
    """The operators on flat buffers: odd sizes and alignments, heads and tails, one rate or one for each segment."""
    from signmaml_ext import compact_sign_step_, meta_accumulate_, sign_step_

    for dtype in (torch.float32, torch.float64):
        for tasks, parameters, shift in ((3, 1027, 0), (7, 1023, 1), (2, 5, 1), (1, 1, 0), (9, 4200, 1)):
            grads, params = gradients(tasks, parameters, dtype), torch.randn(tasks, parameters, dtype=dtype)
            lr, offsets = torch.tensor([0.5, 0.25], dtype=dtype), torch.tensor([0, parameters // 2, parameters])
            there = shifted(grads.to(device), shift)
            nonfinite = flags(tasks, device)
            for rates, segments in ((lr[:1], None), (lr, offsets)):
                stepped = shifted(params.to(device), shift)
                on_device = None if segments is None else segments.to(device)
                sign_step_(stepped, there, rates.to(device), segment_offsets=on_device, nonfinite=nonfinite)
                torch.testing.assert_close(stepped.cpu(), expected_step(params, grads, rates, segments)[0])
            counts = torch.zeros(tasks, parameters, dtype=torch.int8).to(device)
            theta, moved = params[0].clone(), params.clone().to(device)
            compact_sign_step_(counts, moved, theta.to(device), there, lr[:1].to(device), nonfinite=nonfinite)
            assert torch.equal(counts.cpu(), grads.sign().to(torch.int8))
            for skip in (False, True):
                out = shifted(torch.ones(parameters, dtype=dtype).to(device), shift)
                meta_accumulate_(out, there, nonfinite=nonfinite, skip_nonfinite=skip)
                expected = expected_accumulation(torch.ones(parameters, dtype=dtype), grads, flags(tasks), skip)[0]
                torch.testing.assert_close(out.cpu(), expected)
            assert not nonfinite.any()


def apart(found: Tensor, exact: Tensor) -> float:
    """The distance relative to the exact value's norm."""
    return float((found.double().cpu() - exact.double()).norm() / exact.double().norm())


def networks(native: ModuleType, device: str, chosen: Sequence[conv_cases.Net] = OF_EVERY_KIND) -> None:
    """Conv-N of 8, 32 and 64 filters, in each precision, by the covariance of its patches and directly.

    These are launches of the native call, without a CUDA graph. A plain step is compared, because a sign that flips
    near zero moves a parameter by the whole rate. Of the sign step, the share of right directions is checked. Then the
    gradient through a plain step is compared.
    """
    for net in chosen:
        data = conv_cases.draw(net)
        there = data.to(device)
        theta = torch.cat([p.reshape(-1) for p in data.params])
        exact = conv_cases.definition(net, data, steps=1, method="fo-maml")
        second_order = conv_cases.definition(net, data, steps=1, method="maml")
        assert exact.grads is not None
        alive = torch.cat([
            torch.full((torch.Size(shape).numel(),), not dead)
            for shape, dead in zip(net.tensors, net.dead, strict=True)
        ])  # fmt: skip
        for precision in PRECISIONS:
            for by_covariance in (True, False):
                kind = (net.filters, precision, by_covariance)
                options = {"precision": precision, "by_covariance": by_covariance}
                found = conv_cases.run(native, net, there, method="fo-maml", **options)
                assert found.grads is not None and not found.nonfinite.any(), kind
                for own, other in (
                    (found.grads, exact.grads),
                    (found.adapted.cpu() - theta, exact.adapted - theta.double()),
                ):
                    assert apart(own, other) < FAR[precision], (*kind, apart(own, other))
                signed = conv_cases.run(native, net, there, **options)
                moves = (signed.adapted.cpu() - theta)[:, alive]
                towards = (moves.sign() == (exact.adapted - theta.double()).sign()[:, alive]).double().mean()
                assert towards > 1 - FAR[precision], (*kind, float(towards))
                through = conv_cases.run(native, net, there, method="maml", **options)
                assert through.grads is not None and not through.nonfinite.any(), kind
                off = apart(through.grads, second_order.grads)
                assert off < 2 * FAR[precision], (*kind, off)


def meta_steps(device: torch.device, own: bool) -> None:
    """Whole meta-steps by the public call, with `graph=False`."""
    from signmaml_ext import Sharpness, meta_step

    cases = [
        (lambda: nets.mlp(), nets.vector_tasks, {}),
        (lambda: nets.mlp(5, 4), lambda **o: nets.vector_tasks(ways=4, shots=17, queries=18, inputs=5, **o), {}),
        (lambda: nets.mlp(), nets.vector_tasks, {"method": "fo-maml", "nonfinite": "skip"}),
        (lambda: nets.mlp(), nets.vector_tasks, {"method": "maml"}),
        (
            lambda: nets.mlp(5, 4),
            lambda **o: nets.vector_tasks(ways=4, shots=17, queries=18, inputs=5, **o),
            {"method": "maml"},
        ),
        (lambda: nets.conv4(filters=8), nets.image_tasks, {}),
        (lambda: nets.conv4(filters=8), nets.image_tasks, {"method": "maml"}),
    ]
    for sharp in (Sharpness(1e-3), Sharpness(1e-3, "linf", adaptive=True)):
        cases += [
            (lambda: nets.mlp(), nets.vector_tasks, {"method": "fo-maml", "sharpness": sharp}),
            (lambda: nets.conv4(filters=8), nets.image_tasks, {"method": "fo-maml", "sharpness": sharp}),
        ]
    for make, draw in ((nets.mlp, nets.vector_tasks), (lambda: nets.conv4(filters=8), nets.image_tasks)):
        cases.append((make, draw, {"task_state": "int8"}))
        cases += [(make, draw, {"method": method, "learns": True}) for method in ("fo-maml", "maml")]
    if not own:
        cases += [(nets.Tied, nets.vector_tasks, {"task_state": "int8"}), (nets.conv4, nets.image_tasks, {})]
    for make, draw, changes in cases:
        model, data = make(), draw(tasks=5, dtype=torch.float32)
        options = {"inner_lr": 1e-5, "inner_steps": 2, **changes}  # so small that a flipped sign hardly matters
        learns = options.pop("learns", False)
        meta_step(model, *data, backend="torch", **{k: v for k, v in options.items() if k != "task_state"})
        expected = nets.grads(model)
        there = model.to(device)
        if learns:  # a rate for each element
            options["inner_lr"] = {
                name: torch.full_like(p, options["inner_lr"]).requires_grad_() for name, p in there.named_parameters()
            }
        meta_step(there, *(value.to(device) for value in data), graph=False, **options)
        if learns:
            assert all(r.grad is None or r.grad.isfinite().all() for r in options["inner_lr"].values())
        for name, gradient in nets.grads(there).items():
            # A convolution's bias has a gradient of 0, or of rounding errors only.
            if gradient is None or "conv.bias" in name:
                continue
            # The meta-gradient of Sign-MAML is plain, as is that of FO-MAML.
            assert apart(gradient, expected[name]) < 0.05, (type(model).__name__, name)


def main() -> None:
    from signmaml_ext._loader import C

    own, device = "--own" in sys.argv[1:], torch.device("cuda")
    torch.manual_seed(0)
    operators(device)
    networks(C, "cuda")
    meta_steps(device, own)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
