"""Every stage of the CPU's convolutional networks against its definition in torch, for each instruction set.

A stage reads and writes arrays of one task's memory, laid out NHWC with channels padded to whole vectors. The tests
fill the arrays that a stage reads, run it alone and compare the arrays that it writes: to 1e-9 in float64, to the
rounding of sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.cases.conv_cases import Net
from signmaml_ext._loader import C

# Blocks of each kind: images of one item and of several, F(2x2, 3x3) and direct convolution, shared products over one
# image and several, odd and even sizes, whole and partial vectors of channels.
NETS = {
    "pool-colour": Net(blocks=3, channels=3, filters=24, height=23, width=18),
    "pool-gray": Net(blocks=3, channels=1, filters=48, height=12, width=13),
    "pool-large": Net(blocks=2, channels=2, filters=8, height=30, width=37),
    "stride-colour": Net(blocks=3, channels=3, filters=24, height=23, width=18, halving="stride"),
    "stride-gray": Net(blocks=4, channels=1, filters=40, height=28, width=28, halving="stride"),
    "stride-large": Net(blocks=2, channels=2, filters=8, height=45, width=52, halving="stride"),
}
EXAMPLES = 5
BLOCKS = [(name, block) for name, net in NETS.items() for block in range(net.blocks)]
LATER = [(name, block) for name, block in BLOCKS if block > 0]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4}


@dataclass
class Task:
    """One task's memory, with its arrays by name, and the stages that run on it."""

    net: Net
    dtype: torch.dtype
    runner: Any = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.runner = C.ConvStageRunner(self.net.shape, EXAMPLES, is_double=self.dtype == torch.float64)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        """The array itself: writing to it writes the task's memory."""
        return torch.from_numpy(np.asarray(self.runner.array(*key)))

    def plan(self, block: int) -> dict[str, Any]:
        return self.runner.plan(block)

    def run(self, block: int, *stages: str) -> None:
        for stage in stages:
            self.runner.run(stage, block)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    # ---- arrays in torch's layout ----

    def set_images(self, key: tuple[str, int], values: Tensor, border: int = 1) -> None:
        """Writes `[n, filters, h, w]` inside the border; channels beyond the filters become 0."""
        array = self[key]
        inside = array[:, border : array.shape[1] - border, border : array.shape[2] - border]
        inside.zero_()
        inside[:, : values.shape[2], : values.shape[3], : values.shape[1]] = values.permute(0, 2, 3, 1)

    def images(self, key: tuple[str, int], border: int = 1) -> Tensor:
        """`[n, filters, h, w]` inside the border."""
        array = self[key]
        inside = array[:, border : array.shape[1] - border, border : array.shape[2] - border, : self.net.filters]
        return inside.permute(0, 3, 1, 2)

    def packed(self, weight: Tensor, like: tuple[str, int]) -> Tensor:
        """`[filters, inputs, 3, 3]` as `[groups, 9, inputs, group]`."""
        groups, _, inputs, group = self[like].shape
        rows = torch.zeros(groups * group, inputs, 9, dtype=self.dtype)
        rows[: weight.shape[0]] = weight.reshape(weight.shape[0], inputs, 9)
        return rows.view(groups, group, inputs, 9).permute(0, 3, 2, 1)

    def unpacked(self, key: tuple[str, int]) -> Tensor:
        array = self[key]
        groups, _, inputs, group = array.shape
        rows = array.permute(0, 3, 2, 1).reshape(groups * group, inputs, 3, 3)
        return rows[: self.net.filters]

    def set_weight(self, block: int) -> Tensor:
        inputs = self.plan(block)["inputs"]
        weight = self.normal(self.net.filters, inputs, 3, 3) / (9 * inputs) ** 0.5
        self["weight", block].copy_(self.packed(weight, ("weight", block)))
        return weight

    def set_vectors(self, block: int, *names: str) -> list[Tensor]:
        """Fills vectors with random `[filters]` values and zero padding."""
        found = [self.normal(self.net.filters) for _ in names]
        for name, values in zip(names, found, strict=True):
            self[name, block].zero_()[: self.net.filters] = values
        return [values[:, None, None] for values in found]

    def input_of(self, block: int) -> tuple[str, int]:
        return ("images", 0) if block == 0 else ("activation", block - 1)

    def set_input(self, block: int) -> Tensor:
        plan = self.plan(block)
        x = self.normal(EXAMPLES, plan["inputs"], plan["in_h"], plan["in_w"])
        if block:
            x = x.relu()
        self.set_images(self.input_of(block), x)
        return x

    def patches(self, x: Tensor, block: int) -> Tensor:
        """`[n, out_h * out_w, 9 inputs]`, by window row, column and channel."""
        columns = F.unfold(x, 3, padding=1, stride=self.plan(block)["stride"])
        n, _, positions = columns.shape
        return columns.view(n, -1, 9, positions).permute(0, 3, 2, 1).reshape(n, positions, -1)

    def close(self, found: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE[self.dtype]
        scale = float(expected.abs().max().clamp(min=1.0))
        torch.testing.assert_close(found, expected.to(self.dtype), rtol=tolerance, atol=tolerance * scale)


def windows(x: Tensor) -> Tensor:
    """`[..., h // 2, w // 2, 4]`: the values of every pooling window in reading order."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    whole = x[..., : 2 * h, : 2 * w].reshape(*x.shape[:-2], h, 2, w, 2)
    return whole.movedim(-3, -2).reshape(*x.shape[:-2], h, w, 4)


def routed(grad: Tensor, choice: Tensor, height: int, width: int) -> Tensor:
    """`[n, c, h / 2, w / 2]` gradients at the chosen positions of `[n, c, height, width]`, 0 elsewhere."""
    spread = F.one_hot(choice.long(), 4) * grad[..., None]
    n, c, h, w = grad.shape
    to = grad.new_zeros(n, c, height, width)
    to[..., : 2 * h, : 2 * w] = spread.view(n, c, h, w, 2, 2).movedim(-2, -3).reshape(n, c, 2 * h, 2 * w)
    return to


def rows_of_items(values: Tensor, rows: int) -> Tensor:
    """Sums of `[n, c, h, w]` over each item, which is `rows` rows of one example: `[n * items, c]`."""
    return torch.stack([part.sum((1, 2)) for example in values for part in example.split(rows, 1)])


@pytest.fixture(params=C.cpu_isas())
def isa(isas: list[str], request: pytest.FixtureRequest) -> str:
    C.select_cpu_isa(request.param)  # `isas` restores the choice
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def task(isa, dtype, name) -> Task:
    return Task(NETS[name], dtype)


each_net = pytest.mark.parametrize("name", NETS)
each_block = pytest.mark.parametrize("name, block", BLOCKS)
each_later_block = pytest.mark.parametrize("name, block", LATER)


# ---- images, patches, weights ---------------------------------------------------------------------------------------


@each_net
def test_pack_image(task):
    x = task.normal(*task["x", 0].shape)
    task["x", 0].copy_(x)
    task.run(0, "pack_image")
    assert task["images", 0].equal(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)))


@each_net
def test_patch_sum(task):
    x, plan = task.set_input(0), task.plan(0)
    task.run(0, "patch_sum")
    patches = task.patches(x, 0).view(EXAMPLES, plan["out_h"], plan["out_w"], -1).movedim(-1, 1)
    task.close(task["patch_sums", 0], rows_of_items(patches, plan["rows"]))


@each_net
def test_patch_covariance(task):
    x, inputs = task.set_input(0), task.plan(0)["inputs"]
    x = x + 2  # centring matters
    task.set_images(("images", 0), x)
    patches = task.patches(x, 0)
    mean = patches.double().mean((0, 1))
    task["patch_mean", 0][: 9 * inputs] = mean
    task.run(0, "patch_covariance")
    center = mean[4 * inputs : 5 * inputs].to(task.dtype).repeat(9)
    centred = (patches - center).double()
    expected = torch.einsum("npi,npj->nij", centred, centred)
    window_row = torch.arange(9 * inputs) // (3 * inputs)
    written = window_row[:, None] <= window_row[None, :]
    task.close(task["patch_products", 0].where(written, 0), expected.where(written, 0))


@each_block
def test_pack_and_unpack_weights(task, block):
    weight = task.normal(*task["theta", block].shape)
    task["theta", block].copy_(weight)
    task["weight", block].fill_(torch.nan)  # as an earlier task may leave it
    task.run(block, "pack_weights")
    assert task["weight", block].equal(task.packed(weight, ("weight", block)))
    task["theta", block].fill_(torch.nan)
    task.run(block, "unpack_weights")
    assert task["theta", block].equal(weight)


@each_later_block
def test_pack_back(task, block):
    weight = task.set_weight(block)
    task["weight_back", block].fill_(torch.nan)
    task.run(block, "pack_back")
    back = task.unpacked(("weight_back", block))
    assert back.equal(weight.flip(2, 3).transpose(0, 1))
    beyond = task["weight_back", block].permute(0, 3, 2, 1).flatten(0, 1)[task.net.filters :]
    assert not beyond.any()


def transformed(weight: Tensor) -> Tensor:
    """F(2x2, 3x3)'s 4 x 4 values of every 3 x 3 filter. The last row is negated, so that outputs are sums."""
    matrix = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=weight.dtype)
    rows = matrix * torch.tensor([1, 1, 1, -1], dtype=weight.dtype)[:, None]
    return rows @ weight @ matrix.T


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@each_later_block
def test_transform_weights(task, block, back):
    plan, filters = task.plan(block), task.net.filters
    task.set_weight(block)
    task.run(block, "pack_back")
    source = ("weight_back" if back else "weight", block)
    groups, _, inputs, group = task[source].shape
    every = task[source].permute(0, 3, 2, 1).reshape(groups, group, inputs, 3, 3)
    task.run(block, "transform_back" if back else "transform_weights")
    if plan["winograd"]:
        expected = transformed(every).flatten(-2).permute(3, 0, 2, 1)
        task.close(task["transformed", block].view(16, groups, filters, group), expected)
    elif plan["shared"] and max(plan["out_h"], plan["out_w"]) > 2:
        mix = torch.tensor(
            [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5], [0.5, 0, -0.5]], dtype=task.dtype
        )  # taps 0, 1, 2; half of the sum of taps 0 and 2; half of their difference
        mixed = mix @ every @ mix.T
        places = [(y, x) for y in range(3) for x in (3, 4)] + [(y, x) for y in (3, 4) for x in range(5)]
        expected = torch.stack([mixed[..., y, x] for y, x in places], 1).transpose(2, 3)
        task.close(task["transformed", block].view(groups, 16, filters, group), expected)


