"""Sharpness-aware steps, and steps that are counted, on the emulated GPU: against the reference in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from helpers.cases import conv_cases, emulated_cases, nets, perceptrons
from helpers.devices import emulated
from helpers.devices.emulated import by_seed
from signmaml_ext import Sharpness, conv, mlp

SHARP = {
    "l2": Sharpness(0.05),
    "l2 adaptive": Sharpness(0.2, "l2", adaptive=True),
    "linf": Sharpness(0.01, "linf"),
    "linf adaptive": Sharpness(0.05, "linf", adaptive=True),
}
METHODS = ("sign-maml", "fo-maml")
SHAPES = emulated_cases.TEAMS
COUNTED = ("scalar", "tensor", "filter", "element")  # kinds of rates that do not vary by step


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


# ---- perceptrons


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharpness", SHARP)
@pytest.mark.parametrize(
    ("widths", "sizes"), [SHAPES[0], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[1:])]
)
def test_mlp_sharp(native, widths, sizes, sharpness, method):
    by_seed(native, list(SHARP).index(sharpness))
    for kind, learnable in (("scalar", False), ("element and step", True)):
        emulated_cases.mlp_rates(
            native, widths, sizes, kind, method, learnable=learnable, sharpness=SHARP[sharpness], steps=3
        )


@pytest.mark.parametrize("sharpness", [None, *SHARP])
@pytest.mark.parametrize("adapt", [["5.weight", "5.bias"], ["1.bias"], ["3.weight"]])
def test_mlp_of_what_adapts(native, adapt, sharpness):
    """What does not adapt is neither moved nor in the norm."""
    by_seed(native, 2)
    options = {"sharpness": SHARP.get(sharpness), "loss": "cross_entropy", "activation": nn.ReLU}
    emulated_cases.mlp_rates(native, (3, 7, 5, 2), (9, 4, 3), "tensor", "fo-maml", adapt=adapt, **options)
    emulated_cases.mlp_rates(
        native, (3, 7, 5, 2), (9, 4, 3), "tensor", "sign-maml", adapt=adapt, task_state="int8", **options
    )


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    ("widths", "sizes"), [SHAPES[0], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[1:])]
)
def test_mlp_counted(native, widths, sizes, learnable, kind):
    by_seed(native, 4)
    emulated_cases.mlp_rates(
        native, widths, sizes, kind, "sign-maml", learnable=learnable, task_state="int8", steps=4
    )  # fmt: skip


def test_mlp_counted_without_a_step(native):
    emulated_cases.mlp_rates(native, (3, 7, 5, 2), (9, 4, 3), "scalar", "sign-maml", task_state="int8", steps=0)


@pytest.mark.parametrize("task_state", ["full", "int8"])
@pytest.mark.parametrize("sharpness", [None, "l2", "linf"])
def test_mlp_broken_task_is_left_out(native, sharpness, task_state):
    """One team takes all tasks, so the next ones find the broken one's NaN in its memory."""
    native.configure(seed=4, blocks_alive=1, multiprocessors=1)
    model = perceptrons.network((3, 5, 2), nn.Tanh).double()
    data = list(perceptrons.tasks_for((3, 5, 2), "mse", 35, 2, 2, torch.float64))
    options = {"inner_lr": 0.1, "inner_steps": 2, "method": "sign-maml", "nonfinite": "skip"}
    options |= {"sharpness": SHARP.get(sharpness), "task_state": task_state}
    healthy = mlp.meta_gradients(perceptrons.problem_of(model, tuple(v[1:] for v in data), **options), native)
    data[0] = data[0].clone()
    data[0][0] = torch.nan
    problem = perceptrons.problem_of(model, tuple(data), **options)
    found = mlp.meta_gradients(problem, native)
    assert found.nonfinite.tolist() == [True] + [False] * 34
    for name, value in healthy.params.items():
        assert torch.equal(found.params[name], value), name
    adapted = mlp.adapt(problem, native)
    assert all(value[0].isnan().all() and value[1:].isfinite().all() for value in adapted.params.values())
    if task_state == "int8":
        assert all((value[0] == -128).all() for value in adapted.params.counts.values())


