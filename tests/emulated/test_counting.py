"""What the emulated GPU counts for a launch: requests, sectors of global memory, cycles of shared memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.cases import emulated_cases
from helpers.devices import emulated

WARPS = 2  # of a block of counted_kernel

# kind, bytes a lane, executions by a warp, lanes, sectors and the least, wavefronts and the least: of one block of
# counted_kernel, worked out by hand.
REQUESTS = [
    ("global_load", 4, 2, 64, 8, 8, 0, 0),  # in a row
    ("global_load", 4, 2, 64, 16, 8, 0, 0),  # every other float
    ("global_load", 4, 2, 64, 10, 8, 0, 0),  # a row that begins 4 bytes after a boundary
    ("global_load", 4, 2, 64, 2, 2, 0, 0),  # one float for all
    ("shared_store", 4, 2, 64, 0, 0, 8, 2),  # eight banks
    ("shared_store", 4, 2, 64, 0, 0, 64, 2),  # one bank
    ("shared_store", 16, 2, 64, 0, 0, 8, 8),  # 512 bytes take four cycles at least
    ("barrier", 0, 2, 64, 0, 0, 0, 0),
    ("shared_load", 16, 2, 64, 0, 0, 4, 4),  # by pairs of lanes: half of that
    ("shared_load", 16, 2, 64, 0, 0, 4, 4),  # the same for all: no less
    ("global_load", 4, 8, 128, 32, 16, 0, 0),  # in a loop, half of the lanes at a time
    ("shared_load", 4, 2, 32, 0, 0, 8, 2),  # four banks, in the last round of the loop
    ("copy", 16, 2, 64, 16, 16, 8, 8),  # 256 bytes of global memory, 512 of shared
    ("barrier", 0, 2, 64, 0, 0, 0, 0),
    ("shared_load", 4, 2, 64, 0, 0, 2, 2),  # together again
    ("shuffle", 0, 10, 320, 0, 0, 0, 0),  # five for a sum over a warp
    ("global_store", 4, 2, 64, 8, 8, 0, 0),
]


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


def counted(native: ModuleType, blocks: int, counted_blocks: int) -> dict[str, Any]:
    """The counts of a launch of counted_kernel, whose input starts at a multiple of 128 bytes."""
    memory, out = torch.rand(256), torch.empty(64)
    native.configure(seed=1, blocks_alive=3)  # blocks are counted one after the other all the same
    first = -memory.data_ptr() % 128 // 4
    native.count(counted_blocks)
    native.selftest_counted(memory[first:].data_ptr(), out.data_ptr(), blocks)
    (launch,) = native.take_counts()
    return launch


def test_every_request_costs_what_is_worked_out_by_hand(native):
    launch = counted(native, 5, 2)
    assert (launch["kernel"], launch["blocks"], launch["counted_blocks"]) == ("counted_kernel", 5, 2)
    assert (launch["grid"], launch["threads"]) == ([5, 1, 1], 64)
    keys = ("executions", "lanes", "sectors", "least_sectors", "wavefronts", "least_wavefronts")
    found = [
        (place["kind"], place["bytes"], *(place[key] / 2 for key in keys))
        for place in sorted(launch["places"], key=lambda place: place["code"])
        if place["kind"] != "block"
    ]
    assert found == REQUESTS


def test_bytes_of_arrays(native):
    """The first-level cache keeps what a block has loaded, but asynchronous copies go past it."""
    launch = counted(native, 5, 2)
    arrays = {array["name"]: array for array in launch["arrays"]}
    into, out = arrays["in"], arrays["out"]
    assert into["loaded"] == into["copied"] == into["read_by_blocks"] == 2 * 512
    assert into["read_once"] == 512 and into["stored"] == into["written_by_blocks"] == 0
    assert out["stored"] == out["written_by_blocks"] == 2 * 256 and out["written_once"] == 256 and out["loaded"] == 0
    # Up to the barriers a warp makes 4 loads, then 5, then none: at four in flight, 1 + 2 + 0 rounds.
    assert launch["load_rounds"] == 2 * 3


def test_the_lines_of_the_source_are_counted(native):
    """A basic block counts once for each time that a warp enters it with any of its lanes."""
    blocks = [place for place in counted(native, 1, 1)["places"] if place["kind"] == "block"]
    assert max(place["executions"] for place in blocks) >= 8  # the body of the loop: two warps, four rounds
    assert min(place["executions"] for place in blocks) >= WARPS and all(place["bytes"] == 0 for place in blocks)


def test_only_counted_blocks_run_and_they_lie_evenly(native):
    rows, columns = 10, 64
    values, sums = torch.randn(rows, columns), emulated_cases.poisoned(rows)
    native.count(2)
    native.selftest_block_sum(values.data_ptr(), sums.data_ptr(), rows, columns, 32)
    (launch,) = native.take_counts()
    assert (launch["blocks"], launch["counted_blocks"]) == (10, 2)
    ran = (~sums.isnan()).nonzero().flatten().tolist()
    assert ran == [2, 7]
    torch.testing.assert_close(sums[ran], values[ran].sum(1))


def test_products_on_tensor_cores_are_counted(native):
    m, n, k = 32, 16, 24
    a, b, c = torch.rand(m, k), torch.rand(k, n), emulated_cases.poisoned(m, n)
    native.count(1000)
    native.selftest_matmul_tf32(a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k)
    (launch,) = native.take_counts()
    # Two blocks of two warps; each takes three steps of the depth, and reads its fragments by ldmatrix or by hand.
    assert sum(place["executions"] for place in launch["places"] if place["kind"] == "mma") == 2 * 2 * 3
    copies = [place for place in launch["places"] if place["kind"] == "copy"]
    assert sum(place["lanes"] for place in copies) * 16 == 2 * 4 * (16 * 24 + 24 * 16)
    native.count(1)
    rows, columns = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)
    native.selftest_matmul_bf16(rows.data_ptr(), columns.data_ptr(), c.data_ptr(), 16, 16, 16)
    (launch,) = native.take_counts()
    (ldmatrix,) = [place for place in launch["places"] if (place["kind"], place["bytes"]) == ("shared_load", 16)]
    assert (ldmatrix["executions"], ldmatrix["wavefronts"]) == (1, 8)  # rows of 32 bytes: two to a bank


def test_checks_are_back_after_counting(native):
    counted(native, 1, 1)
    values, out = torch.zeros(128), emulated_cases.poisoned(128)
    with pytest.raises(RuntimeError, match="uninitialised"):
        native.selftest_fault(8, values.data_ptr(), out.data_ptr())
    assert native.take_counts() == []


@pytest.mark.parametrize(
    ("addresses", "bytes_", "loads", "taken", "least"),
    [
        ([4 * lane for lane in range(32)], 4, True, 1, 1),
        ([0] * 32, 4, True, 1, 1),
        ([2 * lane for lane in range(32)], 2, True, 1, 1),  # two lanes to a word
        (list(range(32)), 1, False, 1, 1),
        ([8 * lane for lane in range(32)], 4, True, 2, 1),
        ([128 * lane for lane in range(32)], 4, False, 32, 1),
        ([128 * lane if lane < 3 else -1 for lane in range(32)], 4, True, 3, 1),
        ([8 * lane for lane in range(32)], 8, True, 2, 2),
        ([16 * lane for lane in range(32)], 8, True, 4, 2),  # a half of the warp at a time: two words to a bank
        ([8 * (lane // 2) for lane in range(32)], 8, True, 1, 1),  # pairs of lanes agree
        ([8 * (lane // 2) for lane in range(32)], 8, False, 2, 1),  # which helps loads alone
        ([8 * (lane % 2) for lane in range(32)], 8, True, 1, 1),  # lanes n and n ^ 2 agree
        ([16 * lane for lane in range(32)], 16, True, 4, 4),
        ([64 * lane for lane in range(32)], 16, True, 16, 4),
        ([32 * (lane % 4) for lane in range(32)], 16, True, 4, 2),  # four quads, read eight times: by quarters
        ([16 * lane if lane < 8 else -1 for lane in range(32)], 16, True, 1, 1),
        ([], 4, True, 0, 0),
    ],
)
def test_wavefronts(native, addresses, bytes_, loads, taken, least):
    assert native.wavefronts(addresses, bytes_, loads) == (taken, least)