@each_net
def test_transform_weights_of_block_0(task):
    weight, stride, inputs = task.set_weight(0), task.plan(0)["stride"], task.plan(0)["inputs"]
    (scale,) = task.set_vectors(0, "scale")
    task.run(0, "transform_weights")
    scaled = weight * scale[..., None]
    if stride == 1:
        matrix = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, -1]], dtype=task.dtype)
        scaled = matrix @ scaled  # only the window rows are transformed
    rows = scaled.permute(2, 3, 1, 0).reshape(-1, task.net.filters)
    found = task["first_weight", 0].transpose(0, 1).reshape(scaled.shape[2] * 3 * inputs, -1)
    task.close(found[:, : task.net.filters], rows)


# ---- forward --------------------------------------------------------------------------------------------------------


@each_later_block
def test_forward(task, block):
    plan, filters = task.plan(block), task.net.filters
    x, weight = task.set_input(block), task.set_weight(block)
    (gamma,) = task.set_vectors(block, "gamma")
    gamma = gamma.index_fill(0, torch.tensor([1]), 0.0)
    task["gamma", block][1] = 0.0
    task.run(block, "transform_weights", "forward")
    raw = task.images(("raw", block))
    task.close(raw, F.conv2d(x, weight, stride=plan["stride"], padding=1))
    border = task["raw", block].clone()
    border[:, 1:-1, 1:-1] = 0
    assert not border.any()

    counts = torch.tensor([r.shape[0] * plan["out_w"] for r in torch.empty(plan["out_h"]).split(plan["rows"])])
    counts = counts.repeat(EXAMPLES)[:, None]
    means = rows_of_items(raw.double(), plan["rows"]) / counts
    task.close(task["means", block][:, :filters], means)
    squares = rows_of_items(raw.double() ** 2, plan["rows"]) - counts * means**2
    task.close(task["squared_deviations", block][:, :filters], squares)

    if plan["stride"] == 1:
        # Exactly the first maximum of sign(gamma) * raw. With gamma = 0 all are equal.
        choice = (windows(raw) * gamma.sign()[..., None]).argmax(-1)
        first = torch.zeros_like(choice).where(gamma == 0, choice)
        assert task.images(("choice", block), border=0).equal(first.byte())
        assert task.images(("winner", block), border=0).equal(windows(raw).gather(-1, first[..., None])[..., 0])