@pytest.mark.parametrize("sharpness", SHARP)
def test_mlp_bits_in_any_company(native, sharpness):
    """A task's numbers are the same whatever the other tasks and the size of its team."""
    widths, options = (3, 33, 2), {"inner_lr": 0.05, "inner_steps": 2, "method": "fo-maml", "loss": "mse"}
    model = perceptrons.network(widths, nn.ReLU)
    data = perceptrons.tasks_for(widths, "mse", 40, 5, 3, torch.float32)
    by_seed(native, 5)

    def last_adapted(count):
        some = tuple(value[-count:] for value in data)
        problem = perceptrons.problem_of(model, some, sharpness=SHARP[sharpness], **options)
        return {name: value[-1] for name, value in mlp.adapt(problem, native).params.items()}

    alone = last_adapted(1)
    for count in (2, 40):
        for name, value in last_adapted(count).items():
            assert torch.equal(value, alone[name]), (count, name)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_mlp_radius_that_is_0_in_float(native, norm):
    """The step is the plain one."""
    by_seed(native, 6)
    model, data = (
        perceptrons.network((3, 7, 2), nn.Tanh),
        perceptrons.tasks_for((3, 7, 2), "mse", 2, 4, 3, torch.float32),
    )
    plain, sharp = (
        mlp.adapt(
            perceptrons.problem_of(
                model, data, inner_lr=0.1, inner_steps=2, method="fo-maml", loss="mse", sharpness=sharpness
            ),
            native,
        )
        for sharpness in (None, Sharpness(1e-60, norm))
    )
    assert 1e-60 > torch.tensor(1e-60).item() == 0
    torch.testing.assert_close(sharp.params, plain.params, rtol=1e-6, atol=1e-7)


def test_the_mlp_plan(native):
    """Room for what such steps keep, whatever their number."""

    def room(steps, **options):
        plan = native.plan_mlp_meta_step([3, 7, 5, 2], 8, 4, 3, 8, 1, steps, **options)
        return plan["workspace_scalars"] // plan["teams"]

    row = room(1, learns_rates=True)
    assert room(1, counts_steps=True) == room(5, counts_steps=True) == 2 * row
    assert room(1, sharpness_rho=0.1) == room(5, sharpness_rho=0.1) == 2 * row + 256
    assert room(2, sharpness_rho=0.1, counts_steps=True, learns_rates=True) == 5 * row + 256


# ---- Conv-N


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharpness", SHARP)
def test_conv_sharp(native, sharpness, method):
    by_seed(native, list(SHARP).index(sharpness))
    others = {"sharpness": SHARP[sharpness]}
    emulated_cases.conv_rates(native, "scalar", method, learnable=False, others=others)
    emulated_cases.conv_rates(native, "element and step", method, others=others)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", ["l2", "linf"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 2])
def test_conv_sharp_of_networks_whose_block_1_is_direct(native, layers, method, sharpness, monkeypatch):
    """Block 1 by its raw output, as networks of more channels than its covariance serves would have it."""
    by_seed(native, 1)
    direct = _Direct(native)
    others = {"sharpness": SHARP[sharpness]}
    emulated_cases.conv_rates(direct, "tensor", method, learnable=False, others=others, layers=layers)


class _Direct:
    """The native module, with block 1 by its raw output."""

    def __init__(self, native: ModuleType) -> None:
        self._native = native

    def __getattr__(self, name: str) -> object:
        return getattr(self._native, name)

    def plan_conv_meta_step(self, *positional, **named):
        return self._native.plan_conv_meta_step(*positional, by_covariance=False, **named)

    def conv_meta_step_cuda(self, *positional, **named):
        return self._native.conv_meta_step_cuda(*positional, by_covariance=False, **named)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [None, *SHARP])
