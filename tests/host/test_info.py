"""python -m signmaml_ext.info."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys

import pytest
import torch

import signmaml_ext
from signmaml_ext import info


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
    assert info.coverage(capability, architectures) == expected


def test_gpu_lines():
    gpu = {"index": 0, "name": "Some GPU", "compute_capability": "7.0", "memory_gib": 16.0, "covered_by": None}
    assert "not covered: reinstall with TORCH_CUDA_ARCH_LIST=7.0" in info.gpu_line(gpu, built_with_cuda=True)
    assert "SASS 7.0" in info.gpu_line(gpu | {"covered_by": "SASS 7.0"}, built_with_cuda=True)
    assert "built without CUDA" in info.gpu_line(gpu, built_with_cuda=False)


@pytest.mark.parametrize("function", [info.info, info.coverage])
def test_docstring_examples(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=vars(info))
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0
