"""How long a meta-step would take on a GPU, modelled from counts. Nothing here is measured.

A launch takes the gap that a dependent launch leaves, and then the largest of these times: issuing its instructions,
one a cycle and scheduler; the pipes that execute them; shared memory; the second-level cache; memory; and the path of
one block through its instructions, barriers and loads. What a multiprocessor does is counted for the one with the most
blocks: a launch with fewer blocks than multiprocessors is no faster for it.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import machine_code
from launches import Launch

from compile.resources import TABLE, output, plain, warps_resident

SCHEDULERS = 4  # of a multiprocessor
BARRIER_CYCLES = 30
# Cycles from one instruction of a warp to its next, where nothing else hides the latency: of the usual 4 to 6 of
# arithmetic and 20 to 35 of shared memory and tensor cores, about two thirds overlap within a warp.
CYCLES_OF_INSTRUCTION = 3.0
# Instructions of the pipe for integers, comparisons and selections, which has 16 lanes on all these cards, and so takes
# two cycles for a warp; and of the pipe for multiply-adds, where those on integers take two.
OF_ALU = frozenset(
    (
        "IADD3", "IADD", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "IMNMX", "LOP3", "LEA", "ISETP", "FSETP", "SEL",
        "FSEL", "FMNMX", "SHF", "PRMT", "IABS", "PLOP3", "P2R", "R2P", "SGXT", "BMSK",
    )
)  # fmt: skip
ALU_CYCLES = 2
OF_FMA = frozenset({"FFMA", "FADD", "FMUL", "HFMA2", "IMAD"})


@dataclass(frozen=True)
class Card:
    """A GPU, by its datasheet where it says something and by published microbenchmarks where it does not.

    Attributes:
        name: Of the card.
        architecture: Its own, whose limits it has.
        code: Of the machine code that it runs, of those in a wheel.
        multiprocessors: Number of them.
        ghz: Clock under load (datasheet: boost).
        cache_mb: Of the second level.
        cache_gb_s: From the second level to all multiprocessors.
        memory_gb_s: Of memory (datasheet), of which a copy reaches about nine tenths.
        cycles: That a scheduler's tensor core takes for one `mma.sync` of a warp: by precision.
        float_cycles: That a scheduler takes for one multiply-add of floats; of integers it is 2.
        double_cycles: Likewise for one instruction on doubles.
        cache_latency: Cycles from a load to its data in the second level.
        gap_us: From the end of a launch to the start of one that depends on it, in a graph.
    """

    name: str
    architecture: int
    code: int
    multiprocessors: int
    ghz: float
    cache_mb: float
    cache_gb_s: float
    memory_gb_s: float
    cycles: Mapping[str, float]
    float_cycles: float
    double_cycles: float
    cache_latency: int
    gap_us: float


# Datasheets and white papers: multiprocessors, clock, sizes, memory, rates of tensor cores. mma.sync reaches about 63%
# of Hopper's rate, which is wgmma's (Luo et al., arXiv:2501.12084). Latencies of 200 to 290 cycles and bandwidths of 5
# to 6 TB/s are what published microbenchmarks of the second level found; gaps of 1 to 1.5 us those of graphs.
_HOPPER = {"fp32": 4 / 0.63, "tf32": 4 / 0.63, "bf16": 4 / 0.63}
CARDS = {
    "H200": Card("H200", 90, 90, 132, 1.83, 50, 5500, 4800, _HOPPER, 1, 2, 270, 1.3),
    "H100": Card("H100", 90, 90, 132, 1.83, 50, 5500, 3350, _HOPPER, 1, 2, 270, 1.3),
    "A100": Card("A100", 80, 80, 108, 1.41, 40, 4500, 2040, dict.fromkeys(_HOPPER, 8.0), 2, 2, 220, 1.5),
    "RTX 4090": Card("RTX 4090", 89, 80, 128, 2.52, 72, 5000, 1008, dict.fromkeys(_HOPPER, 32.0), 1, 64, 280, 1.3),
}
MEMORY_REACHED = 0.9  # of the datasheet's rate


@dataclass(frozen=True)
class Modelled:
    """One launch on one card.

    Attributes:
        launch: The launch.
        times: Microseconds by what they are spent on; the launch takes the gap plus the largest of the others.
        memory_bytes: From and to memory.
        resident: Blocks that a multiprocessor holds at once.
        instructions: Issued in the launch.
        guessed: The share of instructions whose number is guessed (see `machine_code.Issued`).
    """

    launch: Launch
    times: Mapping[str, float]
    memory_bytes: float
    resident: int
    instructions: float
    guessed: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max((name for name in self.times if name != "gap"), key=lambda name: self.times[name])

    @property
    def microseconds(self) -> float:
        """The launch, with the gap before it."""
        return self.times["gap"] + self.times[self.bound]


class Cache:
    """The second-level cache as a list of arrays, of which the one that was touched longest ago goes first."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._held: OrderedDict[int, tuple[float, bool]] = OrderedDict()  # bytes, and whether they were written

    def touch(self, launch: Launch) -> float:
        """Bytes that a launch moves from and to memory."""
        moved = 0.0
        for address, array in launch.arrays.items():
            held, dirty = self._held.pop(address, (0.0, False))
            moved += max(0.0, array.read - held)
            self._held[address] = (max(held, array.read, array.written), dirty or array.written > 0)
        # What is larger than the cache passes through it.
        while len(self._held) > 1 and sum(size for size, _ in self._held.values()) > self.capacity:
            _, (size, dirty) = self._held.popitem(last=False)
            moved += size if dirty else 0.0
        return moved


