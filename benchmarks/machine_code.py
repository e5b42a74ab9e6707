"""How many machine instructions a kernel issues in a launch, from nvcc's code and from counts of its source lines.

The emulated GPU runs the same source as C++ and counts how often a warp reaches each place of it. Here those counts
meet the machine code (SASS). Every memory access, tensor-core product, shuffle and barrier in it has a line of the
source, and so tells how often the loop runs that it lies in. The result is a model, not a measurement: no GPU has run
anything.

How often each basic block runs is the solution of a linear program. It keeps the flow of a warp through the code (what
enters a block leaves it), and of all such flows takes the one that misses the fewest counted executions.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # helpers that find CUDA's programs and kernels

from compile.resources import LAUNCHES, cubin, output
from helpers.programs.tools import tool

ROOT = Path(__file__).resolve().parents[1]

# What the hardware offers ends here in platform.cuh, and device.h has its twin; below it both run the same source.
PLATFORM = "platform.cuh"
END_OF_PLATFORM = "#endif  // SIGNMAML_EMULATION"

Frames = tuple[tuple[str, int], ...]

CLASSES = (
    "tensor", "float", "double", "integer", "uniform", "shared", "global", "copy", "shuffle", "control", "other",
)  # fmt: skip

_KINDS = {
    "LDG": "global_load", "LD": "load", "STG": "global_store", "ST": "store", "LDS": "shared_load",
    "STS": "shared_store", "LDGSTS": "copy", "HMMA": "mma", "SHFL": "shuffle", "BAR": "barrier", "LDSM": "ldmatrix",
}  # fmt: skip
_BY_OPCODE = {
    **dict.fromkeys(("HMMA", "IMMA", "DMMA", "QMMA", "OMMA"), "tensor"),
    **dict.fromkeys(("LDS", "STS", "LDSM", "ATOMS"), "shared"),
    **dict.fromkeys(("LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED", "CCTL", "LDL", "STL"), "global"),
    **dict.fromkeys(("LDGSTS", "LDGDEPBAR"), "copy"),
    **dict.fromkeys(("SHFL", "VOTE", "MATCH", "REDUX"), "shuffle"),
    **dict.fromkeys(
        ("BRA", "BRX", "BRXU", "BAR", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "EXIT", "DEPBAR", "NOP", "CALL", "RET",
         "YIELD", "ENDCOLLECTIVE", "NANOSLEEP", "ERRBAR", "MEMBAR", "JMP", "KILL", "BMOV"), "control",
    ),
    **dict.fromkeys(
        ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "MUFU", "FSETP", "FSET", "FSEL", "FMNMX", "FMNMX3", "FCHK",
         "F2F", "F2I", "I2F", "F2FP", "I2FP", "FRND", "HFMA2", "HADD2", "HMUL2", "HSETP2", "HMNMX2", "FSWZADD"),
        "float",
    ),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"), "double"),
    **dict.fromkeys(
        ("IMAD", "IADD3", "IADD", "VIADD", "LOP3", "LEA", "ISETP", "SHF", "PRMT", "MOV", "SEL", "S2R", "CS2R", "IABS",
         "VIMNMX", "VIMNMX3", "VIADDMNMX", "IMNMX", "PLOP3", "P2R", "R2P", "POPC", "FLO", "BMSK", "SGXT", "LDC", "BREV",
         "IDP", "MOVM", "LEPC"),
        "integer",
    ),
}  # fmt: skip
# On the uniform datapath, or between it and the others; they take an issue slot like all others.
_UNIFORM = re.compile(r"U[A-Z]|S2UR|R2UR|LDCU|CREDUX")

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_FRAME = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]+)"')


@dataclass(frozen=True)
class Site:
    """A place of the source, with how often a warp ran it in a launch.

    Attributes:
        frames: file and line, the innermost inlined function first, without those of the platform.
        kind: `block`, `global_load`, `global_store`, `shared_load`, `shared_store`, `copy`, `mma`, `shuffle`,
            `barrier`, `warp_barrier` or `ldmatrix`.
        bytes: what a lane moves; 0 for what moves nothing.
        executions: by warps with at least one lane active.
    """

    frames: Frames
    kind: str
    bytes: int
    executions: float


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `predicate` is empty where it always takes effect."""

    address: int
    opcode: str
    operands: str
    predicate: str
    frames: Frames

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it names."""
        match = _TARGET.search(self.operands)
        return match[1] if match else None

    @property
    def kind(self) -> str | None:
        """The kind of site that it is, or None; `load` and `store` may be of shared and of global memory."""
        if self.predicate == "!PT":  # padding in the shape of a load, before asynchronous copies
            return None
        if self.name == "BAR" and "SYNC" not in self.opcode and "RED" not in self.opcode:
            return None
        return _KINDS.get(self.name)

    @property
    def width(self) -> int:
        """Bytes that a lane moves; 0 for what is no load and no store."""
        if self.kind is None or not self.kind.endswith(("load", "store", "copy")):
            return 0
        for modifier in self.opcode.split(".")[1:]:
            if modifier in ("64", "128", "256"):
                return int(modifier) // 8
            if modifier in ("U8", "S8", "U16", "S16"):
                return int(modifier[1:]) // 8
        return 4

    @property
    def category(self) -> str:
        """The class under which it is counted."""
        if self.predicate == "!PT":
            return "control"
        if _UNIFORM.match(self.name):
            return "uniform"
        if self.name in ("F2F", "F2I", "I2F", "MUFU", "FRND") and ("F64" in self.opcode or "64H" in self.opcode):
            return "double"
        return _BY_OPCODE.get(self.name, "other")


@dataclass
class Block:
    """Instructions that run one after the other, and where a warp can go from there.

    Attributes:
        successors: numbers of blocks.
        meets: the block in which the lanes meet that this block's BSSY has sent apart; else None.
        waits: whether it ends with waiting for the others (BSYNC), so that it has no successor of its own.
        rare: whether it runs only for numbers that a quick division or root cannot do.
        uniform: whether all lanes take the same branch at its end.
    """

    instructions: list[Instruction]
    successors: tuple[int, ...] = ()
    meets: int | None = None
    waits: bool = False
    rare: bool = False
    uniform: bool = False


@dataclass(frozen=True)
class Loop:
    """A natural loop: `blocks` that lead back to `header`."""

    header: int
    blocks: frozenset[int]


@dataclass
class Kernel:
    """The machine code of one kernel with its basic blocks; block 0 is the entry."""

    symbol: str
    instructions: list[Instruction]
    blocks: list[Block] = field(default_factory=list)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, the outer before the inner."""
        return _loops(self.blocks)


