"""Compiles the same text with the same flags only once: compiler_cache.py FOLDER COMPILER ARGUMENT...

CMake puts it before the C++ compiler, see `programs.shared.launcher`. Several tests build the project in their own way
and folder, and would otherwise compile the same files repeatedly. The key is the preprocessed text, so any change in it
is noticed. FOLDER holds the object files of one test session.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

WITH_VALUE = {"-o", "-MF", "-MT", "-MQ", "-I", "-isystem"}


def plain_arguments(arguments: list[str]) -> list[str]:
    """The arguments that do not depend on where sources and build folder are; the text stands for the paths."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in WITH_VALUE:
            next(words)
        elif not word.startswith("-I") and not os.path.isabs(word):
            kept.append(word)
    return kept


def preprocessed(arguments: list[str]) -> bytes | None:
    """The text that would be compiled; None if preprocessing fails. Also writes the list of headers for ninja."""
    words = list(arguments)
    at = words.index("-o")
    del words[at : at + 2]
    words.remove("-c")
    done = subprocess.run([*words, "-E", "-P"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else None


def compile_once(folder: Path, arguments: list[str]) -> int:
    """Compiles, or copies an earlier object file; returns the compiler's exit status."""
    text = preprocessed(arguments) if {"-c", "-o"} <= set(arguments) else None
    if text is None:
        return subprocess.run(arguments).returncode
    target = Path(arguments[arguments.index("-o") + 1])
    key = hashlib.sha256("\0".join([arguments[0], *plain_arguments(arguments[1:])]).encode() + b"\0" + text).hexdigest()
    kept = folder / f"{key}.o"
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's object file
        if kept.is_file():
            target.unlink(missing_ok=True)
            shutil.copyfile(kept, target)
            return 0
        code = subprocess.run(arguments).returncode
        if code == 0:
            staged = kept.with_suffix(".part")
            shutil.copyfile(target, staged)
            os.replace(staged, kept)
        return code


if __name__ == "__main__":
    sys.exit(compile_once(Path(sys.argv[1]), sys.argv[2:]))
