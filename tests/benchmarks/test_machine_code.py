"""Instructions of a launch from a listing of machine code and counts of the source, on code that is done by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

# What `nvdisasm -gi -c` prints, cut down: a loop over LDS, FADD and a barrier, then a store.
LISTING = """
	.target	sm_90

//--------------------- .text.sum_kernel --------------------------
	.section	.text.sum_kernel,"ax",@progbits
	.align	128
        .global         sum_kernel
        .type           sum_kernel,@function
sum_kernel:
.text.sum_kernel:
	//## File "/where/csrc/kernels/sum.cuh", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R5, RZ ;
.L_x_1:
	//## File "/where/csrc/kernels/platform.cuh", line 50 inlined at "/where/csrc/kernels/platform.cuh", line 170
	//## File "/where/csrc/kernels/platform.cuh", line 170 inlined at "/where/csrc/kernels/sum.cuh", line 12
	//## File "/where/csrc/kernels/sum.cuh", line 12
        /*0020*/                   LDS.128 R8, [R2] ;
	//## File "/usr/include/sm_30_intrinsics.hpp", line 449 inlined at "/where/csrc/kernels/sum.cuh", line 13
	//## File "/where/csrc/kernels/sum.cuh", line 13
        /*0030*/                   SHFL.BFLY PT, R4, R8, 0x10, 0x1f ;
        /*0040*/                   FADD R5, R5, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
	//## File "/where/csrc/kernels/sum.cuh", line 15
        /*0060*/               @P1 STG.E desc[UR4][R6.64], R5 ;
        /*0070*/              @!PT LDS RZ, [RZ] ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
        /*00a0*/                   NOP ;
"""


def code(lines: Sequence[str]) -> str:
    """A listing from lines such as `7 @P0 STG.E [R2], R3` (line of the source, instruction) and `label:`."""
    text = ['.section .text.k,"ax",@progbits']
    for number, line in enumerate(lines):
        if line.endswith(":"):
            text.append(line)
        else:
            source, instruction = line.split(" ", 1)
            instruction = re.sub(r"(\.L_\w+|\$\w+)$", r"`(\1)", instruction)
            text += [f'\t//## File "/csrc/k.cuh", line {source}', f"        /*{16 * number:04x}*/  {instruction} ;"]
    return "\n".join(text)


@pytest.fixture
def machine_code():
    """The module, from a folder that conftest.py puts on the path."""
    return pytest.importorskip("machine_code")


@pytest.fixture
def issue(machine_code):
    """Issues a kernel's code, given executions by line and kind as (line, kind, bytes, executions)."""

    def run(lines, counts, warps=4.0):
        (kernel,) = machine_code.parse(code(lines), 0).values()
        sites = [machine_code.Site((("k.cuh", line),), *rest) for line, *rest in counts]
        return machine_code.issued(kernel, sites, warps)

    return run


def test_listing_is_read_with_frames_blocks_and_loops(machine_code):
    (kernel,) = machine_code.parse(LISTING, platform_lines=100).values()
    assert kernel.symbol == "sum_kernel"
    names = ["LDC", "MOV", "LDS", "SHFL", "FADD", "BRA", "STG", "LDS", "EXIT", "BRA", "NOP"]
    assert [one.name for one in kernel.instructions] == names
    load, shuffle, store, padding = (kernel.instructions[n] for n in (2, 3, 6, 7))
    assert load.frames == (("platform.cuh", 170), ("sum.cuh", 12))
    assert (load.kind, load.width) == ("shared_load", 16)
    assert shuffle.frames == (("sum.cuh", 13),)
    assert (store.predicate, store.kind, store.width, store.address) == ("P1", "global_store", 4, 0x60)
    assert padding.kind is None
    assert [len(block.instructions) for block in kernel.blocks] == [2, 4, 3, 1, 1]
    assert [block.successors for block in kernel.blocks[:3]] == [(1,), (1, 2), ()]
    assert [(loop.header, sorted(loop.blocks)) for loop in kernel.loops] == [(1, [1])]


def test_frames_that_end_early_are_completed(machine_code):
    """nvcc leaves the kernel's own line out of some lists. The others say where the last frame was called."""
    listing = LISTING.replace(
        '\t//## File "/where/csrc/kernels/sum.cuh", line 15\n',
        '\t//## File "/where/csrc/kernels/platform.cuh", line 170\n',
    )
    (kernel,) = machine_code.parse(listing, platform_lines=100).values()
    assert kernel.instructions[6].frames == (("platform.cuh", 170), ("sum.cuh", 12))


