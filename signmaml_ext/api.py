"""The public calls: `meta_step`, `adapt`, `evaluate`, `explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import conv, dispatch, graphs, layers, mlp, modes, threads
from .checks import check_compiled_order, check_problem
from .dispatch import Explanation
from .inner_rules import InnerRule
from .inputs import Inputs, Output
from .losses import Loss
from .problem import Problem, Rate
from .results import Adaptation, EvaluateResult, MetaGradients, MetaStepResult, raise_if_asked
from .sharpness import Sharpness


def meta_step(
    model: nn.Module,
    support_x: Inputs,
    support_y: Tensor | None,
    query_x: Inputs,
    query_y: Tensor | None,
    *,
    inner_lr: Rate | Mapping[str, Rate],
    inner_steps: int,
    method: str = "sign-maml",
    loss: Loss = "cross_entropy",
    adapt: str | Sequence[str] | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    nonfinite: str = "propagate",
    batch_norm: str = "batch",
    seed: int | None = None,
    zero_dead_bias: bool = True,
    first_task: int = 0,
    graph: bool | None = None,
    task_state: str = "full",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    batching: str = "auto",
    compile: bool = False,
    output: Output | None = None,
) -> MetaStepResult:
    """One meta-batch: adapts to T tasks and adds their mean meta-gradient to `.grad`, like `backward()`.

    For every task i, phi_i starts at the model's parameters theta and takes K = `inner_steps` steps on the mean
    support loss; the meta-gradient is d mean_i l(phi_i; query_i) / d theta. With ``method="sign-maml"`` (Fan, Ram,
    Liu 2021, arXiv 2109.07497) a step is phi <- phi - alpha * sign(g); since d sign / dx = 0, the query gradient at
    phi_K is the exact meta-gradient at first-order cost. ``"fo-maml"`` steps along g and drops the second order,
    ``"maml"`` (Finn et al. 2017) differentiates through the steps.

    Nothing else changes: no parameter, no buffer, no module mode, not even during the call. Every forward pass runs on
    a private copy of the module objects with tensors of its own, so attributes that a forward sets
    (`self.features = h`) are gone afterwards. BatchNorm buffers are neither read nor written unless
    ``batch_norm="running"``. Dropout and everything else follow `model.training`.

    Hooks: forward and backward hooks of modules run in every pass, on the private copies; a model with such hooks is
    served task by task, so that they see one task's tensors. Hooks of parameters (`Tensor.register_hook`,
    `register_post_accumulate_grad_hook`) run once, on the meta-gradient, as after `backward()`; they see no inner step.

    Threads: any number of threads may call on one model at the same time, with the results of sequential calls. Only
    one call at a time adds to `.grad`.

    Args:
        model: Any module whose forward takes tensors `[S, ...]`. Parameters that require grad are float32 or float64,
            on one device. Others are never moved and get no gradient. Tied parameters count once. Not a wrapper such as
            DistributedDataParallel: pass the module in it.
        support_x: `[T, S, ...]`, the model's inputs to adapt on, on the model's device; if floating point, in its
            dtype. For a model with several inputs, a tuple of such tensors, or a dict by the names of its forward's
            arguments. Tasks of different sizes cannot be stacked: make one call per task, numbered by `first_task`, and
            divide `.grad` by the number of tasks.
        support_y: `[T, S]` int64 labels for "cross_entropy"; `[T, S, ...]` of the predictions' shape and dtype for
            "mse"; `[T, S, ...]` of any real dtype for a callable, or None: it then takes the prediction alone.
        query_x: `[T, Q, ...]`, like `support_x`.
        query_y: `[T, Q]` or `[T, Q, ...]`, like `support_y`; None where that is None.
        inner_lr: Inner learning rate ("alpha"): a float >= 0, or a tensor `[]` (one rate) or `[K]` (one rate
            per step), or a mapping from the name of every adapted parameter to a float or a tensor that broadcasts to
            the parameter, optionally with an extra leading axis `[K, ...]` (one rate per step). A tensor that requires
            grad receives its exact gradient in `.grad` (for fo-maml: exact for the steps taken as constants).
        inner_steps: K >= 0. With 0 this is joint training on the query sets.
        method: "sign-maml", "fo-maml" or "maml".
        loss: "cross_entropy" (mean over examples), "mse" (mean over all elements), or a callable
            `(prediction [S, ...], target [S, ...]) -> scalar tensor`, called once for each task; without targets
            `(prediction [S, ...]) -> scalar tensor`. `F.cross_entropy`, `nn.CrossEntropyLoss()`, `F.mse_loss` and
            `nn.MSELoss()` with default settings count as the named ones, which the native kernels serve. (On CUDA,
            where labels are not checked, a label of -100 then makes the loss of its task NaN instead of being ignored.)
            A sign step ignores the scale of the loss.
        adapt: Name patterns (`fnmatch`) of the parameters that the inner loop may move, such as
            ``["classifier.*"]`` (ANIL); the name of a module stands for all its parameters. All others still get the
            meta-gradient. None: all that require grad.
        backend: "auto", or one of "cuda", "cpu" (native: whole meta-steps of Conv-N networks and multilayer
            perceptrons, steps of other modules) and "torch" (pure PyTorch, serves everything). `explain` says which one
            "auto" takes and why.
        precision: "fp32" (strict, also where torch would allow TF32), "tf32" (CUDA) or "bf16" (autocast). The sign
            is always taken on the parameters' dtype.
        nonfinite: What happens when a task meets a NaN or an Inf. "propagate": NaN in, NaN out. "skip": the task is
            left out of the mean. "raise": FloatingPointError, which makes the host wait for the device. In every case
            `result.nonfinite` flags the task.
        batch_norm: "batch": BatchNorm normalises each set by its own statistics, in training and evaluation, task by
            task (transductive: the prediction for a query depends on the other queries). "support": it normalises
            queries by the statistics of their task's support set at the adapted parameters (inductive), with gradients
            through them. "running": it normalises by its running statistics, which are not updated; there is one
            warning if they were never written.
        seed: Integer >= 0 that, with task and step, keys the dropout masks; vary it from call to call. None: if
            the model draws random numbers, one is taken from torch's CPU generator, which advances by one draw.
        zero_dead_bias: Whether a bias in front of a BatchNorm on batch statistics, or of an InstanceNorm, has its true
            gradient, 0. False uses autograd's rounding noise, whose sign moves the bias at random, as the official
            code does.
        first_task: For a meta-batch computed in pieces (over processes, or to save memory): the number of this piece's
            first task in it, so that dropout masks are those of the whole. Weight the pieces' gradients by
            `live_tasks`.
        graph: True: the first call is recorded as one CUDA graph, and later calls replay it with one launch and a copy
            of their inputs; `signmaml_ext.graphs` has the rules on when it is recorded again. False: never. None: where
            the Conv-N kernels serve a call on a CUDA device. Inside a CUDA graph capture of the caller's own, the call
            always becomes part of that graph; make it once before the capture.
        task_state: "full": a task's parameters are kept in their own dtype. "int8": they are kept as counts n of sign
            steps, phi = theta - alpha * n, so that a task takes one byte per parameter (worth it for `adapt`, whose
            result holds all tasks); parameters and gradients are in full precision for few tasks at a time. Only for
            "sign-maml", at most 127 steps and rates that are the same in every step, on the backends "cpu", "cuda"
            (there on flat buffers) and "torch". phi is rounded twice for any K, instead of once per step, so
            trajectories agree up to rounding (float64: to 1e-12 as long as no gradient is that close to 0). A NaN
            gradient gives count -128 and stays NaN, as in full precision.
        sharpness: Takes every inner gradient at phi + eps, the sharpest place near phi by the gradient at phi (the
            lower step of Sharp-MAML, Abbas et al. 2022), which costs a second pass a step. A float is the radius rho of
            the published form, eps = rho * g / ||g|| over the adapted parameters of a task; a `Sharpness` has other
            norms. `support_loss` is still the loss at phi, and both passes of a step use the same dropout masks.
            "sign-maml" stays exact; "maml" differentiates through eps. None or radius 0: plain steps. The upper step is
            `signmaml_ext.perturbed`.
        inner_rule: What a step makes of its gradient and the task's earlier ones, and by how much it shrinks what was
            there: `Plain` (weight decay alone), for "sign-maml" `Signum` or `Lion`, for "fo-maml" and "maml" `Momentum`
            or `Adam`. Every task and every call starts from an empty memory. The rate scales the step and the decay, so
            phi <- (1 - alpha * lambda) * phi - alpha * step. "sign-maml" stays exact, with the factors
            1 - alpha * lambda in its meta-gradient and in those of its rates; "fo-maml" takes gradients for constants
            and keeps those factors; "maml" differentiates through all of it. A parameter that the loss does not reach
            stays as it is. With `sharpness` the rule gets the gradient at phi + eps. Rules run in plain PyTorch, so
            ``compile=True`` and the native backends are refused; ``task_state="int8"`` serves rules without decay.
            None: plain steps.
        output: Which part of what the model returns is the prediction: a key or an attribute ("logits"), a number, or a
            callable `(returned) -> tensor`. None: all of it, which must be one tensor for a named loss.
        batching: How tasks run that no whole-meta-step kernel serves. "together": under torch.vmap; a module that vmap
            refuses is refused. "one-by-one": separately, which serves every module; on a CPU at most as many at a time
            as torch has threads, and one at a time if their order matters (random draws, hooks, a loss that is not
            torch's) or threads do not pay. "auto": together where the operators of one task are too small to be worth
            their calls, as many tasks as fit in the caches, and always on CUDA; one by one where that does not work.
            The choice depends only on the model and on sizes, never on a clock; `explain` says which, and why.
        compile: Whether torch.compile makes the forward and backward passes where no whole-meta-step kernel serves
            ("conv", "mlp" and "layers" have nothing to compile). The first call of a kind takes seconds to minutes.
            Compiled passes round differently from torch's own operators and draw other dropout masks, repeatably. The
            query pass of ``batch_norm="support"`` is not compiled. What torch.compile does not serve is refused with
            its reason: a machine without a compiler, some modules, a `meta_step` with "maml" (there is no second
            derivative); likewise ``graph=True`` and the backend "torch".

    Returns:
        A `MetaStepResult`. Nothing in it made the host wait for the device.

    Raises:
        ValueError, TypeError: For an argument that does not fit, before any work; labels out of range are found on
            the CPU only (elsewhere they turn the task's loss NaN). With ``graph=True`` also for what a graph cannot
            hold: a device other than CUDA, a model that draws random numbers, a model or loss that makes the host
            wait, ``nonfinite="raise"``, an `inner_lr` that requires grad. `.grad` is as before.
        FloatingPointError: With ``nonfinite="raise"``; `.grad` is as before.

    Determinism: the same call gives the same result wherever torch's kernels do; CPU runs are bitwise repeatable for a
    fixed number of threads. Memory: one forward and backward pass; it grows with K for "maml" and for an `inner_lr`
    that requires grad, otherwise not. A recorded graph keeps its memory; `signmaml_ext.graphs.clear()` gives it back.
    Native meta-steps on the CPU keep two work buffers of at most 128 MiB each for the next call.

    Example:
        >>> import torch, signmaml_ext
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10))
        >>> result = signmaml_ext.meta_step(model, x, y, x, y, inner_lr=0.01, inner_steps=5)
        >>> result.query_loss.shape, result.support_loss.shape, model.weight.grad.shape
        (torch.Size([4]), torch.Size([5, 4]), torch.Size([2, 3]))
    """
    problem = check_problem(
        model,
        support_x,
        support_y,
        query_x,
        query_y,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        method=method,
        loss=loss,
        adapt=adapt,
        backend=backend,
        precision=precision,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        seed=seed,
        zero_dead_bias=zero_dead_bias,
        first_task=first_task,
        graph=graph,
        task_state=task_state,
        sharpness=sharpness,
        inner_rule=inner_rule,
        batching=batching,
        compile=compile,
        output=output,
    )
    check_compiled_order(problem)
    compute = graphs.run if graphs.serve(problem) else dispatch.meta_gradients
    used, meta = modes.undisturbed(lambda: compute(problem))
    raise_if_asked(problem, meta.nonfinite)
    _accumulate(problem, meta)
    return MetaStepResult(
        query_loss=meta.query_loss,
        query_accuracy=meta.query_accuracy,
        support_loss=meta.support_loss,
        nonfinite=meta.nonfinite,
        live_tasks=meta.live_tasks,
        backend=used,
    )


def evaluate(
    model: nn.Module,
    support_x: Inputs,
    support_y: Tensor | None,
    query_x: Inputs,
    query_y: Tensor | None,
    *,
    inner_lr: Rate | Mapping[str, Rate],
    inner_steps: int,
    method: str = "sign-maml",
    loss: Loss = "cross_entropy",
    adapt: str | Sequence[str] | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    nonfinite: str = "propagate",
    batch_norm: str = "batch",
    seed: int | None = None,
    zero_dead_bias: bool = True,
    task_state: str = "full",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    batching: str = "auto",
    compile: bool = False,
    output: Output | None = None,
) -> EvaluateResult:
    """Adapts to T tasks and evaluates their query sets; no meta-gradient, nothing changed.

    Arguments, errors and determinism are those of `meta_step`. "maml" and "fo-maml" take the same inner steps. Call
    `model.eval()` first if the model has dropout. A task that met a NaN or an Inf is flagged; with "skip" its row is
    kept.

    Returns:
        An `EvaluateResult`.

    Example:
        >>> import torch, signmaml_ext
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10))
        >>> signmaml_ext.evaluate(model, x, y, x, y, inner_lr=0.01, inner_steps=5).logits.shape
        torch.Size([4, 10, 2])
    """
    problem = check_problem(
        model,
        support_x,
        support_y,
        query_x,
        query_y,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        method=method,
        loss=loss,
        adapt=adapt,
        backend=backend,
        precision=precision,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        seed=seed,
        zero_dead_bias=zero_dead_bias,
        task_state=task_state,
        sharpness=sharpness,
        inner_rule=inner_rule,
        batching=batching,
        compile=compile,
        output=output,
    )
    used, adaptation = _adaptation(problem)
    assert adaptation.query_loss is not None and adaptation.logits is not None
    return EvaluateResult(
        query_loss=adaptation.query_loss,
        query_accuracy=adaptation.query_accuracy,
        logits=adaptation.logits,
        support_loss=adaptation.support_loss,
        nonfinite=adaptation.nonfinite,
        backend=used,
    )


def adapt(
    model: nn.Module,
    support_x: Inputs,
    support_y: Tensor | None,
    *,
    inner_lr: Rate | Mapping[str, Rate],
    inner_steps: int,
    method: str = "sign-maml",
    loss: Loss = "cross_entropy",
    adapt: str | Sequence[str] | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    nonfinite: str = "propagate",
    batch_norm: str = "batch",
    seed: int | None = None,
    zero_dead_bias: bool = True,
    task_state: str = "full",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    batching: str = "auto",
    compile: bool = False,
    output: Output | None = None,
) -> Mapping[str, Tensor]:
    """The inner loop alone: every task's adapted parameters; the model itself is not changed.

    Arguments and errors are those of `meta_step`.

    Returns:
        name -> `[T, *shape]` for each adapted parameter, detached; a dict, or with ``task_state="int8"`` a
        `CompactParams`, which holds step counts and computes a parameter on access. One task's model is
        ``torch.func.functional_call(model, {name: p[i] for name, p in adapted.items()}, (x,))``. In that call BatchNorm
        follows the model's mode: after ``model.train()`` it normalises by the batch, as ``batch_norm="batch"`` does,
        and writes its running statistics. With ``batch_norm="support"`` the result also holds the statistics of each
        task's support set, under the names of the running ones, `[T, C]`: with them, and after ``model.eval()``, that
        call gives the predictions of `evaluate` one query at a time.

    Example:
        >>> import torch, signmaml_ext
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10))
        >>> adapted = signmaml_ext.adapt(model, x, y, inner_lr=0.01, inner_steps=5)
        >>> {name: tuple(value.shape) for name, value in adapted.items()}
        {'weight': (4, 2, 3), 'bias': (4, 2)}
    """
    problem = check_problem(
        model,
        support_x,
        support_y,
        None,
        None,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        method=method,
        loss=loss,
        adapt=adapt,
        backend=backend,
        precision=precision,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        seed=seed,
        zero_dead_bias=zero_dead_bias,
        task_state=task_state,
        sharpness=sharpness,
        inner_rule=inner_rule,
        batching=batching,
        compile=compile,
        output=output,
        with_query=False,
    )
    adaptation = _adaptation(problem)[1]
    return {**adaptation.params, **adaptation.statistics} if adaptation.statistics else adaptation.params


def explain(
    model: nn.Module,
    support_x: Inputs | None = None,
    support_y: Tensor | None = None,
    query_x: Inputs | None = None,
    query_y: Tensor | None = None,
    *,
    inner_lr: Rate | Mapping[str, Rate] = 0.01,
    inner_steps: int = 1,
    method: str = "sign-maml",
    loss: Loss = "cross_entropy",
    adapt: str | Sequence[str] | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    nonfinite: str = "propagate",
    batch_norm: str = "batch",
    seed: int | None = None,
    zero_dead_bias: bool = True,
    task_state: str = "full",
    sharpness: Sharpness | float | None = None,
    inner_rule: InnerRule | None = None,
    batching: str = "auto",
    compile: bool = False,
    output: Output | None = None,
    plan: bool = False,
) -> Explanation:
    """Which backend would serve this call of `meta_step`, and why the others would not.

    Arguments and errors are those of `meta_step`; without data the answer is for data that fits. A module whose
    structure is known runs once on a few random examples, to verify it; others run once on the first task's examples,
    to measure the work of a task. Whether a module's forward can be batched is known only after the first real call.

    Args:
        plan: Also list the launches of the call on a GPU, with modelled work, bytes and time, and the workspace that it
            would take. For Conv-N networks, with or without a GPU in the machine. Pass data of the sizes in question.

    Returns:
        An `Explanation`; print it, or read `.backend` and `.reasons`.

    Example:
        >>> import torch, signmaml_ext
        >>> print(signmaml_ext.explain(torch.nn.Linear(3, 2), method="maml"))  # doctest: +ELLIPSIS
        backend: torch, reference (pure PyTorch, any module, any device); task by task (there is one)
          not cuda: ...
          not cpu, flat: ...'maml' differentiates through them
    """
    if support_x is None and support_y is None and query_x is None and query_y is None:
        support_x, support_y, query_x, query_y = _any_data(model, loss)
    problem = check_problem(
        model,
        support_x,
        support_y,
        query_x,
        query_y,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        method=method,
        loss=loss,
        adapt=adapt,
        backend=backend,
        precision=precision,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        seed=seed,
        zero_dead_bias=zero_dead_bias,
        task_state=task_state,
        sharpness=sharpness,
        inner_rule=inner_rule,
        batching=batching,
        compile=compile,
        output=output,
    )
    check_compiled_order(problem)
    return dispatch.explain(problem, with_plan=plan)


def _any_data(model: nn.Module, loss: Loss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small data of the shape that the model takes: one task of two examples. One feature if it is unknown."""
    like, outputs = torch.empty((), device="cpu"), 1
    example: tuple[int, ...] = (1,)
    if isinstance(model, nn.Module):
        like = next((p for p in model.parameters() if p.requires_grad), like)
        for found in (layers.read(model), mlp.read(model), conv.read(model)):
            if not isinstance(found, str):
                example, outputs = found.example(model), found.outputs
    x = torch.zeros(1, 2, *example, dtype=like.dtype, device=like.device)
    if loss == "mse":
        y = torch.zeros(1, 2, outputs, dtype=like.dtype, device=like.device)
    else:
        y = torch.zeros(1, 2, dtype=torch.int64, device=like.device)
    return x, y, x, y


