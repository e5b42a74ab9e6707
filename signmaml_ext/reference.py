"""The meta-step in plain PyTorch: the definition, the fallback and the oracle of every other backend.

One code path serves the three methods. A task's parameters ("phi") start at the model's ("theta"), every inner step
takes the gradient of the support loss and moves against a direction:

    sign-maml   sign(g), three-valued          fo-maml   g, a constant          maml   g, differentiated through

and the meta-gradient is the gradient of the query loss with respect to theta, through the steps. For sign-maml
and fo-maml the direction is a constant, hence d phi / d theta = I: exact for sign-maml, since d sign(g) / dg = 0.
The same graph gives the exact gradient of the inner rates, -sum_k <g_query, direction_k>.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import batching, chain, inputs, modes, threads
from .checks import (
    ForwardError,
    check_labels,
    check_loss,
    check_prediction,
    describe,
    refuse,
)
from .inner_rules import Memory
from .inputs import Inputs
from .losses import Loss, accuracy, cross_entropy, takes_targets
from .norms import SupportStatistics
from .problem import Problem
from .replica import Replicas
from .results import NAN_COUNT, Adaptation, CompactParams, MetaGradients, TaskParams, from_counts, raise_if_asked
from .sharpness import ascent, sign
from .watch import Facts, Watch, address

if TYPE_CHECKING:
    from .layers.run import NativeRun

Value = TypeVar("Value")
Result = TypeVar("Result", bound=MetaGradients | Adaptation)


def meta_gradients(problem: Problem) -> MetaGradients:
    """The meta-step of all tasks, as deterministic as torch's own kernels."""
    return batched_or_not(problem, meta_gradients_of)


def adapt(problem: Problem) -> Adaptation:
    """The inner loop of all tasks and, if the problem has a query set, its evaluation."""
    return batched_or_not(of_adapt(problem), adapt_of)


def of_adapt(problem: Problem) -> Problem:
    """The same inner loop without second derivatives: 'maml' and 'fo-maml' differ only in the meta-gradient."""
    return problem.replace(method="fo-maml") if problem.method == "maml" else problem


def sign_step(params: Tensor, grads: Tensor, lr: Tensor | float) -> Tensor:
    """`params - lr * sign(grads)`, the readable twin of sign_step_kernel."""
    return params - lr * sign(grads)


def compact_sign_step(counts: Tensor, theta: Tensor, grads: Tensor, lr: Tensor | float) -> tuple[Tensor, Tensor]:
    """The next step counts and `theta - lr * counts`, the readable twin of compact_sign_step_kernel."""
    following = counts.to(torch.int16) + grads.sign().nan_to_num().to(torch.int16)
    lost = (counts == NAN_COUNT) | grads.isnan() | (following.abs() > 127)
    counts = torch.where(lost, NAN_COUNT, following).to(torch.int8)
    return counts, from_counts(counts, theta, lr)


def meta_accumulate(out: Tensor, grads: Tensor, live: Tensor) -> Tensor:
    """`out` plus the mean of the live rows of `grads` `[T, P]`, the readable twin of meta_accumulate_kernel."""
    kept = torch.where(live[:, None], grads, torch.zeros_like(grads))
    return out + kept.sum(0) / live.sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------
# Chunks of tasks: all at once under vmap, or one by one


def why_not_batched(problem: Problem) -> str | None:
    """None if the tasks of a call run together under vmap, else why they run one by one."""
    if problem.batching == "one-by-one":
        return "batching is 'one-by-one'"
    if problem.batching == "auto" and (reason := chain.of_module(problem.model).answers.get(_refusal(problem))):
        return str(reason)
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "saved-tensor hooks are on around the call"
    if (hooked := _hooked(problem.model)) is not None:
        return f"{hooked} has hooks, and what they see should be the tensors of one task"
    return None if problem.batching == "together" else batching.why_one_by_one(problem)


