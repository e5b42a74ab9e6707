"""How the native code divides its work: everything is covered once, and nothing overflows."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signmaml_ext._loader import C

LARGEST_GRID_X, LARGEST_GRID_Y = 2**31 - 1, 2**16 - 1

scalar_bytes = st.sampled_from([4, 8])
tasks = st.one_of(st.integers(1, 40), st.integers(1, 2**20))
parameters = st.one_of(st.integers(1, 5000), st.integers(1, 2**40))
multiprocessors = st.integers(1, 200)
# Addresses as torch allocates them, shifted by up to three elements.
addresses = st.integers(1, 2**40).map(lambda k: 512 * k)
shifts = st.integers(0, 3)


@given(tasks, parameters, scalar_bytes, addresses, shifts, shifts, multiprocessors)
def test_plan_sign_step(tasks, parameters, scalar_bytes, address, params_shift, grads_shift, multiprocessors):
    params, grads = address + params_shift * scalar_bytes, 3 * address + grads_shift * scalar_bytes
    plan = C.plan_sign_step(tasks, parameters, scalar_bytes, params, grads, multiprocessors)
    congruent = params % 16 == grads % 16
    assert plan["vector"] == (16 // scalar_bytes if congruent else 1)
    tile = plan["block"] * plan["unroll"] * plan["vector"]
    assert (plan["tiles_per_row"] - 1) * tile < parameters <= plan["tiles_per_row"] * tile
    assert 1 <= plan["blocks_x"] <= min(plan["tiles_per_row"], LARGEST_GRID_X)
    assert 1 <= plan["blocks_y"] <= min(tasks, LARGEST_GRID_Y)
    # Small work gets one block per tile, large work fills the device.
    blocks = plan["blocks_x"] * plan["blocks_y"]
    assert blocks >= min(plan["tiles_per_row"] * tasks, multiprocessors)


def test_plan_sign_step_takes_single_elements_only_where_rows_do_not_meet():
    vectors = [[C.plan_sign_step(2, 99, 4, 4 * a, 4 * b, 8)["vector"] for b in range(4)] for a in range(4)]
    assert vectors == [[4 if a == b else 1 for b in range(4)] for a in range(4)]


@given(tasks, parameters, scalar_bytes, addresses, shifts, shifts, multiprocessors)
def test_plan_compact_sign_step(tasks, parameters, scalar_bytes, address, params_shift, counts_shift, multiprocessors):
    """Divided like a sign step; vectors only where a vector of scalars and its counts are both aligned."""
    params, counts = address + params_shift * scalar_bytes, 5 * address + counts_shift
    plan = C.plan_compact_sign_step(tasks, parameters, scalar_bytes, params, params + 16, counts, multiprocessors)
    width = 16 // scalar_bytes
    together = (params_shift - counts_shift) % width == 0
    assert plan["vector"] == (width if together else 1)
    if plan["vector"] > 1:
        first = -params % 16 // scalar_bytes  # the first element on a 16-byte boundary
        assert (counts + first) % width == 0
    grads = params + scalar_bytes
    assert C.plan_compact_sign_step(tasks, parameters, scalar_bytes, params, grads, counts, 8)["vector"] == 1
    alike = C.plan_sign_step(tasks, parameters, scalar_bytes, params, params + (0 if together else scalar_bytes), 8)
    assert C.plan_compact_sign_step(tasks, parameters, scalar_bytes, params, params + 16, counts, 8) == alike


@given(tasks, parameters, scalar_bytes, addresses, shifts, shifts, multiprocessors)
def test_plan_meta_accumulate(tasks, parameters, scalar_bytes, address, out_shift, grads_shift, multiprocessors):
    out, grads = address + out_shift * scalar_bytes, 3 * address + grads_shift * scalar_bytes
    plan = C.plan_meta_accumulate(tasks, parameters, scalar_bytes, out, grads, multiprocessors)
    assert plan["head"] + plan["bodies"] * plan["vector"] + plan["tail"] == parameters
    assert min(plan["head"], plan["bodies"], plan["tail"]) >= 0
    assert 1 <= plan["blocks"] <= LARGEST_GRID_X
    if plan["vector"] > 1:
        # Every vector of every row is 16-byte aligned.
        for row in (0, 1, tasks - 1):
            assert (grads + (row * parameters + plan["head"]) * scalar_bytes) % 16 == 0 or tasks == 1
        assert (out + plan["head"] * scalar_bytes) % 16 == 0
        assert (grads + plan["head"] * scalar_bytes) % 16 == 0


def test_plan_meta_accumulate_is_wide_for_long_congruent_rows():
    assert C.plan_meta_accumulate(8, 2**24, 4, 512, 512, 132)["vector"] == 4
    assert C.plan_meta_accumulate(8, 2**24, 8, 512, 512, 132)["vector"] == 2
    assert C.plan_meta_accumulate(8, 2**24 + 1, 4, 512, 512, 132)["vector"] == 1, "rows of odd length drift apart"
    assert C.plan_meta_accumulate(8, 2**24, 4, 512, 516, 132)["vector"] == 1
    assert C.plan_meta_accumulate(1000, 1760, 4, 512, 512, 132)["vector"] == 1, "few columns: more threads instead"


@pytest.mark.parametrize("name", ["plan_sign_step_cpu", "plan_meta_accumulate_cpu"])
@given(tasks, parameters, st.integers(1, 256))
def test_cpu_plans(name, tasks, parameters, threads):
    plan = getattr(C, name)(tasks, parameters, threads)
    assert (plan["chunks_per_row"] - 1) * plan["chunk"] < parameters <= plan["chunks_per_row"] * plan["chunk"]
    assert plan["items"] == plan["chunks_per_row"] * (tasks if name == "plan_sign_step_cpu" else 1)
    assert 1 <= plan["threads"] <= min(threads, plan["items"])


@pytest.mark.parametrize("name", ["plan_sign_step_cpu", "plan_meta_accumulate_cpu"])
def test_cpu_plans_wake_threads_for_large_work_only(name):
    plan = getattr(C, name)
    assert plan(8, 1000, 16)["threads"] == 1
    assert plan(8, 10**6, 16)["threads"] == 16


def test_plans_count_beyond_32_bits():
    assert C.plan_sign_step_cpu(2**20, 2**40, 8)["items"] == 2**20 * 2**40 // 2**14
    assert C.plan_sign_step(1, 2**50, 4, 512, 512, 132)["tiles_per_row"] == 2**50 // 4096
    assert C.plan_meta_accumulate(4, 2**50, 4, 512, 512, 132)["bodies"] == 2**48


conv_shapes = st.builds(
    lambda blocks, channels, filters, height, width, ways, halving, readout, bias: {
        "blocks": blocks,
        "channels": channels,
        "filters": 8 * filters,
        "height": max(height, 2**blocks),
        "width": max(width, 2**blocks),
        "ways": ways,
        "halving": halving,
        "readout": readout,
        "conv_bias": bias,
        "eps": [1e-5] * blocks,
    },
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 16),
    st.integers(2, 300),
    st.integers(2, 300),
    st.integers(2, 1000),
    st.sampled_from(["max", "stride"]),
    st.sampled_from(["flatten", "mean"]),
    st.booleans(),
)


@given(conv_shapes, tasks, st.integers(0, 3000), st.integers(1, 3000), scalar_bytes, st.integers(1, 256))
def test_plan_conv_meta_step_cpu(shape, tasks, support, query, scalar_bytes, threads):
    plan = C.plan_conv_meta_step_cpu(shape, tasks, support, query, scalar_bytes, threads, with_blocks=True)
    assert plan["channels"] >= shape["filters"] and plan["channels"] % plan["lanes"] == 0
    assert plan["channels"] - shape["filters"] < plan["lanes"]
    assert plan["side_by_side"] % threads == 0 and 0 <= tasks - plan["side_by_side"] < threads
    # Every team has its own memory for a task, for any number of tasks.
    assert plan["workspace_bytes"] >= plan["teams"] * plan["task_scalars"] * scalar_bytes
    images = max(support, query) * shape["height"] * shape["width"] * shape["channels"]
    assert plan["task_scalars"] > images
    height, width = shape["height"], shape["width"]
    for block in plan["blocks"]:
        out = (height, width) if shape["halving"] == "max" else ((height + 1) // 2, (width + 1) // 2)
        assert (block["out_h"], block["out_w"]) == out
        # Items cover each row once, and both rows of a pooling pair are in the same item.
        assert (block["items"] - 1) * block["rows"] < out[0] <= block["items"] * block["rows"]
        assert block["rows"] % 2 == 0 or block["items"] == 1
        for vectors in (block["vectors"], block["vectors_back"]):
            assert plan["channels"] // plan["lanes"] % vectors == 0
        height, width = block["act_h"], block["act_w"]


def test_plan_conv_meta_step_cpu_counts_beyond_32_bits_and_refuses_what_it_cannot_count():
    shape = {
        "blocks": 1,
        "channels": 3,
        "filters": 128,
        "height": 4096,
        "width": 4096,
        "ways": 5,
        "halving": "max",
        "readout": "mean",
        "conv_bias": True,
        "eps": [1e-5],
    }
    assert C.plan_conv_meta_step_cpu(shape, 8, 1000, 1000, 4, 2)["workspace_bytes"] > 2**43
    with pytest.raises(ValueError, match="sizes whose memory can be counted"):
        C.plan_conv_meta_step_cpu(shape, 8, 2**31 - 1, 1, 4, 2)


@given(st.lists(st.integers(1, 400), min_size=3, max_size=6), tasks, st.integers(0, 400), st.integers(0, 400))
@example([1, 40, 40, 1], 1000, 10, 10).via("the benchmark's workload D")
def test_teams_of_an_mlp(widths, tasks, support, query):
    """A task gets more warps only while too few are at work, and only if each of their threads has something to do."""
    plan = C.plan_mlp_meta_step(widths, tasks, support, query, 4, 100)
    warps, work = plan["threads"] // 32, max(support, query) * max(widths[1:])
    assert warps in (1, 2, 4, 8)
    assert 1 <= plan["teams"] <= min(max(tasks, 1), 100 * 32 // warps)
    if warps > 1 and work <= 64 * 32:
        assert tasks * warps // 2 < 100 * 12, "half as many would have been enough"
        assert work > plan["threads"] // 2
    if warps < 8:
        assert work <= 64 * 32
        assert tasks * warps >= 100 * 12 or work <= plan["threads"]


@pytest.mark.parametrize("scalar_bytes", [4, 8])
def test_teams_of_an_mlp_in_shared_memory(scalar_bytes):
    """One warp and many, in both types: many in double are in shared memory only while tasks are few."""
    kinds = {
        (plan["threads"], plan["in_shared"])
        for widths, tasks in [([1, 40, 40, 1], 10_000), ([1, 40, 40, 1], 4), ([1, 250, 250, 1], 10_000)]
        for plan in [C.plan_mlp_meta_step(widths, tasks, 10, 10, scalar_bytes, 100)]
    }
    assert kinds == {(32, True), (256, True), (256, False)}
