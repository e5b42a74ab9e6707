"""Runs gpu_cases.py under NVIDIA's compute-sanitizer: python tests/gpu/sanitizer.py [TOOL]...

memcheck finds bad addresses, racecheck races in shared memory, initcheck unwritten memory, synccheck bad barriers.
Exit code: 0 if all tools are content, 1 if one is not, 77 if compute-sanitizer is not installed.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

CASES = Path(__file__).with_name("gpu_cases.py")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOT_INSTALLED = 77

# Substrings of the names of our own kernels, in full: "conv_" alone would be in names of other libraries too.
KERNELS = (
    "sign_step_kernel",  # also compact_sign_step_kernel
    "flag_nonfinite_kernel",
    "meta_accumulate_kernel",  # also conv_meta_accumulate_kernel
    "mlp_meta_step_kernel",
    "mlp_second_order_kernel",
    "patch_moments_kernel",
    "conv_first_kernel",
    "conv_first_grad_kernel",
    "conv_raw_grad_kernel",
    "conv_forward_kernel",
    "conv_data_grad_kernel",
    "conv_weight_grad_kernel",
    "conv_head_kernel",
    "conv_pack_kernel",  # does not match conv_unpack_kernel
    "conv_unpack_kernel",
    "conv_sign_update_kernel",
    "conv_remember_kernel",
    "conv_direction_kernel",
    "conv_first_tangent_kernel",
    "conv_tangent_",
    "conv_subtract_kernel",
    "conv_rate_grads_kernel",
    "conv_climb_",
)

_SUMMARY = {"racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")}
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?")


def find() -> str | None:
    """Path of compute-sanitizer, or None."""
    places = [os.environ.get("PATH", ""), *glob.glob("/usr/local/cuda*/bin"), "/usr/local/cuda/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(path: str, tool: str) -> list[str]:
    """Runs the cases under a tool."""
    words = [path, "--tool", tool, "--error-exitcode", "9"]
    if tool == "initcheck":
        # It must see every write, those of torch's kernels too. So it watches all kernels, but cases that use other
        # libraries are left out.
        return [*words, sys.executable, str(CASES), "--own"]
    # Only our own kernels: watching those of other libraries would be slow and tell nothing.
    for name in KERNELS:
        words += ["--kernel-name", f"kernel_substring={name}"]
    return [*words, sys.executable, str(CASES)]


def complaint(tool: str, code: int, output: str) -> str | None:
    """What is wrong with the end of a run, or None; each tool sums up in its own words."""
    counts = [found.groups() for found in _SUMMARY.get(tool, _ERRORS).finditer(output)]
    if any(int(count) for each in counts for count in each):
        return f"{tool} reports errors"
    if code != 0:
        return f"{tool} ended with code {code}"
    if "all kernels ran" not in output:
        return f"{tool}: the cases did not come to their end"
    return None if counts else f"{tool} printed no summary"


def run(path: str, tool: str, timeout: float | None = None) -> tuple[str | None, str]:
    """The complaint, if any, and the output of one tool, which is also printed as it comes."""
    # Every tensor gets its own allocation, so that bounds are those of tensors and not of torch's pool.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with subprocess.Popen(
        command(path, tool), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, process.kill)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        timer.cancel()
    output = "".join(lines)
    return complaint(tool, process.returncode, output), output


def main() -> int:
    tools = sys.argv[1:] or TOOLS
    for tool in tools:
        if tool not in TOOLS:
            print(f"expected {', '.join(TOOLS)}, found {tool}", file=sys.stderr)
            return 2
    path = find()
    if path is None:
        print("compute-sanitizer is not installed")
        return NOT_INSTALLED
    complaints = []
    for tool in tools:
        print(f"=== {tool}", flush=True)
        found, _ = run(path, tool)
        print(found or f"{tool} is content", flush=True)
        complaints += [found] if found else []
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
