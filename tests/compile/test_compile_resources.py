"""Every kernel is compiled for every architecture, spills nothing, and uses the resources in the table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compile import resources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(resources.missing() is not None, reason=f"no {resources.missing()} on this machine"),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return resources.table()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(resources.TABLE.read_text())


def rows(table: dict[str, Any]) -> list[tuple[str, str, dict[str, int]]]:
    return [(name, arch, values) for name, by_arch in table["kernels"].items() for arch, values in by_arch.items()]


def test_all_kernels_on_all_architectures(measured, recorded):
    assert measured["kernels"].keys() == recorded["kernels"].keys(), (
        "renew the table: python tests/compile/resources.py"
    )
    assert len(measured["kernels"]) >= 10
    for by_architecture in measured["kernels"].values():
        assert set(by_architecture) == {f"sm_{architecture}" for architecture in resources.ARCHITECTURES}


def test_no_spills_and_no_stack(measured):
    """Spilled registers are stored on the stack."""
    for name, architecture, values in rows(measured):
        assert values["stack_bytes"] == 0, (name, architecture, values)


def base_of(kernel: str) -> str:
    return kernel.partition("<")[0]


def test_float_kernels_have_no_double_arithmetic(measured):
    for name, architecture, values in rows(measured):
        if "<double" not in name and base_of(name) not in resources.IN_DOUBLE:
            assert values["fp64_instructions"] == 0, (name, architecture)
        else:
            assert values["fp64_instructions"] > 0, "the count must see double arithmetic where there is some"


def test_steps_on_flat_buffers_are_rounded_as_on_the_cpu(measured):
    """nvcc fuses products and sums unless it is told not to."""
    for name, architecture, values in rows(measured):
        if base_of(name) in resources.ROUNDED_LIKE_THE_CPU:
            assert values["fused_multiply_adds"] == 0, (name, architecture)
        elif base_of(name) == "conv_forward_kernel":  # in its BatchNorm
            assert values["fused_multiply_adds"] > 0, "the count must see them where there are some"


def test_occupancy_at_the_launch_configuration(measured):
    """Kernels that stream memory need 16 warps to hide its latency. Those on tensor cores need 8, because their
    operands are already on chip. A task in shared memory needs about one warp per scheduler. Exact MAML in doubles
    beyond shared memory gets a block's 8 warps: with the registers of two blocks it would spill."""
    for name, architecture, values in rows(measured):
        least = 3 if values["dynamic_shared_bytes"] > 4096 else 16
        if base_of(name) in resources.ON_TENSOR_CORES or name == "mlp_second_order_kernel<double, false, false>":
            least = 8
        assert values["warps_resident"] >= least, (name, architecture, values)


def test_table_is_up_to_date(measured, recorded):
    if measured["nvcc"] != recorded["nvcc"]:
        pytest.skip(f"the table is of nvcc {recorded['nvcc']}, this is {measured['nvcc']}")
    assert measured == recorded, "renew the table: python tests/compile/resources.py"