@pytest.mark.parametrize("name, block", [(n, b) for n, b in BLOCKS if NETS[n].halving == "max" and b < 2])
def test_max_pooling_takes_the_first_of_equals(task, block):
    """Where the image is constant, all outputs of a pooling window are bitwise equal."""
    plan = task.plan(block)
    colour = task.normal(EXAMPLES, plan["inputs"], 1, 1).relu()
    task.set_images(task.input_of(block), colour.expand(-1, -1, plan["in_h"], plan["in_w"]))
    task.set_weight(block)
    task.set_vectors(block, "gamma", "scale", "shift")
    task.run(block, "transform_weights", "forward")
    if block:
        inner = windows(task.images(("raw", block)))[:, :, 1:-1, 1:-1]
        assert inner.numel() and inner.eq(inner[..., :1]).all()
    assert not task.images(("choice", block), border=0)[:, :, 1:-1, 1:-1].any()


@each_net
def test_forward_of_block_0(task):
    """Its statistics are already in `scale` and `shift`; it stores the activation, not the raw output."""
    plan = task.plan(0)
    x, weight = task.set_input(0), task.set_weight(0)
    scale, shift = task.set_vectors(0, "scale", "shift")
    task.run(0, "transform_weights", "forward")
    scaled = scale * F.conv2d(x, weight, stride=plan["stride"], padding=1)
    if plan["stride"] == 1:
        best, choice = windows(scaled).max(-1)
        found = task.images(("choice", 0), border=0).long()
        torch.testing.assert_close(
            windows(scaled).gather(-1, found[..., None])[..., 0],
            best,
            rtol=0,
            atol=1e-4 if task.dtype == torch.float32 else 1e-12,
        )
        assert (found != choice).float().mean() < 0.01  # two values of a window may round to the same
    else:
        best = scaled
    task.close(task.images(("activation", 0), border=plan["pad"]), (best + shift).relu())