@pytest.mark.parametrize("part", ["head", "blocks"])
def test_conv_of_what_adapts(native, part, sharpness):
    """What does not adapt is neither moved nor in the norm."""
    by_seed(native, 5)
    names = [name for name, _ in nets.conv4(layers=2).named_parameters()]
    adapt = names[-2:] if part == "head" else names[:-2]
    others = {"sharpness": SHARP.get(sharpness)}
    emulated_cases.conv_rates(native, "tensor", "fo-maml", adapt=adapt, others=others)
    emulated_cases.conv_rates(native, "tensor", "sign-maml", adapt=adapt, others={**others, "task_state": "int8"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTED)
def test_conv_counted(native, kind):
    by_seed(native, 4)
    others = {"task_state": "int8"}
    emulated_cases.conv_rates(native, kind, "sign-maml", learnable=False, others=others, steps=3)
    emulated_cases.conv_rates(native, kind, "sign-maml", others=others)
    emulated_cases.conv_rates(native, kind, "sign-maml", layers=1, size=6, steps=1, others=others)


@pytest.mark.slow
@pytest.mark.parametrize("task_state", ["full", "int8"])
@pytest.mark.parametrize("sharpness", [None, "l2", "linf"])
def test_conv_broken_task_is_left_out(native, sharpness, task_state):
    by_seed(native, 3)
    torch.manual_seed(0)
    model = nets.conv4(ways=3, channels=2, filters=8, size=9, layers=2)
    data = list(nets.image_tasks(3, 3, 2, 2, 2, 9, dtype=torch.float32))
    options = {"inner_lr": 0.01, "inner_steps": 2, "method": "sign-maml", "nonfinite": "skip", "loss": "cross_entropy"}
    options |= {"sharpness": SHARP.get(sharpness), "task_state": task_state}
    healthy = conv.meta_gradients(perceptrons.problem_of(model, tuple(v[1:] for v in data), **options), native)
    data[0] = data[0].clone()
    data[0][0, 0, 0, 1, 1] = torch.nan
    problem = perceptrons.problem_of(model, tuple(data), **options)
    found = conv.meta_gradients(problem, native)
    assert found.nonfinite.tolist() == [True, False, False]
    for name, value in healthy.params.items():
        assert torch.equal(found.params[name], value), name
    adapted = conv.adapt(problem, native)
    assert adapted.nonfinite.tolist() == [True, False, False]
    assert all(value[1:].isfinite().all() for value in adapted.params.values())
    classifier = list(adapted.params)[-1]
    assert adapted.params[classifier][0].isnan().all()
    if task_state == "int8":
        assert (adapted.params.counts[classifier][0] == -128).all()


def test_the_conv_plan(native):
    """A sharpness-aware step has its passes twice, with a climb between them; memory does not grow with the steps."""

    def plan(steps=3, **options):
        return native.plan_conv_meta_step(conv_cases.Net().shape, 2, 3, 4, steps, "fp32", 132, **options)

    def of_step(found, *parts):
        return [one["kernel"] for one in found["launches"] if one["step"] == 1 and one["part"] in parts]

    plain = plan()
    for norm, climb in (("l2", ["conv_climb_squares", "conv_climb"]), ("linf", ["conv_climb"])):
        sharp = plan(sharpness_rho=0.05, sharpness_norm=norm)
        assert of_step(sharp, "pass") == of_step(plain, "pass") + climb
        assert of_step(sharp, "raised") == of_step(plain, "pass")
        assert plan(7, sharpness_rho=0.05, sharpness_norm=norm)["workspace_bytes"] == sharp["workspace_bytes"]
    added = [one["name"] for one in plan(sharpness_rho=0.05)["workspace"] if one not in plain["workspace"]]
    assert {"ascent", "raised", "squares"} <= set(added)
    counted = plan(counts_steps=True)
    alike = [{**one, "bytes": 0, "flops": 0} for one in counted["launches"]]
    assert alike == [{**one, "bytes": 0, "flops": 0} for one in plain["launches"]]
    assert sum(one["bytes"] for one in counted["launches"]) > sum(one["bytes"] for one in plain["launches"])
    (counts,) = [one for one in counted["workspace"] if one["name"] == "counts"]
    assert counted["workspace_bytes"] == plain["workspace_bytes"] + 2 * counts["stride"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sharpness_rho": -1.0}, "sharpness_rho: expected a finite number >= 0"),
        ({"sharpness_rho": 0.1, "sharpness_norm": "l1"}, "sharpness_norm: expected 'l2' or 'linf', found 'l1'"),
        ({"sharpness_rho": 0.1, "method": "maml"}, "sharpness_rho: expected 0 with method 'maml'"),
        ({"counts_steps": True, "method": "fo-maml"}, "counts_steps: expected false without sign steps"),
        ({"counts_steps": True, "steps": 128}, "steps: expected at most 127 that are counted, found 128"),
    ],
)
def test_what_is_no_such_step_is_refused(native, wrong, message):
    options = {"steps": 1, **wrong}
    with pytest.raises(ValueError, match=message):
        native.plan_conv_meta_step(conv_cases.Net().shape, 2, 3, 4, precision="fp32", multiprocessors=132, **options)
    with pytest.raises(ValueError, match=message):
        native.plan_mlp_meta_step([3, 7, 5, 2], 8, 4, 3, 8, 1, **options)
