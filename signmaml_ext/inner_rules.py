"""Rules for inner steps: what a task remembers of its earlier gradients, and weight decay.

An inner step moves along u, which the rule makes of this step's gradient g and the task's earlier ones. It then shrinks
what was there, by a decay ("lambda") that is decoupled from the gradients (Loshchilov & Hutter 2019):

    phi <- (1 - alpha * lambda) * phi - alpha * sign(u)      "sign-maml"
    phi <- (1 - alpha * lambda) * phi - alpha * u            "fo-maml", "maml"

    Plain       u = g
    Signum      m <- momentum * m + (1 - momentum) * g                  u = m
    Lion        u = beta1 * m + (1 - beta1) * g                         m <- beta2 * m + (1 - beta2) * g
    Momentum    m <- momentum * m + g                                   u = m, with nesterov g + momentum * m
    Adam        m <- beta1 * m + (1 - beta1) * g, v <- beta2 * v + (1 - beta2) * g^2
                u = m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) in the k-th step

m and v are 0 before a task's first step. Nothing here knows tasks: every operation is by element. The loop that applies
a rule is `inner_loop` in reference.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What a rule remembers of one parameter.

    Attributes:
        mean: m, of the parameter's shape.
        square: v, likewise; None for rules without it.
        count: How many gradients went in ("k").
    """

    mean: Tensor
    square: Tensor | None = None
    count: int = 1


class InnerRule:
    """What `inner_rule=` takes: a `Plain`, `Signum`, `Lion`, `Momentum` or `Adam`.

    Attributes:
        methods: The methods whose steps the rule makes.
        weight_decay: lambda, in 1 / (units of the rate), >= 0.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    weight_decay: float

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """One step of the rule, differentiable in the gradients.

        Args:
            gradient: g, of any shape.
            memory: What the parameter's earlier step returned; None in its first.

        Returns:
            u, of the gradient's shape, and what to remember. A NaN in g is a NaN in u.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(InnerRule):
    """The method's own step with weight decay: u = g.

    For every method. The decay is decoupled (Loshchilov & Hutter 2019): it scales the parameter and never enters a
    sign.

    Args:
        weight_decay: lambda, finite and >= 0. With 0 the call is the one without a rule, bit for bit.

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Plain(weight_decay=0.1)
        Plain(weight_decay=0.1)
    """

    methods: ClassVar[tuple[str, ...]] = ("sign-maml", "fo-maml", "maml")
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, weight_decay=math.inf)

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """The gradient itself; nothing to remember."""
        return gradient, None


@dataclass(frozen=True)
class Signum(InnerRule):
    """Sign steps along a running mean of the gradients (Bernstein et al. 2018, arXiv 1802.04434).

    For "sign-maml". m <- momentum * m + (1 - momentum) * g, u = m. The first step is that of the plain sign.

    Args:
        momentum: Weight of the earlier gradients, in [0, 1).
        weight_decay: lambda, finite and >= 0, decoupled.

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Signum()
        Signum(momentum=0.9, weight_decay=0.0)
    """

    methods: ClassVar[tuple[str, ...]] = ("sign-maml",)
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, momentum=1.0, weight_decay=math.inf)

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """u = m, and m."""
        mean = _mixed(self.momentum, memory, (1 - self.momentum) * gradient)
        return mean, Memory(mean)


@dataclass(frozen=True)
class Lion(InnerRule):
    """Sign steps along a mean that weighs the newest gradient more than its memory does (Chen et al. 2023).

    For "sign-maml" (arXiv 2302.06675). u = beta1 * m + (1 - beta1) * g, then m <- beta2 * m + (1 - beta2) * g.

    Args:
        beta1: Weight of m in the step, in [0, 1).
        beta2: Weight of the earlier gradients in m, in [0, 1).
        weight_decay: lambda, finite and >= 0, decoupled as in the paper.

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Lion(weight_decay=0.1)
        Lion(beta1=0.9, beta2=0.99, weight_decay=0.1)
    """

    methods: ClassVar[tuple[str, ...]] = ("sign-maml",)
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, beta1=1.0, beta2=1.0, weight_decay=math.inf)

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """u before m takes the gradient in, and m after."""
        step = _mixed(self.beta1, memory, (1 - self.beta1) * gradient)
        return step, Memory(_mixed(self.beta2, memory, (1 - self.beta2) * gradient))


