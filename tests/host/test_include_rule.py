"""The table in csrc/README.md: which folder of the native code may include what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
STANDARD = r"[a-z_]+"  # <cstdint>, <vector>: standard C++ headers have no suffix

ALLOWED = {
    "params": [STANDARD, "params/.*"],
    "plan": [STANDARD, "params/.*", "plan/.*"],
    "kernels": [STANDARD, "params/.*", "kernels/.*", r"emulation/device\.h"],
    "launch": [STANDARD, "params/.*", "plan/.*", "kernels/.*", "launch/.*", r"cuda_runtime\.h", r"emulation/launch\.h"],
    "cpu": [STANDARD, "params/.*", "plan/.*", r"cpu/[a-z_]+\.h", r"pthread\.h", r"signal\.h", r"xmmintrin\.h"],
    # No other standard header: the instruction sets would share its inline code (test_linkage.py).
    "cpu/isa": ["cstdint", "params/.*", "plan/.*", r"cpu/isa/.*\.h", r"cpu/(kernels|(conv|layers|mlp)_table)\.h"],
    "emulation": [STANDARD, "kernels/.*", "launch/.*", "emulation/.*", r"setjmp\.h", r"ucontext\.h", "sanitizer/.*"],
    "bindings": [
        STANDARD,
        "params/.*",
        "plan/.*",
        r"launch/launch\.h",
        r"cpu/[a-z_]+\.h",
        r"emulation/[a-z_]+\.h",
        "bindings/.*",
        "pybind11/.*",
        r"build_info\.h",
    ],
}  # fmt: skip


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def violations(folder: str, text: str) -> list[str]:
    return [name for name in includes(text) if not any(re.fullmatch(rule, name) for rule in ALLOWED[folder])]


FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu", ".in"})


def folder_of(path: Path) -> str:
    """The folder whose rule applies to a file: the deepest one that has a rule."""
    parents = [str(parent) for parent in path.relative_to(CSRC).parents]
    return next((parent for parent in parents if parent in ALLOWED), parents[-2])


def test_every_folder_has_its_rule():
    assert {folder_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_keep_the_rule(path):
    assert violations(folder_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_headers_are_guarded_once(path):
    if path.suffix in {".h", ".cuh"} or path.name.endswith(".h.in"):
        assert path.read_text().count("#pragma once") == 1


@pytest.mark.parametrize(
    "folder, line",
    [
        ("params", '#include "plan/math.h"'),
        ("plan", "#include <cuda_runtime.h>"),
        ("kernels", '#include "plan/math.h"'),
        ("cpu", "  #  include <Python.h>"),
        ("cpu", '#include "cpu/isa/simd.h"'),
        ("cpu/isa", "#include <algorithm>"),
        ("cpu/isa", '#include "cpu/thread_pool.h"'),
        ("launch", "#include <torch/extension.h>"),
        ("bindings", "#include <ATen/ATen.h>"),
        ("bindings", '#include "launch/device.cuh"'),
    ],
)
def test_a_violation_is_seen(folder, line):
    assert len(violations(folder, f"#pragma once\n{line}\n")) == 1


def test_sources_are_listed_one_by_one():
    listing = (CSRC.parent / "CMakeLists.txt").read_text()
    assert not re.search(r"^\s*file\s*\(\s*GLOB", listing, re.MULTILINE | re.IGNORECASE)
    for path in FILES:
        if path.suffix in {".cpp", ".cu"}:
            assert f"csrc/{path.relative_to(CSRC)}" in listing, f"{path.name} is in no list of CMakeLists.txt"
