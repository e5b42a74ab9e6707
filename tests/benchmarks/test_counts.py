"""FLOPs and bytes against counts made by hand and by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from signmaml.models import MLP, Conv4, parameter_count


def test_workload_a_by_hand():
    from workloads import WORKLOADS

    # Conv4-32 on 84 x 84 RGB: 2 * (weights of one window) * filters * positions.
    layers = [2 * 27 * 32 * 84 * 84, 2 * 288 * 32 * 42 * 42, 2 * 288 * 32 * 21 * 21, 2 * 288 * 32 * 10 * 10]
    assert layers == [12_192_768, 32_514_048, 8_128_512, 1_843_200]
    linear = 2 * 800 * 5
    # Forward, weight gradient and input gradient; the images need no gradient.
    one_image = 2 * layers[0] + 3 * sum(layers[1:]) + 3 * linear
    assert one_image == 151_866_816
    # T = 8, K = 5 passes over 5 support images and one over 5 query images.
    assert WORKLOADS["A"].flops(8, 5) == 8 * 30 * one_image == 36_448_035_840


@pytest.mark.parametrize(("workload", "gflop"), [("A", 36.4), ("B", 50.3), ("C", 130), ("D", 0.6)])
def test_workloads_have_the_known_sizes(workload, gflop):
    from workloads import WORKLOADS

    chosen = WORKLOADS[workload]
    assert chosen.flops(chosen.tasks, 5) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("halving", ["max", "stride"])
@pytest.mark.parametrize("size", [28, 33])
def test_conv_net_equals_what_torch_counts(halving, size):
    import counts

    model = Conv4(ways=3, channels=2, filters=8, image_size=size, pooling=halving)
    net = counts.ConvNet(channels=2, filters=8, size=size, ways=3, halving=halving)
    assert net.parameters == parameter_count(model)
    assert net.pass_flops() == _counted(model, torch.rand(1, 2, size, size).repeat(2, 1, 1, 1)) / 2


def test_perceptron_equals_what_torch_counts():
    import counts

    model, net = MLP(3, 2, hidden=(8, 5)), counts.Perceptron((3, 8, 5, 2))
    assert net.parameters == parameter_count(model)
    assert net.pass_flops() == _counted(model, torch.rand(4, 3)) / 4


def _counted(model: torch.nn.Module, x: torch.Tensor) -> int:
    """FLOPs that torch counts for a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def test_bytes_by_hand():
    import counts

    # 2 tasks of 5 parameters in float32: read w, read g, write w; read 2 rows of g, read and write the sum.
    assert counts.sign_step_bytes(2, 5) == 2 * 5 * 4 * 3
    assert counts.meta_accumulate_bytes(2, 5) == 2 * 5 * 4 + 2 * 5 * 4
    assert counts.copy_bytes(7) == 56
    assert counts.matrix_flops(10) == 2000


def test_second_order_adds_a_sweep_per_step_to_the_first_order_count() -> None:
    import counts

    net = counts.Perceptron((2, 3, 5))
    sizes = {"tasks": 7, "support": 4, "query": 6}
    once = counts.meta_step_flops(net, **sizes, steps=2)
    assert counts.second_order_flops(net, **sizes, steps=0) == counts.meta_step_flops(net, **sizes, steps=0)
    assert counts.second_order_flops(net, **sizes, steps=2) - once == 7 * 2 * 4 * (3 * 2 * 2 * 3 + 8 * 2 * 3 * 5)
