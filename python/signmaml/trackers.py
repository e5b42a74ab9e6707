"""Experiment trackers: records of a run for Weights & Biases and MLflow, where they are installed.

Both keep to their own environment variables for where records go: WANDB_MODE=offline keeps them in the run's folder
(`wandb sync` sends them later), MLFLOW_TRACKING_URI names a server, a database or a folder. A resumed run goes on in
the same tracked run, whose names stand in tracking.json in the run's folder.

A tracker that cannot start stops a new run before it begins. From then on no trouble of a tracker ends a training: it
is a warning, and metrics.jsonl has all records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .files import write_atomically
from .loggers import Record, numbers_of
from .runs import RunFolder

PROJECT = "signmaml"  # of Weights & Biases, and the experiment's name in MLflow
SECONDS_TO_END = 30.0  # for records that are still on their way when training ends
MOST_WAITING = 10_000  # records


class Tracker(Protocol):
    """An open tracked run."""

    def write(self, record: Record) -> None:
        """Takes a record; never waits for a server."""

    def close(self, failed: bool) -> None:
        """Ends the tracked run."""


def require_installed(name: str) -> None:
    """Raises ModuleNotFoundError, saying what to install, unless a tracker's package is there."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, such as the one that wandb writes
        raise ModuleNotFoundError(f"{name}: expected the package {name} (pip install {name}), found none")


@contextlib.contextmanager
def tracked(run: RunFolder, config: Mapping[str, Any], wanted: Mapping[str, bool], quiet: bool) -> Iterator[Trackers]:
    """The trackers that a configuration asks for; closes them, as failed if an exception passes.

    Args:
        run: The run's folder, which exists.
        config: The configuration as plain values.
        wanted: Whether to use "wandb" and "mlflow".
        quiet: Whether Weights & Biases prints nothing.

    Raises:
        ValueError: A tracker cannot start a run, or tracking.json is damaged. One that cannot go on with the run that
            it knows is a warning instead: a program may have restarted the training at night.
    """
    trackers = Trackers()
    failed = True
    try:
        names = Names(run.tracking) if any(wanted.values()) else None
        for name, start in (("wandb", WeightsAndBiases), ("mlflow", MLflow)):
            if not wanted[name] or names is None:
                continue
            known = names.get(name)
            try:
                trackers.open[name] = start(run.path, config, names, quiet)
            except Exception as error:
                if known is None:
                    raise ValueError(f"{name}: expected a tracker that starts, found {_in_short(error)}") from error
                _warn(f"{name}: the tracked run {known} cannot go on, so no records are sent: {_in_short(error)}")
        yield trackers
        failed = False
    finally:
        trackers.close(failed)


class Trackers:
    """The open trackers of a run, none of which can end it.

    Attributes:
        open: By name; one that failed is left out from then on.
    """

    def __init__(self) -> None:
        self.open: dict[str, Tracker] = {}

    def write(self, record: Record) -> None:
        """Hands a record to every tracker."""
        for name, tracker in list(self.open.items()):
            try:
                tracker.write(record)
            except Exception as error:
                _warn(f"{name}: records from iteration {record['iteration']} on are lost: {_in_short(error)}")
                self._close(name, failed=True)

    def close(self, failed: bool) -> None:
        """Closes every tracker."""
        for name in list(self.open):
            self._close(name, failed)

    def _close(self, name: str, failed: bool) -> None:
        try:
            self.open.pop(name).close(failed)
        except Exception as error:
            _warn(f"{name}: the tracked run may be incomplete: {_in_short(error)}")


class Names:
    """The names by which trackers know a run, kept in a JSON file from their first use.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path.is_file():
            try:
                self._known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: expected a JSON object with names of tracked runs, found {error}") from error

    def get(self, tracker: str) -> str | None:
        """The name that a tracker knows the run by; None before its first use."""
        return self._known.get(tracker)

    def keep(self, tracker: str, name: str) -> None:
        """Stores a tracker's name of the run."""
        self._known[tracker] = name
        write_atomically(self._path, json.dumps(self._known, indent=2) + "\n")


class WeightsAndBiases:
    """A run of Weights & Biases of its own, in the project `signmaml` or in that of WANDB_PROJECT."""

    def __init__(self, folder: Path, config: Mapping[str, Any], names: Names, quiet: bool) -> None:
        import wandb

        limits: dict[str, Any] = {"finish_timeout": SECONDS_TO_END, "finish_timeout_raises": True}
        # Versions before 0.26 or so have no such limit.
        limits = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=names.get("wandb") or uuid.uuid4().hex[:12],
            resume="allow",
            reinit="create_new",  # leaves a run that the caller has open alone
            dir=folder,
            config=dict(config),
            allow_val_change=True,  # a resumed run may be longer
            # Wrapping the streams would break the progress bar.
            settings=wandb.Settings(silent=quiet, console="off", **limits),
        )
        names.keep("wandb", self._run.id)
        # Not the tracker's own step: a resumed run may repeat records, which that would refuse.
        self._run.define_metric("*", step_metric="iteration")

    def write(self, record: Record) -> None:
        self._run.log({"iteration": record["iteration"], **numbers_of(record)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow in the experiment `signmaml`, or in that of MLFLOW_EXPERIMENT_NAME.

    A run that the caller has open is not touched.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], names: Names, quiet: bool = True) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = names.get("mlflow")
        if known is None:
            self._run = self._new_run(folder, config, names)
        else:
            self._client.update_run(known, status="RUNNING")
            self._run = known
        self._sender = _Sender()

    def _new_run(self, folder: Path, config: Mapping[str, Any], names: Names) -> str:
        from mlflow.entities import Param

        name: str = self._client.create_run(self._experiment(), run_name=folder.name).info.run_id
        names.keep("mlflow", name)
        self._client.log_batch(name, params=[Param(key, str(value)) for key, value in config.items()])
        return name

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another process was quicker
                if found is None:
                    raise
        return str(found.experiment_id)

    def write(self, record: Record) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, record["iteration"]) for name, value in numbers_of(record).items()]
        self._sender.put(lambda: self._client.log_batch(self._run, metrics=metrics))

    def close(self, failed: bool) -> None:
        status = "FAILED" if failed else "FINISHED"
        self._sender.put(lambda: self._client.set_terminated(self._run, status))
        self._sender.finish()


class _Sender:
    """Makes calls one by one in a thread, so that a slow server does not hold up the training."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(MOST_WAITING)
        self._sent, self._lost, self._why = 0, 0, ""
        self._put = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="records")
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Queues a call; raises queue.Full if too many wait."""
        self._waiting.put_nowait(call)
        self._put += 1

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                call()
                self._sent += 1
            except Exception as error:  # said in `finish`; the server may be back for the next one
                self._lost, self._why = self._lost + 1, _in_short(error)

    def finish(self) -> None:
        """Waits for what is on its way, but not long.

        Raises:
            ConnectionError: Calls failed, or are still on their way.
        """
        with contextlib.suppress(queue.Full):  # then the thread is found alive
            self._waiting.put_nowait(None)
        self._thread.join(SECONDS_TO_END)
        missing = self._put - self._sent
        if self._thread.is_alive():
            raise ConnectionError(f"{missing} of {self._put} messages were not sent within {SECONDS_TO_END:g} s")
        if self._lost:
            raise ConnectionError(f"{self._lost} of {self._put} messages are lost, the last one by {self._why}")


def _in_short(error: Exception) -> str:
    """An exception in one line."""
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
