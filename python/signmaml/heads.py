"""Heads for another number of classes: the last linear layer of a trained model, replaced for one task.

A meta-trained head has one row for each class of the training tasks. A task with another number of classes gets a head
of its own, whose rows start at the classes' prototypes as in ProtoMAML (Triantafillou et al. 2020, arXiv 1903.03096):
with f the head's inputs over the support set, m_c their mean over class c, and m the mean of all m_c,

    w_c = r (m_c - m) / |m_c - m|,    b_c = -w_c . m,    r = a quarter of the mean length of the trained rows

ProtoMAML's own rows are 2 m_c with the offset -|m_c|^2. They are often so long that a few inner steps no longer move
the decision; the fixed length lets them, and inner sign steps then gain as much as with the trained head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import signmaml_ext

from .evaluation import EvaluationArguments, Rates

HEADS = ("auto", "trained", "prototypes")
LENGTH = 0.25  # of a row, as a share of the trained rows' mean length


def check_head(head: str) -> str:
    """Raises ValueError unless `head` is one of `HEADS`."""
    if head not in HEADS:
        raise ValueError(f"head: expected one of {', '.join(map(repr, HEADS))}, found {head!r}")
    return head


class Head(NamedTuple):
    """The end of a model.

    Attributes:
        name: The linear layer whose output is the prediction; None if there is none.
        outputs: Numbers in a prediction.
    """

    name: str | None
    outputs: int


def head_of(model: nn.Module, x: Tensor) -> Head:
    """Finds the end of a model by running it.

    Args:
        model: The model; it is not run itself, only a copy that shares its tensors.
        x: Some inputs ``[n, ...]``.

    Raises:
        ValueError: Its prediction is not ``[n, outputs]``.
    """
    prediction, outputs = _run(model, x)
    if not isinstance(prediction, Tensor) or prediction.ndim != 2 or len(prediction) != len(x):
        found = list(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
        raise ValueError(f"learner: expected a model that predicts scores [{len(x)}, classes], found {found}")
    for name, output in reversed(outputs.items()):
        if output.shape != prediction.shape or not torch.equal(prediction, output):
            continue
        # What follows the layer may do nothing to these outputs, such as a ReLU, so try others, of both signs.
        generator = torch.Generator(device="cpu").manual_seed(0)
        other = torch.randn(output.shape, generator=generator, device="cpu").mul(100).to(output)
        if torch.equal(_run(model, x, {name: other})[0], other):
            return Head(name, prediction.shape[1])
    return Head(None, prediction.shape[1])


def _run(model: nn.Module, x: Tensor, instead: Mapping[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """What a copy of a model returns, and the outputs of its linear layers, some of them replaced."""
    twin = sharing_copy(model)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            hook = partial(_keep_output, seen, name, (instead or {}).get(name))
            twin.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        return twin(x), seen


def _keep_output(
    seen: dict[str, Tensor], name: str, instead: Tensor | None, _: nn.Module, __: Any, output: Tensor
) -> Tensor:
    seen[name] = (output if instead is None else instead).clone()  # what follows may change it in place
    return output if instead is None else instead.clone()


def with_head(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """A copy of a model that shares all tensors but those of the module `name`, which is `layer` there."""
    twin = sharing_copy(model)
    if not name:
        return layer
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, layer)
    return twin


def prototype_head(
    model: nn.Module, name: str, x: Tensor, y: Tensor, ways: int, arguments: EvaluationArguments
) -> nn.Linear:
    """The head of one task; see the module.

    Args:
        model: The trained model.
        name: The name of its head.
        x: ``[S, ...]``, the support set.
        y: ``[S]`` int64 in 0..ways-1, each of them at least once.
        ways: Classes of the task.
        arguments: How the model is run.
    """
    trained = model.get_submodule(name)
    assert isinstance(trained, nn.Linear)
    mode = "running" if arguments["batch_norm"] == "running" else "batch"  # as in the inner loop
    features = predictions(with_head(model, name, nn.Identity()), x, mode, arguments["precision"])
    features = features.float() if features.dtype == torch.bfloat16 else features
    weight = trained.weight
    of_class = (y == torch.arange(ways, device=y.device)[:, None]).to(features.dtype)
    means = of_class @ features / of_class.sum(1, keepdim=True)
    middle = means.mean(0)
    apart = means - middle
    length = LENGTH * weight.detach().norm(dim=1).mean()
    noise = 32 * torch.finfo(apart.dtype).eps * means.norm(dim=1).max()  # of classes whose means are equal
    rows = length * apart / apart.norm(dim=1, keepdim=True).clamp_min(noise + torch.finfo(apart.dtype).tiny)
    layer = _linear_like(trained, ways)
    with torch.no_grad():
        layer.weight.copy_(rows)
        if layer.bias is not None:
            layer.bias.copy_(-rows @ middle)
    layer.weight.requires_grad_(weight.requires_grad)
    return layer


def first_rows(trained: nn.Linear, ways: int) -> nn.Linear:
    """The trained head with its first `ways` rows.

    Raises:
        ValueError: It has fewer.
    """
    if ways > trained.out_features:
        raise ValueError(
            f"head: expected 'auto' or 'prototypes' for more than the {trained.out_features} classes of the trained "
            f"head, found 'trained' for {ways}"
        )
    layer = _linear_like(trained, ways)
    with torch.no_grad():
        layer.weight.copy_(trained.weight[:ways])
        if layer.bias is not None:
            layer.bias.copy_(trained.bias[:ways])
    return layer


def with_stored_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model, one linear layer of which has as many rows as the stored tensors say: a head of other ways."""
    for name, layer in model.named_modules():
        stored = tensors.get(f"{name}.weight" if name else "weight")
        if (
            isinstance(layer, nn.Linear)
            and stored is not None
            and stored.ndim == 2
            and len(stored) != len(layer.weight)
        ):
            return with_head(model, name, _linear_like(layer, len(stored)))
    return model


