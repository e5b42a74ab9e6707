"""The suite's own machinery: the cache of compiled files, the processes that run the tests, and the quick ones."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.programs import quick, shared, workers


def compiled(folder: Path, kept: Path, text: str, *flags: str) -> tuple[int, str, str]:
    """Compiles a file in its own folder; returns the exit status, the object file's text and the list of headers."""
    folder.mkdir()
    (folder / "header.h").write_text("#pragma once\n")
    (folder / "source.cpp").write_text(text)
    # A fake compiler: it preprocesses a file to its own text, and compiles it to the number of compilations so far.
    compiler = kept / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'for word; do case "$before" in -o) target=$word ;; -MF) headers=$word ;; esac; before=$word; done\n'
        'for word; do [ -f "$word" ] && [ "${word%.cpp}" != "$word" ] && source=$word; done\n'
        'echo "$source: header.h" > "$headers"\n'
        'grep -q refused "$source" && exit 3\n'
        'case " $* " in *" -E "*) cat "$source" ;; *) echo x >> "$0.count"; wc -l < "$0.count" > "$target" ;; esac\n'
    )
    compiler.chmod(0o755)
    target, headers = folder / "source.o", folder / "source.o.d"
    words = [sys.executable, "-I", str(shared.COMPILER_CACHE), str(kept), str(compiler), *flags, f"-I{folder}"]
    words += ["-MD", "-MT", str(target), "-MF", str(headers), "-o", str(target), "-c", str(folder / "source.cpp")]
    code = subprocess.run(words).returncode
    return code, target.read_text().strip() if target.exists() else "", headers.read_text()


def test_the_same_text_with_the_same_flags_is_compiled_once(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    first = compiled(tmp_path / "one", kept, "int a;\n", "-O1")
    assert first[:2] == (0, "1")
    again = compiled(tmp_path / "two", kept, "int a;\n", "-O1")
    assert again[:2] == (0, "1")
    assert str(tmp_path / "two") in again[2], "the headers are those of its own folder"
    assert compiled(tmp_path / "three", kept, "int b;\n", "-O1")[:2] == (0, "2")
    assert compiled(tmp_path / "four", kept, "int a;\n", "-O2")[:2] == (0, "3")


def test_what_the_compiler_refuses_is_refused_every_time(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("one", "two"):
        assert compiled(tmp_path / name, kept, "refused\n")[:2] == (3, "")
    assert list(kept.glob("*.o")) == []


def config(*names: str, xdist: bool = True, **options: Any) -> Any:
    """The part of pytest's configuration that `number_of_workers` reads; defaults as without command line options."""
    plain = {"numprocesses": None, "tx": [], "dist": "no", "distload": False, "usepdb": False, "capture": "fd"}
    option = argparse.Namespace(**{**plain, "collectonly": False, **options})
    return SimpleNamespace(args=names, option=option, pluginmanager=SimpleNamespace(hasplugin=lambda _: xdist))


def test_all_cores_run_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workers, "memory", lambda: 64 * 2**30)
    assert workers.number_of_workers(config()) == 4
    assert workers.number_of_workers(config("tests/ops", "tests/host/test_loader.py")) == 4
    monkeypatch.setattr(workers, "memory", lambda: 7 * 2**30)
    assert workers.number_of_workers(config()) == 2
    monkeypatch.setattr(workers, "memory", lambda: 4 * 2**30)
    assert workers.number_of_workers(config()) == 0
    monkeypatch.setattr(workers, "memory", lambda: 64 * 2**30)
    for alone in (
        config(xdist=False),
        config(numprocesses=0),
        config(usepdb=True),
        config(capture="no"),
        config(collectonly=True),
        config("tests/host/test_loader.py"),
        config("tests/host/test_loader.py::test_loads", "tests/ops"),
    ):
        assert workers.number_of_workers(alone) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers.number_of_workers(config()) == 0, "a GPU is one"


def test_the_files_that_go_first_are_there() -> None:
    root = Path(__file__).resolve().parents[2]
    assert [name for name in workers.LONGEST if not (root / name).is_file()] == []
    assert len(set(workers.LONGEST)) == len(workers.LONGEST)


class Case:
    """The part of a test that `mark_the_rest_of_grids_slow` reads and changes."""

    def __init__(self, nodeid: str, *marks: str) -> None:
        self.nodeid, self.marks = nodeid, list(marks)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def iter_markers(self, name: str) -> list[Any]:
        return [SimpleNamespace(args=("here" in self.marks,))] if name == "skipif" and name in self.marks else []

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.marks.append(marker.name)


def test_some_cases_of_every_test_are_quick() -> None:
    single = [Case("a.py::test"), Case("b.py::test"), Case("b.py::Kind::test[1]")]
    grid = [Case(f"a.py::test_grid[{size}-{kind}]") for size in range(20) for kind in "xy"]
    marks = [["slow"], ["skip"], ["gpu"], ["skipif", "here"]]
    others = [Case(f"a.py::test_grid[{mark}]", *mark) for mark in marks]
    quick.mark_the_rest_of_grids_slow([*single, *others, *grid])
    assert [case.marks for case in single] == [[], [], []]
    assert [case.marks for case in others] == marks
    chosen = {case.nodeid for case in grid if case.marks == []}
    assert len(chosen) == quick.QUICK_CASES < len(grid)
    again = [Case(case.nodeid) for case in reversed(grid)]
    quick.mark_the_rest_of_grids_slow(again)
    assert {case.nodeid for case in again if case.marks == []} == chosen, "the order does not matter"