@each_later_block
def test_statistics(task, block):
    plan = task.plan(block)
    raw = task.normal(EXAMPLES, task.net.filters, plan["out_h"], plan["out_w"]) * 2 + 3
    counts = torch.tensor([part.numel() * plan["out_w"] for part in torch.empty(plan["out_h"]).split(plan["rows"])])
    counts = counts.repeat(EXAMPLES)[:, None]
    means = rows_of_items(raw, plan["rows"]) / counts
    task["means", block][:, : task.net.filters] = means
    squares = rows_of_items(raw.double() ** 2, plan["rows"]) - counts * means.double() ** 2
    task["squared_deviations", block][:, : task.net.filters] = squares.to(task.dtype)
    gamma, beta = task.set_vectors(block, "gamma", "beta")
    task.run(block, "statistics")
    check_statistics(task, block, raw, gamma, beta)


@each_net
def test_statistics_of_block_0(task):
    """Computed from the mean and the covariance of its patches."""
    plan, inputs = task.plan(0), task.plan(0)["inputs"]
    x, weight = task.set_input(0), task.set_weight(0)
    patches = task.patches(x, 0).flatten(0, 1).double()
    task["patch_mean", 0][: 9 * inputs] = patches.mean(0)
    task["covariance", 0][: 9 * inputs, : 9 * inputs] = torch.cov(patches.T, correction=0)
    gamma, beta = task.set_vectors(0, "gamma", "beta")
    task.run(0, "statistics")
    check_statistics(task, 0, F.conv2d(x, weight, stride=plan["stride"], padding=1), gamma, beta)


