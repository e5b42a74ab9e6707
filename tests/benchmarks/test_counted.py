"""Traffic and work of the kernels, counted at the benchmarks' sizes, and the times that are modelled from them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

# Every workload, and the smallest of the convolutional ones in the other precisions.
CASES = [("A", "fp32"), ("B", "fp32"), ("C", "fp32"), ("D", "fp32"), ("A", "tf32"), ("A", "bf16")]


@pytest.mark.slow
def test_no_kernel_takes_a_tenth_more_than_the_least_without_a_reason():
    """Sectors of global memory and cycles of shared memory; and no reason is left that nothing needs."""
    import counted
    import launches

    found = {}
    for letter, precision in CASES:
        torch.manual_seed(0)
        of_workload = launches.of_workload(letter, precision, blocks=2, steps=1)
        found |= counted.excesses(of_workload)
        products_are_those_of_the_algorithm(letter, precision, of_workload)
    assert sorted(set(found) - set(counted.REASONS)) == []
    assert sorted(set(counted.REASONS) - set(found)) == []


def products_are_those_of_the_algorithm(letter: str, precision: str, found: Any) -> None:
    """A convolution's products on tensor cores are at least those that it needs, and most are used."""
    import counts
    from workloads import WORKLOADS

    work = WORKLOADS[letter]
    if not isinstance(work.net, counts.ConvNet):
        return
    layers = work.net.layers()
    depth, times = {"fp32": (8, 3), "tf32": (8, 1), "bf16": (16, 1)}[precision]
    for launch in found:
        if launch.kernel not in ("conv_forward_kernel", "conv_data_grad_kernel", "conv_weight_grad_kernel"):
            continue
        images = work.query if launch.query else work.support
        needed = layers[launch.block - 1].flops * images * work.tasks / (2 * 16 * 8 * depth) * times
        share = needed / launch.executions("mma")
        # With stride 2 most images are too small to fill a tile, and taps of the data gradient multiply zeros.
        least = 0.55 if work.net.halving == "max" else 0.0
        # Two counted blocks of a weight gradient do not show how much shorter its last slice is.
        most = 1.6 if launch.kernel == "conv_weight_grad_kernel" else 1.01
        assert least < share < most, (launch.kernel, launch.block, launch.query, share)


def launch(**changes: Any) -> Any:
    """A launch of one kernel that touches nothing."""
    import launches

    values = {
        "kernel": "k", "block": 0, "step": 0, "query": False, "symbol": "k", "blocks": 100.0, "threads": 128,
        "shared_bytes": 0, "places": (), "arrays": {}, "load_rounds": 0.0,
    }  # fmt: skip
    return launches.Launch(**values | changes)


def arrays(**sizes: tuple[float, float]) -> Mapping[int, Any]:
    """Arrays by a made-up address, with bytes read and written."""
    import launches

    return {hash(name): launches.Array(name, read, written, read + written) for name, (read, written) in sizes.items()}


def test_the_cache_keeps_what_fits_and_writes_back_what_it_drops():
    import time_model

    cache = time_model.Cache(100)
    assert cache.touch(launch(arrays=arrays(a=(60, 0)))) == 60
    assert cache.touch(launch(arrays=arrays(a=(60, 0)))) == 0, "it is still there"
    assert cache.touch(launch(arrays=arrays(b=(0, 30)))) == 0, "written, not read"
    assert cache.touch(launch(arrays=arrays(c=(40, 0)))) == 40, "a, which goes, was not written"
    assert cache.touch(launch(arrays=arrays(a=(60, 0)))) == 60 + 30, "a is read again, and b is written back"
    assert cache.touch(launch(arrays=arrays(big=(1000, 0)))) == 1000


