"""Turns the arguments of a call into a checked `Problem`, before any work starts.

Every refusal is a ValueError or a TypeError that names the argument, what was expected and what was found.
Nothing here reads a tensor's values on an accelerator: that would make the host wait for the device.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import inputs, losses
from .inner_rules import RULES, InnerRule, Plain
from .inputs import Inputs, Output
from .losses import Loss
from .problem import (
    BACKENDS,
    BATCH_NORM,
    BATCHINGS,
    LOSSES,
    METHODS,
    MOST_COUNTED_STEPS,
    NONFINITE,
    PRECISIONS,
    TASK_STATES,
    Problem,
    Rate,
    StepRates,
)
from .sharpness import Sharpness


class ForwardError(ValueError, RuntimeError):
    """The model's forward raised a RuntimeError, as torch does for inputs of a shape or dtype that do not fit."""


def refuse(argument: str, expected: str, found: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raises an error in the form that all messages about arguments have."""
    raise error(f"{argument}: expected {expected}, found {found}")


def describe(value: object) -> str:
    """A value in an error message: a tensor by shape, dtype and device, anything else by type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float, bool)) else type(value).__name__


def check_problem(
    model: nn.Module,
    support_x: Inputs | None,
    support_y: Tensor | None,
    query_x: Inputs | None,
    query_y: Tensor | None,
    *,
    inner_lr: Rate | Mapping[str, Rate],
    inner_steps: int,
    method: str,
    loss: Loss,
    adapt: str | Sequence[str] | None,
    backend: str,
    precision: str,
    nonfinite: str,
    batch_norm: str,
    seed: int | None,
    zero_dead_bias: bool,
    first_task: int = 0,
    graph: bool | None = None,
    task_state: str = "full",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    batching: str = "auto",
    compile: bool = False,
    output: Output | None = None,
    with_query: bool = True,
) -> Problem:
    """Checks all arguments of `meta_step`, `evaluate` or (without query) `adapt` and returns the problem."""
    if not isinstance(model, nn.Module):
        refuse("model", "a torch.nn.Module", describe(model), TypeError)
    _check_choice("method", method, METHODS)
    _check_choice("backend", backend, BACKENDS)
    _check_choice("nonfinite", nonfinite, NONFINITE)
    _check_choice("batch_norm", batch_norm, BATCH_NORM)
    _check_choice("batching", batching, BATCHINGS)
    if isinstance(loss, str):
        _check_choice("loss", loss, LOSSES)
    elif not callable(loss):
        refuse(
            "loss", f"one of {_listing(LOSSES)} or a callable (prediction, target) -> scalar", describe(loss), TypeError
        )
    elif isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        name = next(name for name, parameter in loss.named_parameters() if parameter.requires_grad)
        found = f"parameter {name!r} that requires grad in {type(loss).__name__}"
        refuse("loss", "a loss without trainable parameters (make them part of the model, or frozen)", found)
    if output is not None and not isinstance(output, (str, int)) and not callable(output):
        refuse("output", "None, a name, a number or a callable (returned) -> tensor", describe(output), TypeError)
    if not isinstance(zero_dead_bias, bool):
        refuse("zero_dead_bias", "True or False", describe(zero_dead_bias), TypeError)
    if graph is not None and not isinstance(graph, bool):
        refuse("graph", "True, False or None", describe(graph), TypeError)
    if not isinstance(compile, bool):
        refuse("compile", "True or False", describe(compile), TypeError)
    if compile and graph:
        refuse("compile", "False with graph=True", "True")

    _check_served(model)
    params = _check_parameters(model)
    device, dtype = _device_and_dtype(params)
    _check_precision(precision, device, dtype)
    _check_batch_norm(model, batch_norm)
    steps = check_count("inner_steps", inner_steps, at_least=0)
    if seed is not None:
        seed = check_count("seed", seed, at_least=0)
    first_task = check_count("first_task", first_task, at_least=0)
    adapted = _check_adapt(model, params, adapt)
    rates = _check_rates(inner_lr, {name: params[name] for name in adapted}, steps, device, dtype)
    _check_task_state(task_state, method, rates, params)
    rule = _check_inner_rule(inner_rule, method, task_state, compile, dtype)
    if not with_query and batch_norm == "support" and task_state == "int8":
        refuse("task_state", "'full' with batch_norm 'support' (counts hold no statistics)", repr(task_state))

    loss = losses.named(loss, [support_y, query_y])
    support_y = _check_set("support", support_x, support_y, loss, device, dtype)
    assert support_x is not None
    if with_query:
        query_y = _check_set("query", query_x, query_y, loss, device, dtype)
        assert query_x is not None
        if losses.takes_targets(query_y) != losses.takes_targets(support_y):
            kinds = ("a tensor", "None") if losses.takes_targets(support_y) else ("None", "a tensor")
            refuse("query_y", f"{kinds[0]} like support_y", kinds[1])
        _check_alike(support_x, query_x)

    return Problem(
        model=model,
        params=params,
        adapted=adapted,
        support_x=inputs.each(support_x, Tensor.detach),
        support_y=support_y.detach(),
        query_x=None if query_x is None else inputs.each(query_x, Tensor.detach),
        query_y=None if query_y is None else query_y.detach(),
        rates=rates,
        method=method,
        loss=loss,
        backend=backend,
        precision=precision,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        seed=seed,
        zero_dead_bias=zero_dead_bias,
        first_task=first_task,
        graph=graph,
        task_state=task_state,
        sharpness=_check_sharpness(sharpness),
        inner_rule=rule,
        batching=batching,
        output=output,
        compile=compile,
    )


