"""Compile commands of each instruction set, for tests that compile parts of its code."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def isa_commands(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """CMake's compile commands without output and source, by instruction set and source below csrc/cpu/isa/."""
    if missing := [tool for tool in ("cmake", "ninja", "nm", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    build = tmp_path_factory.mktemp("isa")
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, capture_output=True)
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source, folder = Path(entry["file"]), ROOT / "csrc" / "cpu" / "isa"
        if source.is_relative_to(folder):
            command = shlex.split(entry["command"])
            at = command.index("-o")
            isa = command[at + 1].split("signmaml_cpu_")[1].split(".dir")[0]
            found[isa, str(source.relative_to(folder))] = command[:at]
    return found
