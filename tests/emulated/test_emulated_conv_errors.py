"""Gradients of the Conv-N kernels before the sign, on the emulated GPU.

Their error against float64 is at most twice PyTorch's own in the same precision, in every layer, for all sizes that the
kernels support, on random and on real images.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from helpers.cases import conv_cases, images
from helpers.cases.conv_cases import Data, Net
from helpers.devices import emulated

FORMS = pytest.mark.parametrize("by_covariance", [True, False], ids=["covariance", "direct"])  # of block 1
ROUNDOFF = {"fp32": 2**-24, "tf32": 2**-11, "bf16": 2**-8}


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


def sums_of(native: ModuleType, architecture: int) -> None:
    """Chooses whose tensor cores sum."""
    native.configure(seed=1, blocks_alive=2, multiprocessors=2, architecture=architecture)


@pytest.fixture(autouse=True)
def _sums_that_lose_most(native) -> None:
    sums_of(native, 80)


def draws(net: Net, count: int) -> Iterator[Data]:
    return (conv_cases.draw(net, seed) for seed in range(count))


# A network, and how many draws make the median: few where one takes seconds, many where all gradients are small.
SIZES = {
    "128 filters": (Net(filters=128, height=4, width=5, tasks=1, support=2, query=3), 3),
    "128 filters, strided": (Net(filters=128, halving="stride", height=5, width=3, tasks=1, support=2, query=3), 3),
    "120 filters, colour": (Net(filters=120, channels=3, height=4, width=4, tasks=1, support=2, query=3), 3),
    "100 ways": (Net(ways=100, blocks=3, height=8, width=8, tasks=1, support=2, query=100), 9),
    "300 images": (Net(ways=5, height=5, width=7, tasks=1, support=1, query=300), 5),
    "6 blocks": (Net(blocks=6, height=64, width=65, tasks=1, support=2, query=3), 5),
    "6 blocks, strided, colour": (
        Net(blocks=6, channels=3, halving="stride", height=33, width=35, tasks=1, query=12),
        5,
    ),
    "96 pixels, colour": (Net(channels=3, height=96, width=96, tasks=1, support=1, query=2), 5),
    "95 pixels, strided, 2 channels": (Net(channels=2, halving="stride", height=95, width=96, tasks=1, query=2), 5),
}


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("size", SIZES)
def test_extreme_sizes(native, size, by_covariance):
    net, count = SIZES[size]
    apart = conv_cases.errors_of_tasks(native, net, draws(net, count), by_covariance=by_covariance)
    conv_cases.assert_within_twice_torch(net, apart)


# From the fewest filters to the most; a weight gradient over the positions of 75 images; a deep network.
SUMS = {
    "8 filters, 75 images": Net(height=12, width=12, tasks=1, support=2, query=75),
    "32 filters": Net(filters=32, height=14, width=14, tasks=1, support=2, query=8),
    "32 filters, strided": Net(filters=32, halving="stride", height=12, width=12, tasks=1, support=2, query=15),
    "64 filters, strided, deep": Net(
        4, channels=3, filters=64, halving="stride", height=14, width=14, tasks=1, support=2, query=8
    ),
    "128 filters": Net(filters=128, height=5, width=5, tasks=1, support=2, query=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", SUMS)
def test_float32_survives_tensor_cores_that_cut_sums_off(native, case, architecture):
    """Gradients would be 2 to 24 times as far from float64 as PyTorch's if long sums were left to the tensor cores."""
    net = SUMS[case]
    sums_of(native, architecture)
    apart = conv_cases.errors_of_tasks(native, net, conv_cases.draw_tasks(net))
    conv_cases.assert_within_twice_torch(net, apart)
    assert conv_cases.ratio_to_torch(net, apart) < 1.5