def _check_sharpness(sharpness: Sharpness | float | None) -> Sharpness | None:
    """None where nothing is perturbed."""
    if sharpness is None or isinstance(sharpness, Sharpness):
        found = sharpness
    elif isinstance(sharpness, bool) or not isinstance(sharpness, (int, float)):
        refuse("sharpness", "a radius >= 0, a Sharpness or None", describe(sharpness), TypeError)
    elif not (math.isfinite(sharpness) and sharpness >= 0):
        refuse("sharpness", "a finite radius >= 0, a Sharpness or None", repr(sharpness))
    else:
        found = Sharpness(sharpness)
    return found if found is not None and found.rho > 0 else None


def _check_inner_rule(
    rule: InnerRule | None, method: str, task_state: str, compile: bool, dtype: torch.dtype
) -> InnerRule | None:
    """None where steps are plain and nothing decays."""
    if rule is None:
        return None
    if not isinstance(rule, RULES):
        names = ", ".join(kind.__name__ for kind in RULES)
        found = f"the class {rule.__name__} itself" if isinstance(rule, type) else describe(rule)
        refuse("inner_rule", f"None or a rule of signmaml_ext ({names}), such as Plain()", found, TypeError)
    if method not in rule.methods:
        fitting = [kind.__name__ for kind in RULES if method in kind.methods]
        refuse("inner_rule", f"one of {', '.join(fitting)} for method {method!r}", rule)
    if isinstance(rule, Plain) and rule.weight_decay == 0:
        return None
    for name, value in vars(rule).items():
        if value and not torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max:
            refuse("inner_rule", f"{name} within the range of {dtype}, like the parameters", rule)
    if task_state == "int8" and rule.weight_decay > 0:
        refuse("task_state", f"'full' with {rule} (counts hold no weight decay)", repr(task_state))
    if compile:
        refuse("compile", f"False with {rule} (rules run in plain PyTorch, which compiles nothing)", "True")
    return rule


def check_compiled_order(problem: Problem) -> None:
    """Refuses a meta-step that would differentiate compiled passes twice."""
    if problem.compile and problem.method == "maml":
        refuse("compile", "False with method 'maml' (torch.compile has no second derivative)", "True")


