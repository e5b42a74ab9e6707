"""Programs of the toolchain, wherever they lie."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def tool(name: str) -> str | None:
    """The program on PATH, in CUDA's toolkit, or in triton, which torch for CUDA brings; None where there is none."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(places))