def check_statistics(task: Task, block: int, raw: Tensor, gamma: Tensor, beta: Tensor) -> None:
    mean = raw.double().mean((0, 2, 3))
    inverse = (raw.double().var((0, 2, 3), correction=0) + task.net.eps).rsqrt()
    scale = gamma.flatten() * inverse
    expected = {"mean": mean, "inverse": inverse, "scale": scale, "shift": beta.flatten() - mean * scale}
    for name, values in expected.items():
        task.close(task[name, block][: task.net.filters], values)


@each_later_block
def test_normalise(task, block):
    plan = task.plan(block)
    scale, shift = task.set_vectors(block, "scale", "shift")
    z = task.normal(EXAMPLES, task.net.filters, plan["act_h"], plan["act_w"])
    pools = plan["stride"] == 1
    task.set_images(("winner" if pools else "raw", block), z, border=0 if pools else 1)
    task.run(block, "normalise")
    task.close(task.images(("activation", block), border=plan["pad"]), (scale * z + shift).relu())
    if plan["pad"]:
        border = task["activation", block].clone()
        border[:, 1:-1, 1:-1] = 0
        assert not border.any()


# ---- backward -------------------------------------------------------------------------------------------------------


def set_activation_grad(task: Task, block: int) -> Tensor:
    plan = task.plan(block)
    grad = task.normal(EXAMPLES, task.net.filters, plan["act_h"], plan["act_w"])
    task.set_images(("activation_grad", block), grad, border=0)
    return grad


def activation_grad(task: Task, block: int) -> Tensor:
    plan = task.plan(block)
    return task.images(("activation_grad", block), border=0)[:, :, : plan["act_h"], : plan["act_w"]]


@each_later_block
def test_grad_sums(task, block):
    plan, filters = task.plan(block), task.net.filters
    z = task.normal(EXAMPLES, filters, plan["act_h"], plan["act_w"])
    pools = plan["stride"] == 1
    task.set_images(("winner" if pools else "raw", block), z, border=0 if pools else 1)
    scale, shift, mean, inverse = task.set_vectors(block, "scale", "shift", "mean", "inverse")
    passed = set_activation_grad(task, block) * (scale * z + shift > 0)
    task.run(block, "grad_sums")
    assert activation_grad(task, block).equal(passed)
    task.close(task["grad_sums", block][:, :filters], rows_of_items(passed, plan["act_rows"]))
    products = rows_of_items(passed * (z - mean) * inverse, plan["act_rows"])
    task.close(task["grad_products", block][:, :filters], products)


@each_net
def test_halved_sums_of_block_0(task):
    plan = task.plan(0)
    y = task.normal(EXAMPLES, task.net.filters, plan["act_h"], plan["act_w"]).relu()
    y[0, 0, 0, 0] = torch.nan
    task.set_images(("activation", 0), y, border=plan["pad"])
    grad = set_activation_grad(task, 0)
    passed = grad.where(~(y <= 0), 0)  # the gradient of a NaN passes, as in torch
    if plan["stride"] == 2 and task.net.channels == 1:
        task["grad_sums", 0].fill_(torch.nan)
        task.run(0, "grad_sums")  # does nothing here: first_weight_grad computes the sums
        assert activation_grad(task, 0).equal(grad) and task["grad_sums", 0].isnan().all()
        return
    task.run(0, "grad_sums")
    assert activation_grad(task, 0).equal(passed)
    task.close(task["grad_sums", 0][:, : task.net.filters], rows_of_items(passed, plan["act_rows"]))


@each_later_block
def test_norm_grads(task, block):
    plan, filters = task.plan(block), task.net.filters
    sums, products = (task.normal(*task[name, block].shape) for name in ("grad_sums", "grad_products"))
    task["grad_sums", block].copy_(sums)
    task["grad_products", block].copy_(products)
    scale, inverse = task.set_vectors(block, "scale", "inverse")
    task.run(block, "norm_grads")
    beta, gamma = sums.sum(0)[:filters], products.sum(0)[:filters]
    count = EXAMPLES * plan["out_h"] * plan["out_w"]
    task.close(task["beta_grad", block][:filters], beta)
    task.close(task["gamma_grad", block][:filters], gamma)
    task.close(task["slope", block][:filters], -scale.flatten() * inverse.flatten() * gamma / count)
    task.close(task["offset", block][:filters], -scale.flatten() * beta / count)