def check_count(argument: str, value: int, *, at_least: int) -> int:
    """An integer no smaller than `at_least`; bool and float are refused."""
    expected = f"an integer >= {at_least}"
    if isinstance(value, bool):
        refuse(argument, expected, describe(value), TypeError)
    try:
        count = operator.index(value)
    except TypeError:
        refuse(argument, expected, describe(value), TypeError)
    if count < at_least:
        refuse(argument, expected, count)
    return count


def check_labels(problem: Problem, classes: int) -> None:
    """Refuses labels outside 0..classes-1, naming set and task.

    Only on the CPU: elsewhere looking at a value would synchronise, and the loss turns NaN instead (see
    `losses.cross_entropy`), which flags the task.
    """
    for argument, labels in (("support_y", problem.support_y), ("query_y", problem.query_y)):
        if labels is None or labels.device.type != "cpu":
            continue
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            task, example = (int(i) for i in wrong.nonzero()[0])
            found = f"{int(labels[task, example])} in task {task}, example {example}"
            refuse(argument, f"labels in 0..{classes - 1} (the model predicts {classes} classes)", found)


def check_prediction(prediction: object, target: Tensor, loss: Loss) -> None:
    """Checks the model's output for one task against what the loss needs; a callable may take anything."""
    if not isinstance(prediction, Tensor):
        if callable(loss):
            return
        expected = "a forward that returns one tensor, or `output=` to say which of several is the prediction"
        refuse("model", expected, describe(prediction), TypeError)
    shape, examples = list(prediction.shape), target.shape[0]
    if loss == "cross_entropy" and (prediction.ndim != 2 or shape[0] != examples):
        refuse("model", f"a prediction [{examples}, classes] for loss 'cross_entropy'", f"shape {shape}")
    if loss == "mse" and prediction.shape != target.shape:
        # Without this, [S] against [S, 1] would silently broadcast to [S, S].
        refuse("model", f"a prediction of the targets' shape {list(target.shape)} for loss 'mse'", f"shape {shape}")


