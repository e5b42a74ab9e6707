"""A checked call: all that a backend computes from. checks.py makes it from the arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import losses
from .inner_rules import InnerRule
from .inputs import Inputs, Output
from .losses import Loss
from .sharpness import Sharpness

# Allowed values of the arguments of these names.
METHODS = ("sign-maml", "fo-maml", "maml")
LOSSES = losses.NAMES
PRECISIONS = ("fp32", "tf32", "bf16")
NONFINITE = ("propagate", "raise", "skip")
BATCH_NORM = ("batch", "support", "running")
TASK_STATES = ("full", "int8")
BATCHINGS = ("auto", "together", "one-by-one")
MOST_COUNTED_STEPS = 127  # the most that an int8 counts
BACKENDS = ("auto", "torch", "cpu", "cuda")

Rate = float | Tensor


@dataclass(frozen=True)
class StepRates:
    """The inner learning rate ("alpha") by step and parameter.

    Attributes:
        values: One rate under the key "" for all parameters, or a rate by parameter name. A tensor has shape
            `[]` or `[1]` (one rate), `[steps]` (one per step; only under ""), or, under a name, any shape that
            broadcasts to the parameter, with a leading axis of length `steps` when it has one axis more.
        steps: Number of inner steps.
    """

    values: Mapping[str, Rate]
    steps: int

    def learnable(self) -> dict[str, Tensor]:
        """The rates that require a gradient, by their key in `values`."""
        return {k: v for k, v in self.values.items() if isinstance(v, Tensor) and v.requires_grad}

    def tensors(self) -> bool:
        """Whether any rate is a tensor; if none is, `number` suffices."""
        return any(isinstance(value, Tensor) for value in self.values.values())

    def number(self, name: str) -> float:
        """The rate of one parameter, where no rate is a tensor."""
        value = self.values[""] if "" in self.values else self.values[name]
        return float(value)

    def varies_by_step(self, key: str, parameter_ndim: int) -> bool:
        """Whether the first axis of the rate under `key` counts inner steps."""
        value = self.values[key]
        if not isinstance(value, Tensor):
            return False
        if key == "":
            return value.ndim == 1 and value.numel() != 1
        return value.ndim == parameter_ndim + 1

    def vary_by_step(self, params: Mapping[str, Tensor]) -> bool:
        """Whether any rate differs between steps.

        Args:
            params: The parameters `[*shape]` that `values` names.
        """
        return any(self.varies_by_step(key, params[key].ndim if key else 0) for key in self.values)

    def at_all_steps(self, name: str, parameter_ndim: int, leaves: Mapping[str, Tensor]) -> Rate:
        """The rate of one parameter at every step.

        Args:
            name: Name of the parameter.
            parameter_ndim: Number of its axes.
            leaves: Learnable rates by key, to which the result has a graph; all others are taken from `values`.

        Returns:
            A float, or a tensor `[steps or 1, ...]` that broadcasts to `[steps, *parameter.shape]`.
        """
        key = "" if "" in self.values else name
        value = self.values[key]
        if not isinstance(value, Tensor):
            return value
        value = leaves[key] if key in leaves else value.detach()
        if key == "":
            return value.reshape(-1, *[1] * parameter_ndim)
        return value[(None,) * (parameter_ndim + 1 - value.ndim)]

    def at(self, step: int, name: str, parameter: Tensor, leaves: Mapping[str, Tensor]) -> Rate:
        """The rate of one parameter at one step.

        Args:
            step: Inner step, 0-based.
            name: Name of the parameter.
            parameter: `[t, *shape]`, the parameter of t tasks.
            leaves: Learnable rates by key, each with a leading task axis `[t, *rate_shape]`, so that every task
                has its own gradient; all other rates are taken from `values`.

        Returns:
            A float, or a tensor that broadcasts to `parameter`, in its dtype.
        """
        key = "" if "" in self.values else name
        value = leaves[key] if key in leaves else self.values[key]
        if not isinstance(value, Tensor):
            return value
        if key not in leaves:
            value = value.detach()[None]
        if self.varies_by_step(key, parameter.ndim - 1):
            value = value[:, step]
        if key == "":
            value = value.reshape(-1)
        missing_axes = [1] * (parameter.ndim - value.ndim)
        return value.reshape(value.shape[0], *missing_axes, *value.shape[1:]).to(parameter.dtype)

    def sum_to_rate(self, key: str, step: int, products: Mapping[str, Tensor], totals: dict[str, Tensor]) -> None:
        """Adds -sum <gradient, direction> of one step to the gradient of the rate under `key`.

        Args:
            key: One of `learnable()`.
            step: Inner step.
            products: Gradient times direction by parameter, `[t, *shape]`, for parameters that have this rate.
            totals: By key, `[t, *rate_shape]`; added to in place.
        """
        rate = self.values[key]
        assert isinstance(rate, Tensor)
        for name, product in products.items():
            count = product.shape[0]
            if key not in totals:
                totals[key] = product.new_zeros(count, *rate.shape)
            into = totals[key]
            if self.varies_by_step(key, product.ndim - 1):
                into = into[:, step]
            if key == "":
                into.view(count).sub_(product.reshape(count, -1).sum(1))
            else:
                missing_axes = [1] * (product.ndim - into.ndim)
                shape = (count, *missing_axes, *into.shape[1:])
                into.sub_(product.sum_to_size(shape).reshape(into.shape))
            assert key in ("", name)


@dataclass(frozen=True)
class Problem:
    """One checked call: all that a backend computes from.

    Attributes:
        model: The module; its parameters are the start of every task's inner loop.
        params: Every parameter that requires grad, by its first name; tied parameters once.
        adapted: Names of the parameters that the inner loop moves, a subset of `params`.
        support_x: `[T, S, ...]`, or several such tensors.
        support_y: `[T, S, ...]`; `[T, S, 0]` if the loss takes the predictions alone.
        query_x: `[T, Q, ...]`, or several; None where only the inner loop is asked for.
        query_y: `[T, Q, ...]`; None likewise.
        rates: Inner learning rates.
        method: One of `METHODS`.
        loss: One of `LOSSES` or a callable `(prediction, target) -> scalar`, or `(prediction) -> scalar`.
        backend: One of `BACKENDS`.
        precision: One of `PRECISIONS`.
        nonfinite: One of `NONFINITE`.
        batch_norm: One of `BATCH_NORM`.
        seed: Key of the dropout masks; None takes one from torch's generator if the model needs it.
        zero_dead_bias: Whether a bias directly before a BatchNorm or InstanceNorm has gradient exactly 0.
        first_task: Number of the first task in a meta-batch that is computed in pieces; keys the dropout masks.
        graph: Whether the call replays a CUDA graph: True, False, or None where its kernels are made for it.
        keyed: Whether forward passes that run task by task draw from their own streams; False inside a graph.
        task_state: One of `TASK_STATES`.
        sharpness: How gradients of inner steps are perturbed; None: not at all.
        inner_rule: What steps make of the gradients; None: plain steps without weight decay.
        batching: One of `BATCHINGS`.
        output: Which part of the model's output is the prediction; None: all of it.
        compile: Whether torch.compile compiles the passes that torch computes.
    """

    model: nn.Module
    params: dict[str, Tensor]
    adapted: tuple[str, ...]
    support_x: Inputs
    support_y: Tensor
    query_x: Inputs | None
    query_y: Tensor | None
    rates: StepRates
    method: str
    loss: Loss
    backend: str
    precision: str
    nonfinite: str
    batch_norm: str
    seed: int | None
    zero_dead_bias: bool
    first_task: int = 0
    graph: bool | None = None
    keyed: bool = True
    task_state: str = "full"
    sharpness: Sharpness | None = None
    inner_rule: InnerRule | None = None
    batching: str = "auto"
    output: Output | None = None
    compile: bool = False

    @property
    def tasks(self) -> int:
        """T."""
        return self.support_y.shape[0]

    @property
    def steps(self) -> int:
        """K."""
        return self.rates.steps

    @property
    def device(self) -> torch.device:
        """The device of the data and the parameters."""
        return self.support_y.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of losses and, unless a model mixes dtypes, of all parameters."""
        return next(iter(self.params.values())).dtype

    def replace(self, **changes: Any) -> Problem:
        """A copy with some attributes changed."""
        return replace(self, **changes)