def issued(number: float, **opcodes: float) -> Any:
    import machine_code

    return machine_code.Issued({"integer": number}, opcodes, 0.0, 0.0, ())


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An H200, on which three blocks of every kernel are resident."""
    import time_model

    monkeypatch.setattr(time_model, "blocks_resident", lambda launch, card: 3)
    return time_model.CARDS["H200"]


def modelled(one: Any, card: Any, instructions: Any, memory_bytes: float = 0.0) -> Any:
    import time_model

    return time_model._modelled(one, instructions, memory_bytes, card, "fp32")


def test_a_launch_is_as_slow_as_its_fullest_multiprocessor(card):
    few, one_each, two = (
        modelled(launch(blocks=blocks), card, issued(blocks * 10_000)) for blocks in (10, card.multiprocessors, 133)
    )
    assert few.times["instructions"] == pytest.approx(one_each.times["instructions"])
    assert two.times["instructions"] == pytest.approx(2 * one_each.times["instructions"])
    # Three blocks run side by side, so the path of one is no longer; with a fourth each has to wait.
    three, four = (modelled(launch(blocks=blocks), card, issued(blocks * 10_000)) for blocks in (396, 397))
    assert three.times["path of a block"] == pytest.approx(few.times["path of a block"])
    assert four.times["path of a block"] == pytest.approx(2 * few.times["path of a block"], rel=0.01)
    assert few.microseconds == card.gap_us + few.times[few.bound] and few.bound == "path of a block"


def test_what_bounds_a_launch(card):
    """Cycles by hand: four schedulers a multiprocessor, of which each takes two for an instruction on integers."""
    blocks = card.multiprocessors * 3
    found = modelled(launch(blocks=blocks), card, issued(4e6 * card.multiprocessors, IADD3=3e6 * card.multiprocessors))
    assert found.times["instructions"] == pytest.approx(1e6 / card.ghz / 1e3)
    assert found.times["integer pipe"] == pytest.approx(1.5e6 / card.ghz / 1e3)
    slow = dataclasses.replace(launch(blocks=blocks), arrays=arrays(a=(48e6, 0)))
    found = modelled(slow, card, issued(1), memory_bytes=48e6)
    assert found.times["memory"] == pytest.approx(48e6 / (4800e9 * 0.9) * 1e6) and found.bound == "memory"


def test_resident_blocks_are_those_of_the_compilers_report():
    """By registers, shared memory, warps: the same as tests/compile reports for sm_90."""
    import machine_code
    import time_model

    if machine_code.missing():
        pytest.skip(machine_code.missing() or "")
    from compile import resources

    table = time_model.resources()
    for name in ("conv_forward_kernel<fp32, 4>", "conv_head_kernel<float>", "mlp_meta_step_kernel<float, true, true>"):
        values, threads = table[name]["sm_90"], resources.block_of(name)
        one = launch(symbol="it", threads=threads, shared_bytes=values["dynamic_shared_bytes"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time_model, "kernel_name", lambda symbol, name=name: name)
            resident = time_model.blocks_resident(one, time_model.CARDS["H200"])
        assert resident * threads // 32 == values["warps_resident"], name


def test_bytes_of_all_blocks_from_some():
    """Each block has its own bytes, or all have the same, or some of both."""
    import launches

    def all_of(once: int, by_blocks: int) -> float:
        return launches._of_all(once, by_blocks, {"blocks": 10, "counted_blocks": 2})

    assert all_of(200, 200) == 1000, "100 of its own for each of ten"
    assert all_of(100, 200) == 100, "the same 100 for all"
    assert all_of(150, 200) == 150 + 8 * 50, "50 that all have, 50 of its own"


@pytest.mark.slow
def test_the_program_says_that_times_are_modelled(monkeypatch, capsys):
    import counted
    import machine_code

    monkeypatch.setattr(sys, "argv", ["counted.py", "--workload", "D", "--blocks", "1", "--card", "H200", "A100"])
    counted.main()
    printed = capsys.readouterr().out
    assert "mlp_meta_step" in printed and "T = 1000" in printed
    if machine_code.missing():
        assert f"No times are modelled: {machine_code.missing()}" in printed
    else:
        assert "H200, modelled, not measured:" in printed and "A100, modelled, not measured:" in printed
        assert "path of a block" in printed
