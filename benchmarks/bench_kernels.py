"""Each native kernel against the machine's own limits: python benchmarks/bench_kernels.py

Operators on flat buffers: time and GB/s (bytes that must move, counted once: counts.py), as a fraction of the rate of a
plain copy of as many bytes in the same rounds; caches are flushed before every call. Sizes include tails (1023 to 1027
parameters) and rows of odd length. Stages of the CPU's convolutional family: GFLOP/s of direct convolutions on one
thread, as a fraction of a large matrix product on one thread in the same rounds; caches stay warm, as in a meta-step.
bench_meta_step.py measures whole fused meta-steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import counts
import harness
import numpy as np
import torch
from harness import Summary
from workloads import WORKLOADS

import signmaml_ext
from signmaml_ext import reference
from signmaml_ext._loader import C

SIZES = ((8, 32_901), (8, 121_093), (32, 113_088), (1000, 1_761), (8, 4_000_003), (8, 8_388_608))
TAIL_SIZES = tuple((tasks, parameters) for tasks in (1, 7) for parameters in range(1023, 1028))
CONV_WORKLOADS = ("A", "B", "C")


def operators(tasks: int, parameters: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: the call, and the bytes that it must read and write."""
    params, grads = (torch.randn(tasks, parameters, device=device) for _ in range(2))
    out, lr = torch.zeros(parameters, device=device), torch.full((1,), 1e-9, device=device)
    flags = torch.zeros(tasks, dtype=torch.bool, device=device)
    live = torch.ones(tasks, dtype=torch.bool, device=device)
    step, mean = counts.sign_step_bytes(tasks, parameters), counts.meta_accumulate_bytes(tasks, parameters)
    # As many bytes as the sign step moves, so that both use the same level of the memory hierarchy.
    source, target = (torch.randn(step // 8, device=device) for _ in range(2))
    return {
        "copy": (lambda: target.copy_(source), counts.copy_bytes(source.numel())),
        "sign_step_": (lambda: signmaml_ext.sign_step_(params, grads, lr, nonfinite=flags), step),
        "sign_step in PyTorch": (lambda: reference.sign_step(params, grads, lr), step),
        "meta_accumulate_": (lambda: signmaml_ext.meta_accumulate_(out, grads, nonfinite=flags), mean),
        "meta_accumulate in PyTorch": (lambda: reference.meta_accumulate(out, grads, live), mean),
    }


def bench_operators(device: torch.device, seconds: float, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Rows by size and operator."""
    flush = harness.Flush(device)
    found: dict[str, Any] = {}
    print(f"{'T x P':>16}  {'operator':28} {'us':>10} {'GB/s':>8} {'of copy':>8}")
    for tasks, parameters in sizes:
        candidates = operators(tasks, parameters, device)
        runs = {name: run for name, (run, _) in candidates.items()}
        comparison = harness.compare(runs, seconds=seconds, device=device, least=10, flush=flush, queued=True)
        rows = {}
        copied = candidates["copy"][1]
        for name, (_, moved) in candidates.items():
            time, rate = comparison.timing(name), comparison.rate(name, moved)
            pairs = zip(comparison.samples[name], comparison.samples["copy"], strict=True)
            share = Summary.of([(moved / own) / (copied / copy) for own, copy in pairs])
            rows[name] = {"time_ms": time, "gb_per_s": rate, "share_of_copy": share}
            size = f"{tasks} x {parameters}"
            print(f"{size:>16}  {name:28} {time.median * 1e3:10.1f} {rate.median:8.2f} {share.median:8.1%}", flush=True)
        found[f"{tasks}x{parameters}"] = rows
    return found


def stages(workload: str) -> dict[str, tuple[tuple[str, ...], int, float, float]]:
    """By name: stages, block, FLOPs and bytes of one call on the support or query set, whichever is larger.

    Bytes are those of images and activations that a stage reads and writes, each counted once. Only stages that are not
    convolutions have them.
    """
    net = WORKLOADS[workload].net
    assert isinstance(net, counts.ConvNet)
    images = max(WORKLOADS[workload].support, WORKLOADS[workload].query)
    found: dict[str, tuple[tuple[str, ...], int, float, float]] = {}
    for i, layer in enumerate(net.layers()):
        flops = images * layer.flops
        raw = 4 * images * net.filters * layer.positions
        half = raw // 4 if net.halving == "max" else raw
        found[f"conv_forward, block {i + 1}"] = (("forward",), i, flops, 0)
        if i:
            found[f"conv_weight_grad, block {i + 1}"] = (("weight_products", "weight_grad"), i, flops, 0)
            found[f"conv_data_grad, block {i + 1}"] = (("data_grad",), i, flops, 0)
            found[f"normalise, block {i + 1}"] = (("normalise",), i, 0, 2 * half)
            found[f"raw_grad, block {i + 1}"] = (("raw_grad",), i, 0, 2 * raw + half)
        else:
            found["patch_covariance, block 1"] = (("patch_covariance",), 0, 0, 4 * images * net.channels * net.size**2)
            found["conv_weight_grad at the winners, block 1"] = (("first_weight_grad",), 0, 0, 2 * half)
        if i or net.halving == "max" or net.channels > 1:  # else block 1's weight gradient includes it
            found[f"grad_sums, block {i + 1}"] = (("grad_sums",), i, 0, 3 * half)
    return found


def shape_of(workload: str) -> dict[str, Any]:
    """The network's shape for the native module."""
    net = WORKLOADS[workload].net
    assert isinstance(net, counts.ConvNet)
    return {
        "blocks": net.blocks,
        "channels": net.channels,
        "filters": net.filters,
        "height": net.size,
        "width": net.size,
        "ways": net.ways,
        "halving": net.halving,
        "readout": "flatten",
        "conv_bias": True,
        "eps": [1e-5] * net.blocks,
    }


def warm_runner(workload: str, images: int) -> C.ConvStageRunner:
    """A runner with random images, weights and gradients, and the results of every forward stage."""
    shape = shape_of(workload)
    runner = C.ConvStageRunner(shape, images)
    generator = np.random.default_rng(0)

    def fill(name: str, block: int, scale: float) -> None:
        array = np.asarray(runner.array(name, block))
        array[...] = scale * generator.uniform(-1, 1, array.shape)

    fill("x", 0, 1.0)
    runner.run("pack_image", 0)
    for block in range(shape["blocks"]):
        fill("weight", block, 0.1)
        np.asarray(runner.array("gamma", block))[...] = 1
        fill("activation_grad", block, 1e-3)
        for stage in ("statistics", "transform_weights", "forward") if block == 0 else ("transform_weights", "forward"):
            runner.run(stage, block)
        if block:
            for stage in ("statistics", "normalise", "pack_back"):
                runner.run(stage, block)
    return runner


def bench_stages(workload: str, seconds: float) -> dict[str, Any]:
    """The stages of one task's pass, on one thread of the CPU."""
    images = max(WORKLOADS[workload].support, WORKLOADS[workload].query)
    runner = warm_runner(workload, images)
    wanted = stages(workload)
    product, n = harness.matrix_product(torch.device("cpu"), 1024)
    runs: dict[str, Callable[[], object]] = {"matrix product": product}
    for name, (names, block, _, _) in wanted.items():
        runs[name] = lambda names=names, block=block: [runner.run(stage, block) for stage in names]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        comparison = harness.compare(runs, seconds=seconds, device=torch.device("cpu"), least=5, sample_ms=3)
    finally:
        torch.set_num_threads(threads)
    matrix = counts.matrix_flops(n)
    print(f"\nstages of workload {workload}, {images} images, one thread; a matrix product runs at "
          f"{comparison.rate('matrix product', matrix).median:.1f} GFLOP/s")  # fmt: skip
    rows: dict[str, Any] = {}
    for name, (_, _, flops, moved) in wanted.items():
        row: dict[str, Any] = {"time_ms": comparison.timing(name)}
        text = f"{name:42} {row['time_ms'].median * 1e3:10.1f} us"
        if flops:
            pairs = zip(comparison.samples[name], comparison.samples["matrix product"], strict=True)
            row["gflops"] = comparison.rate(name, flops)
            row["share_of_matrix"] = Summary.of([(flops / own) / (matrix / whole) for own, whole in pairs])
            text += f" {row['gflops'].median:8.1f} GFLOP/s {row['share_of_matrix'].median:8.1%} of the matrix rate"
        else:
            row["gb_per_s"] = comparison.rate(name, moved)
            text += f" {row['gb_per_s'].median:8.1f} GB/s"
        rows[name] = row
        print(text, flush=True)
    return {"images": images, "matrix_gflops": comparison.rate("matrix product", matrix), "stages": rows}


def matrix_rates(device: torch.device, seconds: float) -> Mapping[str, Summary]:
    """GFLOP/s of large matrix products: float32, and on CUDA TF32 and bf16 as well."""
    before = torch.backends.cuda.matmul.allow_tf32
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        if device.type == "cpu" and name != "fp32":
            continue
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        product, n = harness.matrix_product(device, dtype=dtype)
        comparison = harness.compare({name: product}, seconds=seconds, device=device, least=5, queued=True)
        rates[name] = comparison.rate(name, counts.matrix_flops(n))
        print(f"matrix product, {name}: {rates[name].median:.0f} GFLOP/s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=4, help="time for the repetitions of a size")
    parser.add_argument("--quick", action="store_true", help="two sizes of operators, one of stages")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result file (JSON)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"benchmark": "kernels", **harness.stamp(device)}
    seconds = 0.0 if arguments.quick else arguments.seconds
    result["matrix_gflops"] = matrix_rates(device, seconds / 2)
    result["sizes"] = bench_operators(device, seconds, SIZES[:2] if arguments.quick else SIZES)
    result["tail_sizes"] = bench_operators(device, seconds / 8, TAIL_SIZES[:2] if arguments.quick else TAIL_SIZES)
    if device.type == "cpu":
        workloads = CONV_WORKLOADS[:1] if arguments.quick else CONV_WORKLOADS
        result["stages"] = {workload: bench_stages(workload, seconds) for workload in workloads}
    if arguments.out:
        harness.write(arguments.out / f"kernels_{device.type}.json", result)


if __name__ == "__main__":
    main()
