"""Tasks on several threads, each with one of torch's own threads; and locks that an interrupt cannot leave held."""

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
    """A `threading.RLock` that `free_locks` knows, for as long as the process lives.

    Use `with` on the lock itself, not on a `threading.Condition` around it: that is entered by lines of Python, and an
    interrupt between two of them leaves the lock held.
    """
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def held_locks() -> list[Any]:
    """The locks that this thread holds."""
    return [lock for lock in tuple(_locks) if _is_held(lock)]


def free_locks(but: list[Any]) -> None:
    """Lets go of the locks that this thread holds, but for some: what an interrupt left half done may hold more."""
    for lock in held_locks():
        if not any(lock is kept for kept in but):
            _free(lock)


def wait_for(changed: threading.Condition, lock: Any) -> None:
    """Waits on a condition of a lock that is held; holds it afterwards, also after an interrupt."""
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
    """Holds threads up until it is opened; unlike a `threading.Event` it is whole after an interrupt."""

    def __init__(self) -> None:
        self._held, self._is_open = threading.Lock(), False
        self._held.acquire()

    def open(self) -> None:
        """Lets all through, from now on; the second time it does nothing."""
        if not self._is_open:
            if self._held.locked():  # else an interrupt ended the first time here
                self._held.release()
            self._is_open = True

    def wait(self) -> None:
        """Returns once it is open."""
        if not self._is_open:
            with self._held:
                pass


# Calls that use all cores take turns: with several at once each would be slower. While one is at work, a thread that
# uses torch for the first time takes over 1 as its number of torch's threads.
_cores = lasting_lock()


def why_one_thread() -> str | None:
    """None if work may move to other threads, else what of this thread's state they would not have."""
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

    An item's result does not depend on the number of threads. The caller's thread does the first item, so that others
    may wait for what that finds out.

    Args:
        function: What is done.
        items: With what.
        threads: How many at most.
        stop: Ends all waiting in the function; called when the results are not wanted any more.

    Raises:
        BaseException: What the function raised for the first item for which it did.
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
        """In the order of the items, which the caller's thread works on too."""
        others: list[Latch] = []
        try:
            try:
                for number in range(1, self._threads):
                    ended = Latch()
                    # Not a `threading.Thread`: an interrupt in the lines of its `start` would leave that half done.
                    _thread.start_new_thread(self._work_until, (number, ended))
                    others.append(ended)
                for number in range(len(self._items)):
                    if number % self._threads == 0:
                        self._do(number)
                    yield self._wait_for_result(number)
            finally:
                self._end(others)
        finally:
            self._end(others)  # of an interrupt in the first one

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
                # Results wait for their turn; only so many of them, for they take memory.
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
