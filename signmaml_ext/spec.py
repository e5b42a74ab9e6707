"""What can be read off a module: facts about its structure that a backend needs to know."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
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


# -----------------------------------------------------------------------------------------------------------------
# Multilayer perceptrons


@dataclass(frozen=True)
class MlpSpec:
    """A module that is linear layers with one kind of activation between them.

    Attributes:
        layers: Parameter names of each linear layer, (weight `[out, in]`, bias `[out]`).
        widths: Of the input, the hidden layers and the output.
        activation: "relu" or "tanh".
    """

    layers: tuple[tuple[str, str], ...]
    widths: tuple[int, ...]
    activation: str

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters in order: weight and bias of the first layer, of the second, ..."""
        return tuple(name for layer in self.layers for name in layer)


_mlps: weakref.WeakKeyDictionary[nn.Module, tuple[object, MlpSpec | str]] = weakref.WeakKeyDictionary()

_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    torch.relu: "relu",
    torch.tanh: "tanh",
    nn.functional.relu: "relu",
    nn.functional.tanh: "tanh",
    "relu": "relu",
    "tanh": "tanh",
}


def mlp_from_module(model: nn.Module) -> MlpSpec | str:
    """The layers of a module that is a multilayer perceptron by its structure, or why it is none.

    What counts is the computation that torch.fx traces, not the class: any module whose forward is flatten (if at all),
    linear, activation, linear, ..., linear. The answer is remembered until the module's structure changes.
    """
    structure = tuple((name, type(module)) for name, module in model.named_modules())
    known = _mlps.get(model)
    if known is None or known[0] != structure:
        known = (structure, _trace_mlp(model))
        _mlps[model] = known
    return known[1]


def _trace_mlp(model: nn.Module) -> MlpSpec | str:
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return "it has no linear layer"
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        return "it has convolutions"  # said without tracing, which takes its time
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the caller's forward on proxies: anything may go wrong
        return f"torch.fx cannot trace it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    modules = dict(model.named_modules())
    layers: list[tuple[str, str]] = []
    widths: list[int] = []
    activations: list[str] = []
    previous: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                return "its forward takes several arguments"
        elif node.op == "output":
            if node.args[0] is not previous:
                return "it returns something else than its last layer's output"
        elif not node.args or node.args[0] is not previous or len(node.all_input_nodes) != 1:
            return f"its layers are no plain chain (at {node.name!r})"
        else:
            target: Any = modules[str(node.target)] if node.op == "call_module" else node.target
            kind: Any = type(target) if node.op == "call_module" else target
            if kind is nn.Linear:
                reason = _add_linear(str(node.target), target, layers, widths, activations)
                if reason is not None:
                    return reason
            elif kind in _ACTIVATIONS:
                if len(activations) + 1 != len(layers):
                    return f"an activation is not between two linear layers (at {node.name!r})"
                activations.append(_ACTIVATIONS[kind])
            elif not _flattens(node, target, bool(layers)):
                return f"it uses {getattr(kind, '__name__', kind)}"
        previous = node
    if len(layers) < 2 or len(activations) != len(layers) - 1 or len(set(activations)) != 1:
        return "it is not linear layers with one kind of activation between every two"
    return MlpSpec(tuple(layers), tuple(widths), activations[0])


def _add_linear(
    name: str, layer: nn.Linear, layers: list[tuple[str, str]], widths: list[int], activations: list[str]
) -> str | None:
    if getattr(layer, "bias", None) is None:
        return f"layer {name!r} has no bias"
    if len(activations) != len(layers):
        return f"there is no activation before layer {name!r}"
    prefix = f"{name}." if name else ""
    if (f"{prefix}weight", f"{prefix}bias") in layers:
        return f"layer {name!r} is used twice"
    layers.append((f"{prefix}weight", f"{prefix}bias"))
    widths.extend([layer.out_features] if widths else [layer.in_features, layer.out_features])
    return None


def _flattens(node: Any, target: Any, after_a_layer: bool) -> bool:
    """Whether a node of the graph leaves `[S, ...]` as rows `[S, features]`, before any layer."""
    if after_a_layer:
        return False
    if isinstance(target, nn.Identity):
        return True
    if isinstance(target, nn.Flatten):
        return target.start_dim == 1 and target.end_dim == -1
    if target is torch.flatten or target == "flatten":
        return [*node.args[1:], *node.kwargs.values()] in ([1], [1, -1])
    return False


def check_mlp(spec: MlpSpec, model: nn.Module, x: Tensor) -> bool:
    """Whether the module computes on `x` `[S, ...]` what its spec says: the numbers, not only the structure."""
    with torch.no_grad():
        value = x.flatten(1)
        for i, (weight, bias) in enumerate(spec.layers):
            value = nn.functional.linear(value, model.get_parameter(weight), model.get_parameter(bias))
            if i + 1 < len(spec.layers):
                value = value.relu() if spec.activation == "relu" else value.tanh()
        return torch.allclose(value, model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


# -----------------------------------------------------------------------------------------------------------------
# Convolutional networks


@dataclass(frozen=True)
class ConvBlockSpec:
    """Parameter names and constants of one block: conv3x3, BatchNorm, ReLU, halving."""

    conv_weight: str  # [filters, channels in, 3, 3]
    conv_bias: str | None  # [filters]
    norm_weight: str  # [filters]
    norm_bias: str  # [filters]
    eps: float


@dataclass(frozen=True)
class ConvSpec:
    """A module that is blocks of conv3x3 (padding 1), BatchNorm, ReLU and a halving, then one linear classifier.

    Attributes:
        blocks: The blocks in order; all have a convolution bias or none has.
        classifier: Names of weight `[ways, features]` and bias `[ways]`.
        channels: Of the images.
        filters: Of every block.
        ways: Width of the output.
        halving: "max" (stride 1, then 2x2 max-pooling) or "stride" (stride-2 convolution).
        readout: "flatten" (NCHW order) or "mean" (over height and width): what the classifier reads.
    """

    blocks: tuple[ConvBlockSpec, ...]
    classifier: tuple[str, str]
    channels: int
    filters: int
    ways: int
    halving: str
    readout: str

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters in the order of params/conv_meta_step.h."""
        names: list[str] = []
        for block in self.blocks:
            bias = [] if block.conv_bias is None else [block.conv_bias]
            names += [block.conv_weight, *bias, block.norm_weight, block.norm_bias]
        return (*names, *self.classifier)
