"""Facts about a model, read from the autograd graph of a forward pass that a call runs anyway.

Nothing is cached here: the next call inspects its own passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .replica import BatchNorm

_ADDS_BIAS = (nn.modules.conv._ConvNd, nn.Linear)

Output = tuple[Any, int]  # a node of an autograd graph, and the number of one of its outputs


@dataclass(frozen=True)
class Facts:
    """What one forward pass showed.

    Attributes:
        dead_biases: Names of biases whose only use is in front of a BatchNorm on batch statistics, or of another norm
            of one channel alone. The mean that it subtracts contains the bias, so its gradient is exactly 0; autograd
            computes rounding noise around 1e-17 for it, with a random sign.
        reached: Name of a parameter that the pass took from the user's own module instead of its private copy; None if
            there is none.
        pads: Whether an embedding has a padding row.
        unused: Names of parameters that the loss does not depend on.
    """

    dead_biases: frozenset[str]
    reached: str | None
    pads: bool
    unused: frozenset[str]


class Watch:
    """Watches one forward pass of a private copy of a model.

    Args:
        copy: The copy, before its forward; hooks are added to it.
        tensors: The parameters that it was given, by name.
        find_dead: Whether to look for biases in front of norms.
    """

    def __init__(self, copy: nn.Module, tensors: Mapping[str, Tensor], find_dead: bool) -> None:
        self._tensors = tensors
        self._sources: defaultdict[int, list[Output | None]] = defaultdict(list)  # by bias: outputs that contain it
        self._normalised: set[Output | None] = set()  # inputs of norms
        if find_dead:
            modules = list(copy.modules())
            biased = [m for m in modules if isinstance(m, _ADDS_BIAS) and m._parameters.get("bias") is not None]
            norms = [m for m in modules if _takes_bias_away(m)]
            if biased and norms:
                for module in biased:
                    module.register_forward_hook(self._leaves_biased)
                for norm in norms:
                    norm.register_forward_pre_hook(self._enters_norm)

    def _leaves_biased(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._sources[id(module._parameters["bias"])].append(_origin(output))

    def _enters_norm(self, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            self._normalised.add(_origin(args[0]))

    def facts(self, loss: Tensor, originals: Mapping[str, Tensor]) -> Facts:
        """Reads the graph of the loss.

        Args:
            loss: The loss that the pass computed.
            originals: The user's own parameters by name, none of which the graph should hold.
        """
        given = {name: _origin(tensor) for name, tensor in self._tensors.items()}
        uses, nodes = _uses(_origin(loss), {output[0] for output in given.values() if output is not None})
        names = {id(parameter): name for name, parameter in originals.items()}
        reached = next((names[id(n.variable)] for n in nodes if id(getattr(n, "variable", None)) in names), None)

        def is_dead(name: str) -> bool:
            outputs = self._sources.get(id(self._tensors[name]), [])
            only_normalised = all(o is not None and o in self._normalised and uses[o] == 1 for o in outputs)
            return bool(outputs) and only_normalised and uses[given[name]] == len(outputs)

        dead = frozenset(name for name, output in given.items() if output is not None and is_dead(name))
        unused = frozenset(name for name, output in given.items() if output is None or not uses[output])
        return Facts(dead, reached, any(map(_pads, nodes)), unused)


def _takes_bias_away(module: nn.Module) -> bool:
    """Whether a module subtracts the mean of each channel by itself."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training or not module.track_running_stats
    return isinstance(module, BatchNorm) or (
        isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
    )


def address(tensor: Tensor) -> int:
    """A tensor's address; under vmap, that of the tensor of all tasks."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.data_ptr()


def _origin(tensor: Tensor) -> Output | None:
    """The output of the autograd graph that is this tensor; under vmap, that of the tensor of all tasks."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if not tensor.requires_grad:
        return None
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _uses(end: Output | None, starts: Iterable[Any]) -> tuple[Counter[Output | None], list[Any]]:
    """How often each output is used in the graph that leads to `end`, and its nodes; stops at `starts`."""
    uses: Counter[Output | None] = Counter()
    if end is None:
        return uses, []
    uses[end] += 1
    stack, nodes, seen = [end[0]], [end[0]], {end[0], *starts}
    while stack:
        for output in stack.pop().next_functions:
            node = output[0]
            if node is None:
                continue
            uses[output] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
                nodes.append(node)
    return uses, nodes


def _pads(node: Any) -> bool:
    """Whether a node is an embedding with a padding row, which gets no gradient; torch stores "none" as unsigned -1."""
    row = getattr(node, "_saved_padding_idx", None) if "Embedding" in node.name() else None
    return row is not None and 0 <= row < 2**63
