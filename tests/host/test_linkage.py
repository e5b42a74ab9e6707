"""Objects that are compiled once for each instruction set share no code with the rest.

The linker keeps one copy of each inline function in a program. It could keep a copy for an instruction set that the
processor lacks, and the program would stop at an illegal instruction. So each object of csrc/cpu/isa/ exports one
symbol, its table. Everything else in it is internal. The objects are compiled without optimisation here, so that the
compiler inlines nothing that it could emit as a function.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

ISA = Path(__file__).resolve().parents[2] / "csrc" / "cpu" / "isa"
TABLES = {
    "conv/stages.cpp": "kConvStages", "layers/stages.cpp": "kLayersStages", "mlp/stages.cpp": "kMlpStages",
    "spans.cpp": "kKernels",
}  # fmt: skip
ISAS = ["portable", *(["avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else [])]


def linked(command: list[str], source: Path, folder: Path) -> set[tuple[str, str]]:
    """Type and name of every symbol that the object exports."""
    target = folder / "object.o"
    subprocess.run([*command, "-O0", "-o", target, "-c", source], check=True, capture_output=True)
    lines = subprocess.run(["nm", "-C", "--defined-only", "--extern-only", target], check=True, capture_output=True)
    return {(kind, name) for _, kind, name in (line.split(" ", 2) for line in lines.stdout.decode().splitlines())}


@pytest.mark.slow
def test_every_source_of_the_folder_is_compiled_for_every_instruction_set(isa_commands):
    sources = {str(path.relative_to(ISA)) for path in ISA.rglob("*.cpp")}
    assert sources == set(TABLES)
    assert set(isa_commands) == {(isa, source) for isa in ISAS for source in sources}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=pytest.mark.slow) for name in TABLES if "/" in name] + ["spans.cpp"]
)
def test_only_the_table_is_shared(isa_commands, tmp_path, isa, source):
    assert linked(isa_commands[isa, source], ISA / source, tmp_path) == {
        ("D", f"signmaml::cpu::{isa}::{TABLES[source]}")
    }


def test_an_inline_function_is_seen(isa_commands, tmp_path):
    source = tmp_path / "inline.cpp"
    source.write_text("inline int twice(int x) { return 2 * x; }\nint four() { return twice(2); }\n")
    assert linked(isa_commands["portable", "spans.cpp"], source, tmp_path) == {("T", "four()"), ("W", "twice(int)")}
