"""Tasks on several threads, each using one torch thread; and locks that an interrupt cannot leave held."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_locks: list[Any] = []


def lasting_lock() -> Any:
    """A `threading.RLock` that `free_locks` can release; it lives as long as the process.

    Use `with` on the lock itself, not on a `threading.Condition` around it: entering the latter runs Python code, and
    an interrupt between two lines of it leaves the lock held.
    """
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def held_locks() -> list[Any]:
    """The locks that this thread holds."""
    return [lock for lock in tuple(_locks) if _is_held(lock)]


def free_locks(but: list[Any]) -> None:
    """Releases the locks that this thread holds except those in `but`; interrupted code may have left some held."""
    for lock in held_locks():
        if not any(lock is kept for kept in but):
            _free(lock)


def wait_for(changed: threading.Condition, lock: Any) -> None:
    """Waits on a condition whose lock is held; the lock is held afterwards too, also after an interrupt."""
    try:
        changed.wait()
    finally:
        if not _is_held(lock):
            lock.acquire()


def _is_held(lock: Any) -> bool:
    return bool(lock._is_owned())


def _free(lock: Any) -> None:
    while _is_held(lock):
        lock.release()


class Latch:
    """Blocks threads until it is opened; unlike a `threading.Event` it stays consistent after an interrupt."""

    def __init__(self) -> None:
        self._held, self._is_open = threading.Lock(), False
        self._held.acquire()

    def open(self) -> None:
        """Releases all threads from now on; opening it again does nothing."""
        if not self._is_open:
            if self._held.locked():  # else an interrupt ended the first call here
                self._held.release()
            self._is_open = True

    def wait(self) -> None:
        """Returns once it is open."""
        if not self._is_open:
            with self._held:
                pass


# Calls that use all cores run one at a time, because each would be slower with several at once. While one runs, a
# thread that uses torch for the first time inherits a thread count of 1.
_cores = lasting_lock()


def why_one_thread() -> str | None:
    """None if work may move to other threads, else the thread-local state that they would lack."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a torch mode is on around the call"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on around the call"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "saved-tensor hooks are on around the call"
    return None


def map_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, stop: Callable[[], None]
) -> Generator[Result, None, None]:
    """The function's results in the order of the items, computed by several threads; close it to stop them early.

    An item's result does not depend on the number of threads. The caller's thread processes the first item, so that
    other threads may wait for its findings.

    Args:
        function: Is applied to each item.
        items: Its arguments.
        threads: Most threads to use.
        stop: Ends all waiting in the function; called when no more results are wanted.

    Raises:
        BaseException: The function's error for the first item that raised one.
    """
    if threads < 2 or len(items) < 2:
        yield from map(function, items)
        return
    with _cores:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from _Team(function, items, threads, stop).results()
        finally:
            torch.set_num_threads(before)


class _Team(Generic[Item, Result]):
    """Threads that share items: number n of them takes items n, n + threads, ...; number 0 is the caller's own."""

    def __init__(
        self, function: Callable[[Item], Result], items: Sequence[Item], threads: int, stop: Callable[[], None]
    ) -> None:
        self._function, self._items, self._threads = function, items, min(threads, len(items))
        self._stop = stop
        self._lock: Any = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._found: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._handed_out = 0
        self._stopped = False

    def results(self) -> Generator[Result, None, None]:
        """The results in the order of the items; the caller's thread computes some of them."""
        others: list[Latch] = []
        try:
            try:
                for number in range(1, self._threads):
                    ended = Latch()
                    # Not a `threading.Thread`: an interrupt within its `start` would leave it half started.
                    _thread.start_new_thread(self._work_until, (number, ended))
                    others.append(ended)
                for number in range(len(self._items)):
                    if number % self._threads == 0:
                        self._do(number)
                    yield self._wait_for_result(number)
            finally:
                self._end(others)
        finally:
            self._end(others)  # again, in case an interrupt ended the first one

    def _wait_for_result(self, number: int) -> Result:
        with self._lock:
            while number not in self._found and number not in self._errors:
                wait_for(self._changed, self._lock)
            if number in self._errors:
                raise self._errors[number]
            self._handed_out = number + 1
            self._changed.notify_all()
            return self._found.pop(number)

    def _end(self, others: list[Latch]) -> None:
        self._stopped = True
        self._stop()
        with self._lock:
            self._changed.notify_all()
        _free(self._lock)  # an interrupt may have left it held, and the others wait for it
        for ended in others:
            ended.wait()

    def _work_until(self, first: int, ended: Latch) -> None:
        try:
            self._work(first)
        finally:
            ended.open()

    def _work(self, first: int) -> None:
        torch.set_num_threads(1)
        for number in range(first, len(self._items), self._threads):
            with self._lock:
                # Finished results wait for their turn and take memory, so threads may run only this far ahead.
                while not self._stopped and number >= self._handed_out + 2 * self._threads:
                    wait_for(self._changed, self._lock)
                if self._stopped:
                    return
            self._do(number)

    def _do(self, number: int) -> None:
        try:
            result = self._function(self._items[number])
        except BaseException as error:
            with self._lock:
                self._errors[number] = error
                self._changed.notify_all()
        else:
            with self._lock:
                self._found[number] = result
                self._changed.notify_all()