def of_launches(launches: Sequence[Launch], card: Card, precision: str = "fp32") -> list[Modelled]:
    """Every launch of a meta-step, in order."""
    code = kernels(card.code)
    cache = Cache(card.cache_mb * 1e6)
    issued: dict[int, machine_code.Issued] = {}  # of launches that are the same object, as those of all steps are
    found = []
    for launch in launches:
        if id(launch) not in issued:
            issued[id(launch)] = machine_code.issued(code[launch.symbol], launch.sites, launch.warps)
        found.append(_modelled(launch, issued[id(launch)], cache.touch(launch), card, precision))
    return found


@cache
def kernels(architecture: int) -> Mapping[str, machine_code.Kernel]:
    """The machine code of all kernels."""
    return machine_code.kernels(architecture)


def _modelled(launch: Launch, issued: machine_code.Issued, memory_bytes: float, card: Card, precision: str) -> Modelled:
    instructions = issued.total
    resident = blocks_resident(launch, card)
    # Of the multiprocessor with the most blocks: whole blocks, unless there are so many that the last ones even out.
    share = math.ceil(launch.blocks / card.multiprocessors) / launch.blocks
    rounds = math.ceil(launch.blocks / card.multiprocessors / resident)
    products = launch.executions("mma")
    alu = sum(number for name, number in issued.by_opcode.items() if name in OF_ALU)
    fma = sum(
        number * (2 if name == "IMAD" else card.float_cycles)
        for name, number in issued.by_opcode.items()
        if name in OF_FMA
    )
    doubles = issued.by_class.get("double", 0.0)

    def of_pipe(cycles: float) -> float:
        """Microseconds for cycles of a pipe that every scheduler has."""
        return share * cycles / SCHEDULERS / card.ghz / 1e3

    barriers = launch.executions("barrier") / launch.warps
    path = (
        launch.load_rounds * card.cache_latency
        + barriers * BARRIER_CYCLES
        + instructions / launch.warps * CYCLES_OF_INSTRUCTION
    )
    # Sectors pass between the first-level cache and the second at 64 bytes a cycle and multiprocessor.
    of_cache = max(launch.passed_bytes / card.cache_gb_s / 1e3, share * launch.passed_bytes / 64 / card.ghz / 1e3)
    times = {
        "gap": card.gap_us,
        "instructions": of_pipe(instructions),
        "integer pipe": of_pipe(alu * ALU_CYCLES),
        "multiply-add pipe": of_pipe(fma),
        "tensor cores": of_pipe(products * card.cycles[precision]),
        "doubles": of_pipe(doubles * card.double_cycles),
        "shared memory": share * launch.wavefronts[0] / card.ghz / 1e3,
        "second-level cache": of_cache,
        "memory": memory_bytes / (card.memory_gb_s * MEMORY_REACHED) / 1e3,
        "path of a block": rounds * path / card.ghz / 1e3,
    }  # fmt: skip
    return Modelled(launch, times, memory_bytes, resident, instructions, issued.guessed)


def blocks_resident(launch: Launch, card: Card) -> int:
    """Blocks of a launch that a multiprocessor holds at once."""
    registers = resources()[kernel_name(launch.symbol)][f"sm_{card.code}"]["registers"]
    return max(
        1, warps_resident(registers, launch.threads, launch.shared_bytes, card.architecture) * 32 // launch.threads
    )


@cache
def resources() -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """Registers of every kernel, which the tests hold to the compiler's report."""
    found: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text())["kernels"]
    return found


@cache
def kernel_name(symbol: str) -> str:
    """A kernel's name in the source, by its mangled one."""
    return plain(output("c++filt", text=symbol).strip())
