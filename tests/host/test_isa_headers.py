"""Standalone headers of csrc/cpu/isa/, each tested by its own program, which is compiled for every instruction set.

simd.h has the vector operations that all kernels use; integers.h and conv/shared_axis.h plan their work in integers.
The programs are beside this file, in isa/.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from signmaml_ext._loader import C

PROGRAMS = Path(__file__).parent / "isa"


def run(command: list[str], program: Path, folder: Path) -> str:
    """What the program prints. It is compiled with the flags of `command`, but at -O1 to save time."""
    target = folder / program.stem
    compiler = [*command, "-O1", f"-I{PROGRAMS}", program, "-o", target]
    compiled = subprocess.run(compiler, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([target], capture_output=True, text=True)
    assert done.returncode in (0, 1), done
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", C.cpu_isas())
@pytest.mark.parametrize("name", ["integers", "shared_axis", "simd"])
def test_header(isa_commands, tmp_path, isa, name):
    assert run(isa_commands[isa, "conv/stages.cpp"], PROGRAMS / f"{name}.cpp", tmp_path) == ""


def test_every_program_runs():
    assert {path.stem for path in PROGRAMS.glob("*.cpp")} == {"integers", "shared_axis", "simd"}


@pytest.mark.slow
def test_a_failure_is_seen(isa_commands, tmp_path):
    program = tmp_path / "wrong.cpp"
    program.write_text(
        '#include "cpu/isa/integers.h"\n#include "check.h"\n'
        "using namespace signmaml::cpu::SIGNMAML_ISA;\n"
        'void check() { CHECK(pieces(7, 3) == 2, "found %d", int(pieces(7, 3))); }\n'
        "int main() { check(); return failures == 0 ? 0 : 1; }\n"
    )
    assert run(isa_commands["portable", "conv/stages.cpp"], program, tmp_path).endswith("pieces(7, 3) == 2: found 3\n")
