"""The plan of a Conv-N meta-step on a GPU: launches, work and memory, for every shape that the family supports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import signmaml_ext
from helpers.cases import nets
from helpers.cases.conv_cases import Net
from signmaml_ext import Sharpness
from signmaml_ext._loader import C

LARGEST_GRID_X, LARGEST_GRID_YZ = 2**31 - 1, 2**16 - 1
# Per block on sm_120, the smallest limit of the architectures that kernels are built for (sm_80: 163 KiB).
SHARED_BYTES = 99 * 1024

OFFICIAL = Net(
    blocks=4, channels=3, filters=32, height=84, width=84, ways=5, tasks=8, support=5, query=5, conv_bias=True
)


def plan(net: Net, steps: int = 5, precision: str = "fp32", **options):
    return C.plan_conv_meta_step(
        net.shape, net.tasks, net.support, net.query, steps, precision, options.pop("multiprocessors", 132), **options
    )


def test_budgets_of_the_official_set_up():
    """Conv4-32, 84 x 84, 5-way 1-shot, 1 query per class, T = 8, K = 5; the mean over tasks is one more launch."""
    found = plan(OFFICIAL)
    assert len(found["launches"]) + 1 <= 90
    assert sum(one["bytes"] for one in found["launches"]) <= 1e9
    # All passes of a Conv4 in full take 39.4 GFLOP; block 1's backward pass needs only the winners.
    assert 33e9 < sum(one["flops"] for one in found["launches"]) < 39.4e9
    assert found["parameters"] == 32_901
    of_a_pass = [one["kernel"] for one in found["launches"] if one["step"] == 0]
    assert of_a_pass == [
        "conv_first", "conv_forward", "conv_forward", "conv_forward", "conv_head",
        "conv_data_grad", "conv_weight_grad", "conv_data_grad", "conv_weight_grad",
        "conv_data_grad", "conv_weight_grad", "conv_first_grad", "conv_sign_update",
    ]  # fmt: skip
    assert sum(one["bytes"] for one in plan(OFFICIAL, precision="bf16")["launches"]) <= 0.65e9


def test_memory_does_not_grow_with_steps():
    sizes = {plan(OFFICIAL, steps)["workspace_bytes"] for steps in (0, 1, 5, 100)}
    assert len(sizes) == 1 and sizes.pop() < 64 * 2**20


def test_nothing_depends_on_the_gpu():
    assert plan(OFFICIAL, multiprocessors=1) == plan(OFFICIAL, multiprocessors=200)


def test_what_is_not_asked_for_is_not_launched():
    forward = plan(OFFICIAL, wants_grads=False, wants_adapted=True)
    query = [one["kernel"] for one in forward["launches"] if one["set"] == "query"]
    assert query == ["patch_moments", "conv_first", "conv_forward", "conv_forward", "conv_forward", "conv_head"]
    assert forward["launches"][-1]["kernel"] == "conv_unpack"
    assert forward["workspace_bytes"] == plan(OFFICIAL)["workspace_bytes"]


def test_tasks_are_cut_into_chunks_that_fit():
    of_one = C.plan_conv_meta_step(OFFICIAL.shape, 1, 5, 5, 5, "fp32", 132)["workspace_bytes"]
    for limit, chunk in ((1, 1), (of_one, 1), (3 * of_one, 3), (100 * of_one, 8)):
        found = plan(OFFICIAL, workspace_limit=limit)
        assert found["chunk"] == chunk
        assert found["workspace_bytes"] == chunk * of_one
        assert {one["grid"][0 if one["kernel"] == "conv_head" else 1] for one in found["launches"]} == {chunk}
    many = C.plan_conv_meta_step(Net().shape, 10**6, 3, 4, 1, "fp32", 132, workspace_limit=2**45)
    assert many["chunk"] == LARGEST_GRID_YZ


shapes = st.builds(
    Net,
    blocks=st.integers(1, 3),
    channels=st.integers(1, 3),
    filters=st.integers(1, 16).map(lambda n: 8 * n),
    height=st.integers(8, 96),
    width=st.integers(8, 96),
    ways=st.integers(2, 100),
    halving=st.sampled_from(["max", "stride"]),
    readout=st.sampled_from(["flatten", "mean"]),
    conv_bias=st.booleans(),
    tasks=st.integers(1, 40),
    support=st.integers(1, 1000),
    query=st.integers(1, 1000),
)


# The largest tile of all: single positions of 46 images, whose rows are padded most.
LARGEST = Net(
    blocks=3, channels=3, filters=128, height=8, width=8, ways=5, halving="stride", tasks=1, support=46, query=46
)


@settings(deadline=None)
@example(LARGEST, "fp32", True, "maml")
@given(shapes, st.sampled_from(["fp32", "tf32", "bf16"]), st.booleans(), st.sampled_from(["sign-maml", "maml"]))
def test_every_shape_has_a_sound_plan(net, precision, by_covariance, method):
    found = plan(net, 2, precision, by_covariance=by_covariance, method=method)
    end = 0
    for array in sorted(found["workspace"], key=lambda array: array["offset"]):
        assert array["offset"] == end and array["offset"] % 256 == 0, "arrays touch and are aligned"
        assert array["stride"] > 0 and array["stride"] % 256 == 0
        end += found["chunk"] * array["stride"]
    assert end == found["workspace_bytes"]
    for one in found["launches"]:
        assert 1 <= one["grid"][0] <= LARGEST_GRID_X
        assert all(1 <= extent <= LARGEST_GRID_YZ for extent in one["grid"][1:])
        assert 0 <= one["shared_bytes"] <= SHARED_BYTES, one
        assert one["flops"] >= 0 and one["bytes"] > 0
    products = [one for one in found["launches"] if one["kernel"] == "conv_forward"]
    passes = 3 if method == "sign-maml" else 7  # two steps and the query set; each step again, and its derivative
    assert len(products) == passes * (net.blocks - by_covariance)


def test_exact_maml_goes_back_through_every_step():
    """The passes of each step again, and beside them their derivatives: 9 N - 1 launches."""
    first_order, found = plan(OFFICIAL, 3), plan(OFFICIAL, 3, method="maml")
    kept = [one for one in found["launches"] if one["kernel"] == "conv_remember"]
    forward = [one for one in found["launches"] if one["part"] == "pass" and one not in kept]
    assert forward == first_order["launches"] and [one["step"] for one in kept] == [0, 1, 2]
    back = [one for one in found["launches"] if one["part"] != "pass"]
    assert [one["step"] for one in back] == [2] * 35 + [1] * 35 + [0] * 35
    assert [one["kernel"].removeprefix("conv_") + "*" * (one["part"] == "again") for one in back[:35]] == [
        "direction", "first*", "forward*", "forward*", "forward*", "head*", "first_tangent",
        "forward", "tangent_sums", "tangent_activate", "forward", "tangent_sums", "tangent_activate",
        "forward", "tangent_sums", "tangent_activate", "tangent_head", "tangent_grad_sums",
        "data_grad*", "tangent_raw_grad", "data_grad", "weight_grad", "tangent_grad_sums",
        "data_grad*", "tangent_raw_grad", "data_grad", "weight_grad", "tangent_grad_sums",
        "data_grad*", "tangent_raw_grad", "data_grad", "weight_grad", "first_grad*", "first_grad", "subtract",
    ]  # fmt: skip
    # Eight convolutions a layer where a step has three, but for block 1.
    of_step = sum(one["flops"] for one in first_order["launches"] if one["step"] == 0)
    assert 2 < sum(one["flops"] for one in back) / 3 / of_step < 8 / 3


def test_only_kept_weights_grow_with_the_steps_of_maml():
    plans = {steps: plan(OFFICIAL, steps, method="maml") for steps in (1, 2, 5, 25)}
    kept = {
        steps: next(array["stride"] for array in found["workspace"] if array["name"] == "history")
        for steps, found in plans.items()
    }
    others = {found["workspace_bytes"] - OFFICIAL.tasks * kept[steps] for steps, found in plans.items()}
    assert len(others) == 1 and others.pop() < 128 * 2**20
    packed = 32_776  # all parameters but the convolutions' biases, rounded up to a multiple of four
    assert kept == {steps: -(-steps * packed * 4 // 256) * 256 for steps in kept}
    without = plan(OFFICIAL, 5, method="maml", wants_grads=False)
    assert without == plan(OFFICIAL, 5, wants_grads=False)


@pytest.mark.parametrize("blocks", [5, 6])
def test_deep_networks(blocks):
    for halving in ("max", "stride"):
        net = Net(blocks=blocks, channels=3, filters=64, height=96, width=84, halving=halving, support=25, query=75)
        launches = 3 + 2 * (3 * blocks + 1)
        assert len(plan(net, 1)["launches"]) == launches
        assert len(plan(net, 1, method="maml")["launches"]) == launches + 1 + 9 * blocks - 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_explain_prints_sharpness_aware_steps(norm):
    model = nets.conv4(ways=5, channels=3, filters=8, size=20, layers=2)
    data = nets.image_tasks(4, 5, 1, 1, 3, 20, dtype=torch.float32)
    plain, sharp = (
        str(signmaml_ext.explain(model, *data, inner_steps=2, sharpness=sharpness, plan=True))
        for sharpness in (None, Sharpness(0.1, norm))
    )
    step = sharp.partition("inner step (one of 2, all alike): its passes, then those at the sharpest place nearby (^)")
    names = [line.split()[0] for line in step[2].partition("query pass")[0].splitlines() if line.strip()]
    raised = [line for line in step[2].splitlines() if "(^)" in line]
    assert names.count("conv_climb") == 1 and names.count("conv_climb_squares") == (norm == "l2")
    assert len(names) == 2 * len(raised) + (2 if norm == "l2" else 1)
    assert "(^)" not in plain and "sharpest" not in plain
    assert "workspace" in sharp and "whatever the number of steps" in sharp


@pytest.mark.parametrize("method", ["sign-maml", "maml"])
def test_explain_prints_the_gradients_of_rates(method):
    model = nets.conv4(ways=5, channels=3, filters=8, size=20, layers=2)
    data = nets.image_tasks(4, 5, 1, 1, 3, 20, dtype=torch.float32)
    rate = torch.tensor(0.01, requires_grad=True)
    text = str(signmaml_ext.explain(model, *data, inner_lr=rate, inner_steps=2, method=method, plan=True))
    kept = "kept weights and directions" if method == "maml" else "kept directions"
    assert f"of which only {kept} grow with the steps" in text
    assert text.count("conv_rate_grads") == 1 and "  gradients of the rates\n  conv_rate_grads" in text


def test_explain_prints_the_plan_as_a_model():
    model = nets.conv4(ways=5, channels=3, filters=8, size=20, layers=2)
    data = nets.image_tasks(4, 5, 1, 1, 3, 20, dtype=torch.float32)
    without = signmaml_ext.explain(model, *data, inner_steps=2)
    assert without.plan is None and "plan" not in str(without)
    text = str(signmaml_ext.explain(model, *data, inner_steps=2, plan=True))
    launches = C.plan_conv_meta_step(
        Net(channels=3, height=20, width=20, ways=5).shape, 4, 5, 5, 2, "fp32", 1
    )["launches"]  # fmt: skip
    assert "a model, nothing here is measured" in text and f"  {len(launches)} launches, and one for the mean" in text
    assert "measured" not in text.replace("nothing here is measured", "")
    kernels = [line.split()[0] for line in text.splitlines() if " x " in line and "threads" not in line]
    # The inner steps have the same launches, so the second one is not printed.
    assert kernels == [one["kernel"] for one in launches if one["step"] != 1]
    back = str(signmaml_ext.explain(model, *data, inner_steps=2, method="maml", plan=True)).partition("back through")[2]
    assert "conv_forward (*)" in back and "conv_tangent_head" in back and "kept weights" not in text
    maml = signmaml_ext.explain(model, *data, inner_steps=2, method="maml", sharpness=0.1, plan=True).plan
    assert maml is not None and maml.startswith("plan: there is one for Conv-N networks only, and its kernels do not")
    other = signmaml_ext.explain(nets.mlp(), plan=True).plan
    assert other == "plan: there is one for Conv-N networks only, and it has no 2d convolution"
