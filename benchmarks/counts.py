"""Floating-point operations and bytes of each operation, counted from the definition.

A multiplication and an addition are two operations. Only convolutions and matrix products are counted, as direct
sums. An implementation that needs fewer operations (Winograd) thus shows a higher rate, and one that does redundant
work gets no credit for it. Bytes are those that must move between memory and the processor, each operand once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution with padding 1 of one image: `inputs` x `height` x `width` to `outputs` channels."""

    inputs: int
    outputs: int
    height: int
    width: int
    stride: int = 1

    @property
    def positions(self) -> int:
        """Pixels of the output."""
        return (-(-self.height // self.stride)) * (-(-self.width // self.stride))

    @property
    def flops(self) -> int:
        """FLOPs of the forward pass; the weight gradient and the input gradient take as many each."""
        return 2 * 9 * self.inputs * self.outputs * self.positions


@dataclass(frozen=True)
class ConvNet:
    """Blocks of conv3x3, BatchNorm, ReLU and downsampling, then a linear classifier: `signmaml.models.Conv4`."""

    channels: int
    filters: int
    size: int
    ways: int = 5
    halving: str = "max"  # or "stride"
    blocks: int = 4

    def layers(self) -> list[Convolution]:
        """The convolutions of one image."""
        found, channels, size = [], self.channels, self.size
        for _ in range(self.blocks):
            stride = 2 if self.halving == "stride" else 1
            found.append(Convolution(channels, self.filters, size, size, stride))
            size = -(-size // 2) if self.halving == "stride" else size // 2
            channels = self.filters
        return found

    @property
    def features(self) -> int:
        """Inputs of the classifier."""
        size = self.size
        for _ in range(self.blocks):
            size = -(-size // 2) if self.halving == "stride" else size // 2
        return self.filters * size * size

    @property
    def parameters(self) -> int:
        """Number of trainable scalars, with a bias in each convolution."""
        convolutions = sum(9 * layer.inputs * layer.outputs for layer in self.layers())
        return convolutions + 3 * self.filters * self.blocks + (self.features + 1) * self.ways

    def forward_flops(self) -> list[int]:
        """FLOPs of each layer's forward pass over one image, the classifier last."""
        return [*(layer.flops for layer in self.layers()), 2 * self.features * self.ways]

    def pass_flops(self) -> int:
        """FLOPs of one image, forward and backward. The first block needs no input gradient: two thirds of the work."""
        first, *rest = (layer.flops for layer in self.layers())
        return 2 * first + 3 * sum(rest) + 3 * 2 * self.features * self.ways


@dataclass(frozen=True)
class Perceptron:
    """Linear layers of these widths: `signmaml.models.MLP`."""

    widths: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of trainable scalars."""
        return sum((inputs + 1) * outputs for inputs, outputs in zip(self.widths, self.widths[1:], strict=False))

    def forward_flops(self) -> list[int]:
        """FLOPs of each layer's forward pass over one example."""
        return [2 * inputs * outputs for inputs, outputs in zip(self.widths, self.widths[1:], strict=False)]

    def pass_flops(self) -> int:
        """FLOPs of one example, forward and backward, without the gradient of the example."""
        first, *rest = (2 * inputs * outputs for inputs, outputs in zip(self.widths, self.widths[1:], strict=False))
        return 2 * first + 3 * sum(rest)


def meta_step_flops(net: ConvNet | Perceptron, *, tasks: int, support: int, query: int, steps: int) -> int:
    """FLOPs of a first-order meta-step: `steps` passes over the support set of each task and one over its query set."""
    return tasks * (steps * support + query) * net.pass_flops()


def second_order_flops(net: ConvNet | Perceptron, *, tasks: int, support: int, query: int, steps: int) -> int:
    """FLOPs of an exact maml meta-step: first-order's, and a sweep back through each of the steps.

    The sweep is forward 1, tangent 2, data gradient 1, its tangent 2 and the weight gradient's tangent 2, in units of a
    layer's forward pass. The first layer's input has neither a gradient nor a tangent: 1, 1 and 1. Every implementation
    gets this count, whatever it does.
    """
    first, *rest = net.forward_flops()
    sweep = 3 * first + 8 * sum(rest)
    once = meta_step_flops(net, tasks=tasks, support=support, query=query, steps=steps)
    return once + tasks * steps * support * sweep


def sign_step_bytes(tasks: int, parameters: int, scalar: int = 4) -> int:
    """Bytes moved: reads parameters and gradients, writes parameters."""
    return 3 * scalar * tasks * parameters


def meta_accumulate_bytes(tasks: int, parameters: int, scalar: int = 4) -> int:
    """Bytes moved: reads the gradients of all tasks and the sum, writes the sum."""
    return scalar * parameters * (tasks + 2)


def copy_bytes(elements: int, scalar: int = 4) -> int:
    """Bytes moved: reads and writes each element once."""
    return 2 * scalar * elements


def matrix_flops(n: int) -> int:
    """FLOPs of the product of two n x n matrices."""
    return 2 * n**3
