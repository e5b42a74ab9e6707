"""Training one model with several processes: the few collectives of `torch.distributed` that the trainer needs.

Every process holds the whole model and the same optimizer state. The tasks of a meta-batch are numbered; each process
draws and computes its share of them. One all-reduce per step gives every process the same meta-gradient. Only rank 0
writes files. docs/howto/distributed.md describes what is exchanged.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

DEFAULT_TIMEOUT = 600.0  # seconds that a process waits for the others
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessLost(RuntimeError):
    """Another process of the run has ended, hangs, or cannot be reached."""


class Group:
    """The processes of a run. `Group()` is one process alone; `join` gives the group that torchrun started.

    All methods except `share_of` are collective: every process must call them, in the same order.

    Attributes:
        rank: This process, 0 to size - 1.
        size: Number of processes.
        local_rank: This process's rank on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share_of(self, tasks: int) -> range:
        """The tasks out of 0..tasks-1 that this process computes: consecutive, and shares differ by at most one task.

        Example:
            >>> [Group(rank, 3).share_of(7) for rank in range(3)]
            [range(0, 2), range(2, 4), range(4, 7)]
        """
        return range(tasks * self.rank // self.size, tasks * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over all processes; every process gets the same bits.

        Raises:
            ProcessLost: Another process has ended or does not answer in time.
        """
        if self.size > 1:
            with self._telling():
                torch.distributed.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        raised = torch.tensor([int(flag)], device="cpu")
        self.add(raised)
        return bool(raised)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with rank 0's."""
        if self.size > 1:
            with self._telling(), torch.no_grad():
                for tensor in tensors:
                    sent = tensor.detach().contiguous()
                    torch.distributed.broadcast(sent, 0)
                    tensor.copy_(sent)

    def bytes_of_first(self, content: bytes | None) -> bytes:
        """Rank 0's bytes, in every process. Bytes rather than objects, so that nothing received is ever unpickled."""
        if self.size == 1:
            assert content is not None
            return content
        with self._telling():
            length = torch.tensor([len(content) if content is not None else 0], device="cpu")
            torch.distributed.broadcast(length, 0)
            data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
            if self.first and content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if len(data):
                torch.distributed.broadcast(data, 0)
        return data.numpy().tobytes()

    def first_does(self, work: Callable[[], Result]) -> Result | None:
        """Runs `work` on rank 0 only; the others wait for it and fail if it fails.

        Returns:
            What `work` returned on rank 0; None elsewhere.

        Raises:
            ProcessLost: On the other ranks, if `work` raised on rank 0, where the error itself is raised.
        """
        if self.size == 1:
            return work()
        result = None
        if self.first:
            try:
                result = work()
            except BaseException as error:
                self.bytes_of_first(f"{type(error).__name__}: {error}".encode())
                raise
        failure = self.bytes_of_first(b"" if self.first else None).decode()
        if failure:
            raise ProcessLost(f"distributed: process {self.rank} of {self.size} ends because process 0 did: {failure}")
        return result

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Runs the body on rank 0 first and then on the others, so that they find what it put into a cache."""
        if not self.first:
            self.first_does(lambda: None)
        yield
        if self.first:
            self.first_does(lambda: None)

    def check_same(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raises RuntimeError unless the tensors are bitwise equal in every process."""
        if self.size == 1:
            return
        total = torch.tensor([_checksum(tensors)], device="cpu")
        low, high = total.clone(), total.clone()
        with self._telling():
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        if int(low) != int(high):
            raise RuntimeError(
                f"distributed: expected bitwise the same {what} in all {self.size} processes, found different ones. "
                "Processors or library versions that round differently do this: use machines of one kind, and set "
                "the same ATEN_CPU_CAPABILITY on all"
            )

    def close(self) -> None:
        """Leaves the group (collective). Do not call it after an error. Call `leave` afterwards."""
        if self.size > 1:
            self.any(False)
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # includes DistBackendError and gloo's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProcessLost(
                f"distributed: expected an answer of all {self.size} processes, found that one has ended, hangs or "
                f"cannot be reached (noticed by process {self.rank}: {reason}). What was saved is safe: continue with "
                "--resume, or let torchrun restart the processes (--max-restarts)"
            ) from error


