"""Faults at every step of a run that touches the disk: the steps are counted, and one of them fails."""

from __future__ import annotations

import builtins
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest


class Steps:
    """Counts opening for writing, writing, syncing, renaming and removing files; step number `at` fails.

    A write fails half-way: the first half of the data is in the file.

    Args:
        at: The step that fails, counted from 0; None only counts.
        fault: Called at that step.
    """

    def __init__(self, at: int | None, fault: Callable[[], None]) -> None:
        self.taken: list[str] = []
        self._at, self._fault = at, fault

    def take(self, what: str, before: Callable[[], None] = lambda: None) -> None:
        """Counts one step; if it is the one that fails, calls `before` ahead of the fault."""
        number = len(self.taken)
        self.taken.append(what)
        if number == self._at:
            before()
            self._fault()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Patches `open` and the functions of `os` that count as steps."""
        really_open = builtins.open

        def open_counted(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            if not set(mode) & set("wax+"):
                return really_open(file, mode, *arguments, **keywords)
            self.take(f"open {os.path.basename(str(file))}")
            return _Writer(really_open(file, mode, *arguments, **keywords), self)

        def counted(name: str) -> Callable[..., Any]:
            really = getattr(os, name)

            def call(*arguments: Any, **keywords: Any) -> Any:
                self.take(name)
                return really(*arguments, **keywords)

            return call

        patch.setattr(builtins, "open", open_counted)
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, counted(name))


class _Writer:
    """A file whose writes are steps."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._steps.take("write", half)
        written: int = self._file.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def die() -> None:
    """Ends this process between two instructions, as `kill -9` would."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(28, "No space left on device")


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process and prints its error; returns its exit code, or minus the signal that ended it.

    Torch refuses to differentiate in a fork of a process that has used torch.compile, see `workers.LONGEST`.
    """
    reader, writer = os.pipe()  # whose writes no limit of file sizes forbids
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as said:
        print(said.read().decode())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
