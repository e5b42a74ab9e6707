"""Weights & Biases and MLflow, both offline: a run's records, its resumption, and what must not harm it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.programs.toy_run import toy_config, toy_trainer
from signmaml import cli, trackers
from signmaml.loggers import read_metrics
from signmaml.runs import RunFolder
from signmaml.trackers import Names, WeightsAndBiases
from training.test_outer_loop import lose
from training.test_resume import assert_same_run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def client() -> Any:
    return pytest.importorskip("mlflow").MlflowClient()


def wandb_records(folder: Path) -> list[dict[str, float]]:
    """The history of all offline parts of a run, in the order in which they were written."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records: list[Any] = []
        deadline = time.monotonic() + 20
        # Its service may still be writing.
        while not records or records[-1].WhichOneof("record_type") not in ("exit", "footer"):
            assert time.monotonic() < deadline, "the file never ends"
            time.sleep(0.05)
            records = [messages.Record.FromString(data) for data in log_entries(path.read_bytes())]
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def log_entries(content: bytes) -> list[bytes]:
    """The entries of a log as LevelDB writes them, behind a header of 7 bytes: blocks of 32 KiB hold fragments."""
    entries, parts, place = [], [], 7
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # no fragment starts so near a block's end
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + length > len(content):  # half written
            break
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            entries.append(b"".join(parts))
            parts = []
    return entries


