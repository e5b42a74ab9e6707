"""Finds programs of the toolchain."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def tool(name: str) -> str | None:
    """The program on PATH, in the CUDA toolkit, or in triton (installed with torch for CUDA); None if not found."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(places))