@pytest.mark.slow
@FORMS
def test_a_step_on_one_hundred_images_of_one_hundred_ways(native, by_covariance):
    """The step uses exactly the gradient compared with float64 here: that of the same data as a query set."""
    net = Net(ways=100, blocks=3, height=8, width=8, tasks=2, support=100, query=100)
    data = conv_cases.draw(net)
    data.support_x, data.support_y = data.query_x, data.query_y
    gradient = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
    # oneDNN sums a hundred small images in more or fewer parts by the processor, so its errors are no fixed measure.
    with torch.backends.mkldnn.flags(enabled=False):
        draws = [data, conv_cases.draw(net, 1)]
        apart = conv_cases.errors_of_tasks(native, net, draws, by_covariance=by_covariance)
    conv_cases.assert_within_twice_torch(net, apart)
    stepped = conv_cases.run(native, net, data, steps=1, by_covariance=by_covariance, with_query=False)
    theta = torch.cat([p.reshape(-1) for p in data.params])
    assert torch.equal(stepped.adapted, theta - torch.tensor(0.01) * gradient.grads.sign())
    assert torch.equal(stepped.support_loss[0], gradient.query_loss)


def of_pictures(net: Net, kind: str, count: int) -> Iterator[Data]:
    """Crops of CIFAR images, scaled as in training (-1 to 1) or as stored in the files (0 to 255)."""
    from signmaml import data as sets

    chosen = sets.load("fc100", "test", root=images.real_data("cifar100"), progress=False)
    for seed in range(count):
        data = conv_cases.draw(net, seed)
        for x, y in ((data.support_x, data.support_y), (data.query_x, data.query_y)):
            for task in range(net.tasks):
                for i in range(x.shape[1]):
                    y[task, i] = i % net.ways
                    pixels = chosen.images_of((3 * seed + i % net.ways) % 20)[11 + i + 40 * task].float()
                    x[task, i] = pixels[:, 8 : 8 + net.height, 9 : 9 + net.width]
        if not kind.endswith("255"):
            data.support_x, data.query_x = (x / 127.5 - 1 for x in (data.support_x, data.query_x))
        yield data


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("halving", ["max", "stride"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("kind", ["random", "real", "real 0..255", "real, sm_90"])
def test_every_precision_on_random_and_real_images(native, kind, precision, halving, by_covariance):
    """Compares the typical error of several draws.

    In fp32 and tf32, a ReLU or pooling decision rarely differs from float64's, but then moves a gradient far more than
    rounding does; the median excludes such draws. In bf16 every draw contains some, so many images average over them.
    """
    rare = precision != "bf16"
    sums_of(native, 90 if kind.endswith("sm_90") else 80)
    net = Net(
        3, channels=3, filters=16, height=12, width=11, halving=halving, query=6 if rare else 30, tasks=1, support=2
    )
    count = 7 if rare else 3
    data = draws(net, count) if kind == "random" else of_pictures(net, kind, count)
    apart = conv_cases.errors_of_tasks(native, net, data, precision, by_covariance=by_covariance)
    ours, theirs = apart.median(0).values if rare else apart.log().mean(0).exp()
    assert (ours <= 2 * theirs + conv_cases.SPACING).all(), (ours, theirs)
    # The kernel computed in that precision, not in a better one.
    weights = [i for i, shape in enumerate(net.tensors) if len(shape) == 4]
    assert (ours[weights] > ROUNDOFF[precision] / 10).all(), ours


@pytest.mark.slow
@pytest.mark.parametrize("halving", ["max", "stride"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_both_forms_of_block_1_agree(native, precision, halving):
    """Via the covariance of its patches or like the other blocks: the same gradients, up to the precision's rounding.

    The covariance form is the more exact one, because it computes block 1's output by float32 dot products.
    """
    net = Net(1, channels=3, halving=halving, height=12, width=11, support=2, query=9, tasks=1)
    apart = []
    for data in draws(net, 5):
        results = [
            conv_cases.run(native, net, data, steps=0, precision=precision, by_covariance=form)
            for form in (True, False)
        ]
        apart.append(conv_cases.errors(net, results[1].grads, results[0].grads.double()))
    typical = torch.tensor(apart).clamp(min=1e-12).log().mean(0).exp()
    assert (typical <= 16 * ROUNDOFF[precision]).all(), typical
    assert typical[0] > 1e-9, "equal bits: one form was held against itself"
