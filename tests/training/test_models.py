"""Conv4, ResNet12, MLP, their names, and loading of learn2learn's weights."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from signmaml import models, networks
from signmaml.building import build_model
from signmaml.config import TrainConfig
from signmaml.episodes import Episodes
from signmaml.models import MLP, Conv4, ResNet12, load_learn2learn_state_dict, parameter_count

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "models.md"


class L2LBlock(nn.Module):
    """A block as learn2learn registers it, with running statistics."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.max_pool = nn.MaxPool2d(2)
        self.normalize = nn.BatchNorm2d(filters)
        self.conv = nn.Conv2d(channels, filters, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(torch.relu(self.normalize(self.conv(x))))


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)


class L2LNet(nn.Module):
    """Three generations of the layout: how the blocks and the head are named."""

    def __init__(self, layout: str, filters: int = 6) -> None:
        super().__init__()
        blocks = nn.Sequential(L2LBlock(3, filters), *(L2LBlock(filters, filters) for _ in range(3)))
        head = nn.Linear(filters * 4, 5)
        if layout == "nested":
            self.features, self.classifier = nn.Sequential(blocks, Flatten()), head
        elif layout == "flat":
            self.features, self.classifier = blocks, head
        else:
            self.base, self.linear = blocks, head
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        body = self.features if hasattr(self, "features") else self.base
        head = self.classifier if hasattr(self, "classifier") else self.linear
        return head(body(x).reshape(len(x), -1))