def _adaptation(problem: Problem) -> tuple[str, Adaptation]:
    if problem.method == "maml":
        problem = problem.replace(method="fo-maml")  # they differ only in the meta-gradient
    used, adaptation = modes.undisturbed(lambda: dispatch.adapt(problem))
    raise_if_asked(problem, adaptation.nonfinite)
    return used, adaptation


# Several threads may add to the `.grad` of one model, so the test for None and the assignment must be atomic.
_grad_lock = threads.lasting_lock()


def _accumulate(problem: Problem, meta: MetaGradients) -> None:
    """Adds the meta-gradients to `.grad`. The rates go first: only their backward can raise."""
    learnable = problem.rates.learnable()
    pairs = [(rate, gradient) for key, rate in learnable.items() if (gradient := meta.rates[key]) is not None]
    found = [(problem.params[name], gradient) for name, gradient in meta.params.items() if gradient is not None]
    with torch.inference_mode(False), _grad_lock:
        if pairs:
            rates, gradients = zip(*pairs, strict=True)
            # A rate computed from others (an exponential, say) passes its gradient on to them.
            torch.autograd.backward(rates, gradients)
        if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter, _ in found):
            parameters, gradients = zip(*found, strict=True)
            torch.autograd.backward(parameters, gradients)  # runs their hooks, as any backward pass does
            return
        with torch.no_grad():
            for parameter, gradient in found:
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad += gradient
