"""What every launch of a meta-step asks of a GPU's memory and tensor cores, counted on the emulated GPU.

The kernels run as C++ on the CPU (csrc/emulation/counting.h), at the real sizes of a workload. Of each launch a few
blocks run, spread evenly over the grid, and stand for all. One task runs and stands for all as well: tasks differ in
their data, and no kernel's work depends on it, except for the winners of max-pooling, which are random here.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import counts
import torch
from machine_code import Site  # which makes the tests' helpers known
from torch import Tensor
from workloads import WORKLOADS, Workload

from helpers.devices import emulated

MULTIPROCESSORS = 132  # that plans are told; only the perceptron's plan asks
# Kernels whose blocks do different work; they take little time.
COUNTED_IN_FULL = {"conv_pack_kernel", "conv_sign_update_kernel", "conv_meta_accumulate_kernel", "conv_unpack_kernel"}
SHARED_BY_TASKS = {"theta", "lr", "adapt"}
# Frames of the emulator's twin of platform.cuh: the machine code has none of their own.
OF_THE_EMULATOR = {"device.h", "machine.h"}


@dataclass(frozen=True)
class Array:
    """The bytes of one global array that a launch touches, for all tasks.

    Attributes:
        name: Of the array.
        read: Bytes of sectors that are read, each counted once.
        written: Likewise.
        passed: Bytes that pass between the multiprocessors and the second-level cache: a sector counts once a block if
            it is loaded, and at every request if it is stored or copied asynchronously.
    """

    name: str
    read: float
    written: float
    passed: float


@dataclass(frozen=True)
class Place:
    """One place in a kernel's source, and what the warps of a launch do there.

    Attributes:
        site: Where and how often.
        sectors: 32-byte sectors of global memory that requests touch, and the least for as many bytes.
        wavefronts: Cycles of shared memory that requests take, and the least for as many bytes.
    """

    site: Site
    sectors: tuple[float, float]
    wavefronts: tuple[float, float]


@dataclass(frozen=True)
class Launch:
    """One launch of a meta-step, with everything scaled to all blocks of all tasks.

    Attributes:
        kernel: Its name.
        block: Of the network, from 1; 0: all blocks, or none.
        step: The inner step, from 0; K: the query pass; -1: before the first.
        query: Whether it works on the query set.
        symbol: The kernel's mangled name.
        blocks: Blocks of threads.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        places: Of the source.
        arrays: By their address.
        load_rounds: Loads from global memory that a block makes one after the other, four at a time.
    """

    kernel: str
    block: int
    step: int
    query: bool
    symbol: str
    blocks: float
    threads: int
    shared_bytes: int
    places: tuple[Place, ...]
    arrays: Mapping[int, Array]
    load_rounds: float

    @property
    def warps(self) -> float:
        """Of all blocks."""
        return self.blocks * self.threads / 32

    def executions(self, kind: str) -> float:
        """How often a warp executes places of a kind."""
        return sum(place.site.executions for place in self.places if place.site.kind == kind)

    @cached_property
    def sectors(self) -> tuple[float, float]:
        """Sectors of global memory, and the least."""
        return sum_of_pairs(place.sectors for place in self.places)

    @cached_property
    def wavefronts(self) -> tuple[float, float]:
        """Cycles of shared memory, and the least."""
        return sum_of_pairs(place.wavefronts for place in self.places)

    @property
    def sites(self) -> list[Site]:
        """For `machine_code.issued`."""
        return [place.site for place in self.places]

    @property
    def passed_bytes(self) -> float:
        """Between the multiprocessors and the second-level cache."""
        return sum(array.passed for array in self.arrays.values())


def sum_of_pairs(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """What is taken and the least, of several."""
    first, second = zip((0.0, 0.0), *pairs, strict=True)
    return sum(first), sum(second)


@cache
def emulated_module() -> Path:
    """The module of the kernels on the emulated GPU, built at the first call from these sources."""
    return emulated.build_once()


@cache
def native() -> ModuleType:
    """The same, loaded."""
    return emulated.load(emulated_module())


@contextmanager
def counting(blocks: int) -> Iterator[list[dict[str, Any]]]:
    """Launches within are counted instead of checked; the list holds their counts afterwards."""
    found: list[dict[str, Any]] = []
    native().count(blocks, COUNTED_IN_FULL)
    try:
        yield found
    finally:
        found += native().take_counts()


def of_workload(letter: str, precision: str = "fp32", *, blocks: int = 8, steps: int = 5) -> list[Launch]:
    """The launches of one meta-step, in order.

    Args:
        letter: Of a workload of `workloads.WORKLOADS`.
        precision: Of the convolutions.
        blocks: How many blocks of a launch are counted.
        steps: K.
    """
    work = WORKLOADS[letter]
    if isinstance(work.net, counts.ConvNet):
        return _convolutional(work, precision, blocks, steps)
    return _perceptron(work, blocks, steps)


def _convolutional(work: Workload, precision: str, blocks: int, steps: int) -> list[Launch]:
    net = work.net
    assert isinstance(net, counts.ConvNet)
    shape = {
        "blocks": net.blocks, "channels": net.channels, "filters": net.filters, "height": net.size, "width": net.size,
        "ways": net.ways, "halving": net.halving, "readout": "flatten", "conv_bias": True, "eps": [1e-5] * net.blocks,
    }  # fmt: skip
    # One task and one step; the other steps are the same.
    plan = native().plan_conv_meta_step(shape, 1, work.support, work.query, 1, precision, MULTIPROCESSORS)
    sizes = {"support": work.support, "query": work.query}
    tensors = 4 * net.blocks + 2
    arguments = {
        "theta": torch.randn(plan["parameters"]) * 0.1,
        "lr": torch.full((tensors,), work.inner_lr),
        "adapt": torch.ones(tensors, dtype=torch.bool),
        "workspace": _workspace(plan, pools=net.halving == "max"),
        **{f"{name}_x": torch.rand(1, count, net.channels, net.size, net.size) for name, count in sizes.items()},
        **{f"{name}_labels": torch.arange(count).expand(1, -1) % net.ways for name, count in sizes.items()},
        "support_loss": torch.empty(1, 1), "query_loss": torch.empty(1), "query_accuracy": torch.empty(1),
        "grads": torch.empty(1, plan["parameters"]), "nonfinite": torch.zeros(1, dtype=torch.bool),
    }  # fmt: skip
    with counting(blocks) as launched:
        native().conv_meta_step_cuda(
            {name: tensor.data_ptr() for name, tensor in arguments.items()}, shape, tasks=1, **sizes, steps=1,
            method="sign-maml", precision=precision, by_covariance=True, workspace_limit=0, device=0, stream=0,
        )  # fmt: skip
    bytes_of = _sizes(arguments)
    for array in plan["workspace"]:
        bytes_of[arguments["workspace"].data_ptr() + array["offset"]] = array["stride"]
    found = [
        _launch(
            counted, bytes_of, work.tasks, block=planned["block_of_network"] + 1, step=planned["step"],
            query=planned["set"] == "query",
        )
        for counted, planned in zip(launched, plan["launches"], strict=True)
    ]  # fmt: skip
    before = [one for one in found if one.step < 0]
    step = [one for one in found if one.step == 0]
    return [*before, *step * steps, *(one for one in found if one.step == 1)]


def _perceptron(work: Workload, blocks: int, steps: int) -> list[Launch]:
    assert isinstance(work.net, counts.Perceptron)
    widths, tasks = list(work.net.widths), work.tasks
    parameters = sum((before + 1) * after for before, after in itertools.pairwise(widths))
    sizes = {"tasks": tasks, "support": work.support, "query": work.query}
    plan = native().plan_mlp_meta_step(widths, *sizes.values(), 4, MULTIPROCESSORS)
    native().configure(multiprocessors=MULTIPROCESSORS)
    layers = len(widths) - 1
    arguments = {
        "theta": torch.randn(parameters), "lr": torch.full((steps, 2 * layers), work.inner_lr),
        "adapt": torch.ones(2 * layers, dtype=torch.bool),
        "support_x": torch.randn(tasks, work.support, widths[0]), "query_x": torch.randn(tasks, work.query, widths[0]),
        "support_target": torch.randn(tasks, work.support, widths[-1]),
        "query_target": torch.randn(tasks, work.query, widths[-1]), "support_loss": torch.empty(steps, tasks),
        "query_loss": torch.empty(tasks), "grads": torch.empty(tasks, parameters),
        "nonfinite": torch.zeros(tasks, dtype=torch.bool), "workspace": torch.empty(max(1, plan["workspace_scalars"])),
    }  # fmt: skip
    with counting(blocks) as launched:
        native().mlp_meta_step_cuda(
            {name: tensor.data_ptr() for name, tensor in arguments.items()}, widths, "relu", "mse", **sizes,
            steps=steps, method="sign-maml", is_double=False, device=0, stream=0,
        )  # fmt: skip
    native().configure()
    (counted,) = launched
    return [_launch(counted, _sizes(arguments), 1, block=0, step=-1, query=False)]


def _workspace(plan: Mapping[str, Any], pools: bool) -> Tensor:
    """Memory for the blocks that do not run: other blocks read what those would have written."""
    memory = torch.rand(plan["workspace_bytes"] // 4)
    for array in plan["workspace"]:
        if array["name"] != "choices":
            continue
        # The winner's place among four (among one without pooling), plus 4 where ReLU passes the value.
        part = memory.view(torch.uint8)[array["offset"] : array["offset"] + array["stride"]]
        part.copy_(torch.randint(8, part.shape, dtype=torch.uint8) & (7 if pools else 4))
    return memory


def _sizes(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    return {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors.values()}


def _launch(
    counted: Mapping[str, Any], bytes_of: Mapping[int, int], tasks: int, *, block: int, step: int, query: bool
) -> Launch:
    """A launch scaled from the blocks that were counted to all, and from one task to all."""
    scale = tasks * counted["blocks"] / counted["counted_blocks"]
    chains = frames(place["code"] for place in counted["places"])
    # The caller of the kernel is in the same file, and its basic blocks are counted too.
    symbol = Counter(chains[place["code"]][-1][0] for place in counted["places"]).most_common(1)[0][0]
    places = []
    for place in counted["places"]:
        chain = chains[place["code"]]
        if chain[-1][0] != symbol:
            continue
        lines = tuple((file, line) for _, file, line in chain if file not in OF_THE_EMULATOR)
        places.append(
            Place(
                Site(lines, place["kind"], place["bytes"], place["executions"] * scale),
                (place["sectors"] * scale, place["least_sectors"] * scale),
                (place["wavefronts"] * scale, place["least_wavefronts"] * scale),
            )
        )
    arrays = {}
    for array in counted["arrays"]:
        of_tasks = 1 if array["name"] in SHARED_BY_TASKS else tasks
        most = bytes_of[array["address"]]
        read, written = (
            of_tasks * min(most, _of_all(array[f"{what}_once"], array[f"{what}_by_blocks"], counted))
            for what in ("read", "written")
        )
        passed = scale * (array["loaded"] + array["copied"] + array["stored"])
        arrays[array["address"]] = Array(array["name"], read, written, passed)
    return Launch(
        counted["kernel"], block, step, query, symbol, counted["blocks"] * tasks, counted["threads"],
        counted["shared_bytes"], tuple(places), arrays, counted["load_rounds"] / counted["counted_blocks"],
    )  # fmt: skip


def _of_all(once: int, by_blocks: int, counted: Mapping[str, Any]) -> float:
    """Bytes that all blocks touch, each counted once, from what the counted blocks touch together and one by one: every
    block has bytes of its own, and some that all have."""
    some = counted["counted_blocks"]
    own = 0.0 if some == 1 else max(0.0, (once - by_blocks / some) / (some - 1))
    return float(once + (counted["blocks"] - some) * own)


_FRAMES: dict[int, list[tuple[str, str, int]]] = {}


def frames(codes: Any) -> Mapping[int, Sequence[tuple[str, str, int]]]:
    """Function, file and line of places in the emulated module, and of the calls that were inlined, innermost first."""
    new = sorted(set(codes) - _FRAMES.keys())
    if new:
        # A place is where a call returns to, which may be on the next line.
        listing = "\n".join(hex(code - 1) for code in new)
        command = ["addr2line", "--inlines", "--functions", "--addresses", "--exe", str(emulated_module())]
        done = subprocess.run(command, input=listing, capture_output=True, text=True, check=True)
        for code, part in zip(new, re.split(r"^0x[0-9a-f]+\n", done.stdout, flags=re.MULTILINE)[1:], strict=True):
            lines = part.splitlines()
            chain = []
            for function, where in zip(lines[::2], lines[1::2], strict=True):
                file, _, line = where.split(" ")[0].rpartition(":")
                chain.append((function, Path(file).name, int(line) if line.isdigit() else 0))
            _FRAMES[code] = chain
    return _FRAMES