@pytest.mark.parametrize("layout", ["nested", "flat", "base"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_learn2learn_weights_predict_the_same(layout: str, prefix: str) -> None:
    theirs = L2LNet(layout)
    ours = Conv4(5, 3, 6, 32)
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    report = load_learn2learn_state_dict(ours, weights)
    x = torch.randn(7, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))  # theirs is in training mode: batch statistics
    assert set(report.loaded) == set(ours.state_dict())
    assert len(report.ignored) == 12 and all("running" in k or "tracked" in k for k in report.ignored)


def test_learn2learn_weights_that_do_not_fit_change_nothing() -> None:
    ours = Conv4(5, 3, 6, 32)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    weights = dict(L2LNet("nested").state_dict())
    weights["features.0.1.conv.weight"] = torch.zeros(7, 6, 3, 3)
    weights["encoder.weight"] = torch.zeros(1)
    del weights["classifier.bias"]
    with pytest.raises(ValueError) as error:
        load_learn2learn_state_dict(ours, weights)
    message = str(error.value)
    assert "'features.0.1.conv.weight' has shape [7, 6, 3, 3]" in message and "[6, 6, 3, 3]" in message
    assert "unexpected key 'encoder.weight'" in message
    assert "nothing for the model's 'classifier.bias'" in message
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_learn2learn_weights_under_two_names_must_agree() -> None:
    weights = dict(L2LNet("flat").state_dict())
    weights["base.0.conv.bias"] = weights["features.0.conv.bias"].clone()
    load_learn2learn_state_dict(Conv4(5, 3, 6, 32), weights)
    weights["base.0.conv.bias"] += 1
    with pytest.raises(ValueError, match=r"two different values for 'features\.0\.conv\.bias'"):
        load_learn2learn_state_dict(Conv4(5, 3, 6, 32), weights)


@pytest.mark.parametrize(
    ("size", "pooling", "features"),
    [(28, "max", 1), (28, "stride", 4), (32, "max", 4), (32, "stride", 4), (84, "max", 25), (84, "stride", 36)],
)
def test_conv4_shapes(size: int, pooling: str, features: int) -> None:
    model = Conv4(ways=5, channels=1, filters=8, image_size=size, pooling=pooling)
    assert model.classifier.in_features == 8 * features
    assert model(torch.randn(3, 1, size, size)).shape == (3, 5)


def test_conv4_has_the_official_size_and_names() -> None:
    model = Conv4(ways=5, channels=3, filters=32, image_size=84)
    assert parameter_count(model) == 32901
    names = {
        f"features.{i}.{part}.{kind}" for i in range(4) for part in ("conv", "normalize") for kind in ("weight", "bias")
    }
    assert set(model.state_dict()) == names | {"classifier.weight", "classifier.bias"}


def test_conv4_starts_as_documented() -> None:
    model = Conv4(filters=32, channels=3)
    weight = model.features[1].conv.weight
    bound = (6 / (2 * 32 * 9)) ** 0.5
    assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
    assert all((module.bias == 0).all() for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    assert all((block.normalize.weight == 1).all() for block in model.features)


def test_conv4_normalises_by_the_batch_in_evaluation_too() -> None:
    model, x = Conv4(channels=1, image_size=16, filters=4), torch.randn(6, 1, 16, 16)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_conv4_leaves_out_running_statistics_and_says_so() -> None:
    model = Conv4(5, 3, 6, 32)
    weights = L2LNet("flat").state_dict()
    count = len(weights)
    with pytest.warns(UserWarning, match="left out 12 keys"):
        model.load_state_dict(weights)
    assert len(weights) == count
    assert torch.equal(model.features[2].conv.weight, weights["features.2.conv.weight"])
    with pytest.raises(RuntimeError, match="Unexpected"), pytest.warns(UserWarning):
        model.load_state_dict({**weights, "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 1}, "ways: expected an integer >= 2, found 1"),
        ({"filters": 0}, "filters"),
        ({"channels": 2.0}, "channels"),
        ({"pooling": "mean"}, "pooling: expected one of 'max', 'stride', found 'mean'"),
        ({"image_size": 15}, "image_size: expected at least 16 pixels for 4 blocks"),
        ({"layers": 0}, "layers: expected an integer >= 1, found 0"),
        ({"filters": (8, 16), "layers": 3}, r"filters: expected a width for each of 3 blocks, found \(8, 16\)"),
        ({"filters": ()}, r"filters: expected a width for each of 1 blocks, found \(\)"),
        ({"filters": (8, 0)}, "filters: expected an integer >= 1, found 0"),
        ({"norm": "layer"}, "norm: expected one of 'batch', 'group', 'instance', 'none', found 'layer'"),
        ({"norm": "instance", "image_size": 16, "pooling": "stride"}, "at least 2 x 2 pixels for norm 'instance'"),
        ({"activation": "sine"}, "activation: expected one of 'relu', 'leaky-relu'"),
    ],
)
def test_conv4_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv4(**arguments)


def test_mlp_flattens_and_activates() -> None:
    model = MLP(12, 3, hidden=(8,), activation="tanh")
    x = torch.randn(4, 3, 2, 2)
    hidden = torch.tanh(x.flatten(1) @ model.features[0].weight.T + model.features[0].bias)
    assert torch.allclose(model(x), hidden @ model.classifier.weight.T + model.classifier.bias)
    assert MLP(3, 2, hidden=())(torch.randn(5, 3)).shape == (5, 2)
    with pytest.raises(ValueError, match="activation"):
        MLP(1, 1, activation="sine")


def as_first_released(filters: int, layers: int, pooling: str) -> nn.Module:
    """How `Conv4` draws its weights: torch's own numbers of all layers in order, then Xavier's."""
    stride = 2 if pooling == "stride" else 1
    widths = [3] + [filters] * layers
    convs = [nn.Conv2d(i, o, 3, stride=stride, padding=1) for i, o in pairwise(widths)]
    side = 32 // 2**layers
    drawn = [*convs, nn.Linear(filters * side * side, 5)]
    for layer in drawn:
        nn.init.xavier_uniform_(layer.weight)
    return nn.ModuleList(drawn)


@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize("layers", [4, 2])
def test_conv4_keeps_its_initial_weights(layers: int, pooling: str) -> None:
    torch.manual_seed(3)
    expected = [p for name, p in as_first_released(8, layers, pooling).named_parameters() if "weight" in name]
    torch.manual_seed(3)
    model = Conv4(5, 3, 8, 32, pooling, layers)
    found = [p for name, p in model.named_parameters() if "weight" in name and "normalize" not in name]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.manual_seed(3)
    spelt_out = Conv4(5, 3, [8] * layers, 32, pooling)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spelt_out.parameters(), strict=True))


def test_names_in_the_configuration_are_those_of_the_models() -> None:
    assert tuple(models.NORMS) == networks.NORMS
    assert tuple(models.ACTIVATIONS) == networks.ACTIVATIONS


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
@pytest.mark.parametrize("norm", networks.NORMS)
def test_norms_and_activations(norm: str, activation: str) -> None:
    x = torch.randn(3, 2, 16, 16)
    for model in (
        Conv4(5, 2, (4, 6, 12), 16, norm=norm, activation=activation),
        ResNet12(5, 2, (4, 4, 6, 12), 16, norm, activation),
    ):
        assert model(x).shape == (3, 5)
        assert torch.equal(model.eval()(x), model.train()(x))
        change = float((model(x[:1].expand(3, -1, -1, -1))[0] - model(x)[0]).detach().abs().max())
        assert (change > 1e-4) == (norm == "batch"), "only BatchNorm looks at the other examples"
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("BatchNorm2d" in kinds) == (norm == "batch") and ("GroupNorm" in kinds) == (norm == "group")