def _hooked(model: nn.Module) -> str | None:
    """Which module has user hooks, if any; those that torch.nn.utils adds to compute weights do not count."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(nn.modules.module, f"_global{kind}") for kind in kinds):
        return "every module"
    for name, module in model.named_modules():
        for kind in kinds:
            for hook in getattr(module, kind).values():
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    return f"module {name!r}" if name else "it"
    return None


def _is_torchs(loss: Any) -> bool:
    module = getattr(type(loss) if isinstance(loss, nn.Module) else loss, "__module__", None)
    return isinstance(module, str) and module.startswith("torch.nn")


# Questions whose answers are cached for a model until its structure changes (see `chain`). An answer only decides which
# way is tried first; the result is exact either way.
_REFUSED, _OWN_BUFFERS, _DRAWS = "vmap refused it", "its tasks have buffers of their own", "it draws random numbers"


def _refusal(problem: Problem) -> Hashable:
    """The key under which a refusal by vmap is cached: everything in a call that may cause it."""
    of_call = (problem.method, problem.batch_norm, problem.precision, kind_of(problem.loss), kind_of(problem.output))
    return (_REFUSED, problem.model.training, problem.compile, *of_call)


def kind_of(value: Any) -> Hashable:
    """A key for a loss or an output: a function is identified by its code, not by what its closure holds.

    A function that is created anew for each call thus keeps its key.
    """
    kind: Any = value if isinstance(value, (str, int)) else getattr(value, "__code__", type(value))
    return kind


class NotBatchable(Exception):
    """The tasks of this call cannot run together under vmap; the message says why.

    Attributes:
        lasts: Whether the reason also holds for later calls, until the model changes.
    """

    def __init__(self, message: str, *, lasts: bool) -> None:
        super().__init__(message)
        self.lasts = lasts


def run_batched(problem: Problem, compute: Callable[[Run], Result]) -> Result:
    """`compute` on all tasks at once.

    Raises:
        NotBatchable: If running them together is known not to work or not to pay, or turns out not to work.
    """
    reason = why_not_batched(problem)
    if reason is not None:
        raise NotBatchable(reason, lasts=False)
    answers, question = chain.of_module(problem.model).answers, (_OWN_BUFFERS, problem.model.training)
    ways = (False, True) if next(problem.model.buffers(), None) is not None else (False,)
    together = batching.chunk(problem)
    # Tasks share the buffers unless a forward writes to them: vmap refuses to write per-task values to a shared tensor.
    for own_buffers in ways if question not in answers else (answers[question],):
        try:
            with modes.call_modes(problem), no_saved_tensor_hooks():
                result = compute(Run(problem, together, own_buffers=own_buffers))
            answers[question] = own_buffers
            return result
        except NotBatchable:
            raise
        except torch.OutOfMemoryError as error:
            raise NotBatchable("all tasks together do not fit in memory", lasts=False) from error
        except Exception as error:
            # vmap refuses random draws, data-dependent control flow, in-place writes and operators without a batching
            # rule, each with its own exception type. If the fault is the caller's, task by task raises it again.
            _raise_interrupt(error)
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise NotBatchable(f"vmap refused it: {first_line}", lasts=True)


def _raise_interrupt(error: BaseException) -> None:
    """Re-raises the Ctrl-C behind an error: torch's own cleanup may fail when it is interrupted."""
    before = error.__context__
    while before is not None:
        if not isinstance(before, Exception):
            raise before
        before = before.__context__


@contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Refuses activation checkpointing and the like.

    Checkpointing recomputes activations in the backward pass, outside vmap and on tensors that vmap no longer tracks.
    The gradient would be silently wrong.
    """
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        yield  # already refused
        return
    with torch.autograd.graph.disable_saved_tensors_hooks("it saves tensors in a way of its own (checkpointing)"):
        yield


def run_task_by_task(problem: Problem, compute: Callable[[Run], Result]) -> Result:
    """`compute` task by task, which works for every module."""
    answers, question = chain.of_module(problem.model).answers, (_DRAWS, problem.model.training)
    most_threads = _threads_for(problem)  # may set torch's generators, so not in `with_randomness`

    def with_streams(randomness: modes.Randomness) -> Result:
        with modes.call_modes(problem):
            result = compute(Run(problem, randomness=randomness, most_threads=most_threads))
        if isinstance(randomness, modes.KeyedRandomness):
            raise_if_asked(problem, result.nonfinite)  # now: a call that raises leaves the generators as they were
        return result

    with modes.without_collector():
        result, draws = modes.with_randomness(problem, with_streams, answers.get(question, False))
    answers[question] = draws
    return result


def _threads_for(problem: Problem) -> int:
    """How many tasks run at once outside vmap: torch's thread count; 1 if order may be seen or threads do not pay."""
    if problem.device.type != "cpu" or problem.tasks < 2 or torch.get_num_threads() == 1:
        return 1
    if callable(problem.loss) and not _is_torchs(problem.loss):
        return 1  # a stateful loss would see the tasks in another order
    if threads.why_one_thread() is not None or _hooked(problem.model) is not None:
        return 1
    return torch.get_num_threads() if batching.pays_on_threads(problem) else 1