def test_loop_runs_as_often_as_its_shuffle(machine_code):
    (kernel,) = machine_code.parse(LISTING, platform_lines=100).values()
    sites = [
        machine_code.Site((("platform.cuh", 170), ("sum.cuh", 12)), "shared_load", 4, 4 * 40.0),
        machine_code.Site((("sum.cuh", 13),), "shuffle", 0, 40.0),
        machine_code.Site((("sum.cuh", 15),), "global_store", 4, 1.0),
    ]
    found = machine_code.issued(kernel, sites, warps=8)
    assert found.trips == pytest.approx((8, 40, 8, 0, 0))
    assert found.total == pytest.approx(2 * 8 + 4 * 40 + 3 * 8)
    assert {
        name: found.by_class[name] for name in ("shared", "shuffle", "float", "global", "integer")
    } == pytest.approx({"shared": 40, "shuffle": 40, "float": 40, "global": 8, "integer": 16})
    assert (found.guessed, found.missed) == pytest.approx((0, 0), abs=1e-6)


def test_nested_loops(issue):
    lines = [
        "1 MOV R0, RZ", ".L_outer:", "2 LDG.E R2, [R4]", ".L_inner:", "3 HMMA.1688.F32.TF32 R8, R2, R3, R8",
        "3 @P0 BRA .L_inner", "4 IADD3 R0, R0, 0x1, RZ", "4 @P1 BRA .L_outer", "5 EXIT",
    ]  # fmt: skip
    found = issue(lines, [(2, "global_load", 4, 12.0), (3, "mma", 0, 120.0)])
    assert found.trips == pytest.approx((4, 12, 120, 12, 4))
    assert found.by_class["tensor"] == pytest.approx(120)
    assert found.guessed == pytest.approx((12 * 2 + 4) / (4 + 12 + 240 + 24 + 4))


def test_unrolled_loop_is_taken_before_the_one_for_its_remainder(issue):
    lines = [
        "1 @P0 BRA .L_rest", ".L_four:", *["2 STS [R2], R3"] * 4, "2 @P1 BRA .L_four", ".L_rest:", "2 @P2 BRA .L_end",
        ".L_one:", "2 STS [R2], R3", "2 @P3 BRA .L_one", ".L_end:", "3 EXIT",
    ]  # fmt: skip
    found = issue(lines, [(2, "shared_store", 4, 100.0)])
    assert found.by_opcode["STS"] == pytest.approx(100)
    assert found.trips[1] == pytest.approx(25)


def test_merged_accesses_count_by_their_bytes(issue):
    lines = ["1 MOV R0, RZ", ".L_loop:", "2 STS.128 [R2], R4", "2 @P0 BRA .L_loop", "3 EXIT"]
    found = issue(lines, [(2, "shared_store", 4, 80.0)])
    assert found.by_opcode["STS"] == pytest.approx(20)


def test_generic_access_may_be_of_shared_memory(issue):
    lines = ["1 MOV R0, RZ", ".L_loop:", "2 LD.E R2, [R4]", "2 LDS R3, [R5]", "2 @P0 BRA .L_loop", "3 EXIT"]
    found = issue(lines, [(2, "shared_load", 4, 80.0), (2, "global_load", 4, 20.0)])
    assert (found.by_opcode["LD"], found.by_opcode["LDS"]) == pytest.approx((50, 50))


def test_access_is_issued_where_its_predicate_lets_no_lane_take_part(issue):
    lines = ["1 MOV R0, RZ", ".L_loop:", "2 BAR.SYNC 0x0", "3 @P1 STG.E [R2], R4", "4 @P0 BRA .L_loop", "5 EXIT"]
    found = issue(lines, [(2, "barrier", 0, 64.0), (3, "global_store", 4, 16.0)])
    assert found.by_opcode["STG"] == pytest.approx(64)


def test_lanes_that_part_meet_again(issue):
    lines = [
        "1 BSSY B0, .L_met", "1 @P0 BRA .L_other", "2 STS [R2], R3", "2 BRA .L_meet", ".L_other:", "3 STG.E [R2], R3",
        ".L_meet:", "3 BSYNC B0", ".L_met:", "4 FADD R0, R0, R0", "4 EXIT",
    ]  # fmt: skip
    found = issue(lines, [(2, "shared_store", 4, 4.0), (3, "global_store", 4, 3.0)])
    assert found.by_opcode["BSYNC"] == pytest.approx(7)  # three warps come in two parts
    assert found.by_opcode["FADD"] == pytest.approx(4)


