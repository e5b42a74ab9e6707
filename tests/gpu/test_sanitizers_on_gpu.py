"""All kernels under NVIDIA's compute-sanitizer, and without a GPU: what it watches and how its answer is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gpu import gpu_cases, sanitizer
from helpers.cases import emulated_cases
from helpers.devices import backends

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# "__global__ void", launch bounds in any number of parentheses, the name.
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(")


def kernels() -> list[str]:
    """The names of all kernels of the package."""
    names = []
    for path in sorted((CSRC / "kernels").glob("*.cuh")):
        text = path.read_text(encoding="utf-8")
        found = KERNEL.findall(text)
        assert len(found) == text.count("__global__ void"), f"{path.name}: a kernel is declared in another form"
        names += found
    return names


def test_every_kernel_is_watched():
    names = kernels()
    assert {"patch_moments_kernel", "compact_sign_step_kernel", "mlp_meta_step_kernel"} <= set(names)
    assert [name for name in names if not any(part in name for part in sanitizer.KERNELS)] == []
    assert [part for part in sanitizer.KERNELS if not any(part in name for name in names)] == [], "of no kernel"


def test_the_filters_are_in_the_command():
    words = sanitizer.command("compute-sanitizer", "racecheck")
    for name in sanitizer.KERNELS:
        assert words[words.index(f"kernel_substring={name}") - 1] == "--kernel-name"
    assert "--own" not in words
    assert "--kernel-name" not in sanitizer.command("compute-sanitizer", "initcheck"), "it must see all writes"


CLEAN = {
    "memcheck": "all kernels ran\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "all kernels ran\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_each_tools_own_summary_is_understood(tool):
    text = CLEAN.get(tool, CLEAN["memcheck"])
    assert sanitizer.complaint(tool, 0, text) is None
    assert sanitizer.complaint(tool, 9, text) == f"{tool} ended with code 9"
    assert "no summary" in sanitizer.complaint(tool, 0, "all kernels ran\n")
    assert "their end" in sanitizer.complaint(tool, 0, text.replace("all kernels ran", ""))
    assert "their end" in sanitizer.complaint(tool, 0, "")


@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        ("memcheck", "ERROR SUMMARY: 10 errors"),
        ("synccheck", "ERROR SUMMARY: 1 error"),
        ("initcheck", "ERROR SUMMARY: 0 errors\nERROR SUMMARY: 3 errors"),  # of two processes
        ("racecheck", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"),
        ("racecheck", "RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)"),
    ],
)
def test_bad_summaries_are_refused(tool, summary):
    assert sanitizer.complaint(tool, 0, f"all kernels ran\n========= {summary}\n") == f"{tool} reports errors"


def test_one_tools_summary_is_not_anothers():
    assert "no summary" in sanitizer.complaint("racecheck", 0, CLEAN["memcheck"])
    assert "no summary" in sanitizer.complaint("memcheck", 0, CLEAN["racecheck"])


@pytest.mark.slow
def test_the_cases_hold_on_the_emulated_gpu():
    """So a failure on a device is the device's, or that of a launch."""
    native = backends.emulated_module()
    native.configure(seed=1, multiprocessors=1)
    gpu_cases.networks(native, "cpu", emulated_cases.OF_EVERY_KIND[:1])
    with backends.operators_emulated():
        gpu_cases.operators(torch.device("cpu"))
    gpu_cases.meta_steps(torch.device("cpu"), own=False)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_all_kernels_under(tool):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    path = sanitizer.find()
    if path is None:
        pytest.skip("compute-sanitizer is not installed")
    found, output = sanitizer.run(path, tool, timeout=600)
    assert found is None, f"{found}\n{output[-4000:]}"