@dataclass(frozen=True)
class Issued:
    """Instructions that all warps of a launch issue.

    Attributes:
        by_class: see `CLASSES`.
        by_opcode: the same by opcode without modifiers.
        guessed: the share of the total in blocks that nothing counted lies in, and that need not run as often as one
            in which something does.
        missed: by how much products, shuffles and barriers differ from the counted ones, as a share of those.
        trips: how often each block runs.
    """

    by_class: dict[str, float]
    by_opcode: dict[str, float]
    guessed: float
    missed: float
    trips: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.by_class.values())


# ---- reading a listing


def first_shared_line() -> int:
    """The line of platform.cuh below which both machines run the same source."""
    lines = (ROOT / "csrc" / "kernels" / PLATFORM).read_text().splitlines()
    return lines.index(END_OF_PLATFORM) + 1


def parse(listing: str, platform_lines: int) -> dict[str, Kernel]:
    """The kernels in what `nvdisasm -gi -c` prints.

    Args:
        listing: of a cubin that was compiled with -lineinfo.
        platform_lines: see `first_shared_line`; frames of platform.cuh up to this line are left out.
    """
    found = {}
    for part in re.split(r"(?=^\s*\.section\s)", listing, flags=re.MULTILINE):
        head = _FUNCTION.match(part)
        if head:
            found[head[1]] = _kernel(head[1], part.splitlines(), platform_lines)
    return found


