"""What this installation is and can do: `python -m signmaml_ext.info`, with `--json` for machines.

Everything that a problem report should contain: versions, where the package was imported from, what the native module
was built for, what the CPU and the GPUs offer, and which backends are usable or why not.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from . import dispatch
from ._loader import VERSION, C
from .gpus import coverage, version_text, why_not_served


def info() -> dict[str, Any]:
    """Collects what `python -m signmaml_ext.info` prints.

    Returns:
        A dictionary of strings, numbers, booleans, None, and lists and dictionaries of these: `versions`, `package`,
        `native`, `cpu`, `gpus` and `backends` (name -> None where usable, else the reason).

    Example:
        >>> sorted(info())
        ['backends', 'cpu', 'gpus', 'native', 'package', 'versions']
    """
    return {
        "versions": {
            "signmaml_ext": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "driver": driver_version(),
            "driver_cuda": driver_cuda_version(),
        },
        "package": str(Path(__file__).resolve().parent),
        "native": {
            "file": C.__file__,
            "build_type": C.build_type,
            "compiler": C.compiler,
            "built_with_cuda": C.built_with_cuda,
            "cuda": C.cuda_version,
            "cuda_architectures": list(C.cuda_architectures),
        },
        "cpu": {
            "machine": platform.machine(),
            "instruction_set": C.cpu_isa(),
            "instruction_sets": C.cpu_isas(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "backends": dispatch.backend_status(),
    }


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def driver_cuda_version() -> str | None:
    """The newest CUDA version that the driver serves; None without a driver, or where the build cannot ask."""
    number = C.cuda_driver_version() if C.built_with_cuda else 0
    return version_text(number) if number else None


def gpu(index: int) -> dict[str, Any]:
    """One visible GPU, and how this build serves it."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "covered_by": coverage((properties.major, properties.minor), C.cuda_architectures),
        "why_not": why_not_served(index) if C.built_with_cuda else None,
    }


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    versions, native, cpu = found["versions"], found["native"], found["cpu"]
    torch_cuda = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "CPU build"
    driver = versions["driver"] or "none found"
    if versions["driver_cuda"]:
        driver += f" (serves CUDA up to {versions['driver_cuda']})"
    built = "without CUDA"
    if native["built_with_cuda"]:
        built = f"with CUDA {native['cuda']} for {', '.join(native['cuda_architectures'])}"
    lines = [
        f"signmaml_ext {versions['signmaml_ext']}",
        f"  imported from    {found['package']}",
        f"  native module    {native['file']}",
        f"  built            {built}; {native['compiler']}, {native['build_type']}",
        f"Python             {versions['python']}",
        f"torch              {versions['torch']} ({torch_cuda})",
        f"NVIDIA driver      {driver}",
        f"CPU                {cpu['machine']}: {cpu['instruction_set']} of {', '.join(cpu['instruction_sets'])}; "
        f"{cpu['threads']} threads",
    ]
    gpus = [gpu_line(each, native["built_with_cuda"]) for each in found["gpus"]]
    lines += gpus or ["GPUs               none visible"]
    lines.append("backends")
    for name, reason in found["backends"].items():
        lines.append(f"  {name:<16} {'usable' if reason is None else f'not usable: {reason}'}")
    return "\n".join(lines)


def gpu_line(found: dict[str, Any], built_with_cuda: bool) -> str:
    covered = f"not used: {found['why_not']}" if found["why_not"] else found["covered_by"]
    if not built_with_cuda:
        covered = "not used: built without CUDA"
    return (
        f"GPU {found['index']:<14} {found['name']}, compute capability {found['compute_capability']}, "
        f"{found['memory_gib']} GiB; {covered}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m signmaml_ext.info", description="What this installation of signmaml_ext is and can do."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = info()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
