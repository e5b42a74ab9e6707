"""What the processes of one session of tests share: a folder, and in it what is made or compiled once.

pytest-xdist runs the files of tests in several processes. The first process makes the folder before it starts them.
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
    """Makes the folder, for this process and those that it starts; what is returned removes it."""
    made = tempfile.TemporaryDirectory(prefix="signmaml_tests-")
    os.environ[VARIABLE] = made.name
    return made.cleanup


def folder(name: str) -> Path:
    """A folder of that name, the same in all processes of the session."""
    found = Path(os.environ[VARIABLE]) / name
    found.mkdir(exist_ok=True)
    return found


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, in the process that asks first; the others wait for it.

    Where `make` fails, the next process tries again in an empty folder, and says the same.
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
    """The environment in which CMake compiles C++ through the cache; none outside of a session of tests."""
    if VARIABLE not in os.environ:
        return {}
    words = [sys.executable, "-I", str(COMPILER_CACHE), str(folder("objects"))]
    return {"CMAKE_CXX_COMPILER_LAUNCHER": ";".join(words)}
