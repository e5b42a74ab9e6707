"""Conv4, MLP, and loading of learn2learn's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from signmaml.models import MLP, Conv4, load_learn2learn_state_dict, parameter_count


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
        MLP(1, 1, activation="gelu")