def leave(code: int) -> NoReturn:
    """Ends this process, one of several, once everything is written or an error has been reported.

    Skips Python's own shutdown: gloo threads that had not finished yet were seen to abort it (torch 2.14).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def restarts_allowed() -> bool:
    """Whether torchrun would restart the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def join(device: str = "auto", timeout: float = DEFAULT_TIMEOUT) -> Group:
    """Joins the processes that torchrun started: NCCL between CUDA devices, gloo between CPUs.

    Args:
        device: "auto", "cpu" or "cuda"; with CUDA every process uses the device of its local rank.
        timeout: Seconds that any exchange waits for the others before it fails.

    Returns:
        The group; one process alone if torchrun did not start it.

    Raises:
        ValueError: A variable of torchrun's environment is missing or not a number; there are more processes on this
            machine than CUDA devices; `device` names one device for several processes.
        ProcessLost: The other processes do not join in time.

    Example:
        >>> join().size
        1
    """
    if not launched():
        return Group()
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"distributed: expected torchrun's variables {', '.join(_VARIABLES)}, found no {missing[0]}")
    rank, size, local_rank, local_size = (_number(name) for name in _VARIABLES[:4])
    if not 0 <= rank < size or not 0 <= local_rank < local_size:
        raise ValueError(f"distributed: expected 0 <= RANK < WORLD_SIZE, found RANK {rank} and WORLD_SIZE {size}")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if ":" in device and local_size > 1:
            raise ValueError(f"device: expected auto, cpu or cuda for several processes, found {device!r}")
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"distributed: expected at most one process a CUDA device ({torch.cuda.device_count()} here), found "
                f"{local_size} processes; start fewer, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    group = Group(rank, size, local_rank)
    if size > 1:
        # CPU tensors (flags, bytes of files) use gloo in both cases.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        with group._telling():
            limit = datetime.timedelta(seconds=timeout)
            store, _, _ = next(torch.distributed.rendezvous("env://", timeout=limit))
            store.set_timeout(limit)
            own = torch.distributed.PrefixStore(_fresh_name(store, rank, size, timeout), store)
            torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    return group


def _fresh_name(store: torch.distributed.Store, rank: int, size: int, timeout: float) -> str:
    """A key prefix shared by all processes of this start and by none of an earlier one.

    torchrun's store outlives the processes that it restarts, so its old keys hold addresses of dead processes. The
    restart count cannot serve as the new prefix because it differs between machines. Instead, each process asks with a
    random word, and rank 0 answers every word it finds until all processes have confirmed.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"signmaml/ask/{rank}", word)
        name: str = store.get(f"signmaml/answer/{word}").decode()
        store.set(f"{name}/confirm/{rank}", "here")
        return name
    name, waiting, answered = f"signmaml/{word}", set(range(1, size)), set()
    deadline = time.monotonic() + timeout
    while waiting:
        for other in sorted(waiting):
            if store.check([f"signmaml/ask/{other}"]):
                asked = store.get(f"signmaml/ask/{other}").decode()
                if asked not in answered:
                    store.set(f"signmaml/answer/{asked}", name)
                    answered.add(asked)
            if store.check([f"{name}/confirm/{other}"]):
                waiting.discard(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(waiting)} did not come within {timeout:g} s")
        time.sleep(0.01)
    return name


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"distributed: expected a number in {name}, found {os.environ[name]!r}") from None


def _checksum(tensors: Iterable[Tensor]) -> int:
    """A 62-bit checksum of float32 and float64 tensors that depends on every bit and on their order."""
    total = 0
    for tensor in tensors:
        words = tensor.detach().contiguous().cpu().flatten().view(torch.int32).to(torch.int64)
        places = torch.arange(1, len(words) + 1, device="cpu").mul_(0x9E3779B1)
        total = (total * 31 + int(places.mul_(words).sum())) % (1 << 62)
    return total
