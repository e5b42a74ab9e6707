"""The folder of a run: its files, and the lock that admits one writing process."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import config as configs
from .config import TrainConfig
from .files import exclusive, first_free, remove_leftovers, write_atomically


class RunFolder:
    """Names of the files in one run's folder.

    Attributes:
        path: The folder.
        config: config.yaml, the configuration the run was started (or last resumed) with.
        metrics: metrics.jsonl, one record per line.
        last: last.safetensors, the state to resume from.
        best: best.safetensors, weights with the best validation result.
        result: result.json, the test at the end.
        curves: curves.png.
        episode: episode.png: one test episode with predictions, or fits of sine waves.
        tensorboard: Folder of TensorBoard events.
        tracking: tracking.json, the names by which experiment trackers know the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.result = self.path / "result.json"
        self.curves = self.path / "curves.png"
        self.episode = self.path / "episode.png"
        self.tensorboard = self.path / "tensorboard"
        self.tracking = self.path / "tracking.json"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any(path.exists() for path in (self.config, self.metrics, self.last, self.best, self.result))

    def clear(self) -> None:
        """Removes the run's files and leaves everything else in the folder."""
        own = (self.last, self.best, self.result, self.curves, self.episode, self.metrics, self.tracking, self.config)
        for path in own:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def read_config(self) -> TrainConfig:
        """The stored configuration.

        Raises:
            FileNotFoundError: No run was started here.
            ValueError: The file is damaged.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"run folder: expected one with a config.yaml, found none in {self.path}")
        return TrainConfig.from_dict(configs.read_file(self.config), str(self.config))

    def write_config(self, config: TrainConfig) -> None:
        write_atomically(self.config, config.to_yaml())

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomically(self.result, json.dumps(result, indent=2) + "\n")

    @contextlib.contextmanager
    def claimed(self, config: TrainConfig, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Locks the folder for one run of `config`; with `overwrite`, removes the run in it.

        Raises:
            FileExistsError: There is a run, and neither `resume` nor `overwrite` is set.
            FileNotFoundError: There is no run to resume.
            BlockingIOError: Another process is training here.
            ValueError: The run to resume has another configuration; the message names the fields.
        """
        if resume and not self.holds_run():
            raise FileNotFoundError(f"run folder: expected a run to resume, found none in {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            if resume:
                changed = configs.differences(self.read_config(), config)
                if changed:
                    raise ValueError(
                        f"resume: expected the configuration of {self.config} (only the length, device and logging "
                        f"may differ), found {'; '.join(changed)}"
                    )
            elif self.holds_run() and not overwrite:
                raise FileExistsError(
                    f"run folder: expected an empty one, found a run in {self.path}; "
                    f"continue it with --resume {self.path}, or replace it with --overwrite"
                )
            else:
                self.clear()
            remove_leftovers(self.path)
            yield


def choose_folder(out: str | Path | None, data_name: str) -> RunFolder:
    """The folder `out`, else the first unused one of runs/DATA, runs/DATA-2, ... (created at once)."""
    return RunFolder(first_free(Path("runs") / data_name) if out is None else out)