def test_group_norm_has_eight_groups_or_a_divisor() -> None:
    model = Conv4(5, 3, (64, 20, 7), 84, norm="group")
    assert [block.normalize.num_groups for block in model.features] == [8, 4, 1]


def test_resnet12_is_the_published_one() -> None:
    """The blocks as papers draw them, from the parameters alone."""
    model, x = ResNet12(5, 3, (4, 6, 8, 10), 84).double(), torch.randn(2, 3, 84, 84, dtype=torch.float64)
    values = dict(model.named_parameters())

    def normed(z: Tensor, name: str) -> Tensor:
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (values[f"{name}.{kind}"].view(-1, 1, 1) for kind in ("weight", "bias"))
        return (z - mean) / (var + 1e-5).sqrt() * scale + shift

    def leaky(z: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0.1 * z)

    h = x
    for i in range(4):
        z = h
        for j in range(3):
            conv = values[f"features.{i}.convs.{j}.weight"]
            z = normed(nn.functional.conv2d(z if j == 0 else leaky(z), conv, padding=1), f"features.{i}.norms.{j}")
        around = nn.functional.conv2d(h, values[f"features.{i}.shortcut.0.weight"])
        h = nn.functional.max_pool2d(leaky(z + normed(around, f"features.{i}.shortcut.1")), 2)
    assert h.shape == (2, 10, 5, 5)
    expected = h.mean((2, 3)) @ values["classifier.weight"].T + values["classifier.bias"]
    torch.testing.assert_close(model(x), expected)
    assert len(values) == 4 * (3 + 6 + 3) + 2
    assert all("bias" not in name or "norms" in name or ".1." in name for name in values if "features" in name)


def test_resnet12_starts_as_documented() -> None:
    model = ResNet12(widths=(32, 32, 32, 32), norm="none")
    block = model.features[1]
    for conv in (*block.convs, block.shortcut[0]):
        fan_out = 32 * conv.kernel_size[0] ** 2
        assert abs(float(conv.weight.detach().std()) * (fan_out / 2) ** 0.5 - 1) < 0.1
        assert (conv.bias == 0).all()
    assert all((norm.weight == 1).all() for norm in ResNet12(widths=(4, 4, 4, 4)).features[0].norms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64, 160, 320)}, r"widths: expected four integers, found \(64, 160, 320\)"),
        ({"widths": 64}, "widths: expected four integers, found 64"),
        ({"widths": (4, 4, 4, 0)}, "widths: expected an integer >= 1, found 0"),
        ({"image_size": 15}, "image_size: expected at least 16 pixels"),
        ({"ways": 1}, "ways"),
        ({"norm": "layer"}, "norm: expected one of"),
        ({"activation": "sine"}, "activation: expected one of"),
    ],
)
def test_resnet12_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet12(**arguments)


class Images:
    """A sampler of one meta-batch without content."""

    def __init__(self, channels: int, size: int) -> None:
        self.x, self.y = torch.zeros(1, 5, channels, size, size), torch.zeros(1, 5, dtype=torch.int64)

    def draw(self, iteration: int) -> Episodes:
        return Episodes(self.x, self.y, self.x, self.y)


def built(name: str, channels: int = 1, size: int = 28, **changes: object) -> nn.Module:
    return build_model(TrainConfig(model=name, **changes), Images(channels, size))  # type: ignore[arg-type]


def test_networks_by_name() -> None:
    assert [block.conv.out_channels for block in built("conv4-8-12-16-20").features] == [8, 12, 16, 20]
    assert [block.conv.out_channels for block in built("conv3-16").features] == [16, 16, 16]
    assert [block.conv.out_channels for block in built("conv2", filters=7).features] == [7, 7]
    narrow = built("resnet12-8-8-12-16", norm="group", activation="relu")
    assert isinstance(narrow, ResNet12) and isinstance(narrow.features[0].activation, nn.ReLU)
    assert isinstance(built("resnet12-4-4-4-4").features[0].activation, nn.LeakyReLU)
    assert isinstance(built("mlp", activation="tanh").activation, nn.Tanh)
    torch.manual_seed(0)
    expected = Conv4(5, 1, 32, 28)
    assert all(torch.equal(a, b) for a, b in zip(built("conv4").parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="image_size: expected at least 64 pixels for 6 blocks"):
        built("conv6")


def test_documented_sizes() -> None:
    """The table of the page, counted on the "meta" device, where no memory is needed."""
    rows = re.findall(r"(?m)^\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text(encoding="utf-8"))
    assert len(rows) >= 5
    for name, small, large in rows:
        for count, channels, size in ((small, 1, 28), (large, 3, 84)):
            assert f"{parameter_count(built(name, channels, size)):,}" == count, (name, size)