def batched_or_not(problem: Problem, compute: Callable[[Run], Result]) -> Result:
    """`compute` on all tasks together if that works and pays, else task by task.

    Raises:
        ValueError: The call asks for tasks to run together, and they cannot.
    """
    try:
        return run_batched(problem, compute)
    except NotBatchable as error:
        reason, lasts = str(error), error.lasts  # not the error: its frames hold the tensors of all tasks
    if problem.batching == "together":
        refuse("batching", "'auto' or 'one-by-one' for this call", f"'together': {reason}")
    # Outside the except clause, so that the caller's own errors are not chained to the refusal.
    result = run_task_by_task(problem, compute)
    # Cached only now: if the call itself were at fault, `run_task_by_task` would have raised.
    if lasts:
        chain.of_module(problem.model).answers[_refusal(problem)] = reason
    return result


@dataclass(frozen=True)
class Seen:
    """What is known about passes of one kind (support or query).

    Attributes:
        facts: What the autograd graph showed.
        writes_input: Whether the forward writes to its input.
        outputs: Length of the last axis of predictions.
    """

    facts: Facts
    writes_input: bool
    outputs: int


@dataclass
class Run:
    """One pass over the tasks of a problem.

    Attributes:
        problem: The call.
        together: Most tasks that run together under vmap; 0: tasks run one by one.
        own_buffers: Whether each task under vmap has its own buffers, which its forward may write to.
        randomness: Random streams of forward passes that run one by one.
        most_threads: How many tasks may run at once outside vmap, if the model draws no random numbers.
    """

    problem: Problem
    together: int = 0
    own_buffers: bool = False
    randomness: modes.Randomness = field(default_factory=modes.PlainRandomness)
    most_threads: int = 1

    def __post_init__(self) -> None:
        self._replicas: dict[int, Replicas] = {}
        self.buffers = self.replicas.own_buffers() if self.own_buffers else {}
        self._facts: dict[bool, Facts] = {}  # key: whether it is the query pass
        self._writes: dict[bool, bool] = {}  # whether a forward writes to its input; same key
        # The first task's passes fill these in; tasks on other threads wait for that.
        self._found_out = {is_query: threads.Latch() for is_query in (False, True)}
        self._stopped = False

    @property
    def replicas(self) -> Replicas:
        """This thread's maker of private copies: no thread may see what another thread's forward writes."""
        thread = threading.get_ident()
        if thread not in self._replicas:
            by = "running" if self.problem.batch_norm == "running" else "batch"
            self._replicas[thread] = Replicas(self.problem.model, by)
        return self._replicas[thread]

    @property
    def batched(self) -> bool:
        """Whether tasks run together under vmap."""
        return self.together > 0

    def chunks(self) -> list[slice]:
        """Slices of the task axis, one for each group of tasks that runs together."""
        tasks, size = self.problem.tasks, self.together or 1
        return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]

    def dead(self, step: int) -> frozenset[str]:
        """Parameters whose gradient is exactly 0; known after the first pass of this kind."""
        is_query = step == self.problem.steps
        found = self._facts[is_query].dead_biases
        if is_query and self.problem.batch_norm == "support" and False in self._facts:
            # The support set's statistics contain the bias too, so it cancels in the query pass as well.
            found |= self._facts[False].dead_biases
        return found

    def loss_and_prediction(
        self, params: TaskParams, x: Inputs, y: Tensor, *, first_task: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Loss `[t]` and prediction `[t, S, ...]` of t tasks.

        Args:
            params: Per-task parameters, `[t, *shape]` under vmap and `[*shape]` for a single task. All others are taken
                from the model.
            x: `[t, S, ...]`.
            y: `[t, S, ...]`.
            first_task: Number of the first of these tasks.
            step: Inner step; the query pass counts as step K.
        """
        self.wait_for_first(first_task, step)
        modes.collect()
        found = self._noted(params, x, y, first_task, step)
        self.first_is_done(step)
        return found

    def wait_for_first(self, task: int, step: int) -> None:
        """Blocks a task until the first task's pass of this kind (support or query) is done."""
        if task > 0 and self.threads() > 1:
            self._found_out[step == self.problem.steps].wait()
            if self._stopped:
                raise RuntimeError("stopped")

    def first_is_done(self, step: int) -> None:
        """Lets the other tasks begin passes of this kind."""
        self._found_out[step == self.problem.steps].open()

    def _noted(self, params: TaskParams, x: Inputs, y: Tensor, first_task: int, step: int) -> tuple[Tensor, Tensor]:
        is_query = step == self.problem.steps
        is_first = is_query not in self._writes
        # A forward may modify its input in place. The first pass, which gets a copy, shows whether it does.
        if is_first or self._writes[is_query]:
            x = inputs.each(x, Tensor.clone)
        versions = [part._version for part in inputs.parts(x)] if is_first else []
        found = self._passed(params, x, y, first_task, step)
        if is_first:
            self._writes[is_query] = versions != [part._version for part in inputs.parts(x)]
        return found

    def stop(self) -> None:
        """Makes tasks that wait for the first one give up."""
        self._stopped = True
        for latch in self._found_out.values():
            latch.open()

    def _passed(self, params: TaskParams, x: Inputs, y: Tensor, first_task: int, step: int) -> tuple[Tensor, Tensor]:
        if self.batched:
            other = self._statistics_from(slice(first_task, first_task + y.shape[0]), step)
            buffers = self.buffers_of(y.shape[0])
            in_dims = (0, 0, 0, None if other is None else 0, None)
            loss, prediction = torch.vmap(self._one_task, in_dims)({**params, **buffers}, x, y, other, step)
            return loss, prediction
        other = self._statistics_from(first_task, step)
        with self.stream(first_task, step):
            loss, prediction = self._one_task(params, inputs.take(x, 0), y[0], other, step)
        return loss[None], prediction[None]

    def look(self, params: TaskParams, x: Inputs, y: Tensor, *, first_task: int, step: int) -> Seen:
        """Finds out what passes of a kind do, for compiled passes, which cannot be inspected.

        Runs a pass of one task and discards its result; arguments as for `loss_and_prediction`.

        Raises:
            ValueError: The forward writes to its parameters.
        """
        self.forget(step)
        alone = {name: value[:1] if self.batched else value for name, value in params.items()}
        alone = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in alone.items()}
        before = [(value.data_ptr(), value._version) for value in alone.values()]
        first = inputs.take(x, slice(0, 1))
        _, prediction = self._noted(alone, first, y[:1], first_task, step)
        if before != [(value.data_ptr(), value._version) for value in alone.values()]:
            refuse("compile", "False for this model", "True, and a forward that writes to its parameters")
        is_query = step == self.problem.steps
        return Seen(self._facts[is_query], self._writes[is_query], prediction.shape[-1])

    def know(self, seen: Seen, step: int) -> None:
        """Takes over what an earlier call found out about passes of a kind."""
        if self.problem.loss == "cross_entropy" and not self._facts:
            check_labels(self.problem, seen.outputs)
        is_query = step == self.problem.steps
        self._facts[is_query], self._writes[is_query] = seen.facts, seen.writes_input

    def forget(self, step: int) -> None:
        """Drops what is known about passes of a kind."""
        self._facts.pop(step == self.problem.steps, None)
        self._writes.pop(step == self.problem.steps, None)

    def buffers_of(self, tasks: int) -> TaskParams:
        """One copy of the buffers per task, `[t, *shape]`."""
        return {name: b.expand(tasks, *b.shape).clone() for name, b in self.buffers.items()}

    def stream(self, task: int, step: int) -> AbstractContextManager[object]:
        """A context in which one task's pass draws from its own random stream."""
        return self.randomness.at(self.problem.first_task + task, step)

    def by_task(self, values: Iterable[Value]) -> list[Value]:
        """Per-task tensors (or None) as `[t, *shape]`, also for a single task."""
        return [value if self.batched or value is None else value[None] for value in values]  # type: ignore[index]

    def _statistics_from(self, tasks: slice | int, step: int) -> Inputs | None:
        """The inputs that BatchNorm's statistics come from; None: the set at hand."""
        by_support = self.problem.batch_norm == "support" and step == self.problem.steps
        return inputs.take(self.problem.support_x, tasks) if by_support else None

    def threads(self) -> int:
        """How many tasks may run at once."""
        return self.most_threads if isinstance(self.randomness, modes.PlainRandomness) else 1

    def _one_task(
        self, own: Mapping[str, Tensor], x: Inputs, y: Tensor, other: Inputs | None, step: int
    ) -> tuple[Tensor, Tensor]:
        is_query = step == self.problem.steps
        watch = None
        places = {name: address(tensor) for name, tensor in own.items()} if is_query not in self._facts else {}
        copy = self.replicas.make(own)
        if is_query not in self._facts:
            find_dead = self.problem.zero_dead_bias and self.problem.batch_norm != "running" and other is None
            watch = Watch(copy, {name: own[name] for name in own if name in self.problem.params}, find_dead)
        with modes.autocast(self.problem):
            if other is not None:
                statistics = SupportStatistics()
                statistics.record(first := self.replicas.make(own))
                self._forward(first, inputs.each(other, Tensor.clone))
                statistics.use(copy)
            returned = self._forward(copy, x)
        prediction = inputs.selected(self.problem.output, returned)
        if self.problem.precision == "bf16" and isinstance(prediction, Tensor) and not prediction.is_complex():
            prediction = prediction.float()
        check_prediction(prediction, y, self.problem.loss)
        if self.problem.loss == "cross_entropy" and not self._facts:
            check_labels(self.problem, prediction.shape[-1])
        loss = task_loss(self.problem.loss, prediction, y)
        if watch is not None:
            if self.batched and places != {name: address(tensor) for name, tensor in own.items()}:
                raise NotBatchable("its forward gives parameters other memory, which vmap forgets", lasts=True)
            self._facts[is_query] = self._checked(watch.facts(loss, self.problem.params))
        # A prediction that only the caller's loss understands is not returned.
        return loss, prediction if isinstance(prediction, Tensor) else loss.new_empty(0)

    def _forward(self, copy: nn.Module, x: Inputs) -> Any:
        try:
            return inputs.call(copy, x)
        except RuntimeError as error:
            # Out-of-memory and device errors are subclasses. What vmap refuses is tried again task by task.
            if self.batched or type(error) is not RuntimeError:
                raise
            taken = ", ".join(map(describe, inputs.parts(x)))
            raise ForwardError(f"model: expected a forward that takes {taken}, found: {error}") from error

    def support_statistics(self, params: TaskParams) -> dict[str, Tensor]:
        """Each task's support-set statistics under the names of BatchNorm's running statistics, `[T, C]`.

        Args:
            params: Parameters of all tasks, `[T, *shape]`.
        """

        def of_task(own: Mapping[str, Tensor], x: Inputs) -> dict[str, Tensor]:
            statistics = SupportStatistics()
            statistics.record(copy := self.replicas.make(own))
            with modes.autocast(self.problem):
                self._forward(copy, inputs.each(x, Tensor.clone))
            return statistics.buffers(copy)

        if self.batched:
            parts = []
            for tasks in self.chunks():
                of_chunk = {name: p[tasks] for name, p in params.items()}
                count = tasks.stop - tasks.start
                buffers = {name: b.expand(count, *b.shape).clone() for name, b in self.buffers.items()}
                parts.append(torch.vmap(of_task)({**of_chunk, **buffers}, inputs.take(self.problem.support_x, tasks)))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found = []
        for task in range(self.problem.tasks):
            with self.randomness.at(self.problem.first_task + task, self.problem.steps):
                own = {name: p[task] for name, p in params.items()}
                found.append(of_task(own, inputs.take(self.problem.support_x, task)))
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _checked(self, facts: Facts) -> Facts:
        if facts.reached is not None:
            raise ForwardError(
                "model: expected a forward that reaches its parameters through the module it is called on, found one "
                f"that takes {facts.reached!r} from elsewhere (a global, say)"
            )
        if facts.pads and self.batched:
            raise NotBatchable(
                "torch's gradient of an embedding with padding_idx is wrong for tasks side by side", lasts=True
            )
        return facts


