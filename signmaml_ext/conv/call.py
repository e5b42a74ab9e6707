"""The native calls of the family."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _loader, fused, recognition
from ..inputs import only
from ..nvtx import Range
from ..problem import Problem
from ..results import Adaptation, MetaGradients
from .spec import ConvSpec, read

MOST_BLOCKS = 6  # kConvBlocks
MOST_FILTERS = 128  # kConvFilters
FILTER_UNIT = 8  # kConvFilterUnit
MOST_CHANNELS = 3  # kConvChannels


def why_not(problem: Problem, *, on_cuda: bool | None = None) -> str | None:
    """None if the Conv-N kernels serve this problem, on any device, else the reason.

    Args:
        problem: The call.
        on_cuda: Whether the CUDA kernels are asked; None: if the model is on a CUDA device.
    """
    on_cuda = problem.device.type == "cuda" if on_cuda is None else on_cuda
    found = read(problem.model)
    if isinstance(found, str):
        return found
    if len(found.blocks) > MOST_BLOCKS or found.filters > MOST_FILTERS or found.filters % FILTER_UNIT:
        return (
            f"it serves up to {MOST_BLOCKS} blocks with a multiple of {FILTER_UNIT} up to {MOST_FILTERS} filters, "
            f"and these are {len(found.blocks)} with {found.filters}"
        )
    if found.channels > MOST_CHANNELS:
        return f"it serves images of up to {MOST_CHANNELS} channels, and these have {found.channels}"
    if problem.loss != "cross_entropy":
        return "its loss is cross-entropy, and this is " + ("a callable" if callable(problem.loss) else problem.loss)
    if problem.batch_norm != "batch":
        return f"it normalises by the batch, and batch_norm is {problem.batch_norm!r}"
    if not problem.zero_dead_bias and found.blocks[0].conv_bias is not None:
        return "its convolution biases have gradient 0, and zero_dead_bias=False asks for rounding noise"
    precisions = ("fp32", "tf32", "bf16") if on_cuda else ("fp32",)
    reason = fused.why_not(problem, found.names, precisions)
    if reason is not None:
        return reason
    if on_cuda and problem.dtype == torch.float64:
        return "it computes in float32 on CUDA, and the model is float64"
    return _why_not_images(problem, found)


def _why_not_images(problem: Problem, found: ConvSpec) -> str | None:
    x = only(problem.support_x)
    if x.ndim != 5 or x.shape[2] != found.channels:
        return f"the images are not [T, S, {found.channels}, H, W]"
    counts = [y.shape[1] for y in (problem.support_y, problem.query_y) if y is not None]
    height, width = x.shape[3:]
    for _ in found.blocks:
        if found.halving == "stride":
            height, width = (height + 1) // 2, (width + 1) // 2
        if min(counts) * height * width == 1:
            return "BatchNorm would see one value a channel"
        if found.halving == "max":
            height, width = height // 2, width // 2
        if height == 0 or width == 0:
            return f"images of {x.shape[3]} x {x.shape[4]} shrink to nothing in {len(found.blocks)} blocks"
    features = found.filters * (height * width if found.readout == "flatten" else 1)
    takes = problem.model.get_parameter(found.classifier[0]).shape[1]
    if takes != features:
        return f"its classifier takes {takes} features, and these images give {features}"
    if not recognition.verified(found, problem.model, x[0]):
        return "it does not compute what its structure says"
    return None


def meta_gradients(problem: Problem, native: ModuleType = _loader.C) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    return fused.meta_gradients(problem, read(problem.model), native, native_call)


def adapt(problem: Problem, native: ModuleType = _loader.C) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    return fused.adapt(problem, read(problem.model), native, native_call)


def shape_of(problem: Problem, found: ConvSpec) -> dict[str, Any]:
    """The network and its images as the native calls take them."""
    height, width = only(problem.support_x).shape[3:]
    return {
        "blocks": len(found.blocks),
        "channels": found.channels,
        "filters": found.filters,
        "height": height,
        "width": width,
        "ways": found.ways,
        "halving": found.halving,
        "readout": found.readout,
        "conv_bias": found.blocks[0].conv_bias is not None,
        "eps": [block.eps for block in found.blocks],
    }


def native_call(problem: Problem, tensors: dict[str, Tensor], found: ConvSpec, native: ModuleType) -> None:
    shape, sizes = shape_of(problem, found), fused.sizes_of(problem)
    steps, method = problem.steps, problem.method

    if fused.on_cuda(problem, native):
        index = problem.device.index or 0
        options = fused.step_options(problem, learns_rates="rate_grads" in tensors)
        plan = native.plan_conv_meta_step(
            shape, **sizes, steps=steps, precision=problem.precision, multiprocessors=native.multiprocessors(index),
            wants_grads="grads" in tensors, wants_adapted="adapted" in tensors or "counts" in tensors, method=method,
            **options,
        )  # fmt: skip
        # Held until the call returns; after that, torch's allocator reuses it in stream order only.
        tensors["workspace"] = torch.empty(plan["workspace_bytes"], dtype=torch.uint8, device=problem.device)
        with Range("conv_meta_step", problem.device):
            native.conv_meta_step_cuda(
                fused.addresses(tensors), shape, **sizes, steps=steps, method=method,
                precision=problem.precision, device=index, stream=fused.stream_of(problem.device),
                **options,
            )  # fmt: skip
    else:
        threads = torch.get_num_threads()
        of_plan, of_call = fused.step_options_on_cpu(problem, tensors)
        plan = native.plan_conv_meta_step_cpu(
            shape, *sizes.values(), problem.dtype.itemsize, threads, steps=steps, method=method,
            **of_plan,
        )  # fmt: skip
        with fused.memory_on_cpu(tensors, plan["workspace_bytes"], plan["mean_rows"]) as addresses:
            native.conv_meta_step_cpu(
                addresses, shape, **sizes, steps=steps, method=method, is_double=problem.dtype == torch.float64,
                skip_nonfinite=problem.nonfinite == "skip", threads=threads, **of_call,
            )  # fmt: skip