@each_later_block
def test_raw_grad(task, block):
    plan, filters = task.plan(block), task.net.filters
    raw = task.normal(EXAMPLES, filters, plan["out_h"], plan["out_w"])
    task.set_images(("raw", block), raw)
    scale, slope, mean, offset = task.set_vectors(block, "scale", "slope", "mean", "offset")
    grad = set_activation_grad(task, block)
    if plan["stride"] == 1:
        choice = torch.randint(4, grad.shape, generator=task.generator, dtype=torch.uint8)
        task.set_images(("choice", block), choice, border=0)
        grad = routed(grad, choice, plan["out_h"], plan["out_w"])
    task.run(block, "raw_grad")
    task.close(task.images(("raw", block)), slope * (raw - mean) + offset + scale * grad)
    border = task["raw", block].clone()
    border[:, 1:-1, 1:-1] = 0
    assert not border.any()


@each_later_block
def test_weight_grad(task, block):
    plan = task.plan(block)
    x, weight = task.set_input(block), task.set_weight(block)
    dead = slice(2, 4)
    x[:, dead] = 0
    x[:, 3, 0, :] = 1.5  # alive in the first row only: taps that never meet it must be exactly 0
    task.set_images(("activation", block - 1), x)
    grad = task.normal(EXAMPLES, task.net.filters, plan["out_h"], plan["out_w"])
    task.set_images(("raw", block), grad)
    task.run(block, "weight_products", "weight_grad")
    whole = task["weight_grad", block].clone()
    expected = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride=plan["stride"], padding=1)
    task.close(task.unpacked(("weight_grad", block)), expected)
    unmet = expected[:, dead] == 0
    assert unmet[:, 0].all() and unmet[:, 1].any()
    assert not task.unpacked(("weight_grad", block))[:, dead][unmet].any()

    task["weight_grad", block].fill_(torch.nan)
    task.run(block, "weight_products_in_shares", "weight_grad")
    shares = task["weight_grad", block]
    if plan["weight_images"] >= EXAMPLES:
        assert shares.equal(whole)  # in whatever way threads divide the shares
    else:
        task.close(shares, whole)


@each_later_block
def test_data_grad(task, block):
    """Also computes grad_sums of the block before, whose outputs are all positive here, so every gradient passes."""
    plan, before, filters = task.plan(block), task.plan(block - 1), task.net.filters
    weight = task.set_weight(block)
    grad = task.normal(EXAMPLES, filters, plan["out_h"], plan["out_w"])
    task.set_images(("raw", block), grad)
    positive = torch.ones(EXAMPLES, filters, before["act_h"], before["act_w"], dtype=task.dtype)
    if block == 1:
        task.set_images(("activation", 0), positive)
    else:
        pools = before["stride"] == 1
        task.set_images(("winner" if pools else "raw", block - 1), positive, border=0 if pools else 1)
        task["scale", block - 1].fill_(1)
    task.run(block, "pack_back", "transform_back", "data_grad_kept")
    expected = torch.nn.grad.conv2d_input(positive.shape, weight, grad, stride=plan["stride"], padding=1)
    task.close(activation_grad(task, block - 1), expected)
    if block > 1 or before["stride"] == 1 or task.net.channels > 1:
        sums = task["grad_sums", block - 1][:, :filters]
        task.close(sums, rows_of_items(expected, before["act_rows"]))


