"""Experiment trackers: records of a run for Weights & Biases and MLflow, where they are installed.

Both keep to their own environment variables for where records go: WANDB_MODE=offline keeps them in the run's folder
(`wandb sync` sends them later), MLFLOW_TRACKING_URI names a server, a database or a folder. A resumed run goes on in
the same tracked run, whose names stand in tracking.json in the run's folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .files import write_atomically
from .loggers import Record
from .runs import RunFolder

PROJECT = "signmaml"  # of Weights & Biases, and the experiment's name in MLflow


class Tracker(Protocol):
    """An open tracked run."""

    def write(self, record: Record) -> None: ...

    def close(self, failed: bool) -> None: ...


def require_installed(name: str) -> None:
    """Raises ModuleNotFoundError, saying what to install, unless a tracker's package is there."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{name}: expected the package {name} (pip install {name}), found none")


@contextlib.contextmanager
def tracked(
    run: RunFolder, config: Mapping[str, Any], *, wandb: bool, mlflow: bool, quiet: bool
) -> Iterator[list[Tracker]]:
    """The trackers that a configuration asks for; closes them, as failed if an exception passes.

    Args:
        run: The run's folder, which exists.
        config: The configuration as plain values.
        wandb: Whether to track with Weights & Biases.
        mlflow: Whether to track with MLflow.
        quiet: Whether Weights & Biases prints nothing.
    """
    names = Names(run.tracking)
    trackers: list[Tracker] = []
    failed = True
    try:
        if wandb:
            trackers.append(WeightsAndBiases(run.path, config, names, quiet))
        if mlflow:
            trackers.append(MLflow(run.path, config, names))
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


class Names:
    """The names by which trackers know a run, kept in a JSON file from their first use.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def get(self, tracker: str) -> str | None:
        """The name that a tracker knows the run by; None before its first use."""
        return self._known.get(tracker)

    def keep(self, tracker: str, name: str) -> None:
        """Stores a tracker's name of the run."""
        self._known[tracker] = name
        write_atomically(self._path, json.dumps(self._known, indent=2) + "\n")


def numbers_of(record: Record) -> dict[str, float]:
    """A record's numbers under `split/name`, as TensorBoard has them."""
    return {
        f"{record['split']}/{name}": value
        for name, value in record.items()
        if name not in ("iteration", "split") and isinstance(value, (int, float))
    }


class WeightsAndBiases:
    """A run of Weights & Biases in the project `signmaml`, or in that of WANDB_PROJECT."""

    def __init__(self, folder: Path, config: Mapping[str, Any], names: Names, quiet: bool) -> None:
        import wandb

        known = names.get("wandb") or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=known,
            resume="allow",
            dir=folder,
            config=dict(config),
            # Wrapping the streams would break the progress bar.
            settings=wandb.Settings(silent=quiet, console="off"),
        )
        names.keep("wandb", known)

    def write(self, record: Record) -> None:
        self._run.log(numbers_of(record), step=record["iteration"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow in the experiment `signmaml`; a run that the caller has open is not touched."""

    def __init__(self, folder: Path, config: Mapping[str, Any], names: Names) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = names.get("mlflow")
        if known is None:
            experiment = self._client.get_experiment_by_name(PROJECT)
            number = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
            known = self._client.create_run(number, run_name=folder.name).info.run_id
            self._client.log_batch(known, params=[Param(name, str(value)) for name, value in config.items()])
            names.keep("mlflow", known)
        else:
            self._client.set_terminated(known, "RUNNING")
        self._run, self._lost = known, False

    def write(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        if self._lost:
            return
        try:
            for name, value in numbers_of(record).items():
                self._client.log_metric(self._run, name, value, step=record["iteration"])
        except MlflowException as error:
            # A server that is gone must not end hours of training; metrics.jsonl has all records.
            self._lost = True
            warnings.warn(f"mlflow: records from iteration {record['iteration']} on are lost: {error}", stacklevel=2)

    def close(self, failed: bool) -> None:
        if not self._lost:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