def check_loss(value: object) -> None:
    """Checks what a caller's loss function returned for one task."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else describe(value)
        refuse("loss", "a callable that returns a scalar tensor (mean over the examples)", found)
    if value.is_complex():
        refuse("loss", "a callable that returns a real scalar (the part that is meant, such as .real)", describe(value))


def _check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        refuse(argument, f"one of {_listing(choices)}", describe(value), TypeError)
    if value not in choices:
        refuse(argument, f"one of {_listing(choices)}", repr(value))


def _listing(words: Sequence[str]) -> str:
    return ", ".join(repr(word) for word in words)


# Refused wrappers by the name of their class, and why.
_WRAPPERS = {
    "DistributedDataParallel": "which averages gradients in a backward pass of its own that meta_step never runs",
    "DataParallel": "which spreads one batch over devices; tasks are spread over processes instead",
    "FullyShardedDataParallel": "which holds only a part of every parameter",
    "FSDPModule": "which holds only a part of every parameter",
}


def _check_served(model: nn.Module) -> None:
    """Refuses modules whose parameters or gradients are not their own."""
    for name, module in model.named_modules():
        where = f"{type(module).__name__} (module {name!r})" if name else type(module).__name__
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                refuse(
                    "model",
                    "the module itself, such as wrapper.module, with each process's tasks numbered by `first_task` and "
                    "its gradients weighed by `live_tasks` before an all_reduce (signmaml.pieces.MetaStep and "
                    "signmaml.distributed.join do that)",
                    f"{where}, {_WRAPPERS[kind.__name__]}",
                )
        if isinstance(module, torch.jit.ScriptModule):
            refuse("model", "modules whose parameters can be replaced", f"{where}, whose parameters lie in TorchScript")
        if isinstance(module, nn.SyncBatchNorm):
            refuse(
                "model", "statistics of one task's set (nn.BatchNorm)", f"{where}, which mixes those of all processes"
            )


def _check_parameters(model: nn.Module) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            refuse("model", "initialised parameters (run one forward pass first)", f"lazy parameter {name!r}")
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            found = f"{parameter.dtype} in parameter {name!r}"
            refuse("model", "parameters in torch.float32 or torch.float64", found, TypeError)
        params[name] = parameter
    if not params:
        refuse("model", "at least one parameter that requires grad", "none")
    return params


def _device_and_dtype(params: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    first_name, first = next(iter(params.items()))
    for name, parameter in params.items():
        if parameter.device != first.device:
            found = f"{first_name!r} on {first.device} and {name!r} on {parameter.device}"
            refuse("model", "all parameters on one device", found)
    return first.device, first.dtype


def _check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    _check_choice("precision", precision, PRECISIONS)
    if precision != "fp32" and dtype == torch.float64:
        refuse("precision", "'fp32' (no reduced precision) for a float64 model", repr(precision))
    if precision == "tf32" and device.type != "cuda":
        refuse("precision", f"'fp32' or 'bf16' on {device.type} (tf32 is a mode of CUDA devices)", repr(precision))


# Models whose running statistics were checked already.
_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_batch_norm(model: nn.Module, batch_norm: str) -> None:
    kind = nn.modules.batchnorm._BatchNorm
    for name, module in model.named_modules() if batch_norm == "support" else ():
        if isinstance(module, kind) and (type(module).forward is not kind.forward or "forward" in vars(module)):
            found = f"{type(module).__name__} (module {name!r}) with another"
            refuse("batch_norm", "'batch', or for 'support' BatchNorms with torch's own forward", found)
    if batch_norm != "running":
        return
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, module in norms.items():
        if module.running_mean is None:
            refuse("batch_norm", "'batch' for a model without running statistics", f"'running' with none in {name!r}")
    if model in _looked_at or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    _looked_at.add(model)  # once: on a CUDA device the check makes the host wait
    for name, module in norms.items():
        if module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0:
            warnings.warn(
                f"batch_norm='running': the running statistics of {name!r} were never written, so it normalises by "
                "mean 0 and variance 1 (meta_step writes none). batch_norm='support' normalises queries by the "
                "statistics of their task's support set; or write them first, by forward passes in training mode",
                stacklevel=4,
            )
            return


def _check_adapt(
    model: nn.Module, params: Mapping[str, Tensor], patterns: str | Sequence[str] | None
) -> tuple[str, ...]:
    if patterns is None:
        return tuple(params)
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        refuse("adapt", "None or a list of name patterns such as ['classifier.*']", describe(patterns), TypeError)
    if not patterns:
        refuse("adapt", "at least one name pattern (inner_steps=0 adapts nothing)", "an empty list")
    # A tied parameter has several names; a pattern may use any of them.
    first_name = {id(parameter): name for name, parameter in params.items()}
    names_of: dict[str, list[str]] = {name: [] for name in params}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first_name:
            names_of[first_name[id(parameter)]].append(name)
    chosen = set()
    for pattern in patterns:
        matches = {first for first, names in names_of.items() if any(fnmatchcase(name, pattern) for name in names)}
        if not matches:  # the name of a module stands for all its parameters
            matches = {first for first, names in names_of.items() if any(n.startswith(f"{pattern}.") for n in names)}
        if not matches:
            refuse("adapt", f"patterns that match trainable parameters ({_shortened(params)})", repr(pattern))
        chosen |= matches
    return tuple(name for name in params if name in chosen)


def _shortened(names: Mapping[str, object], most: int = 8) -> str:
    listed = ", ".join(list(names)[:most])
    return listed if len(names) <= most else f"{listed}, ... {len(names)} in all"


def _check_rates(
    inner_lr: Rate | Mapping[str, Rate],
    adapted: Mapping[str, Tensor],
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> StepRates:
    if not isinstance(inner_lr, Mapping):
        _check_rate("inner_lr", inner_lr, device, dtype)
        if isinstance(inner_lr, Tensor) and tuple(inner_lr.shape) not in ((), (1,), (steps,)):
            expected = f"a tensor of shape [] or [{steps}] (one rate a step)"
            refuse("inner_lr", expected, f"shape {list(inner_lr.shape)}")
        return StepRates({"": inner_lr if isinstance(inner_lr, Tensor) else float(inner_lr)}, steps)
    missing = [name for name in adapted if name not in inner_lr]
    if missing:
        refuse("inner_lr", "a rate for every adapted parameter", f"none for {_listing(missing)}")
    unknown = [str(name) for name in inner_lr if name not in adapted]
    if unknown:
        refuse("inner_lr", f"names of adapted parameters ({_shortened(adapted)})", _listing(unknown))
    for name, parameter in adapted.items():
        _check_rate(f"inner_lr[{name!r}]", inner_lr[name], device, dtype)
        _check_rate_shape(name, inner_lr[name], parameter, steps)
    rates = {name: inner_lr[name] for name in adapted}
    return StepRates({n: rate if isinstance(rate, Tensor) else float(rate) for n, rate in rates.items()}, steps)


def _is_number(value: object) -> TypeGuard[float]:
    """An int, a float, or a NumPy scalar."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_rate(argument: str, rate: object, device: torch.device, dtype: torch.dtype) -> None:
    expected = "a finite float >= 0 or a floating-point tensor"
    if isinstance(rate, Tensor):
        if not rate.is_floating_point():
            refuse(argument, expected, describe(rate), TypeError)
        if rate.device != device:
            refuse(argument, f"a tensor on {device} like the model", f"one on {rate.device}")
    elif not _is_number(rate):
        refuse(argument, expected, describe(rate), TypeError)
    elif not 0 <= rate <= sys.float_info.max:  # an int may be beyond any float; nan compares as false
        refuse(argument, expected, rate if isinstance(rate, float) else describe(rate)[:40])
    elif rate > torch.finfo(dtype).max:  # it would be infinite in the parameters' dtype
        refuse(argument, f"at most {torch.finfo(dtype).max!r}, the largest {dtype} like the parameters", float(rate))