def task_loss(loss: Loss, prediction: Any, target: Tensor) -> Tensor:
    """The scalar loss of one task."""
    if loss == "cross_entropy":
        # On the CPU the labels were checked before, see `check_labels`.
        return F.cross_entropy(prediction, target) if target.is_cpu else cross_entropy(prediction, target)
    if loss == "mse":
        return F.mse_loss(prediction, target)
    assert callable(loss)
    value = loss(prediction, target) if takes_targets(target) else loss(prediction)
    check_loss(value)
    return value


# ----------------------------------------------------------------------------------------------------
# The algorithm, for t tasks


def inner_loop(
    run: Run | NativeRun, tasks: slice, theta: TaskParams, rates: Mapping[str, Tensor], nonfinite: Tensor
) -> tuple[TaskParams, Tensor, TaskParams]:
    """K inner steps of t tasks.

    Args:
        run: The pass this belongs to.
        tasks: Which tasks.
        theta: All trainable parameters, `[t, *shape]` under vmap and `[*shape]` for a single task: the leaves of the
            result's graph.
        rates: Learnable rates by key, `[t, *rate_shape]`.
        nonfinite: `[t]` bool, set where a task meets a NaN or an Inf.

    Returns:
        The parameters after the last step as in `theta`, the support loss `[K, t]` before each step, and, for
        `task_state="int8"`, the step counts of the adapted parameters.
    """
    problem = run.problem
    second_order = problem.method == "maml"
    x, y = inputs.take(problem.support_x, tasks), problem.support_y[tasks]
    compact, rule = problem.task_state == "int8", problem.inner_rule
    phi, losses = dict(theta), []
    memory: dict[str, Memory | None] = {}
    counts = {name: torch.zeros_like(theta[name], dtype=torch.int8) for name in problem.adapted} if compact else {}

    def rate_of(name: str, step: int) -> float | Tensor:
        rate = problem.rates.at(step, name, phi[name] if run.batched else phi[name][None], rates)
        return rate[0] if isinstance(rate, Tensor) and not run.batched else rate

    for step in range(problem.steps):
        moving = {name: phi[name] for name in problem.adapted}
        # Tasks share the parameters that do not adapt, which is cheaper than one copy each. Second order needs the
        # copies, because the steps depend on these parameters too.
        loss, _ = run.loss_and_prediction(phi if second_order else moving, x, y, first_task=tasks.start, step=step)
        losses.append(loss.detach())
        nonfinite |= ~loss.detach().isfinite()
        # Only of parameters that move: with second order, the graph of earlier steps leads to the others too.
        wanted = {name: value for name, value in moving.items() if name not in run.dead(step)}
        gradients = gradients_of(loss, wanted, create_graph=second_order)
        nonfinite |= ~_all_finite_by_task(run, gradients, nonfinite)
        if problem.sharpness is not None:
            place = _sharpest(run, wanted, gradients)
            there = {**(phi if second_order else moving), **place}
            loss, _ = run.loss_and_prediction(there, x, y, first_task=tasks.start, step=step)
            gradients = gradients_of(loss, place, create_graph=second_order)
            nonfinite |= ~(loss.detach().isfinite() & _all_finite_by_task(run, gradients, nonfinite))
        if rule is not None and rule.weight_decay > 0:
            # A gradient of exactly 0 is one, so its parameter decays.
            gradients |= {name: torch.zeros_like(value) for name, value in moving.items() if name not in wanted}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            rate, kept = rate_of(name, step), phi[name]
            if rule is not None:
                own = gradient if second_order else gradient.detach()
                gradient, memory[name] = rule.combine(own, memory.get(name))
                if rule.weight_decay > 0:
                    kept = (1 - rate * rule.weight_decay) * kept
            if compact:
                counts[name], phi[name] = compact_sign_step(counts[name], theta[name], gradient.detach(), rate)
                continue
            direction = sign(gradient) if problem.method == "sign-maml" else gradient
            if not second_order:
                direction = direction.detach()
            phi[name] = kept - rate * direction
    if not losses:
        return phi, torch.empty(0, y.shape[0], dtype=problem.dtype, device=problem.device), counts
    return phi, torch.stack(losses), counts


