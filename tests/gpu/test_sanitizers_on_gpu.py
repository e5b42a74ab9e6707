"""All kernels under NVIDIA's compute-sanitizer: memory errors, races in shared memory, unwritten memory, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("gpu_cases.py")

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def sanitizer() -> str:
    """Path of compute-sanitizer; skips the test with a reason if something is missing."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    path = shutil.which("compute-sanitizer", path=places)
    if path is None:
        pytest.skip("compute-sanitizer is not installed")
    return path


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_all_kernels_under(tool):
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9"]
    # Only our own kernels: watching those of other libraries would be slow and tell nothing.
    names = ("sign_step", "meta_accumulate", "flag_nonfinite", "mlp_meta_step", "conv_")
    for name in names:
        command += ["--kernel-name", f"kernel_substring={name}"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # check bounds of tensors, not of torch's pool
    done = subprocess.run(
        [*command, sys.executable, str(CASES)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "all kernels ran" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-2000:]
