"""What can be read off a module: facts about its structure that a backend needs to know."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import modes
from .checks import Problem

_ADDS_BIAS = (nn.modules.conv._ConvNd, nn.Linear)

# model -> (what the answer was found for, the answer)
_dead: weakref.WeakKeyDictionary[nn.Module, tuple[object, frozenset[str]]] = weakref.WeakKeyDictionary()


def dead_biases(problem: Problem) -> frozenset[str]:
    """Names of biases whose only use is in front of a BatchNorm on batch statistics.

    The mean that BatchNorm subtracts holds the bias, so the bias has no effect and its gradient is exactly 0; what
    autograd computes for it is rounding noise around 1e-17 whose sign is a coin flip.

    The answer comes from the autograd graph of one forward pass on the first task's support set, hence holds for any
    way of writing the module; it is remembered by model until its modules change.
    """
    model = problem.model
    modules = dict(model.named_modules())
    biased = [m for m in modules.values() if isinstance(m, _ADDS_BIAS) and m.bias is not None]
    if problem.batch_norm != "batch" or not biased or not any(isinstance(m, modes.BatchNorm) for m in modules.values()):
        return frozenset()
    structure = tuple((name, type(module)) for name, module in modules.items())
    known = _dead.get(model)
    if known is None or known[0] != structure:
        known = (structure, _find_dead_biases(problem, biased))
        _dead[model] = known
    return known[1]


def _find_dead_biases(problem: Problem, biased: Sequence[nn.Module]) -> frozenset[str]:
    sources: defaultdict[nn.Module, list[Any]] = defaultdict(list)  # module -> graph nodes of its outputs
    normalised: set[Any] = set()  # graph nodes whose output goes into a BatchNorm

    def leaves_biased(module: nn.Module, args: Any, output: Tensor) -> None:
        sources[module].append(output.grad_fn)

    def enters_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        normalised.add(args[0].grad_fn)

    handles = [module.register_forward_hook(leaves_biased) for module in biased]
    handles += [
        m.register_forward_pre_hook(enters_norm) for m in problem.model.modules() if isinstance(m, modes.BatchNorm)
    ]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            modes.call_modes(problem),
            modes.KeyedRandomness(0, problem.device) as randomness,
            randomness.at(0, 0),
        ):
            buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
            output = torch.func.functional_call(problem.model, buffers, (problem.support_x[0],))
    finally:
        for handle in handles:
            handle.remove()

    uses = _uses(output)
    # Where autograd hands a parameter its gradient: how often it is used counts every read, whoever reads.
    reads = {id(node.variable): count for node, count in uses.items() if hasattr(node, "variable")}
    added_by: defaultdict[int, list[nn.Module]] = defaultdict(list)
    for module in biased:
        added_by[id(module.bias)].append(module)

    def is_dead(parameter: Tensor) -> bool:
        nodes = [node for module in added_by[id(parameter)] for node in sources[module]]
        only_normalised = all(node in normalised and uses[node] == 1 for node in nodes)
        return bool(nodes) and only_normalised and reads.get(id(parameter)) == len(nodes)

    return frozenset(name for name, p in problem.params.items() if id(p) in added_by and is_dead(p))


def _uses(output: object) -> Counter[Any]:
    """How often each node of the graph under `output` is used."""
    uses: Counter[Any] = Counter()
    if not isinstance(output, Tensor) or output.grad_fn is None:
        return uses
    stack, seen = [output.grad_fn], {output.grad_fn}
    uses[output.grad_fn] += 1
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            uses[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return uses