def _sharpest(run: Run | NativeRun, values: TaskParams, gradients: Mapping[str, Tensor | None]) -> TaskParams:
    """The parameters with a gradient, moved to the sharpest place near them; see `sharpness`."""
    assert run.problem.sharpness is not None
    names = [name for name, gradient in gradients.items() if gradient is not None]
    second_order = run.problem.method == "maml"
    own = [values[name] if second_order else values[name].detach() for name in names]
    along = [gradient for gradient in gradients.values() if gradient is not None]
    offsets = ascent(run.problem.sharpness, run.by_task(own), run.by_task(along))
    # Leaves of a graph of their own, unless the steps are differentiated.
    moved = [value + offset.reshape(value.shape) for value, offset in zip(own, offsets, strict=True)]
    return {n: m if m.requires_grad else m.requires_grad_() for n, m in zip(names, moved, strict=True)}


def _all_finite_by_task(run: Run | NativeRun, gradients: Mapping[str, Tensor | None], like: Tensor) -> Tensor:
    return all_finite_together([g.detach() for g in run.by_task(gradients.values()) if g is not None], like)


def gradients_of(loss: Tensor, params: TaskParams, *, create_graph: bool = False) -> dict[str, Tensor | None]:
    """Per-task gradients. Tasks share no tensor in `params`, so the summed loss has each task's own gradient."""
    if not loss.requires_grad or not params:
        return dict.fromkeys(params)
    grads = torch.autograd.grad(loss.sum(), list(params.values()), create_graph=create_graph, allow_unused=True)
    return dict(zip(params, grads, strict=True))


