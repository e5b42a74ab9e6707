"""Which calls the family serves, and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from .. import compact, flat, fused, modes, recognition, reference
from ..inputs import only
from ..problem import Problem
from ..results import Adaptation, MetaGradients, raise_if_asked
from .run import NativeRun, program_of
from .spec import LayersSpec, read

Result = TypeVar("Result", MetaGradients, Adaptation)


def why_not(problem: Problem) -> str | None:
    """None if the program's kernels serve this problem on the CPU, else the reason."""
    found = read(problem.model)
    if isinstance(found, str):
        return found
    if problem.device.type != "cpu":
        return f"its kernels are the CPU's, and the model is on {problem.device}"
    if problem.loss not in ("cross_entropy", "mse"):
        return "the loss is a callable"
    if found.draws and not problem.keyed:
        return "it draws random numbers, which a graph draws in its own way"
    reason = fused.why_not(problem, found.names, steps_natively=False)
    if reason is not None:
        return reason
    if any(block.drops == "values" for block in found.blocks) and not _in_torchs_order(problem, found):
        return (
            "it has dropouts, whose random numbers depend on the order in memory, which is not torch's usual one here"
        )
    if problem.batch_norm != "batch" and any(block.norm == "batch" for block in found.blocks):
        return f"it normalises by the batch, and batch_norm is {problem.batch_norm!r}"
    if problem.batch_norm == "support":
        return "it keeps no statistics of the support set, and batch_norm is 'support'"
    if not problem.zero_dead_bias and found.unmoved:
        return "its biases in front of BatchNorm have gradient 0, and zero_dead_bias=False asks for rounding noise"
    if problem.loss == "mse" and any(
        tuple(y.shape[2:]) != (found.outputs,) for y in (problem.support_y, problem.query_y) if y is not None
    ):
        return f"the targets are not [T, S, {found.outputs}]"
    return _why_not_examples(problem, found)


def _in_torchs_order(problem: Problem, found: LayersSpec) -> bool:
    """Whether parameters and a task's examples lie in memory as new tensors of their shapes do.

    A dropout fills its mask in the order of what it reads. Strides decide, also of axes of size 1: torch tells
    channels_last by them.
    """
    parameters = (problem.model.get_parameter(name) for name in found.names)
    examples = (only(x)[0] for x in (problem.support_x, problem.query_x) if x is not None and only(x).shape[0] > 0)
    usual = (torch.empty(t.shape, device="meta").stride() == t.stride() for t in (*parameters, *examples))
    return all(usual)


def _why_not_examples(problem: Problem, found: LayersSpec) -> str | None:
    x = only(problem.support_x)
    example = tuple(x.shape[2:])
    if found.size(example) is None:
        return f"its examples are no {found.kind}: {list(example)}"
    program = program_of(problem, found)
    if isinstance(program, str):
        return program
    counts = [y.shape[1] for y in (problem.support_y, problem.query_y) if y is not None]
    for block, (read_size, made, _) in zip(found.blocks, program.sizes, strict=True):
        if block.product == "linear":
            takes = problem.model.get_parameter(block.weight).shape[1]
            if takes != math.prod(read_size):
                return f"{block.weight!r} takes {takes} features, and these examples give {math.prod(read_size)}"
        elif block.product == "conv" and problem.model.get_parameter(block.weight).shape[1] != read_size[0]:
            return f"{block.weight!r} takes other channels than these examples give"
        if block.scale is not None and problem.model.get_parameter(block.scale).shape[0] != made[0]:
            return f"{block.scale!r} is not of {made[0]} channels"
        values = made[1] * made[2] * (min(counts) if block.norm == "batch" else made[0] // block.groups)
        if block.norm != "none" and values == 1:
            return "a normalisation would see one value"
    if not recognition.verified(found, problem.model, x[0]):
        return "it does not compute what its structure says"
    return None


def meta_gradients(problem: Problem) -> MetaGradients:
    """The meta-step of all tasks; see `reference.meta_gradients`."""
    return _with_seed(problem, _meta_gradients)


def adapt(problem: Problem) -> Adaptation:
    """The inner loop of all tasks; see `reference.adapt`."""
    return _with_seed(problem, _adapt)


def _with_seed(problem: Problem, compute: Callable[[Problem], Result]) -> Result:
    """`compute` of a problem that has a seed, if the network draws random numbers."""
    found = read(problem.model)
    assert not isinstance(found, str), "why_not has a reason for this problem"
    if not found.draws:
        return compute(problem)
    if problem.steps == 0 and problem.query_x is None:
        return compute(problem.replace(seed=0))  # there is no pass, so nothing is drawn

    def checked(problem: Problem) -> Result:
        result = compute(problem)
        raise_if_asked(problem, result.nonfinite)  # now: a call that raises leaves the generator as it was
        return result

    return modes.with_seed(problem, checked)


def _meta_gradients(problem: Problem) -> MetaGradients:
    if problem.inner_rule is not None or (problem.method == "maml" and problem.sharpness is not None):
        with torch.enable_grad():
            return reference.meta_gradients_of(NativeRun.of(problem))
    if problem.task_state == "int8":
        return compact.meta_gradients(problem, lambda part: flat.meta_gradients_of(NativeRun.of(part)))
    return flat.meta_gradients_of(NativeRun.of(problem))


def _adapt(problem: Problem) -> Adaptation:
    problem = reference.of_adapt(problem)
    if problem.inner_rule is not None:
        with torch.enable_grad():
            return reference.adapt_of(NativeRun.of(problem))
    if problem.task_state == "int8":
        return compact.adapt(problem, lambda part: flat.adapt_of(NativeRun.of(part)))
    return flat.adapt_of(NativeRun.of(problem))