def test_weights_and_biases_has_all_records_and_the_test(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    result = toy_trainer(tmp_path / "run", wandb=True).fit()
    rows = wandb_records(tmp_path / "run")
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        at_step = [row for row in rows if row["iteration"] == record["iteration"]]
        assert any(row.get(f"{record['split']}/loss") == pytest.approx(record["loss"]) for row in at_step)
    assert any(row.get("test/accuracy") == pytest.approx(result.test.mean) for row in rows)


def test_mlflow_has_all_records_the_configuration_and_the_test(tmp_path: Path) -> None:
    mlflow = client()
    result = toy_trainer(tmp_path / "run", mlflow=True).fit()
    number = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    run = mlflow.get_run(number)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["ways"] == "3" and run.data.params["method"] == "sign-maml"
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    wanted = {record["iteration"]: record["loss"] for record in records if record["split"] == "train"}
    assert {point.step: point.value for point in mlflow.get_metric_history(number, "train/loss")} == wanted
    assert run.data.metrics["test/accuracy"] == result.test.mean


def test_a_resumed_run_goes_on_in_the_same_tracked_run(tmp_path: Path) -> None:
    mlflow = client()
    pytest.importorskip("wandb")
    toy_trainer(tmp_path / "whole", 12).fit()
    lose(toy_trainer(tmp_path / "run", 12, wandb=True, mlflow=True), 7)
    names = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert mlflow.get_run(names["mlflow"]).info.status == "FAILED"
    toy_trainer(tmp_path / "run", 12, wandb=True, mlflow=True).fit(resume=True)
    assert json.loads((tmp_path / "run" / "tracking.json").read_text()) == names
    assert mlflow.get_run(names["mlflow"]).info.status == "FINISHED"
    experiment = mlflow.get_experiment_by_name("signmaml")
    assert len(mlflow.search_runs([experiment.experiment_id])) == 1
    points = mlflow.get_metric_history(names["mlflow"], "train/loss")
    assert [point.step for point in points] == [4, 8, 12], "the checkpoint at 5 lies behind the record at 4"
    parts = [path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert parts == [names["wandb"]] * 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_new_run_in_the_folder_is_a_new_tracked_run(tmp_path: Path) -> None:
    mlflow = client()
    toy_trainer(tmp_path / "run", 4, mlflow=True).fit()
    first = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    toy_trainer(tmp_path / "run", 4, mlflow=True).fit(overwrite=True)
    second = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    assert first != second and mlflow.get_run(first).info.status == "FINISHED"


def test_a_server_that_is_gone_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses the records sent meanwhile, and says so."""
    mlflow = client()
    send = mlflow.__class__.log_batch

    def refuse_once(self: Any, run: str, metrics: Any = (), params: Any = ()) -> Any:
        if metrics and metrics[0].step == 8:
            raise ConnectionError("refused")
        return send(self, run, metrics=metrics, params=params)

    monkeypatch.setattr(mlflow.__class__, "log_batch", refuse_once)
    with pytest.warns(
        UserWarning, match=r"mlflow: .* 1 of \d+ messages are lost, the last one by ConnectionError: ref"
    ):
        result = toy_trainer(tmp_path / "run", 12, mlflow=True).fit()
    assert result.iterations == 12 and result.test is not None
    number = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    assert [point.step for point in mlflow.get_metric_history(number, "train/loss")] == [4, 12]
    assert mlflow.get_run(number).info.status == "FINISHED"


class Broken:
    """A tracker that fails where it is told to."""

    def __init__(self, *_: Any, failing: str) -> None:
        self.failing, self.closed = failing, False

    def write(self, record: Any) -> None:
        if self.failing == "write":
            raise BrokenPipeError("service is dead")

    def close(self, failed: bool) -> None:
        self.closed = True
        if self.failing == "close":
            raise ConnectionResetError("service is dead")


@pytest.mark.parametrize("failing", ["write", "close"])
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_no_trouble_of_a_tracker_ends_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, name: str
) -> None:
    made: dict[str, Broken] = {}

    def starting(which: str) -> Any:
        def start(*_: Any) -> Broken:
            made[which] = Broken(failing=failing if which == name else "")
            return made[which]

        return start

    monkeypatch.setattr(trackers, "WeightsAndBiases", starting("wandb"))
    monkeypatch.setattr(trackers, "MLflow", starting("mlflow"))
    monkeypatch.setattr(trackers, "require_installed", lambda _: None)
    both = {"wandb": True, "mlflow": True}
    with pytest.warns(UserWarning, match=f"{name}: .* service is dead"):
        toy_trainer(tmp_path / "run", 5, **both).fit()
    assert all(tracker.closed for tracker in made.values())
    made.clear()
    with pytest.warns(UserWarning, match=f"{name}: .* service is dead"):
        lose(toy_trainer(tmp_path / "lost", 8, **both), 5)  # the training's own error is what is seen
    assert all(tracker.closed for tracker in made.values())


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no API key\nand more lines")

    with monkeypatch.context() as patched:
        patched.setattr(trackers, "WeightsAndBiases", refuse)
        patched.setattr(trackers, "require_installed", lambda _: None)
        with pytest.raises(ValueError, match=r"wandb: .* starts, found RuntimeError: no API key$"):
            toy_trainer(tmp_path / "run", 4, wandb=True).fit()
    assert not RunFolder(tmp_path / "run").holds_run()
    toy_trainer(tmp_path / "run", 4).fit()  # the folder is free


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_without_a_tracker_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("server is away")

    monkeypatch.setattr(trackers, "WeightsAndBiases", refuse)
    monkeypatch.setattr(trackers, "MLflow", refuse)
    monkeypatch.setattr(trackers, "require_installed", lambda _: None)
    lose(toy_trainer(tmp_path / "run", 12), 7)
    Names(tmp_path / "run" / "tracking.json").keep(name, "known")
    with pytest.warns(UserWarning, match=f"{name}: the tracked run known cannot go on, so no records are sent: Conn"):
        result = toy_trainer(tmp_path / "run", 12, **{name: True}).fit(resume=True)
    assert result.iterations == 12


def test_a_refused_resume_leaves_the_tracked_run_alone(tmp_path: Path) -> None:
    mlflow = client()
    toy_trainer(tmp_path / "run", 8, mlflow=True).fit()
    number = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    with pytest.raises(ValueError, match="iterations: expected at least the 8"):
        toy_trainer(tmp_path / "run", 4, mlflow=True).fit(resume=True)
    assert mlflow.get_run(number).info.status == "FINISHED"


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "SECONDS_TO_END", 0.2)
    released = threading.Event()
    sender = trackers._Sender()
    for _ in range(3):
        sender.put(lambda: released.wait(20))
    with pytest.raises(ConnectionError, match=r"3 of 3 messages were not sent within 0.2 s"):
        sender.finish()
    released.set()


def test_a_run_that_mlflow_does_not_know_goes_on_untracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client()
    lose(toy_trainer(tmp_path / "run", 12, mlflow=True), 7)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    with pytest.warns(UserWarning, match="mlflow: the tracked run [0-9a-f]+ cannot go on, so no records are sent"):
        result = toy_trainer(tmp_path / "run", 12, mlflow=True).fit(resume=True)
    assert result.iterations == 12


def test_a_damaged_file_of_names_is_said(tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(ValueError, match=r"tracking\.json: expected a JSON object with names of tracked runs, found"):
        Names(tmp_path / "tracking.json")


def test_a_run_that_the_caller_has_open_is_left_alone(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    own = wandb.init(project="own", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    tracker = WeightsAndBiases(tmp_path, {}, Names(tmp_path / "tracking.json"), quiet=True)
    tracker.write({"iteration": 3, "split": "val", "loss": 1.0})
    tracker.close(failed=False)
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"] != own.id
    own.log({"mine": 1.0})
    own.finish()
    assert {"mine", "val/loss"} <= {name for row in wandb_records(tmp_path) for name in row}


def test_records_hold_numbers_alone_and_may_repeat(tmp_path: Path) -> None:
    """A resumed run repeats what it wrote since its last checkpoint; text is no metric, and a NaN is one."""
    pytest.importorskip("wandb")
    tracker = WeightsAndBiases(tmp_path, {}, Names(tmp_path / "tracking.json"), quiet=True)
    for iteration in (3, 4, 3):
        tracker.write({"iteration": iteration, "split": "val", "loss": math.nan, "accuracy": 0.5, "name": "text"})
    tracker.close(failed=False)
    rows = wandb_records(tmp_path)
    assert [row["iteration"] for row in rows] == [3, 4, 3]
    assert all(
        row["val/accuracy"] == 0.5 and "val/name" not in row and math.isnan(float(row["val/loss"])) for row in rows
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == name else find(asked, *rest))
    with pytest.raises(ModuleNotFoundError, match=rf"{name}: expected the package {name} \(pip install {name}\)"):
        toy_trainer(tmp_path / "run", **{name: True})
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", f"--{name}", "--out", str(tmp_path / "other")]) == 2
    assert f"pip install {name}" in capsys.readouterr().err


def test_a_folder_named_like_the_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "namespace_only").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="namespace_only: expected the package"):
        trackers.require_installed("namespace_only")


def test_trackers_are_off_unless_asked_for() -> None:
    assert not toy_config(3).wandb and not toy_config(3).mlflow