def _start(run: Run | NativeRun, count: int) -> tuple[TaskParams, TaskParams]:
    """Theta and the learnable rates, one view per task, as leaves of a new graph."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().expand(count, *value.shape).requires_grad_()

    # Copies, because an Embedding with max_norm writes to its weight.
    params = run.problem.params
    alone = {} if run.batched else {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    theta = alone or {name: leaf(p) for name, p in params.items()}
    if not alone and run.problem.inner_rule is not None and run.problem.inner_rule.weight_decay > 0:
        # Memory of their own: what a forward writes for one task (max_norm) must not be what decays for the others.
        theta |= {name: theta[name].detach().contiguous().requires_grad_() for name in run.problem.adapted}
    return theta, {key: leaf(rate) for key, rate in run.problem.rates.learnable().items()}


@dataclass(frozen=True)
class _Part:
    """Per-task results of a meta-step on some tasks."""

    gradients: dict[str, Tensor | None]
    loss: Tensor
    accuracy: Tensor | None
    support_loss: Tensor
    nonfinite: Tensor


def meta_gradients_of(run: Run | NativeRun) -> MetaGradients:
    """The meta-step of all tasks, with the run's gradients."""
    problem = run.problem
    sums: dict[str, Tensor | None] = {}
    parts = []
    with closing(
        threads.map_in_order(lambda tasks: _part(run, tasks), run.chunks(), run.threads(), run.stop)
    ) as in_order:
        for part in in_order:
            _add_live(sums, part.gradients, ~part.nonfinite if problem.nonfinite == "skip" else None)
            parts.append(replace(part, gradients={}))  # free them while other tasks run
    nonfinite = torch.cat([part.nonfinite for part in parts])
    live_tasks = (~nonfinite).sum() if problem.nonfinite == "skip" else torch.full_like(nonfinite, True).sum()
    means = {name: None if s is None else s / live_tasks.clamp(min=1) for name, s in sums.items()}
    return MetaGradients(
        params={name: means[name] for name in problem.params},
        rates={key: means[_rate_key(key)] for key in problem.rates.learnable()},
        query_loss=torch.cat([part.loss for part in parts]),
        query_accuracy=_cat([part.accuracy for part in parts]),
        support_loss=torch.cat([part.support_loss for part in parts], dim=1),
        nonfinite=nonfinite,
        live_tasks=live_tasks,
    )


