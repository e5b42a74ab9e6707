"""Adapted networks for other programs: what is written computes the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import signmaml
from signmaml import ExampleFormat, FewShotClassifier, FewShotRegressor, Learner
from signmaml import export as exporting
from signmaml.export import export

SIDE = 16


def learner(norm: str = "batch") -> Learner:
    torch.manual_seed(2)
    model = signmaml.Conv4(3, 1, 4, SIDE, layers=2, norm=norm)
    return Learner.of(model, inner_lr=0.02, inner_steps=3, example=ExampleFormat((1, SIDE, SIDE)))


def classifier(**options: Any) -> FewShotClassifier:
    x = torch.rand(8, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return FewShotClassifier(learner(), **options).fit(x, list("abcd") * 2)


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.mark.slow
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", [{}, {"task_state": "int8"}], ids=str)
def test_a_torch_program_predicts_the_same(tmp_path: Path, options: dict, probabilities: bool) -> None:
    fitted, x = classifier(**options), images()
    fitted.export(tmp_path / "net.pt2", probabilities=probabilities)
    extra = {"signmaml.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    wanted = fitted.predict_proba(x) if probabilities else fitted.decision_function(x)
    np.testing.assert_allclose(program(x).detach(), wanted, rtol=1e-5, atol=1e-6)
    said = json.loads(extra["signmaml.json"])
    assert said["classes"] == list("abcd") and said["output"] == ("probabilities" if probabilities else "scores")
    assert said["example"]["shape"] == [1, SIDE, SIDE]


@pytest.mark.slow
@pytest.mark.parametrize("probabilities", [False, True])
def test_an_onnx_model_predicts_the_same(tmp_path: Path, probabilities: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[test]' brings onnxruntime")
    pytest.importorskip("onnxscript")
    fitted, x = classifier(), images()
    fitted.export(tmp_path / "net.onnx", probabilities=probabilities)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    wanted = fitted.predict_proba(x) if probabilities else fitted.decision_function(x)
    name = "probabilities" if probabilities else "scores"
    (found,) = session.run([name], {"x": x.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["signmaml.classes"]) == list("abcd")


@pytest.mark.slow
def test_onnx_without_a_runtime_is_checked_by_onnx_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="pip install '.[test]' brings onnx and onnxscript")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = signmaml.MLP(4, 3, (5,))
    export(model, tmp_path / "net.onnx", torch.zeros(1, 4))
    assert (tmp_path / "net.onnx").stat().st_size > 500


def test_a_state_dict_is_the_modules(tmp_path: Path) -> None:
    fitted = classifier()
    fitted.export(tmp_path / "net.safetensors")
    tensors, metadata = signmaml.checkpoint.load(tmp_path / "net.safetensors", kind="weights")
    own = fitted.module().state_dict()
    assert tensors.keys() == own.keys() and all(torch.equal(tensors[name], own[name]) for name in own)
    assert metadata["classes"] == list("abcd") and "features.0.normalize.running_mean" in own
    with pytest.raises(ValueError, match="probabilities: expected False for a state dict"):
        fitted.export(tmp_path / "b.safetensors", probabilities=True)


@pytest.mark.slow
def test_loaded_learners_and_regressors(tmp_path: Path) -> None:
    fitted, x = classifier(), images()
    fitted.save(tmp_path / "adapted.safetensors")
    loaded = FewShotClassifier.load(tmp_path / "adapted.safetensors", learner())
    loaded.export(tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()(x)
    np.testing.assert_allclose(again.detach(), fitted.decision_function(x), rtol=1e-5, atol=1e-6)
    model = signmaml.MLP(2, 1)
    points = torch.randn(6, 2)
    wave = FewShotRegressor(model, inner_lr=0.01, inner_steps=2).fit(points, points[:, 0])
    wave.export(tmp_path / "wave.pt2")
    found = torch.export.load(tmp_path / "wave.pt2").module()(points)
    np.testing.assert_allclose(found[:, 0].detach(), wave.predict(points), rtol=1e-5, atol=1e-6)
    wave.save(tmp_path / "wave.safetensors")
    again = Learner.of(model, inner_lr=0.01, inner_steps=2)
    FewShotRegressor.load(tmp_path / "wave.safetensors", again).export(tmp_path / "c.pt2")
    assert torch.export.load(tmp_path / "c.pt2").module()(points).shape == (6, 1)
    # Files were once written without the inputs' sizes.
    tensors, header = signmaml.checkpoint.load(tmp_path / "wave.safetensors", kind="adapted")
    signmaml.checkpoint.save(tmp_path / "old.safetensors", tensors, kind="adapted", metadata={**header, "input": None})
    shapeless = FewShotRegressor.load(tmp_path / "old.safetensors", again)
    with pytest.raises(ValueError, match="X: expected some examples"):
        shapeless.export(tmp_path / "b.pt2")
    shapeless.export(tmp_path / "b.pt2", points)
    assert (tmp_path / "b.pt2").is_file()


class Undecided(nn.Module):
    """Its way depends on its data, which torch.export refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


@pytest.mark.slow
def test_what_torch_cannot_export_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="export: torch cannot export this Undecided: "):
        export(Undecided(), tmp_path / "net.pt2", torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_differs_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = signmaml.MLP(4, 3, (5,))
    monkeypatch.setattr(exporting, "_torch_program", lambda *_: (b"wrong", lambda x: model(x) + 0.01))
    with pytest.raises(RuntimeError, match=r"own predictions for 1 examples, found ones up to 0\.01 apart"):
        export(model, tmp_path / "net.pt2", torch.zeros(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_single_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export: expected an inductive learner"):
        classifier(transductive=True).export(tmp_path / "net.pt2")
    wave = FewShotRegressor(signmaml.MLP(1, 1), inner_lr=0.01, inner_steps=1).fit([[0.0], [1.0]], [0.0, 1.0])
    with pytest.raises(ValueError, match="probabilities: expected False for regression"):
        wave.export(tmp_path / "net.pt2", probabilities=True)
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = signmaml.MLP(4, 3), torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"ending in \.safetensors, \.pt2, \.onnx, found 'net\.pth'"):
        export(model, tmp_path / "net.pth", x)
    with pytest.raises(FileNotFoundError, match="export: expected a file in an existing folder"):
        export(model, tmp_path / "no" / "net.pt2", x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="found no onnx and no onnxscript"):
        export(model, tmp_path / "net.onnx", x)
    with pytest.raises(ValueError, match="expected a call of fit first"):
        FewShotClassifier(model, inner_lr=0.1, inner_steps=1).export(tmp_path / "net.pt2")
