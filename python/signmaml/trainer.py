"""`MetaTrainer`: the training loop, with checkpoints that make it survive interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import signmaml_ext
from signmaml_ext.lazy import cached_property

from . import building, checkpoint, state, trackers, version
from .averaging import Average
from .config import TrainConfig
from .distributed import Group
from .episodes import EpisodeSampler, Sampler, draw
from .evaluation import Evaluation, default_chunk, evaluate_sampler, loss_for
from .hypergradient import OnlineRates
from .iteration import Iteration, Training, outer_adam, outer_adamw, outer_sgd, try_one_task, why_no_graph
from .loggers import MetricsFile, Progress, TensorBoard, counting, tensorboard_wanted
from .models import parameter_count
from .pieces import MetaStep
from .rates import InnerRates
from .results import Best, FitResult
from .runs import RunFolder, choose_folder
from .schedule import learning_rate
from .signals import SignalGuard, TrainingInterrupted

Loss = str | Callable[[Tensor, Tensor], Tensor]


class _Writer(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...


class MetaTrainer:
    """Meta-trains a model as a `TrainConfig` says: Adam or SGD on the meta-gradients of `signmaml_ext.meta_step`.

    All randomness is computed from counters (seed and iteration). A run that was interrupted at any point and resumed
    therefore ends with bitwise the same weights, metrics and curve as one that was not. The run's folder holds
    config.yaml, metrics.jsonl, last.safetensors (to resume), best.safetensors (weights with the best validation),
    result.json and plots; see `signmaml.runs.RunFolder`.

    Args:
        config: The configuration.
        model: Module to train, moved to the configuration's device; None: the one the configuration names. Its
            forward takes `[B, ...]` and returns scores `[B, ways]`, or predictions for float targets.
        train: Training data: an `ImageSet`, or any sampler with `draw(iteration)` (see `signmaml.episodes.Sampler`;
            resuming is exact only if it depends on `iteration` alone). None: the configuration's data.
        val: Validation data likewise. None: the configuration's, or none at all if `train` is given.
        test: Test data likewise.
        out: Run folder; None: `config.out`, or the first unused one under runs/.
        loss: As in `signmaml_ext.meta_step`; None: cross-entropy for int64 labels, else the mean squared error.
        progress: Whether to show progress (a bar on a terminal, lines elsewhere).
        callbacks: Called with every record that goes to metrics.jsonl.
        group: The processes that train together (see `signmaml.distributed`), each with an equal trainer. All start
            from rank 0's weights; only rank 0 writes, shows progress and calls callbacks. None: this process alone.

    Raises:
        ValueError, TypeError: The configuration does not fit the data or the model, or names a device or backend that
            is not available.
        FileNotFoundError: The data are not on disk.

    Example:
        >>> import tempfile, signmaml
        >>> config = TrainConfig(data="sinusoid", model="mlp", shots=10, iterations=4, validate_tasks=5, test_tasks=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = MetaTrainer(config, out=f"{folder}/run", progress=False).fit()
        >>> result.iterations, result.test.metric
        (4, 'mse')
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module | None = None,
        train: building.Source = None,
        val: building.Source = None,
        test: building.Source = None,
        out: str | Path | None = None,
        loss: Loss | None = None,
        progress: bool = True,
        callbacks: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        group: Group | None = None,
    ) -> None:
        self.config = config
        self.group = group or Group()
        for name in ("wandb", "mlflow"):
            if getattr(config, name) and self.group.first:
                trackers.require_installed(name)
        self.device = building.resolve_device(config.device, self.group.local_rank)
        progress = progress and self.group.first
        self._out, self._show_progress, self._callbacks = out, progress, tuple(callbacks)
        own_data = train is not None
        self._sources = {"train": train, "val": val, "test": test}
        # Whether everything can be rebuilt from the configuration alone, as the command line does.
        self._self_contained = model is None and loss is None and not any(self._sources.values())
        with self.group.first_before_others():
            self._train_sampler = building.make_sampler(
                config, train, "train", self.device, training=True, progress=progress
            )
            # Open all splits now, so that a missing test set is not noticed only after hours of training.
            self._val_sampler = self._test_sampler = None
            if config.validate_every > 0 and (val is not None or not own_data):
                self._val_sampler = building.make_sampler(config, val, "val", self.device, progress=progress)
            if config.test_tasks > 0 and (test is not None or not own_data):
                self._test_sampler = building.make_sampler(config, test, "test", self.device, progress=progress)
        if config.patience > 0 and self._val_sampler is None:
            raise ValueError(f"patience: expected 0 without validation data (val=), found {config.patience}")
        self.data_name = building.data_name(config, [train, val, test])

        self._example = building.example_format(self._train_sampler)
        self.model = building.build_model(config, self._train_sampler) if model is None else model
        self.model.to(self.device)
        kinds = (config.learn_inner_lr, config.inner_lr, config.inner_steps, config.adapt)
        self.rates = InnerRates(self.model, *kinds, online=config.adapts_inner_lr())
        episodes = draw(self._train_sampler, 0)
        self._loss = loss or loss_for(episodes)
        self._arguments = building.step_arguments(config, self._loss)
        training = Training(config, self.model, self.rates, self._train_sampler, self._arguments, self.group)
        self._trained = training.trained
        # Reject a configuration that does not fit before a folder is created.
        one_task = episodes.part(0, 1)
        self._classification, unreached = try_one_task(training, one_task)
        self.explanation = signmaml_ext.explain(
            self.model,
            *episodes,
            inner_lr=self.rates.values(),
            inner_steps=config.inner_steps,
            **self._arguments,  # type: ignore[arg-type]
        )
        reason = why_no_graph(training, one_task)
        if config.graph and reason is not None:
            raise ValueError(f"graph: expected a run whose iterations a CUDA graph can hold, found that {reason}")
        step = MetaStep(self.model, training.trained, self.group, self._classification, unreached)
        self.optimizer = self._make_optimizer()
        self.online = self._online_rates()
        self._average = (
            Average(self._trained, config.average, config.iterations) if config.average is not None else None
        )
        self._iteration = Iteration(training, step, self.optimizer, reason, self.online, self._average)
        self.iteration = 0  # meta-iterations done
        self.best: Best | None = None
        self._seconds = 0.0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.outer_optimizer == "adamw":
            decay = 0.01 if config.outer_weight_decay is None else config.outer_weight_decay
            rates = {id(rate) for rate in self.rates.parameters()}
            weights = [tensor for tensor in self._trained.values() if id(tensor) not in rates]
            learned = [tensor for tensor in self._trained.values() if id(tensor) in rates]
            return outer_adamw(weights, learned, config.outer_lr, self.device, decay)
        make = outer_adam if config.outer_optimizer == "adam" else outer_sgd
        stepped = [tensor for tensor in self._trained.values() if tensor is not self.rates.online]
        return make(stepped, config.outer_lr, self.device)

    def _online_rates(self) -> OnlineRates | None:
        config = self.config
        if config.adapt_rates == "none":
            return None
        return OnlineRates(
            self.optimizer,
            self.rates.online,
            rule=config.adapt_rates,
            inner_hyper_lr=config.inner_hyper_lr,
            outer_hyper_lr=config.outer_hyper_lr,
        )

    @cached_property
    def run(self) -> RunFolder:
        """The run's folder; chosen, and created if necessary, on first access."""
        return choose_folder(self._out or self.config.out, self.data_name)

    # ---- Running

    def fit(self, *, resume: bool = False, overwrite: bool = False) -> FitResult:
        """Trains to the configuration's last iteration, tests the best weights, writes result and plots.

        On SIGINT or SIGTERM, finishes the current iteration, saves the state and raises `TrainingInterrupted`.

        Args:
            resume: Continue the run in the folder; its configuration may differ only in length, device and logging.
            overwrite: Replace a run that is in the folder.

        Raises:
            FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` is given.
            BlockingIOError: Another process is training in the folder.
            FileNotFoundError, ValueError: There is no run to resume, or it does not fit.
            TrainingInterrupted: On SIGINT or SIGTERM, after saving; several processes all stop at the next multiple
                of `log_every`.
            ProcessLost: Another process of several has ended or hangs.
            FloatingPointError: The weights became NaN or Inf (the last good checkpoint is kept), or
                `nonfinite="raise"` and a task met one.
        """
        with contextlib.ExitStack() as stack:
            self._settle_folder()
            claim = self.run.claimed(self.config, resume=resume, overwrite=overwrite)
            self.group.first_does(lambda: stack.enter_context(claim))
            self._load_state(resume)
            # Before the guard, because a tracker may ask for a login; before the configuration, because it may fail.
            tracking = self.group.first_does(lambda: stack.enter_context(self._tracked()))
            guard = stack.enter_context(SignalGuard())
            self.group.first_does(lambda: self.run.write_config(self.config))
            self._train(guard, tracking)
            evaluation = self._test_best(guard)
            if evaluation is not None and tracking is not None:
                tracking.write({"iteration": self.iteration, "split": "test", **_numbers(evaluation)})
            result = FitResult(evaluation, self.best, self.iteration, self._seconds, self.run.path)
            if self.group.first:
                self._write_result(result)
                self._draw_plots()
        return result

    def _tracked(self) -> contextlib.AbstractContextManager[trackers.Trackers]:
        wanted = {"wandb": self.config.wandb, "mlflow": self.config.mlflow}
        return trackers.tracked(self.run, self.config.to_dict(), wanted, quiet=not self._show_progress)

    def _settle_folder(self) -> None:
        """Rank 0 chooses the folder; the others get its name for messages."""
        chosen = self.group.first_does(lambda: str(self.run.path).encode())
        path = self.group.bytes_of_first(chosen).decode()
        if not self.group.first:
            self.run = RunFolder(path)

    def validate(self) -> Evaluation:
        """Validates the current weights as configured, always on the same tasks.

        Raises:
            ValueError: The trainer has no validation data.
        """
        return self._evaluate("val", self._val_sampler, self.config.validate_tasks)

    def test(self, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Tests the current weights as configured.

        Args:
            progress: Called with the number of tasks of each chunk.

        Raises:
            ValueError: The trainer has no test data.
        """
        return self._evaluate("test", self._test_sampler, self.config.test_tasks, progress)

    def describe(self) -> str:
        """A summary of this run in a few lines."""
        config, count = self.config, parameter_count(self.model)
        points = "" if config.data == "sinusoid" else f"{config.ways}-way "
        samplers = {"train": self._train_sampler, "val": self._val_sampler, "test": self._test_sampler}
        sizes = [f"{split} {s.size_in_words()}" for split, s in samplers.items() if isinstance(s, EpisodeSampler)]
        learned = "" if config.learn_inner_lr == "none" else f" (learned, {config.learn_inner_lr})"
        sharp = [f"sharp    {_sharpness_in_words(config)}"] if config.sharpness_lower or config.sharpness_upper else []
        rule = [] if config.takes_plain_steps() else [f"rule     {building.inner_rule(config)}"]
        adapted = "" if config.adapt_rates == "none" else f", rates adapted online ({config.adapt_rates})"
        optimizer = type(self.optimizer).__name__
        return "\n".join(
            (
                f"data     {self.data_name}: {points}{config.shots}-shot, {config.queries} queries a class"
                + (f", images changed ({', '.join(config.augment)})" if config.augment else ""),
                *(f"         {size}" for size in sizes),
                f"model    {type(self.model).__name__}, {count:,} parameters",
                f"method   {config.method}: {config.inner_steps} inner steps of {config.inner_lr:g}{learned}, "
                f"{config.tasks} tasks a meta-batch, {config.iterations} iterations, "
                f"{optimizer} {config.outer_lr:g} {config.schedule}{adapted}{_extras_in_words(config)}",
                *rule,
                *sharp,
                *str(self.explanation).replace("backend: ", "backend  ").splitlines(),
                f"device   {building.device_name(self.device)}",
                f"graph    {self._graph_in_words()}",
                f"folder   {self.run.path}",
            )
        )

    def _graph_in_words(self) -> str:
        reason = self._iteration.why_no_graph
        return "each iteration is one CUDA graph" if reason is None else f"none ({reason})"

    # ---- Training

    def _train(self, guard: SignalGuard, tracking: trackers.Trackers | None) -> None:
        config = self.config
        self.model.train()
        began = time.monotonic() - self._seconds
        with contextlib.ExitStack() as stack:
            writers: list[_Writer] = []
            if self.group.first:
                metrics = MetricsFile(self.run.metrics, keep_until=self.iteration)
                stack.callback(metrics.close)
                writers.append(metrics)
            if self.group.first and tensorboard_wanted(config.tensorboard):
                board = TensorBoard(self.run.tensorboard, self.iteration)
                stack.callback(board.close)
                writers.append(board)
            progress = stack.enter_context(Progress(config.iterations, self.iteration, enabled=self._show_progress))
            writers += [progress] if tracking is None else [progress, tracking]
            if self.iteration < config.iterations and self._has_lost_patience():  # in an earlier part of the run
                progress.message(self._why_early())
            while self.iteration < config.iterations and not self._has_lost_patience():
                self._train_step()
                progress.advance()
                last = self.iteration == config.iterations
                if last or self.iteration % config.log_every == 0:
                    self._log(writers, self._training_record())
                if self._val_sampler is not None and (last or self.iteration % config.validate_every == 0):
                    self._log(writers, self._validation_record())
                if not last and self._has_lost_patience():
                    last = True
                    if len(self._iteration.window):
                        self._log(writers, self._training_record())
                    progress.message(self._why_early())
                stopping = self._is_to_stop(guard)
                if last or stopping or self.iteration % config.checkpoint_every == 0:
                    self._seconds = time.monotonic() - began
                    if self.group.first:
                        metrics.sync()
                    self._save_state()
                if stopping and not last:
                    raise self._interrupted(guard)

    def _has_lost_patience(self) -> bool:
        """Whether so many validations were worse than the best one that training ends."""
        waited = 0 if self.best is None else self.iteration - self.best.iteration
        return self.config.patience > 0 and waited >= self.config.patience * self.config.validate_every

    def _why_early(self) -> str:
        assert self.best is not None
        since = f"{self.config.patience} validation{'s' * (self.config.patience > 1)}"
        return f"stopped early at iteration {self.iteration}: {since} since the best one, at {self.best.iteration}"

    def _is_to_stop(self, guard: SignalGuard) -> bool:
        """Whether to stop after this iteration; several processes exchange this only every `log_every` iterations."""
        if self.group.size > 1 and self.iteration % self.config.log_every != 0:
            return False
        return self.group.any(guard.received is not None)

    def _train_step(self) -> None:
        """One meta-iteration; never waits for the device once its graph is recorded."""
        before = self._iteration.why_no_graph
        self._iteration.run(self.iteration)
        self.iteration += 1
        if self._iteration.why_no_graph != before:
            warnings.warn(f"training goes on without a CUDA graph: {self._iteration.why_no_graph}", stacklevel=2)

    def _outer_lr(self, iteration: int) -> float:
        config = self.config
        return learning_rate(config.schedule, config.outer_lr, iteration, config.iterations, config.warmup)

    def _training_record(self) -> dict[str, Any]:
        """Means since the last record. Synchronises with the device."""
        window = self._iteration.window
        rows = window.present().cpu()
        window.fill(rows[:0])
        loss, accuracy, _ = rows.mean(0).tolist()
        nonfinite = int(rows[:, 2].sum())
        record: dict[str, Any] = {"iteration": self.iteration, "split": "train", "loss": loss}
        if self._classification:
            record["accuracy"] = accuracy
        record |= {"outer_lr": self._outer_lr(self.iteration - 1), "nonfinite_tasks": nonfinite}
        if self.online is not None:
            # The outer rate as the last step used it and before the schedule; the inner rate of the next meta-step.
            beta, used = float(self.online.outer_lr), float(self.online.outer_lr * self.online.factor)
            with torch.no_grad():
                record |= {"outer_lr": used, "outer_lr_before_schedule": beta, "inner_lr": self.rates.values()}
        if self.rates.logs:
            rates = torch.cat([log.detach().exp().flatten() for log in self.rates.logs.values()])
            low, mean, high = torch.stack((rates.min(), rates.mean(), rates.max())).tolist()
            record |= {"inner_lr_min": low, "inner_lr_mean": mean, "inner_lr_max": high}
        return record

    def _validation_record(self) -> dict[str, Any]:
        with self._averaged():
            found = self.validate()
            if self.best is None or self.best.beaten_by(found):
                self.best = Best(self.iteration, found.metric, found.mean)
                self._save_best()
        return {"iteration": self.iteration, "split": "val", **_numbers(found)}

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The weights are their moving average meanwhile, if there is one."""
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    def _log(self, writers: Sequence[_Writer], record: Mapping[str, Any]) -> None:
        if not self.group.first:
            return
        for writer in writers:
            writer.write(record)
        for callback in self._callbacks:
            callback(record)

    # ---- State on disk

    def _save_state(self) -> None:
        """Writes last.safetensors: everything that the next iteration depends on.

        Raises:
            FloatingPointError: The weights are not finite; the last good state is kept.
            OSError: The state could not be written; the last good one is kept.
        """
        broken = [name for name, p in self._trained.items() if not bool(p.isfinite().all())]
        if broken:
            raise FloatingPointError(
                f"weights turned NaN or Inf by iteration {self.iteration} (first {broken[0]!r}); the last good state "
                f"is {self.run.last}. Try a smaller inner_lr or outer_lr, or nonfinite='skip'"
            )
        online = {} if self.online is None else self.online.tensors()
        self.group.check_same([*self._trained.values(), *online.values()], "weights")
        window = self._iteration.window.present()
        average = {} if self._average is None else self._average.tensors
        tensors = state.pack(self.model, self.rates, self._trained, self.optimizer, window, online, average)
        metadata = {
            "iteration": self.iteration,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "seconds": self._seconds,
            "inner_rates": self.rates.to_json(),
            "config": self.config.to_dict(),
            "self_contained": self._self_contained,
            "example": None if self._example is None else self._example.to_json(),
            "torch": torch.__version__,
        }
        try:
            self.group.first_does(lambda: checkpoint.save(self.run.last, tensors, kind="training", metadata=metadata))
        except OSError as error:
            safe = f"the last good state is {self.run.last}" if self.run.last.is_file() else "there is no earlier state"
            raise OSError(
                error.errno, f"{error.strerror or error}: iteration {self.iteration} is not saved; {safe}"
            ) from error

    def _load_state(self, resume: bool) -> None:
        """Loads last.safetensors when resuming, if it exists; rank 0 sends weights, state and iteration to all."""
        last = self.run.last
        found = self.group.first_does(lambda: last.read_bytes() if resume and last.is_file() else b"")
        content = self.group.bytes_of_first(found)
        if not content:
            self._share_weights()
            if self._average is not None:
                self._average.restart()
            return
        tensors, metadata = checkpoint.parse(content, last, kind="training")
        iteration, seconds, best = state.checked_metadata(metadata, str(last))
        if iteration > self.config.iterations:
            raise ValueError(
                f"iterations: expected at least the {iteration} that the run has done, found {self.config.iterations}"
            )
        where = str(self.run.last)
        online = {} if self.online is None else self.online.tensors()
        average = {} if self._average is None else self._average.tensors
        window = state.unpack(tensors, self.model, self.rates, self._trained, self.optimizer, where, online, average)
        self._iteration.window.fill(window)
        self.iteration, self._seconds, self.best = iteration, seconds, best

    def _share_weights(self) -> None:
        self.group.copy_from_first([*self.model.state_dict().values(), *self.rates.parameters()])

    def _save_best(self) -> None:
        metadata = {
            "iteration": self.iteration,
            "validation": None if self.best is None else dataclasses.asdict(self.best),
            "inner_rates": self.rates.to_json(),
            "config": self.config.to_dict(),
            "self_contained": self._self_contained,
            "example": None if self._example is None else self._example.to_json(),
        }
        self.group.first_does(
            lambda: checkpoint.save_weights(self.model, self.run.best, metadata, self.rates.tensors())
        )

    def load_weights(self, path: str | Path) -> None:
        """Loads the weights, and the inner rates if they were learned or adapted, from a weights file.

        Raises:
            FileNotFoundError, ValueError: As `signmaml.checkpoint.load_weights`.
        """
        metadata = checkpoint.load_weights(self.model, path)
        if "inner_rates" in metadata:
            beside = checkpoint.load(path)[0] if self.rates.tensors() else {}
            self.rates.load_json(metadata["inner_rates"], beside)

    def _interrupted(self, guard: SignalGuard) -> TrainingInterrupted:
        return TrainingInterrupted(
            f"stopped after iteration {self.iteration} of {self.config.iterations}; everything is saved. "
            f"Continue with: signmaml train --resume {self.run.path}",
            guard.received or signal.SIGTERM,  # another process may have received the signal
        )

    # ---- Evaluation

    def _evaluate(
        self, split: str, sampler: Sampler | None, tasks: int, progress: Callable[[int], None] | None = None
    ) -> Evaluation:
        if sampler is None:
            raise ValueError(f"{split}: expected data for this split, found none")
        config = self.config
        report: dict[str, Any] = {"data": self.data_name, "split": split}
        if self._sources[split] is None:
            report |= {"ways": config.ways, "shots": config.shots, "queries": config.evaluation_queries()}
        return evaluate_sampler(
            self.model,
            sampler,
            tasks=tasks,
            chunk=default_chunk(self.device),
            report=report,
            progress=progress,
            group=self.group,
            **building.evaluation_arguments(config, self.rates, self._loss),
        )

    def _test_best(self, guard: SignalGuard) -> Evaluation | None:
        """Loads the best weights into the model and tests them."""
        if self.best is None:
            with self._averaged():
                self._save_best()  # without validation the last weights are the best
        self.group.first_does(lambda: self.load_weights(self.run.best))
        self._share_weights()
        if self._test_sampler is None:
            return None
        with counting("test", self.config.test_tasks, enabled=self._show_progress) as count:

            def count_or_stop(tasks: int) -> None:
                count(tasks)
                if guard.received is not None:
                    raise self._interrupted(guard)

            return self.test(count_or_stop)

    def _write_result(self, result: FitResult) -> None:
        self.run.write_result(
            {
                **result.to_dict(),
                "parameters": parameter_count(self.model),
                "device": building.device_name(self.device),
                "versions": {"signmaml_ext": version(), "torch": torch.__version__},
                "config": self.config.to_dict(),
            }
        )

    def _draw_plots(self) -> None:
        from . import plots

        plots.draw_curves(self.run.metrics, self.run.curves)
        sampler = self._test_sampler or self._val_sampler or self._train_sampler
        arguments = building.evaluation_arguments(self.config, self.rates, self._loss)
        split = "test" if self._test_sampler else "val" if self._val_sampler else "train"
        title = f"{self.data_name}/{split}, {self.config.method}"
        plots.draw_task(self.model, sampler, self.run.episode, title=title, **arguments)


def _numbers(found: Evaluation) -> dict[str, Any]:
    """An evaluation as a record has it."""
    accuracy = {"accuracy": found.mean} if found.metric == "accuracy" else {}
    return {
        "loss": found.loss,
        **accuracy,
        "ci95": found.ci95,
        "tasks": found.tasks,
        "nonfinite_tasks": found.nonfinite,
    }


def _extras_in_words(config: TrainConfig) -> str:
    """Such as ", warm-up 100, gradients of at most 1, patience 5"."""
    words = {
        f", losses of all steps for {config.multi_step_loss}": config.multi_step_loss > 0,
        f", first order for {config.first_order_for}": config.first_order_for > 0,
        f", warm-up {config.warmup}": config.warmup > 0,
        f", gradients of at most {config.clip_gradient or 0:g}": config.clip_gradient is not None,
        f", average {config.average or 0:g}": config.average is not None,
        f", patience {config.patience}": config.patience > 0,
    }
    return "".join(text for text, said in words.items() if said)


def _sharpness_in_words(config: TrainConfig) -> str:
    """Such as "lower 0.05, upper 0.005 (l2)"."""
    sides = {"lower": config.sharpness_lower, "upper": config.sharpness_upper}
    radii = ", ".join(f"{side} {rho:g}" for side, rho in sides.items() if rho)
    return f"{radii} ({'adaptive ' * config.sharpness_adaptive}{config.sharpness_norm})"