def _part(run: Run | NativeRun, tasks: slice) -> _Part:
    """The meta-step of some tasks."""
    problem = run.problem
    assert problem.query_x is not None and problem.query_y is not None
    x, y = inputs.take(problem.query_x, tasks), problem.query_y[tasks]
    count = y.shape[0]
    nonfinite = torch.zeros(count, dtype=torch.bool, device=problem.device)
    theta, rates = _start(run, count)
    phi, support_loss, _ = inner_loop(run, tasks, theta, rates, nonfinite)
    loss, prediction = run.loss_and_prediction(phi, x, y, first_task=tasks.start, step=problem.steps)
    nonfinite |= ~loss.detach().isfinite()
    gradients = gradients_of(loss, theta | {_rate_key(key): rate for key, rate in rates.items()})
    for name in theta:
        gradients[name] = run.by_task([gradients[name]])[0]
    for name, gradient in gradients.items():
        if name in run.dead(problem.steps) and gradient is not None:
            gradients[name] = torch.zeros_like(gradient)
    nonfinite |= ~all_finite_together(gradients.values(), nonfinite)
    return _Part(gradients, loss.detach(), accuracy(problem.loss, prediction, y), support_loss, nonfinite)


def _rate_key(key: str) -> str:
    """A learnable rate's name among the gradients; no parameter name starts with 'rate/'."""
    return f"rate/{key}"


