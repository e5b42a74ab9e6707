"""The folder that all processes of a test session share, for things that are built or compiled once.

pytest-xdist runs test files in several processes. The first process creates the folder before it starts them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "SIGNMAML_TEST_SHARED"
COMPILER_CACHE = Path(__file__).with_name("compiler_cache.py")


def make_folder() -> Callable[[], None]:
    """Creates the folder for this process and those that it starts; returns a function that removes it."""
    made = tempfile.TemporaryDirectory(prefix="signmaml_tests-")
    os.environ[VARIABLE] = made.name
    return made.cleanup


def folder(name: str) -> Path:
    """A folder with this name, the same in all processes of the session."""
    found = Path(os.environ[VARIABLE]) / name
    found.mkdir(exist_ok=True)
    return found


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder filled by `make` in the first process that asks for it; the others wait.

    If `make` fails, the next process tries again in an empty folder and reports the same error.
    """
    place = folder(name)
    made = place / "made"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            (place / "complete").touch()
    return made


def launcher() -> dict[str, str]:
    """Variables that make CMake compile C++ through the cache; empty outside of a test session."""
    if VARIABLE not in os.environ:
        return {}
    words = [sys.executable, "-I", str(COMPILER_CACHE), str(folder("objects"))]
    return {"CMAKE_CXX_COMPILER_LAUNCHER": ";".join(words)}