def _check_rate_shape(name: str, rate: Rate, parameter: Tensor, steps: int) -> None:
    if not isinstance(rate, Tensor):
        return
    shape, target = tuple(rate.shape), tuple(parameter.shape)
    if rate.ndim == parameter.ndim + 1 and shape[0] == steps:
        shape = shape[1:]
    try:
        fits = torch.broadcast_shapes(shape, target) == target
    except RuntimeError:
        fits = False
    if not fits:
        expected = f"a shape that broadcasts to {list(target)}, or [{steps}, ...] with one axis more (a rate a step)"
        refuse(f"inner_lr[{name!r}]", expected, f"shape {list(rate.shape)}")


def _check_task_state(task_state: str, method: str, rates: StepRates, params: Mapping[str, Tensor]) -> None:
    """Step counts determine a task's parameters only if all steps have one size and an int8 can count them."""
    _check_choice("task_state", task_state, TASK_STATES)
    if task_state == "full":
        return
    if method != "sign-maml":
        refuse("task_state", f"'full' for method {method!r} (int8 counts sign steps)", repr(task_state))
    if rates.steps > MOST_COUNTED_STEPS:
        refuse("inner_steps", f"at most {MOST_COUNTED_STEPS} with task_state 'int8'", rates.steps)
    for key in rates.values:
        if rates.steps > 1 and rates.varies_by_step(key, params[key].ndim if key else 0):
            where = f"inner_lr[{key!r}]" if key else "inner_lr"
            refuse(where, "one rate for all steps with task_state 'int8'", "a rate a step")