def _kernel(symbol: str, lines: Sequence[str], platform_lines: int) -> Kernel:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}  # to the number of an instruction
    frames: list[tuple[str, int]] = []
    complete = False  # an instruction has ended the list of frames
    for line in lines:
        if match := _FRAME.match(line):
            if complete:
                frames, complete = [], False
            frames.append((Path(match[1]).name, int(match[2])))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            complete = True
            kept = tuple(frame for frame in frames if _kept(frame, platform_lines))
            instructions.append(Instruction(int(match[1], 16), match[3], match[4], match[2] or "", kept))
    instructions = _with_outermost(instructions)
    return Kernel(symbol, instructions, _blocks(instructions, labels))


def _with_outermost(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Completes lists of frames that nvcc ends early: before the kernel's own line, where a call was inlined late. Most
    other lists say who calls the last frame that is there."""
    callers: dict[tuple[str, int], Counter[Frames]] = defaultdict(Counter)
    for one in instructions:
        for n, frame in enumerate(one.frames[:-1]):
            callers[frame][one.frames[n + 1 :]] += 1
    found = []
    for one in instructions:
        outer = callers.get(one.frames[-1]) if one.frames else None
        found.append(replace(one, frames=one.frames + outer.most_common(1)[0][0]) if outer else one)
    return found


def _kept(frame: tuple[str, int], platform_lines: int) -> bool:
    """Whether both machines run this place of the source; they do not share CUDA's own headers."""
    file, line = frame
    return file.endswith((".cuh", ".cu")) and (file != PLATFORM or line > platform_lines)


def _common(frames: Frames) -> Frames:
    """Frames without those in the C++ library's headers."""
    return tuple(frame for frame in frames if _kept(frame, 0))


def _ends_block(one: Instruction) -> bool:
    return one.name in ("BRA", "BRX", "BRXU", "JMP", "EXIT", "RET", "BSYNC", "CALL", "BSSY", "KILL")


def _never_taken(one: Instruction) -> bool:
    """BRA.DIV is for a warp that comes to a shuffle in parts."""
    return one.name == "BRA" and ".DIV" in one.opcode


def _blocks(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Block]:
    starts = {0, *labels.values()} | {n + 1 for n, one in enumerate(instructions) if _ends_block(one)}
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    number = {start: block for block, start in enumerate(bounds[:-1])}
    blocks = [Block(list(instructions[a:b])) for a, b in itertools.pairwise(bounds)]
    for n, block in enumerate(blocks):
        last = block.instructions[-1]
        target = number.get(labels.get(last.target or "", -1))
        after = (n + 1,) if n + 1 < len(blocks) else ()
        always = last.predicate in ("", "PT", "UPT") and not re.match(r"!?U?P\d", last.operands)
        listed = _TARGETS.search(last.operands)
        if last.name == "BSSY":
            block.meets, block.successors = target, after
        elif last.name == "BSYNC":
            block.waits = True
        elif last.name == "CALL" and not (last.target or "").startswith("."):
            # What these kernels call are the slow paths of divisions and roots.
            block.rare, block.successors = True, after
        elif last.name in ("EXIT", "RET", "KILL"):
            block.successors = () if always else after
        elif listed:
            block.successors = tuple(dict.fromkeys(number[labels[label]] for label in listed[1].split(",")))
        elif _never_taken(last) or target is None:
            block.successors = after
        else:  # a call of a label in the kernel does not come back: it is a branch, too
            block.successors = (target,) if always else tuple(dict.fromkeys((target, *after)))
            block.uniform = last.predicate.lstrip("!").startswith("UP") or bool(re.match(r"!?UP\d", last.operands))
    return blocks


def _reached(blocks: Sequence[Block]) -> set[int]:
    """Blocks to which a warp can come from the entry; not the subroutines, and not what pads the code's end."""
    found, todo = set(), [0]
    while todo:
        n = todo.pop()
        if n in found:
            continue
        found.add(n)
        todo += blocks[n].successors
        meets = blocks[n].meets
        if meets is not None:
            todo.append(meets)
    return found


def _flow(block: Block) -> tuple[int, ...]:
    """Successors, where a loop's body may end with waiting for the other lanes."""
    return block.successors if block.meets is None else (*block.successors, block.meets)


def _loops(blocks: Sequence[Block]) -> list[Loop]:
    reached = sorted(_reached(blocks))
    before: dict[int, list[int]] = defaultdict(list)
    for n in reached:
        for successor in _flow(blocks[n]):
            before[successor].append(n)
    everything = (1 << len(blocks)) - 1
    dominators = dict.fromkeys(reached, everything)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for n in reached[1:]:
            mask = everything
            for one in before[n]:
                mask &= dominators[one]
            mask |= 1 << n
            if mask != dominators[n]:
                dominators[n], changed = mask, True
    found: dict[int, set[int]] = {}
    for n in reached:
        for header in blocks[n].successors:
            if dominators[n] >> header & 1:
                body, todo = found.setdefault(header, {header}), [n]
                while todo:
                    one = todo.pop()
                    if one not in body:
                        body.add(one)
                        todo += before[one]
    return sorted((Loop(h, frozenset(b)) for h, b in found.items()), key=lambda loop: -len(loop.blocks))


# ---- how often each block runs


@dataclass
class _Program:
    """A linear program under construction: variables that are at least 0, rows, and the cost of each variable."""

    costs: list[float] = field(default_factory=list)
    origins: dict[int, int] = field(default_factory=dict)  # of edges: the block that they leave
    upper: list[float] = field(default_factory=list)
    equal: list[tuple[dict[int, float], float]] = field(default_factory=list)
    at_most: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def variable(self, cost: float = 0.0, upper: float = np.inf) -> int:
        self.costs.append(cost)
        self.upper.append(upper)
        return len(self.costs) - 1

    def solved(self) -> np.ndarray:
        """The values of the variables."""

        def matrix(rows: Sequence[tuple[dict[int, float], float]]) -> tuple[coo_matrix, np.ndarray]:
            entries = [(n, column, value) for n, (row, _) in enumerate(rows) for column, value in row.items()]
            at, columns, values = zip(*entries, strict=True)
            shape = (len(rows), len(self.costs))
            return coo_matrix((values, (at, columns)), shape), np.array([right for _, right in rows])

        a_eq, b_eq = matrix(self.equal)
        a_ub, b_ub = matrix(self.at_most) if self.at_most else (None, None)
        bounds = [(0.0, upper) for upper in self.upper]
        done = linprog(self.costs, a_ub, b_ub, a_eq, b_eq, bounds, method="highs")
        if done.x is None:
            raise ValueError(f"no flow through the code: {done.message}")
        return np.asarray(done.x)


# What an execution costs by which the trips give too few, and too many, by kind. It costs at its place, by line of the
# kernel, and in all. A compiler leaves out a load whose value it still has, and never a store, a product or a barrier.
# Most loads from shared memory that C++ repeats are such loads.
_COST = (1.0, 1.0)
_COSTS = {"global_load": (0.2, 0.3), "shared_load": (0.01, 0.3), "load": (0.01, 0.3)}
_WEIGHTS = ((None, 0.1), (1, 0.3), (0, 1.0))  # outermost frames that are kept, weight
_UNCOUNTED = 0.2  # of too many, where nothing was counted: lines may differ between compilers
_UNDER_PREDICATE = 0.05  # too many: an access is issued, too, where its predicate lets no lane take part
_LINE = 0.02  # too few of a line that computes
_SLOW_PATH = 10.0
# What decides where nothing was counted.
_DIVERGENCE = 1e-3  # a warp that takes both ways, or ends
_UNEVEN = 1e-3
_ANY = 1e-5  # every instruction: an unrolled loop before the one for its remainder
_LONG = 1e-3  # an iteration of a loop beyond the usual
_USUAL, _LONGEST = 8.0, 512.0  # iterations of a loop each time that it is entered


def _demands(sites: Sequence[Site]) -> dict[tuple[str, Frames], float]:
    """Executions by kind and frames; of loads and stores, executions times bytes."""
    wanted: dict[tuple[str, Frames], float] = defaultdict(float)
    for site in sites:
        if site.kind != "block":
            wanted[site.kind, _common(site.frames)] += site.executions * (site.bytes or 1)
    return wanted


def trips_of(kernel: Kernel, sites: Sequence[Site], warps: float) -> tuple[float, ...]:
    """How often each block runs in a launch; 0 for subroutines and for what pads the code."""
    blocks, reached = kernel.blocks, sorted(_reached(kernel.blocks))
    rows = _rows(blocks, reached, _demands(sites)) + _lines(blocks, reached, sites)
    scale = max([warps, *(row.executions for row in rows)])  # the solver's tolerances are absolute
    program = _Program()
    runs = {n: program.variable(_ANY * len(blocks[n].instructions) + _SLOW_PATH * blocks[n].rare) for n in reached}
    entering = _flows(program, blocks, runs)
    for n in reached:
        program.equal.append(({**entering[n], runs[n]: -1.0}, -warps / scale if n == 0 else 0.0))
    for row in rows:
        columns = {runs[n]: times for n, times in row.times.items()}
        missing, beyond = program.variable(row.too_few), program.variable(row.too_many)
        program.equal.append(({**columns, missing: 1.0, beyond: -1.0}, row.executions / scale))
    _connect(program, kernel, runs, entering)
    _share(program, kernel, runs, rows)
    values = program.solved()
    return tuple(float(values[runs[n]]) * scale if n in runs else 0.0 for n in range(len(blocks)))


def _flows(program: _Program, blocks: Sequence[Block], runs: Mapping[int, int]) -> dict[int, dict[int, float]]:
    """Sends what runs a block on to its successors. Returns what enters each block, as variables and how often."""
    entering: dict[int, dict[int, float]] = {n: {} for n in runs}
    for n in runs:
        block = blocks[n]
        if block.meets is not None:  # the lanes go on together, however they came here
            entering[block.meets][runs[n]] = 1.0
            program.origins[runs[n]] = n
        if not block.successors:
            continue
        edges = [program.variable() for _ in block.successors]
        program.origins.update(dict.fromkeys(edges, n))
        for successor, edge in zip(block.successors, edges, strict=True):
            entering[successor][edge] = 1.0
        both = program.variable(_DIVERGENCE, 0.0 if block.uniform or len(edges) == 1 else np.inf)
        ended = program.variable(_DIVERGENCE, np.inf if block.instructions[-1].name == "EXIT" else 0.0)
        row = {**dict.fromkeys(edges, 1.0), runs[n]: -1.0, both: -1.0, ended: 1.0}
        program.equal.append((row, 0.0))
        program.at_most += [({edge: 1.0, runs[n]: -1.0}, 0.0) for edge in edges]
    return entering


@dataclass
class _Row:
    """Executions at one place: the trips of blocks, each taken `times`, are to sum to `executions`."""

    times: dict[int, float]
    executions: float
    too_few: float
    too_many: float
    fine: bool = True  # one place, rather than several


def _rows(blocks: Sequence[Block], reached: Sequence[int], wanted: Mapping[tuple[str, Frames], float]) -> list[_Row]:
    """What the trips should give back: at each place, by line of the kernel, and in all.

    A compiler that joins or moves instructions leaves them one of their lines, so that sums are surer than places.
    """
    found = []
    for places, weight in _WEIGHTS:

        def place(frames: Frames, places: int | None = places) -> Frames:
            return frames if places is None else frames[len(frames) - places :]

        counted = [(n, one, place(one.frames)) for n in reached for one in blocks[n].instructions if one.kind]
        generic = {(one.kind, where) for _, one, where in counted if one.kind in ("load", "store")}

        def key(kind: str, where: Frames, generic: set[tuple[str, Frames]] = generic) -> tuple[str, Frames]:
            """Where a place has generic accesses, what it does in shared and in global memory is one."""
            either = kind.rpartition("_")[2]
            return (either if (either, where) in generic else kind), where

        right: dict[tuple[str, Frames], float] = defaultdict(float)
        for (kind, frames), executions in wanted.items():
            right[key(kind, place(frames))] += executions
        anchors: dict[tuple[str, Frames], list[tuple[int, Instruction]]] = defaultdict(list)
        for n, one, where in counted:
            anchors[key(str(one.kind), where)].append((n, one))
        for (kind, where), ones in anchors.items():
            widest = max(one.width for _, one in ones) or 1
            row = _Row(defaultdict(float), right.get((kind, where), 0.0) / widest, *_COSTS.get(kind, _COST))
            for n, one in ones:
                row.times[n] += (one.width or 1) / widest
            if row.executions == 0.0:
                row.too_many *= _UNCOUNTED
            if places == 0 and "load" in kind:
                row.too_few = 0.0  # a load that was left out in one place is not made up for in another
            if any(one.predicate for _, one in ones):
                row.too_many = min(row.too_many, _UNDER_PREDICATE)
            row.too_few, row.too_many, row.fine = row.too_few * weight, row.too_many * weight, places is None
            found.append(row)
    return found


# Arithmetic that a compiler neither shares between iterations nor uses for addresses and integer divisions.
_ARITHMETIC = {"FADD", "FMUL", "FFMA", "FSETP", "FMNMX", "DADD", "DMUL", "DFMA", "DSETP"}


def _lines(blocks: Sequence[Block], reached: Sequence[int], sites: Sequence[Site]) -> list[_Row]:
    """Lines that compute, for loops in which nothing else is counted.

    Where a block of the C++ compiler begins in a line, the line has run at least as often as that block.
    """
    counted: dict[Frames, float] = defaultdict(float)
    for site in sites:
        if site.kind == "block":
            frames = _common(site.frames)
            counted[frames] = max(counted[frames], site.executions)
    times: dict[Frames, dict[int, float]] = defaultdict(dict)
    for n in reached:
        found: dict[Frames, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for one in blocks[n].instructions:
            if one.name in _ARITHMETIC and one.frames in counted:
                found[one.frames][one.name] += 1
        for frames, of_name in found.items():
            times[frames][n] = min(of_name.values())  # one for each time that the line was unrolled
    return [_Row(of_block, counted[frames], _LINE, 0.0) for frames, of_block in times.items()]


def _connect(
    program: _Program, kernel: Kernel, runs: Mapping[int, int], entering: Mapping[int, Mapping[int, float]]
) -> None:
    """No loop runs that is not entered: to the flow alone a loop is a closed circle."""
    inside_of: dict[int, frozenset[int]] = {loop.header: loop.blocks for loop in kernel.loops}
    for header, inside in inside_of.items():
        row = {runs[header]: 1.0}
        for column, times in entering[header].items():
            if program.origins.get(column) not in inside:
                row[column] = row.get(column, 0.0) - _LONGEST * times
        program.at_most.append((row, 0.0))
        # A warp that enters is likelier than one more iteration of those that are there.
        usual = {column: times * _USUAL / _LONGEST for column, times in row.items() if column != runs[header]}
        program.at_most.append(({**usual, runs[header]: 1.0, program.variable(_LONG): -1.0}, 0.0))


def _share(program: _Program, kernel: Kernel, runs: Mapping[int, int], rows: Sequence[_Row]) -> None:
    """Copies of a line in loops of their own have equal shares of its executions, if nothing else is known.

    They are iterations of an outer loop that was unrolled. A loop and the one for its remainder lie in the same loop,
    and share nothing.
    """
    innermost: dict[int, Loop] = {}
    for loop in kernel.loops:  # the inner ones come last
        for n in loop.blocks:
            innermost[n] = loop
    parent = {
        loop.header: next((o for o in reversed(kernel.loops) if loop.blocks < o.blocks), None) for loop in kernel.loops
    }
    for row in rows:
        groups: dict[int, dict[int, float]] = defaultdict(dict)
        for n, times in row.times.items():
            around = parent[innermost[n].header] if n in innermost else None
            if row.fine and around is not None:
                groups[around.header][runs[n]] = times
        shares = list(groups.values())
        for one, other in itertools.pairwise(shares):
            up, down = program.variable(_UNEVEN), program.variable(_UNEVEN)
            program.equal.append(({**one, **{c: -t for c, t in other.items()}, up: 1.0, down: -1.0}, 0.0))


# ---- the sum


# Executions of these can be told from the machine code without doubt: none is left out, merged or issued in vain.
_CERTAIN = ("mma", "ldmatrix", "shuffle", "barrier")


def issued(kernel: Kernel, sites: Sequence[Site], warps: float) -> Issued:
    """The instructions that a launch issues.

    Args:
        kernel: see `kernels`.
        sites: what the emulated GPU counted in the launch.
        warps: of the launch.
    """
    trips = trips_of(kernel, sites, warps)
    settled = _settled(kernel, sites)
    by_class, by_opcode = dict.fromkeys(CLASSES, 0.0), defaultdict[str, float](float)
    found = dict.fromkeys(_CERTAIN, 0.0)
    guessed = 0.0
    for n, (block, times) in enumerate(zip(kernel.blocks, trips, strict=True)):
        for one in block.instructions:
            by_class[one.category] += times
            by_opcode[one.name] += times
            if one.kind in found:
                found[one.kind] += times
        if n not in settled:
            guessed += times * len(block.instructions)
    total = sum(by_class.values())
    wanted = dict.fromkeys(_CERTAIN, 0.0)
    for site in sites:
        if site.kind in wanted:
            wanted[site.kind] += site.executions
    missed = sum(abs(found[kind] - wanted[kind]) for kind in _CERTAIN) / (sum(wanted.values()) or 1.0)
    return Issued(by_class, dict(by_opcode), guessed / total if total else 0.0, missed, trips)


def _settled(kernel: Kernel, sites: Sequence[Site]) -> set[int]:
    """Blocks with something that was counted, and those that must run as often as one of them."""
    blocks, reached = kernel.blocks, sorted(_reached(kernel.blocks))
    ways: dict[int, list[int]] = defaultdict(list)
    for n in reached:
        for successor in _flow(blocks[n]):
            ways[successor].append(n)
    alike = [(n, blocks[n].meets) for n in reached if blocks[n].meets is not None]
    alike += [(n, blocks[n].successors[0]) for n in reached if len(blocks[n].successors) == 1]
    twins = [(n, other) for n, other in alike if other is not None and ways[other] == [n]]
    settled = {n for n in reached if any(one.kind for one in blocks[n].instructions)}
    settled |= {n for row in _lines(blocks, reached, sites) for n in row.times}
    settled.add(0)
    size = 0
    while size != len(settled):
        size = len(settled)
        for n, other in twins:
            if n in settled or other in settled:
                settled |= {n, other}
    return settled


# ---- compiling


def kernels(architecture: int, launches: Sequence[str] = LAUNCHES) -> dict[str, Kernel]:
    """The kernels as nvcc compiles them for a wheel, by symbol.

    Args:
        architecture: such as 90.
        launches: files of csrc/launch/, without their ending.
    """

    def listing(folder: str, launch: str) -> str:
        file = cubin(Path(folder), launch, architecture, "-lineinfo")  # which changes no instruction
        return output("nvdisasm", "-gi", "-c", str(file))

    found: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for text in pool.map(lambda launch: listing(folder, launch), launches):
            found |= parse(text, first_shared_line())
    return found


def missing() -> str | None:
    """A program that reading machine code needs and that is not there, or None."""
    return next((f"there is no {name}" for name in ("nvcc", "nvdisasm", "c++filt") if tool(name) is None), None)
