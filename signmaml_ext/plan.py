"""What a meta-step would launch on a GPU, as a table for people: the model of csrc/plan/, never a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _loader, conv, fused
from .problem import Problem

# The modelled GPU is an H200 with these figures: bytes per second of a copy, operations per second of products by
# precision (three TF32 products make one of fp32) and of everything else, seconds between two launches of a graph.
BANDWIDTH = 4.3e12
PRODUCTS = {"fp32": 500e12 / 3, "tf32": 500e12, "bf16": 790e12}
SCALAR = 67e12
LAUNCH = 1.3e-6
ON_TENSOR_CORES = ("conv_forward", "conv_data_grad", "conv_weight_grad")

Launch = dict[str, Any]

_NAME = 23  # the column of kernels' names


def table(problem: Problem) -> str:
    """The launches of a call on CUDA, with their modelled work and time; or why there is no plan."""
    reason = conv.why_not(problem, on_cuda=True)
    if reason is not None:
        return f"plan: there is one for Conv-N networks only, and {reason}"
    found = conv.read(problem.model)
    assert not isinstance(found, str)
    sizes = fused.sizes_of(problem)
    options = fused.step_options(problem, learns_rates=bool(problem.rates.learnable()))
    plan = _loader.C.plan_conv_meta_step(
        conv.shape_of(problem, found), *sizes.values(), problem.steps, problem.precision, 1, method=problem.method,
        **options,
    )  # fmt: skip
    launches: list[Launch] = plan["launches"]
    chunks = -(-problem.tasks // plan["chunk"])
    lines = [
        f"plan on CUDA, {problem.precision}: a model, nothing here is measured (H200: {BANDWIDTH / 1e12:g} TB/s, "
        f"{PRODUCTS[problem.precision] / 1e12:.0f} TFLOP/s in products, {LAUNCH * 1e6:g} us a launch)",
        f"  {len(launches) * chunks} launches, and one for the mean; {_total(launches, 'flops') * chunks / 1e9:.2f} "
        f"GFLOP, {_total(launches, 'bytes') * chunks / 1e6:.1f} MB, modelled "
        f"{sum(seconds(one, problem.precision) for one in launches) * chunks * 1e3:.3f} ms",
        f"  workspace {plan['workspace_bytes'] / 2**20:.1f} MiB for {plan['chunk']} of {problem.tasks} tasks at once, "
        + (
            f"of which only {kept} with the steps"
            if (kept := _kept(problem, launches))
            else "whatever the number of steps"
        ),
        f"  {'kernel':<{_NAME}}{'block':>6}{'grid':>14}{'threads':>8}{'KiB':>6}{'MFLOP':>9}{'MB':>8}"
        f"{'modelled us':>12}",
    ]
    for title, part in _parts(launches, problem.steps):
        lines.append(f"  {title}")
        lines += [_row(one, problem.precision) for one in part]
    return "\n".join(lines)


def seconds(one: Launch, precision: str) -> float:
    """The modelled time of a launch: the roofline of its work and bytes, and the gap to the next launch."""
    rate = PRODUCTS[precision] if one["kernel"] in ON_TENSOR_CORES else SCALAR
    return max(one["flops"] / rate, one["bytes"] / BANDWIDTH) + LAUNCH


def _total(launches: Sequence[Launch], what: str) -> float:
    return sum(one[what] for one in launches)


def _kept(problem: Problem, launches: Sequence[Launch]) -> str:
    """What a task keeps of every step, as the start of a sentence."""
    goes_back = any(one["part"] == "again" for one in launches)
    kept = [*(["weights"] if goes_back else []), *(["directions"] if problem.rates.learnable() else [])]
    return f"kept {' and '.join(kept)} grow" if kept else ""


def _parts(launches: Sequence[Launch], steps: int) -> list[tuple[str, list[Launch]]]:
    """The launches in order; only the first of the inner steps, which are all alike."""
    climbs = any(one["part"] == "raised" for one in launches)
    groups = [
        ("before", [one for one in launches if one["step"] < 0 and one["kernel"] != "conv_unpack"]),
        (
            f"inner step (one of {steps}, all alike)"
            + (": its passes, then those at the sharpest place nearby (^)" if climbs else ""),
            _of_a_step(launches, steps, "pass", "raised"),
        ),
        ("query pass", [one for one in launches if one["step"] == steps]),
        ("gradients of the rates", [one for one in launches if one["kernel"] == "conv_rate_grads"][:1]),
        (
            f"back through a step (one of {steps}, all alike): its passes again (*), and their derivatives",
            _of_a_step(launches, steps, "again", "tangent"),
        ),
        ("after", [one for one in launches if one["kernel"] == "conv_unpack"]),
    ]
    return [(title, part) for title, part in groups if part]


def _of_a_step(launches: Sequence[Launch], steps: int, *parts: str) -> list[Launch]:
    of_step = [one for one in launches if one["step"] == 0 < steps and one["part"] in parts]
    return [one for one in of_step if one["kernel"] != "conv_rate_grads"]


def _row(one: Launch, precision: str) -> str:
    block = "" if one["block_of_network"] < 0 else str(one["block_of_network"] + 1)
    grid = " x ".join(str(extent) for extent in one["grid"])
    name = one["kernel"] + {"again": " (*)", "raised": " (^)"}.get(one["part"], "")
    return (
        f"  {name:<{_NAME}}{block:>6}{grid:>14}{one['threads']:>8}{one['shared_bytes'] / 1024:>6.1f}"
        f"{one['flops'] / 1e6:>9.1f}{one['bytes'] / 1e6:>8.2f}{seconds(one, precision) * 1e6:>12.2f}"
    )