def _check_set(
    which: Literal["support", "query"], x: object, y: object, loss: Loss, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Checks one set of examples, `[T, S, ...]` inputs with their targets, and returns the targets."""
    letter = "S" if which == "support" else "Q"
    named = _named_inputs(f"{which}_x", x)
    targets = {f"{which}_y": y} if y is not None or isinstance(loss, str) else {}
    for argument, value in (*named.items(), *targets.items()):
        if not isinstance(value, Tensor):
            expected = f"a tensor of targets for loss {loss!r}" if argument in targets and y is None else "a tensor"
            refuse(argument, expected, describe(value), TypeError)
        if value.ndim < 2:
            refuse(argument, f"a shape [T, {letter}, ...]", f"shape {list(value.shape)}")
        if 0 in value.shape:
            refuse(argument, "at least one task and one example a task", f"shape {list(value.shape)}")
        if value.device != device:
            refuse(argument, f"a tensor on {device} like the model", f"one on {value.device}")
        if value.is_complex():
            refuse(argument, "real values", describe(value), TypeError)
    axes = list(next(iter(named.values())).shape[:2])
    for argument, value in named.items():
        if list(value.shape[:2]) != axes:
            refuse(argument, f"[T, {letter}] = {axes} as in {next(iter(named))}", f"{list(value.shape[:2])}")
        if value.is_floating_point() and value.dtype != dtype:
            refuse(argument, f"{dtype} like the model's parameters", value.dtype, TypeError)
    if y is None:
        return losses.no_targets(axes[0], axes[1], dtype, device)
    assert isinstance(y, Tensor)
    if list(y.shape[:2]) != axes:
        refuse(f"{which}_y", f"[T, {letter}] = {axes} as in {which}_x", f"{list(y.shape[:2])}")
    if loss == "cross_entropy":
        if y.dtype != torch.int64:
            refuse(f"{which}_y", "torch.int64 labels for loss 'cross_entropy'", y.dtype, TypeError)
        if y.ndim != 2:
            refuse(f"{which}_y", f"labels [T, {letter}] for loss 'cross_entropy'", f"shape {list(y.shape)}")
    if loss == "mse" and y.dtype != dtype:
        refuse(f"{which}_y", f"{dtype} targets like the model's parameters for loss 'mse'", y.dtype, TypeError)
    return y


def _named_inputs(argument: str, x: object) -> dict[str, Any]:
    """The tensors of some inputs, under the names that messages use for them."""
    if isinstance(x, list):
        refuse(
            argument,
            "a tensor [T, ...] of tasks that are alike, or a tuple or dict of such for a model of several inputs "
            "(tasks of different sizes: one call a task with `first_task`, then divide .grad by their number)",
            f"a list of {len(x)}",
            TypeError,
        )
    if not isinstance(x, (tuple, dict)):
        return {argument: x}
    if not x or (isinstance(x, dict) and not all(isinstance(name, str) for name in x)):
        refuse(argument, "at least one tensor, in a dict under the name of the forward's argument", describe(x))
    pairs = x.items() if isinstance(x, dict) else enumerate(x)
    return {f"{argument}[{name!r}]": value for name, value in pairs}


def _check_alike(support_x: Inputs, query_x: Inputs) -> None:
    """Checks that both sets have as many tasks, and examples of the same shape."""
    support, query = _named_inputs("support_x", support_x), _named_inputs("query_x", query_x)
    if {name.removeprefix("query_x") for name in query} != {name.removeprefix("support_x") for name in support}:
        refuse("query_x", f"inputs as in support_x ({', '.join(support)})", ", ".join(query))
    for of_support, s in support.items():
        argument = "query_x" + of_support.removeprefix("support_x")
        q = query[argument]
        if q.shape[0] != s.shape[0]:
            refuse(argument, f"{s.shape[0]} tasks as in {of_support}", f"{q.shape[0]} tasks")
        if q.shape[2:] != s.shape[2:]:
            expected = f"examples of shape {list(s.shape[2:])} as in {of_support}"
            refuse(argument, expected, f"shape {list(q.shape[2:])}")
