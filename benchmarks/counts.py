"""Floating-point operations and bytes of each operation, counted from the definition.

A multiplication and an addition are two operations. Only convolutions and matrix products are counted, as direct
sums: an implementation that needs fewer (Winograd) shows a higher rate, one that computes more than it must shows none
of it. Bytes are those that have to move between the operands and the processor, each operand once.
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
        """Of the forward pass; the weight gradient and the input gradient are as many each."""
        return 2 * 9 * self.inputs * self.outputs * self.positions


@dataclass(frozen=True)
class ConvNet:
    """Blocks of conv3x3, BatchNorm, ReLU and a halving, then a linear classifier: `signmaml.models.Conv4`."""

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
        """Trainable numbers, with a bias in each convolution."""
        convolutions = sum(9 * layer.inputs * layer.outputs for layer in self.layers())
        return convolutions + 3 * self.filters * self.blocks + (self.features + 1) * self.ways

    def pass_flops(self) -> int:
        """One image forward and backward. The images' own gradient is not needed, so the first block has two thirds."""
        first, *rest = (layer.flops for layer in self.layers())
        return 2 * first + 3 * sum(rest) + 3 * 2 * self.features * self.ways


@dataclass(frozen=True)
class Perceptron:
    """Linear layers of these widths: `signmaml.models.MLP`."""

    widths: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum((inputs + 1) * outputs for inputs, outputs in zip(self.widths, self.widths[1:], strict=False))

    def pass_flops(self) -> int:
        """One example forward and backward, without the gradient of the example."""
        first, *rest = (2 * inputs * outputs for inputs, outputs in zip(self.widths, self.widths[1:], strict=False))
        return 2 * first + 3 * sum(rest)


def meta_step_flops(net: ConvNet | Perceptron, *, tasks: int, support: int, query: int, steps: int) -> int:
    """A first-order meta-step: `steps` passes over the support set of each task and one over its query set."""
    return tasks * (steps * support + query) * net.pass_flops()


def sign_step_bytes(tasks: int, parameters: int, scalar: int = 4) -> int:
    """Reads parameters and gradients, writes parameters."""
    return 3 * scalar * tasks * parameters


def meta_accumulate_bytes(tasks: int, parameters: int, scalar: int = 4) -> int:
    """Reads the gradients of all tasks and the sum, writes the sum."""
    return scalar * parameters * (tasks + 2)


def copy_bytes(elements: int, scalar: int = 4) -> int:
    """Reads and writes each element once."""
    return 2 * scalar * elements


def matrix_flops(n: int) -> int:
    """The product of two n x n matrices."""
    return 2 * n**3