def _linear_like(layer: nn.Linear, rows: int) -> nn.Linear:
    weight = layer.weight
    return nn.Linear(weight.shape[1], rows, layer.bias is not None, weight.device, weight.dtype)


def rates_for_head(rates: Rates, model: nn.Module, name: str, rows: int | None = None) -> Rates:
    """Inner rates for a model with another head, where there is a rate for each row of the trained one.

    Args:
        rates: The inner rates.
        model: The trained model.
        name: The name of its head.
        rows: The other head is the first so many rows, with their rates; None: it has rows of its own, and their rate
            is the mean over the trained rows.
    """
    if not isinstance(rates, Mapping):
        return rates
    prefix = f"{name}." if name else ""
    found = dict(rates)
    for kind in ("weight", "bias"):
        rate, parameter = found.get(prefix + kind), getattr(model.get_submodule(name), kind)
        if not isinstance(rate, Tensor) or parameter is None:
            continue
        axis = rate.ndim - parameter.ndim  # the rows, or with a leading axis of steps the one behind it
        if axis >= 0 and rate.shape[axis] == len(parameter):
            found[prefix + kind] = rate.mean(axis, keepdim=True) if rows is None else rate.narrow(axis, 0, rows)
    return found


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares their parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def predictions(model: nn.Module, x: Tensor, batch_norm: str, precision: str) -> Tensor:
    """What a model returns for inputs ``[n, ...]``, by `signmaml_ext.evaluate` without steps, for its precision."""
    result = signmaml_ext.evaluate(
        model,
        x[None],
        None,
        x[None],
        None,
        inner_lr=0.0,
        inner_steps=0,
        loss=no_loss,
        batch_norm=batch_norm,
        backend="torch",
        precision=precision,
    )
    return result.logits[0]


def no_loss(prediction: Tensor) -> Tensor:
    """A loss for calls that take no step and want the predictions alone."""
    return prediction.float().mean()