def _add_live(sums: dict[str, Tensor | None], gradients: Mapping[str, Tensor | None], live: Tensor | None) -> None:
    """Adds the gradients of the live tasks (of all tasks if None), in task order."""
    for name, gradient in gradients.items():
        if gradient is None:
            sums.setdefault(name, None)
            continue
        if live is not None:
            # where, not a product: 0 * nan is nan.
            gradient = torch.where(live.view(-1, *[1] * (gradient.ndim - 1)), gradient, torch.zeros_like(gradient))
        of_part = gradient[0] if gradient.shape[0] == 1 else gradient.sum(0)
        previous = sums.get(name)
        sums[name] = of_part if previous is None else previous + of_part


def adapt_of(run: Run | NativeRun) -> Adaptation:
    """The inner loop of all tasks, with the run's gradients."""
    problem = run.problem
    chunks: list[Adaptation] = []
    for tasks in run.chunks():
        count = problem.support_y[tasks].shape[0]
        nonfinite = torch.zeros(count, dtype=torch.bool, device=problem.device)
        theta, _ = _start(run, count)
        phi, support_loss, counts = inner_loop(run, tasks, theta, {}, nonfinite)
        phi = {name: p.detach() for name, p in phi.items()}
        moved = dict(
            zip(problem.adapted, run.by_task(counts.values() or [phi[n] for n in problem.adapted]), strict=True)
        )
        loss = prediction = shares = None
        if problem.query_x is not None and problem.query_y is not None:
            x, y = inputs.take(problem.query_x, tasks), problem.query_y[tasks]
            # Grad mode stays on, because a forward may take gradients itself (for a force, say). phi is detached.
            found = run.loss_and_prediction(phi, x, y, first_task=tasks.start, step=problem.steps)
            loss, prediction = (value.detach() for value in found)
            nonfinite |= ~loss.isfinite()
            shares = accuracy(problem.loss, prediction, y)
        chunks.append(Adaptation(moved, support_loss, loss, shares, prediction, nonfinite))
    params = {name: torch.cat([chunk.params[name] for chunk in chunks]) for name in problem.adapted}
    statistics = {}
    if problem.batch_norm == "support" and problem.query_x is None and isinstance(run, Run):
        statistics = run.support_statistics(params)
    return Adaptation(
        params=CompactParams(params, problem.params, problem.rates) if problem.task_state == "int8" else params,
        support_loss=torch.cat([chunk.support_loss for chunk in chunks], dim=1),
        query_loss=_cat([chunk.query_loss for chunk in chunks]),
        query_accuracy=_cat([chunk.query_accuracy for chunk in chunks]),
        logits=_cat([chunk.logits for chunk in chunks]),
        nonfinite=torch.cat([chunk.nonfinite for chunk in chunks]),
        statistics=statistics,
    )


def all_finite(value: Tensor) -> Tensor:
    """`[t]` bool for `[t, ...]`: no NaN and no Inf."""
    if value.ndim == 1:
        return value.isfinite()
    rows = value.flatten(1)
    if rows.shape[1] == 0:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=value.device)
    # Minimum and maximum are NaN if any value is. 20 times as fast as `isfinite` on all values, or as `aminmax`.
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()


# From this many elements per task, a tensor is handled separately: copying it takes longer than one more call.
LARGE = 2**18


def all_finite_together(values: Iterable[Tensor | None], like: Tensor) -> Tensor:
    """`[t]` bool, as `like`: no NaN and no Inf in any of several tensors `[t, ...]`; None counts as finite."""
    rows = [value.detach().reshape(value.shape[0], -1) for value in values if value is not None]
    small = [value for value in rows if value.shape[1] < LARGE]
    large = [value for value in rows if value.shape[1] >= LARGE]
    found = torch.ones_like(like)
    for value in (*large, *([torch.cat(small, 1)] if small else [])):
        found &= all_finite(value)
    return found


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """The chunks concatenated; None if the chunks have no such tensor."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
