"""Sharpness-aware steps (Sharp-MAML, Abbas et al. 2022): the perturbation, and the upper step for a loop of one's own.

A gradient is taken not at the parameters w but at w + eps, the sharpest place near them to first order:

    "l2"      eps = rho * g / (||g|| + 1e-12)      adaptive: rho * w^2 g / (|| |w| g || + 1e-12)
    "linf"    eps = rho * sign(g)                  adaptive: rho * |w| sign(g)

with g the gradient at w and the norm over all perturbed parameters. `meta_step(..., sharpness=...)` does so in the
inner steps ("lower"); `perturbed` moves a model for a second meta-step ("upper").
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = ("l2", "linf")
TINY = 1e-12  # keeps the quotient of a gradient of 0 at 0


@dataclass(frozen=True)
class Sharpness:
    """How far, and how, a gradient's place is perturbed.

    Args:
        rho: Radius of the perturbation in units of the parameters (adaptive: relative to them), finite and >= 0; 0 is
            no perturbation.
        norm: "l2", the published form (Foret et al. 2021; Abbas et al. 2022), or "linf", its form by signs, which needs
            no norm over the parameters.
        adaptive: Whether every parameter is perturbed in proportion to its size (ASAM, Kwon et al. 2021).

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> Sharpness(0.05)
        Sharpness(rho=0.05, norm='l2', adaptive=False)
    """

    rho: float
    norm: str = "l2"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rho, bool) or not isinstance(self.rho, (int, float)):
            raise TypeError(f"rho: expected a number >= 0, found {type(self.rho).__name__} {self.rho!r}")
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"rho: expected a finite number >= 0, found {self.rho!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, found {self.norm!r}")
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"adaptive: expected True or False, found {type(self.adaptive).__name__} {self.adaptive!r}")
        object.__setattr__(self, "rho", float(self.rho))


def sign(gradient: Tensor) -> Tensor:
    """The three-valued sign, with sign(nan) = nan (`torch.sign` says 0). Kernel: sign_step_kernel."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


def ascent(sharpness: Sharpness, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The perturbation of some tasks, differentiable in values and gradients.

    Args:
        sharpness: Radius and norm.
        values: All perturbed parameters, each `[t, ...]`.
        gradients: Theirs, of the same shapes.

    Returns:
        eps, likewise. A norm is over all tensors of one task.
    """
    if not values:
        return []
    if sharpness.norm == "linf":
        steps = [sharpness.rho * sign(gradient) for gradient in gradients]
        return [w.abs() * eps for w, eps in zip(values, steps, strict=True)] if sharpness.adaptive else steps
    scaled = list(gradients)
    if sharpness.adaptive:
        scaled = [w.abs() * g for w, g in zip(values, gradients, strict=True)]
    of_tensors = torch.stack([torch.linalg.vector_norm(s.reshape(s.shape[0], -1), dim=1) for s in scaled])
    factor = sharpness.rho / (torch.linalg.vector_norm(of_tensors, dim=0) + TINY)
    if sharpness.adaptive:
        scaled = [w.abs() * s for w, s in zip(values, scaled, strict=True)]
    return [factor.reshape(-1, *[1] * (s.ndim - 1)) * s for s in scaled]


@contextlib.contextmanager
def perturbed(parameters: Iterable[Tensor], sharpness: Sharpness | float) -> Iterator[None]:
    """The upper step of Sharp-MAML: parameters at the sharpest place near them, by the gradient in their `.grad`.

    On entry every parameter that has a `.grad` moves by eps (see this module), and all `.grad` become None. On exit the
    parameters are back, bit for bit, and `.grad` is what the calls in between left there; if an error ends the
    context, `.grad` is as before too.

    Args:
        parameters: The model's parameters; those without `.grad` stay where they are.
        sharpness: Radius and norm; a float is the radius of the published form. With radius 0 nothing moves.

    Raises:
        ValueError, TypeError: For an argument that does not fit.

    Example:
        >>> import torch, signmaml_ext
        >>> model, optimizer = (m := torch.nn.Linear(3, 2)), torch.optim.Adam(m.parameters())
        >>> x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     result = signmaml_ext.meta_step(model, x, y, x, y, inner_lr=0.01, inner_steps=5)
        ...     with signmaml_ext.perturbed(model.parameters(), 0.05):
        ...         _ = signmaml_ext.meta_step(model, x, y, x, y, inner_lr=0.01, inner_steps=5)
        ...     optimizer.step()
    """
    how = sharpness if isinstance(sharpness, Sharpness) else Sharpness(sharpness)
    everything = list(parameters)
    for parameter in everything:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters: expected tensors, found {type(parameter).__name__}")
    everything = list({id(parameter): parameter for parameter in everything}.values())  # tied ones move once
    grads = [parameter.grad for parameter in everything]
    before = [parameter.detach().clone() for parameter in everything]
    moving = [number for number, grad in enumerate(grads) if grad is not None]
    with torch.no_grad():
        offsets = ascent(how, [before[number][None] for number in moving], [g[None] for g in grads if g is not None])
    try:
        with torch.no_grad():
            for number, offset in zip(moving, offsets, strict=True):
                everything[number] += offset[0]
        for parameter in everything:
            parameter.grad = None
        yield
    except BaseException:
        for parameter, grad in zip(everything, grads, strict=True):
            parameter.grad = grad
        raise
    finally:
        with torch.no_grad():
            for number in moving:
                everything[number].copy_(before[number])