@dataclass(frozen=True)
class Momentum(InnerRule):
    """Gradient steps with momentum, as `torch.optim.SGD` defines it.

    For "fo-maml" and "maml". m <- momentum * m + g, and u = m; with `nesterov`, u = g + momentum * m.

    Args:
        momentum: Weight of the earlier gradients, in [0, 1).
        nesterov: Whether the step looks ahead.
        weight_decay: lambda, finite and >= 0, decoupled. (`torch.optim.SGD` adds its decay to the gradient instead.)

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Momentum(nesterov=True)
        Momentum(momentum=0.9, nesterov=True, weight_decay=0.0)
    """

    methods: ClassVar[tuple[str, ...]] = ("fo-maml", "maml")
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, momentum=1.0, weight_decay=math.inf)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov: expected True or False, found {type(self.nesterov).__name__} {self.nesterov!r}")

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """u and m."""
        mean = _mixed(self.momentum, memory, gradient)
        return gradient + self.momentum * mean if self.nesterov else mean, Memory(mean)


@dataclass(frozen=True)
class Adam(InnerRule):
    """Steps of Adam (Kingma & Ba 2015) with decoupled weight decay, as `torch.optim.AdamW` defines them.

    For "fo-maml" and "maml". Both moments are corrected for their start at 0.

    Args:
        beta1: Weight of the earlier gradients in m, in [0, 1).
        beta2: Weight of the earlier squares in v, in [0, 1).
        eps: Added to the root, finite and > 0. It is also what "maml" divides by where all gradients were 0.
        weight_decay: lambda, finite and >= 0, decoupled (Loshchilov & Hutter 2019).

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Adam(beta2=0.99)
        Adam(beta1=0.9, beta2=0.99, eps=1e-08, weight_decay=0.0)
    """

    methods: ClassVar[tuple[str, ...]] = ("fo-maml", "maml")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, beta1=1.0, beta2=1.0, eps=math.inf, weight_decay=math.inf)

    def combine(self, gradient: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """u, and both moments."""
        count = 1 if memory is None else memory.count + 1
        mean = _mixed(self.beta1, memory, (1 - self.beta1) * gradient)
        square = (1 - self.beta2) * gradient * gradient
        if memory is not None and memory.square is not None:
            square = self.beta2 * memory.square + square
        root = _root(square) / math.sqrt(1 - self.beta2**count)
        return mean / (1 - self.beta1**count) / (root + self.eps), Memory(mean, square, count)


RULES: tuple[type[InnerRule], ...] = (Plain, Signum, Lion, Momentum, Adam)


def _mixed(weight: float, memory: Memory | None, share: Tensor) -> Tensor:
    """weight * m + share, where m is 0 at first."""
    return share if memory is None else weight * memory.mean + share


def _root(square: Tensor) -> Tensor:
    """The root of v, with derivative 0 where v is 0.

    torch says infinity there, which times 0, the derivative of the square, is NaN. What counts is the derivative of u
    at gradients that are all 0. There m = 0 too, so u = m / (sqrt(v) + eps) differs from m / eps by the order of v
    only. The derivative of u is exactly that of m / eps, and the root has no part in it. If m is not 0 there (with a
    beta2 of 0, or squares that underflow), u has a kink like |g|, and 0 lies between the root's two slopes.
    """
    is_zero = square == 0
    return square.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def _check(rule: InnerRule, **below: float) -> None:
    """Checks fields that are numbers in [0, limit), eps without 0, and makes floats of them."""
    for name, limit in below.items():
        value = getattr(rule, name)
        sign = ">" if name == "eps" else ">="
        expected = f"a finite number {sign} 0" if limit == math.inf else f"a number in [0, {limit:g})"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected {expected}, found {type(value).__name__} {value!r}")
        if not 0 <= value < limit or (name == "eps" and value == 0):
            raise ValueError(f"{name}: expected {expected}, found {value!r}")
        object.__setattr__(rule, name, float(value))
