"""The native module as built: libraries, symbols, instruction sets, GPU code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import signmaml_ext
from helpers.programs import tools
from signmaml_ext._loader import C

# glibc before 2.34 keeps threads, dl and rt in separate libraries.
BASE_LIBRARIES = r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux.*"


def tool(name: str) -> str:
    """Path of a program of the toolchain; skips the test if it is missing."""
    path = tools.tool(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_needs_the_base_libraries_only():
    needed = re.findall(r"NEEDED.*\[(.+)\]", output(tool("readelf"), "-d", C.__file__))
    assert "libc.so.6" in needed
    assert [name for name in needed if not re.fullmatch(BASE_LIBRARIES, name)] == []


def test_exports_nothing_but_the_module():
    """Above all not our copy of the CUDA runtime, which could be mixed up with torch's."""
    symbols = output(tool("nm"), "-D", "--defined-only", C.__file__).split("\n")
    names = [line.split()[-1] for line in symbols if line]
    assert names == ["PyInit__C"]


def test_version_is_that_of_the_package():
    assert C.version == signmaml_ext.__version__


def test_gpu_code_is_what_the_build_says():
    if not C.built_with_cuda:
        assert C.cuda_architectures == ()
        assert C.cuda_version is None
        pytest.skip("signmaml_ext was built without CUDA")
    cuobjdump = tool("cuobjdump")
    cubins = set(re.findall(r"sm_(\d+[af]?)\.cubin", output(cuobjdump, "--list-elf", C.__file__)))
    ptx = set(re.findall(r"sm_(\d+[af]?)\.ptx", output(cuobjdump, "--list-ptx", C.__file__)))
    assert cubins == {entry.split("+")[0].replace(".", "") for entry in C.cuda_architectures}
    assert ptx == {entry.split("+")[0].replace(".", "") for entry in C.cuda_architectures if entry.endswith("+PTX")}


def test_kernels_are_there_beside_the_cuda_build_of_torch():
    """Where CI has nvcc, it requires code for at least two architectures, loaded beside a CUDA build of torch."""
    required = os.environ.get("SIGNMAML_TEST_REQUIRE_CUDA") == "1"
    if not C.built_with_cuda and not required:
        pytest.skip("signmaml_ext was built without CUDA, and SIGNMAML_TEST_REQUIRE_CUDA is not 1")
    assert C.built_with_cuda
    assert len(C.cuda_architectures) >= (2 if required else 1)
    assert {"sign_step_cuda", "meta_accumulate_cuda", "mlp_meta_step_cuda"} <= set(dir(C))
    assert re.fullmatch(r"\d+\.\d+.*", C.cuda_version)
    assert not required or torch.version.cuda is not None, "torch is a CPU build"
    assert C.cuda_driver_version() >= 0  # our own CUDA runtime answers


@pytest.mark.slow
def test_fastest_instruction_set_is_chosen():
    isas = C.cpu_isas()
    assert isas[0] == "portable"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if platform.machine() == "x86_64":
        assert ("avx2" in isas) == bool(re.search(r"\bavx2\b", flags) and re.search(r"\bfma\b", flags))
        assert ("avx512" in isas) == all(re.search(rf"\bavx512{part}\b", flags) for part in ("f", "bw", "dq", "vl"))
    code = "from signmaml_ext._loader import C; print(C.cpu_isa())"
    assert output(sys.executable, "-c", code, SIGNMAML_CPU_ISA="").strip() == isas[-1]


@pytest.mark.slow
def test_instruction_set_can_be_forced():
    code = "from signmaml_ext._loader import C; print(C.cpu_isa())"
    assert output(sys.executable, "-c", code, SIGNMAML_CPU_ISA="portable").strip() == "portable"


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"expected one of those usable here \(portable.*found 'mmx'"):
        C.select_cpu_isa("mmx")


@pytest.mark.slow
def test_unknown_instruction_set_is_refused_at_import():
    command = [sys.executable, "-c", "import signmaml_ext"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SIGNMAML_CPU_ISA": "mmx"}, cwd="/"
    )
    assert done.returncode != 0
    assert "ImportError: SIGNMAML_CPU_ISA: CPU instruction set: expected one of those usable here" in done.stderr
