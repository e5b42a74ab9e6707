"""The module _emulated on an interpreter of PTX: the project's launches and nvcc's PTX of its kernels, run on the CPU.

The interpreter is no part of the project. The environment variable SIGNMAML_PTX_MACHINE names its folder, which holds
`decode.cpp` and `machine.cpp` (the interpreter), `cudart_stub.cpp` (a CUDA runtime that takes the PTX out of the object
files) and `selftest_cuda.cu`. Its settings are environment variables that start with PTXLAB_.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from compile import resources
from helpers.devices import emulated
from helpers.programs import shared
from helpers.programs.tools import tool
from signmaml_ext._loader import C

VARIABLE = "SIGNMAML_PTX_MACHINE"


def missing() -> str | None:
    """Why there is nothing to run PTX with, or None."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} names no interpreter of PTX"
    if not (Path(folder) / "machine.cpp").is_file():
        return f"{VARIABLE} is {folder}, which holds no interpreter of PTX"
    if tool("nvcc") is None:
        return "there is no nvcc"
    if "avx2" not in C.cpu_isas():
        return "the interpreter of PTX needs AVX2"
    return None


def build_once(architecture: int) -> Path:
    """The module with the PTX for one architecture, built once in a test session."""

    def build(folder: Path) -> None:
        machine = Path(os.environ[VARIABLE]).resolve()
        variables = (
            "SIGNMAML_CUDA=ON",
            f"SIGNMAML_PTX_MACHINE={machine}",
            f"CMAKE_CUDA_ARCHITECTURES={architecture}-virtual",
            f"CMAKE_CUDA_COMPILER={tool('nvcc')}",
            "CMAKE_CUDA_FLAGS=--no-compress",  # the runtime reads the PTX as text
        )
        emulated.configure(emulated.ROOT, folder, *variables)
        emulated.compile_module(folder)

    (module,) = shared.once(f"ptx_{architecture}", build).glob("_emulated*.so")
    return module


def texts(architecture: int, folder: Path) -> dict[str, str]:
    """nvcc's PTX for an architecture, by the file of launch/ that it is of."""

    def text(launch: str) -> str:
        target = folder / f"{launch}.ptx"
        source = emulated.ROOT / "csrc" / "launch" / f"{launch}.cu"
        code = f"--generate-code=arch=compute_{architecture},code=compute_{architecture}"
        resources.output("nvcc", *resources.usual_options(), code, "-ptx", str(source), "-o", str(target))
        return target.read_text()

    return {launch: text(launch) for launch in resources.LAUNCHES}


def texts_in(module: Path) -> set[str]:
    """The PTX in a module, as `plain` makes it."""
    return {plain(text.decode()) for text in re.findall(rb"\.version \d[^\0]*", module.read_bytes())}


TARGET = re.compile(r"^\.target sm_(\d+)$", re.MULTILINE)


def target(text: str) -> int:
    """The architecture that PTX names."""
    found = TARGET.search(text)
    assert found is not None
    return int(found[1])


def plain(text: str) -> str:
    """PTX without the line that names the architecture, and without comments and spaces, which a module leaves out."""
    return " ".join(TARGET.sub("", re.sub(r"//.*", "", text)).split())


def settings(architecture: int, coverage: Path) -> dict[str, str]:
    """An environment in which whatever PTX leaves open turns out badly: tensor cores cut sums off as the architecture's
    do, the low bits of a TF32 number are random, and every product that may be fused with a sum is fused."""
    return {
        **os.environ,
        "PTXLAB_TENSOR_CORES": "a100" if architecture < 90 else "h100",
        "PTXLAB_GARBAGE_TF32": "1",
        "PTXLAB_FUSE": "1",
        "PTXLAB_COVERAGE": str(coverage),
    }