def test_copies_of_a_loop_for_an_unrolled_outer_one_share_evenly(issue):
    loop = [
        ".L_{0}:",
        "1 LEA R3, R3, R4, 0x2",
        ".L_in{0}:",
        "2 LDS R2, [R3]",
        "{1}",
        "2 @P0 BRA .L_in{0}",
        "3 STS [R2], R3",
        "3 @P1 BRA .L_{0}",
    ]
    lines = ["1 MOV R0, RZ"]
    for name, extra in (("a", "2 MOV R1, R1"), ("b", "2 IADD3 R1, R1, R2, R3")):
        lines += [line.format(name, extra) for line in loop]
    found = issue([*lines, "4 EXIT"], [(2, "shared_load", 4, 600.0), (3, "shared_store", 4, 60.0)])
    assert found.by_opcode["MOV"] - 4 == pytest.approx(found.by_opcode["IADD3"]) == pytest.approx(300)


def test_loop_without_accesses_runs_as_often_as_its_line(issue):
    lines = [
        "1 MOV R0, RZ",
        ".L_loop:",
        *["2 FFMA R0, R0, R1, R2"] * 2,
        "2 @P0 BRA .L_loop",
        "3 STG.E [R2], R0",
        "3 EXIT",
    ]
    counts = [(2, "block", 0, 50.0), (3, "global_store", 4, 4.0)]
    assert issue(lines, counts).by_opcode["FFMA"] == pytest.approx(50)
    alone = issue(lines, counts[1:])  # nothing says how often: as often as what is around it
    assert alone.by_opcode["FFMA"] == pytest.approx(8)
    assert alone.guessed == pytest.approx(3 / 6)


def test_slow_path_of_a_division_never_runs(issue):
    lines = [
        "1 BSSY B0, .L_met", "1 @!P0 BRA .L_quick", "1 CALL.REL.NOINC $slow", "1 BRA .L_meet", ".L_quick:",
        "1 FFMA R0, R0, R1, R2", ".L_meet:", "1 BSYNC B0", ".L_met:", "2 STG.E [R2], R0", "2 EXIT", "$slow:",
        "1 FMUL R0, R0, R1", "1 RET.REL.NODEC R2 k",
    ]  # fmt: skip
    found = issue(lines, [(2, "global_store", 4, 4.0)])
    assert (found.by_opcode["CALL"], found.by_opcode["FMUL"], found.by_opcode["FFMA"]) == pytest.approx((0, 0, 4))


def test_branch_with_a_table_of_targets(issue):
    lines = [
        '1 BRX R4 -0x10 (*"BRANCH_TARGETS .L_a,.L_b,.L_c"*)', ".L_a:", "2 STS [R2], R3", "2 EXIT", ".L_b:",
        "3 MOV R0, RZ", "3 EXIT", ".L_c:", "4 STG.E [R2], R3", "4 EXIT",
    ]  # fmt: skip
    found = issue(lines, [(2, "shared_store", 4, 3.0), (4, "global_store", 4, 1.0)])
    assert found.trips == pytest.approx((4, 3, 0, 1))


def test_loop_that_is_not_entered_does_not_run(issue):
    lines = [
        "1 BRA.U UP0, .L_second", ".L_first:", "2 LDG.E R2, [R3]", "2 @P0 BRA .L_first", "3 STG.E [R4], R2", "3 EXIT",
        ".L_second:", "2 LDG.E R2, [R3]", "2 MOV R2, R2", "2 @P0 BRA .L_second", "4 STG.E [R4], R2", "4 EXIT",
    ]  # fmt: skip
    found = issue(lines, [(2, "global_load", 4, 90.0), (4, "global_store", 4, 4.0)])
    assert found.by_opcode["MOV"] == pytest.approx(90)


@pytest.mark.slow
def test_kernel_on_tensor_cores_as_nvcc_compiles_it(machine_code):
    for name in ("nvcc", "nvdisasm"):
        if machine_code.tool(name) is None:
            pytest.skip(f"there is no {name}")
    kernels = machine_code.kernels(90, ["conv_products_tf32"])
    (kernel,) = (found for symbol, found in kernels.items() if "conv_forward_kernel" in symbol and "ELi4E" in symbol)
    around = [
        [loop for loop in kernel.loops if n in loop.blocks]
        for n, block in enumerate(kernel.blocks)
        if any(one.kind == "mma" for one in block.instructions)
    ]
    # Tiles, channels, rows of taps; nvcc unrolls the taps of a row and the depth.
    assert around and min(map(len, around)) >= 3
    of_kind = {one.kind for one in kernel.instructions}
    assert {"mma", "ldmatrix", "shuffle", "barrier", "shared_store", "global_load", "global_store"} <= of_kind
    lines = {one.frames[-1][0] for one in kernel.instructions if one.kind == "mma"}
    assert lines == {"conv_forward.cuh"}
    assert all(one.category != "other" for one in kernel.instructions)
