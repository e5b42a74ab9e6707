"""python -m signmaml_ext.info."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import signmaml_ext
from signmaml_ext import dispatch, gpus, info


def test_report_for_machines_is_complete(capsys):
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["signmaml_ext"] == signmaml_ext.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["native"]["built_with_cuda"] in (True, False)
    assert found["cpu"]["instruction_set"] in found["cpu"]["instruction_sets"]
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["backends"] == signmaml_ext.dispatch.backend_status()
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.slow
def test_report_for_people_runs_as_a_module():
    command = [sys.executable, "-m", "signmaml_ext.info"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    for words in (
        f"signmaml_ext {signmaml_ext.__version__}",
        "imported from",
        torch.__version__,
        "backends",
        "threads",
    ):
        assert words in done.stdout
    for name, reason in signmaml_ext.dispatch.backend_status().items():
        assert f"{name:<16} {'usable' if reason is None else 'not usable: ' + reason}" in done.stdout


@pytest.mark.parametrize(
    "capability, architectures, expected",
    [
        ((9, 0), ("8.0", "9.0+PTX"), "SASS 9.0"),
        ((8, 6), ("8.0", "8.6", "9.0+PTX"), "SASS 8.6"),
        ((8, 9), ("8.0", "8.6", "9.0"), "SASS 8.6"),
        ((10, 0), ("8.0", "9.0+PTX"), "PTX 9.0"),
        ((12, 1), ("10.0", "12.0+PTX"), "SASS 12.0"),
        ((9, 0), ("9.0a",), "SASS 9.0a"),
        ((10, 0), ("9.0a+PTX",), None),
        ((8, 0), ("8.6", "9.0+PTX"), None),
        ((7, 5), (), None),
    ],
)
def test_coverage_of_a_gpu(capability, architectures, expected):
    assert gpus.coverage(capability, architectures) == expected


@pytest.mark.parametrize(
    "capability, driver, architectures, release, expected",
    [
        ((9, 0), 13000, ("8.0", "9.0+PTX"), "13.0.88", None),
        ((9, 0), 13020, ("8.0", "9.0+PTX"), "13.0.88", None),
        ((9, 0), 14000, ("8.0", "9.0+PTX"), "13.0.88", None),
        ((9, 0), 0, ("8.0", "9.0+PTX"), "13.0.88", None),
        ((9, 0), 13000, ("8.0", "9.0+PTX"), "13.1.10", None),
        ((10, 0), 13010, ("8.0", "9.0+PTX"), "13.1.10", None),
        ((10, 0), 13000, ("8.0", "9.0+PTX"), "13.1.10", "the driver serves CUDA 13.0, and .* by CUDA 13.1: install"),
        ((9, 0), 12080, ("8.0", "9.0+PTX"), "13.0.88", "the driver serves CUDA 12.8, and .* by CUDA 13.0: install"),
        ((7, 5), 13000, ("8.0", "9.0+PTX"), "13.0.88", "kernels for 8.0, 9.0.PTX, .* capability 7.5: .*LIST=7.5"),
    ],
)
def test_why_a_gpu_is_not_served(capability, driver, architectures, release, expected):
    reason = gpus.why_not(capability, driver, architectures, release)
    assert reason is None if expected is None else re.search(expected, reason), reason


def test_a_gpu_that_the_kernels_do_not_run_on_is_left_to_torch(monkeypatch):
    """ "auto" says why and goes on; asked for by name, the backend refuses with the reason. Another GPU is served."""
    monkeypatch.setattr(gpus, "why_not_served", lambda index: "it is too old" if index == 1 else None)
    cuda = dataclasses.replace(dispatch.BACKENDS["cuda"], why_not_here=lambda: None)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", cuda)
    old, new = (SimpleNamespace(device=torch.device("cuda", index), backend="auto", compile=False) for index in (1, 0))
    assert cuda.why_not_there(old) == "it is too old" and cuda.why_not_there(new) is None
    backend, family = dispatch.choose(old)
    assert (backend.name, family.name) == ("torch", "reference")
    old.backend = "cuda"
    with pytest.raises(ValueError, match="backend: expected one that serves this call, found 'cuda': it is too old"):
        dispatch.choose(old)


def test_a_call_on_the_cpu_asks_nothing_of_a_gpu(monkeypatch):
    """That would initialise CUDA, which fails in a process forked from one that has used it."""

    def asked(index: int) -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(gpus, "why_not_served", asked)
    cuda = dataclasses.replace(dispatch.BACKENDS["cuda"], why_not_here=lambda: None)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", cuda)
    problem = SimpleNamespace(device=torch.device("cpu"), backend="auto", compile=False)
    assert cuda.why_not_there(problem) == "the model is on cpu"
    with pytest.raises(AssertionError, match="initialised"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        dispatch.backend_status()


def test_gpu_lines():
    gpu = {"index": 0, "name": "Some GPU", "compute_capability": "7.0", "memory_gib": 16.0, "covered_by": None}
    refused = gpu | {"why_not": "reinstall with TORCH_CUDA_ARCH_LIST=7.0"}
    assert "not used: reinstall with TORCH_CUDA_ARCH_LIST=7.0" in info.gpu_line(refused, built_with_cuda=True)
    assert "SASS 7.0" in info.gpu_line(gpu | {"covered_by": "SASS 7.0", "why_not": None}, built_with_cuda=True)
    assert "built without CUDA" in info.gpu_line(refused, built_with_cuda=False)


@pytest.mark.parametrize("function", [info.info, gpus.coverage, gpus.why_not])
def test_docstring_examples(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=vars(sys.modules[function.__module__]))
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0