@each_net
def test_first_weight_grad(task):
    plan, filters, inputs = task.plan(0), task.net.filters, task.plan(0)["inputs"]
    x = task.set_input(0)
    grad = set_activation_grad(task, 0)
    at_positions = grad
    if plan["stride"] == 1:
        choice = torch.randint(4, grad.shape, generator=task.generator, dtype=torch.uint8)
        task.set_images(("choice", 0), choice, border=0)
        at_positions = routed(grad, choice, plan["out_h"], plan["out_w"])
    task.set_images(("activation", 0), torch.ones_like(grad), border=plan["pad"])
    task.run(0, "first_weight_grad")
    expected = torch.nn.grad.conv2d_weight(
        x, (filters, inputs, 3, 3), at_positions, stride=plan["stride"], padding=1
    ).permute(2, 3, 1, 0)
    found = task["patch_grads", 0].sum(0).transpose(0, 1).reshape(9 * inputs, -1)
    task.close(found[:, :filters], expected.reshape(9 * inputs, filters))
    if plan["stride"] == 2 and inputs == 1:
        task.close(task["grad_sums", 0][:, :filters], rows_of_items(grad, plan["rows"]))


@each_net
def test_gradients_of_block_0(task):
    """statistics, forward, grad_sums, first_weight_grad and finish_first together equal autograd for block 0."""
    plan, filters, inputs = task.plan(0), task.net.filters, task.plan(0)["inputs"]
    x, weight = task.set_input(0), task.set_weight(0)
    gamma, beta = task.set_vectors(0, "gamma", "beta")
    patches = task.patches(x, 0).flatten(0, 1).double()
    task["patch_mean", 0][: 9 * inputs] = patches.mean(0)
    task["covariance", 0][: 9 * inputs, : 9 * inputs] = torch.cov(patches.T, correction=0)
    grad = set_activation_grad(task, 0)
    task.run(0, "statistics", "transform_weights", "forward", "grad_sums", "first_weight_grad", "finish_first")

    leaves = [each.double().requires_grad_() for each in (weight, gamma.flatten(), beta.flatten())]
    raw = F.conv2d(x.double(), leaves[0], stride=plan["stride"], padding=1)
    y = F.batch_norm(raw, None, None, *leaves[1:], training=True, eps=task.net.eps).relu()
    if plan["stride"] == 1:
        y = F.max_pool2d(y, 2)
    expected = torch.autograd.grad((y * grad.double()).sum(), leaves)
    found = [task.unpacked(("weight_grad", 0)), task["gamma_grad", 0][:filters], task["beta_grad", 0][:filters]]
    for one, other in zip(found, expected, strict=True):
        task.close(one, other)


# ---- vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3, 17, 64, 127, 1000])
@pytest.mark.parametrize("name", ["pool-gray"])
def test_vectors(task, n):
    a, b = task.normal(n + 1)[1:], task.normal(n + 1)[1:]  # unaligned
    scale = float((a.abs().double() @ b.abs().double()).clamp(min=1e-30))
    found = task.runner.dot(a.data_ptr(), b.data_ptr(), n)
    assert abs(found - float(a.double() @ b.double())) <= scale * torch.finfo(task.dtype).eps * 4

    sum_, expected = a.clone(), a + 0.7 * b
    task.runner.add_scaled(sum_.data_ptr(), 0.7, b.data_ptr(), n)
    torch.testing.assert_close(sum_, expected)

    moved = a.clone()
    assert task.runner.gradient_step(moved.data_ptr(), b.data_ptr(), 0.3, n) is False
    torch.testing.assert_close(moved, a - 0.3 * b)
    for bad in (torch.nan, torch.inf, -torch.inf):
        if n:
            b[n // 2] = bad
            assert task.runner.gradient_step(moved.data_ptr(), b.data_ptr(), 0.3, n) is True


# ---- the runner itself ----------------------------------------------------------------------------------------------


def test_what_does_not_exist_is_refused():
    runner = C.ConvStageRunner(NETS["pool-gray"].shape, 2)
    with pytest.raises(ValueError, match=r"^examples: expected 1 to 1048576, found 0$"):
        C.ConvStageRunner(NETS["pool-gray"].shape, 0)
    with pytest.raises(ValueError, match=r"^block: expected 0 to 2, found 3$"):
        runner.run("forward", 3)
    with pytest.raises(ValueError, match=r"^stage: block 0 has no stage 'pack_back'$"):
        runner.run("pack_back", 0)
    with pytest.raises(ValueError, match=r"^name: block 1 has no array 'colour'$"):
        runner.array("colour", 1)
    with pytest.raises(ValueError, match="this block has no such array"):
        runner.array("raw", 0)
