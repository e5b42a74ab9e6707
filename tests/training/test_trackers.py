"""Weights & Biases and MLflow, both offline: a run's records, its resumption, and what must not harm it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.programs.toy_run import toy_config, toy_trainer
from signmaml import cli
from signmaml.loggers import read_metrics
from signmaml.trackers import MLflow, Names, WeightsAndBiases
from training.test_outer_loop import lose
from training.test_resume import assert_same_run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def client() -> Any:
    return pytest.importorskip("mlflow").MlflowClient()


def wandb_records(folder: Path) -> list[dict[str, float]]:
    """The history of all offline parts of a run, in the order in which they were written."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_entries(path.read_bytes()):
            record = messages.Record.FromString(data)
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
        at_step = [row for row in rows if row["_step"] == record["iteration"]]
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
    assert {point.step for point in points} == {4, 8, 12}
    assert {path.name.rsplit("-", 1)[1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")} == {
        names["wandb"]
    }
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_new_run_in_the_folder_is_a_new_tracked_run(tmp_path: Path) -> None:
    mlflow = client()
    toy_trainer(tmp_path / "run", 4, mlflow=True).fit()
    first = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    toy_trainer(tmp_path / "run", 4, mlflow=True).fit(overwrite=True)
    second = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    assert first != second and mlflow.get_run(first).info.status == "FINISHED"


def test_a_server_that_is_gone_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("mlflow.exceptions")
    tracker = MLflow(tmp_path, {"ways": 3}, Names(tmp_path / "tracking.json"))

    def refuse(*_: Any, **__: Any) -> None:
        raise exceptions.MlflowException("connection refused")

    monkeypatch.setattr(tracker._client, "log_metric", refuse)
    with pytest.warns(UserWarning, match="mlflow: records from iteration 3 on are lost: connection refused"):
        tracker.write({"iteration": 3, "split": "val", "loss": 1.0})
    tracker.write({"iteration": 4, "split": "val", "loss": 1.0})
    tracker.close(failed=False)


def test_numbers_that_are_not_finite_are_kept_as_such(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracker = WeightsAndBiases(tmp_path, {}, Names(tmp_path / "tracking.json"), quiet=True)
    tracker.write({"iteration": 3, "split": "val", "loss": float("nan"), "accuracy": 0.5, "name": "text"})
    tracker.close(failed=False)
    (row,) = wandb_records(tmp_path)
    assert row["val/accuracy"] == 0.5 and "val/name" not in row


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


def test_trackers_are_off_unless_asked_for() -> None:
    assert not toy_config(3).wandb and not toy_config(3).mlflow
