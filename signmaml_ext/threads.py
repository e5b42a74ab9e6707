"""Tasks on several threads, each with one of torch's own threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Calls that use all cores take turns: with several at once each would be slower. While one is at work, a thread that
# uses torch for the first time takes over 1 as its number of torch's threads.
_cores = threading.RLock()

# So many items or fewer are not worth threads: of several, the first is done alone.
FEWEST = 2


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
    function: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Generator[Result, None, None]:
    """The function's results in the order of the items, computed by several threads; close it to stop them early.

    An item's result does not depend on the number of threads. The first item is done alone: what it finds out about the
    model, the others use.

    Raises:
        BaseException: What the function raised for the first item for which it did.
    """
    if threads < 2 or len(items) <= FEWEST:
        yield from map(function, items)
        return
    with _cores:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield function(items[0])
            yield from _Team(function, items[1:], threads).results()
        finally:
            torch.set_num_threads(before)


class _Team(Generic[Item, Result]):
    """Threads that share items: number n of them takes items n, n + threads, ...; number 0 is the caller's own."""

    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> None:
        self._function, self._items, self._threads = function, items, min(threads, len(items))
        self._changed = threading.Condition()
        self._found: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._handed_out = 0
        self._stopped = False

    def results(self) -> Generator[Result, None, None]:
        """In the order of the items, which the caller's thread works on too."""
        others = [threading.Thread(target=self._work, args=(number,)) for number in range(1, self._threads)]
        for thread in others:
            thread.start()
        try:
            for number in range(len(self._items)):
                if number % self._threads == 0:
                    self._do(number)
                with self._changed:
                    while number not in self._found and number not in self._errors:
                        self._changed.wait()
                    if number in self._errors:
                        raise self._errors[number]
                    result = self._found.pop(number)
                    self._handed_out = number + 1
                    self._changed.notify_all()
                yield result
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            for thread in others:
                thread.join()

    def _work(self, first: int) -> None:
        torch.set_num_threads(1)
        for number in range(first, len(self._items), self._threads):
            with self._changed:
                # Results wait for their turn; only so many of them, for they take memory.
                while not self._stopped and number >= self._handed_out + 2 * self._threads:
                    self._changed.wait()
                if self._stopped:
                    return
            self._do(number)

    def _do(self, number: int) -> None:
        try:
            result = self._function(self._items[number])
        except BaseException as error:
            with self._changed:
                self._errors[number] = error
                self._changed.notify_all()
        else:
            with self._changed:
                self._found[number] = result
                self._changed.notify_all()
