"""JAX: jit(vmap) of the whole task, inner loop included.

On a CPU, convolutions are nine shifted slices and one matrix product (im2col), because XLA's convolution is slower when
each task of a vmap has its own weights. On a GPU, XLA's convolution is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from workloads import Problem

from peers import Step, missing
from signmaml.models import MLP, Conv4

NAME = "JAX jit(vmap)"
SUMMARY = "the whole meta-step under jax.jit, tasks by jax.vmap"


def why_not(problem: Problem) -> str | None:
    if reason := missing("jax"):
        return reason
    import jax

    if problem.device.type == "cuda" and jax.default_backend() != "gpu":
        return "this JAX sees no GPU"
    if not isinstance(problem.model, (Conv4, MLP)):
        return "written for Conv4 and MLP"
    return None


def prepare(problem: Problem) -> Step:
    import jax

    jax.config.update("jax_enable_x64", True)  # needed by the float64 check; float32 data stay float32
    import jax.numpy as jnp

    on_gpu = problem.device.type == "cuda"

    def array(value: Tensor) -> Any:
        return jnp.asarray(value.detach().cpu().numpy())

    def images(value: Tensor) -> Tensor:
        return value.permute(0, 1, 3, 4, 2) if problem.convolutional else value

    support_x, support_y, query_x, query_y = problem.data
    data = tuple(array(value) for value in (images(support_x), support_y, images(query_x), query_y))
    theta = {name: array(_to_jax(p)) for name, p in problem.model.named_parameters()}
    dtype = theta["classifier.bias"].dtype
    model = problem.model

    def convolution(x: Any, weight: Any, stride: int) -> Any:
        if on_gpu:
            padding = [(1, 1), (1, 1)]
            return jax.lax.conv_general_dilated(
                x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        slices = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
        return jnp.concatenate(slices, -1) @ weight.reshape(-1, weight.shape[-1])

    def conv4(phi: Any, x: Any) -> Any:
        for i, block in enumerate(model.features):
            x = convolution(x, phi[f"features.{i}.conv.weight"], block.conv.stride[0]) + phi[f"features.{i}.conv.bias"]
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            scale = phi[f"features.{i}.normalize.weight"] * jax.lax.rsqrt(variance + dtype.type(block.normalize.eps))
            x = jax.nn.relu((x - mean) * scale + phi[f"features.{i}.normalize.bias"])
            if isinstance(block.pool, torch.nn.MaxPool2d):
                n, height, width, channels = x.shape
                x = x[:, : height // 2 * 2, : width // 2 * 2]
                x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return x @ phi["classifier.weight"].T + phi["classifier.bias"]

    def mlp(phi: Any, x: Any) -> Any:
        for i in range(len(model.features)):
            x = jax.nn.relu(x @ phi[f"features.{i}.weight"].T + phi[f"features.{i}.bias"])
        return x @ phi["classifier.weight"].T + phi["classifier.bias"]

    def error(phi: Any, x: Any, y: Any) -> Any:
        prediction = conv4(phi, x) if problem.convolutional else mlp(phi, x)
        if problem.loss == "mse":
            return ((prediction - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(prediction), y[:, None], 1).mean()

    gradient = jax.grad(error)
    signs, second_order = problem.method == "sign-maml", problem.method == "maml"
    rate = dtype.type(problem.inner_lr)

    def task(theta: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        def step(_: int, phi: Any) -> Any:
            grads = gradient(phi, support_x, support_y)
            return jax.tree.map(lambda value, g: value - rate * (jnp.sign(g) if signs else g), phi, grads)

        def adapted_error(theta: Any) -> Any:  # JAX can differentiate a loop of a fixed number of steps
            return error(jax.lax.fori_loop(0, problem.steps, step, theta), query_x, query_y)

        if second_order:
            return jax.grad(adapted_error)(theta)
        return gradient(jax.lax.fori_loop(0, problem.steps, step, theta), query_x, query_y)

    @jax.jit
    def meta_step(theta: Any, data: Any) -> Any:
        grads = jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(theta, *data)
        return jax.tree.map(lambda g: g.mean(0), grads)

    def run() -> Any:
        return jax.block_until_ready(meta_step(theta, data))

    def gradients(found: Any) -> dict[str, Tensor]:
        return {name: _from_jax(torch.from_numpy(np.array(value))).to(problem.device) for name, value in found.items()}

    return Step(run, gradients, note="XLA convolution" if on_gpu else "im2col" if problem.convolutional else "")


def _to_jax(value: Tensor) -> Tensor:
    """Convolution weights from [out, in, 3, 3] to [3, 3, in, out]."""
    return value.permute(2, 3, 1, 0).contiguous() if value.ndim == 4 else value


def _from_jax(value: Tensor) -> Tensor:
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value
