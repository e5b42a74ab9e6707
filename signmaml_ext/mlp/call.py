"""The native calls of the family."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import _loader, fused, recognition
from ..inputs import only
from ..nvtx import Range
from ..problem import Problem
from ..results import Adaptation, MetaGradients
from .spec import MlpSpec, read

WIDEST = 256  # kMlpWidth
MOST_HIDDEN_LAYERS = 4  # kMlpLayers - 1


def why_not(problem: Problem, *, on_cuda: bool | None = None) -> str | None:
    """None if the MLP kernels serve this problem, on any device, else the reason.

    Args:
        problem: The call.
        on_cuda: Whether the CUDA kernels are asked; None: if the model is on a CUDA device.
    """
    on_cuda = problem.device.type == "cuda" if on_cuda is None else on_cuda
    found = read(problem.model)
    if isinstance(found, str):
        return found
    if problem.loss not in ("mse", "cross_entropy"):
        return "the loss is a callable"
    if max(found.widths[1:-1]) > WIDEST or len(found.layers) - 1 > MOST_HIDDEN_LAYERS:
        return (
            f"it serves up to {MOST_HIDDEN_LAYERS} hidden layers of up to {WIDEST}, and the widths are {found.widths}"
        )
    reason = fused.why_not(problem, found.names)
    if reason is not None:
        return reason
    if problem.loss == "mse" and not _targets_fit(problem, found.widths[-1]):
        return f"the targets are not [T, S, {found.widths[-1]}]"
    x = only(problem.support_x)
    if x[0, 0].numel() != found.widths[0]:
        return f"its first layer takes {found.widths[0]} features"
    if not recognition.verified(found, problem.model, x[0]):
        return "it does not compute what its structure says"
    return None


def _targets_fit(problem: Problem, outputs: int) -> bool:
    targets = [y for y in (problem.support_y, problem.query_y) if y is not None]
    return all(tuple(y.shape[2:]) == (outputs,) for y in targets)


def meta_gradients(problem: Problem, native: ModuleType = _loader.C) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    return fused.meta_gradients(problem, read(problem.model), native, native_call)


def adapt(problem: Problem, native: ModuleType = _loader.C) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    return fused.adapt(problem, read(problem.model), native, native_call)


def native_call(problem: Problem, tensors: dict[str, Tensor], found: MlpSpec, native: ModuleType) -> None:
    sizes, itemsize = fused.sizes_of(problem), problem.dtype.itemsize
    network = (found.widths, found.activation, str(problem.loss))
    steps = {"steps": problem.steps, "method": problem.method}
    options = {**sizes, **steps, "is_double": problem.dtype == torch.float64}
    if "logits" in tensors:
        tensors["predictions"] = tensors.pop("logits")
    if fused.on_cuda(problem, native):
        index = problem.device.index or 0
        of_steps = fused.step_options(problem, learns_rates="rate_grads" in tensors)
        plan = native.plan_mlp_meta_step(
            found.widths, *sizes.values(), itemsize, native.multiprocessors(index), **steps, **of_steps
        )
        tensors["workspace"] = tensors["theta"].new_empty(plan["workspace_scalars"])
        with Range("mlp_meta_step", problem.device):
            native.mlp_meta_step_cuda(
                fused.addresses(tensors), *network, **options, **of_steps, device=index,
                stream=fused.stream_of(problem.device),
            )  # fmt: skip
    else:
        threads = torch.get_num_threads()
        of_plan, of_call = fused.step_options_on_cpu(problem, tensors)
        plan = native.plan_mlp_meta_step_cpu(found.widths, *sizes.values(), itemsize, threads, **steps, **of_plan)
        workspace = plan["workspace_scalars"] * itemsize
        with fused.memory_on_cpu(tensors, workspace, plan["mean_rows"]) as addresses:
            native.mlp_meta_step_cpu(
                addresses, *network, **options, skip_nonfinite=problem.nonfinite == "skip", threads=threads,
                **of_call,
            )  # fmt: skip
