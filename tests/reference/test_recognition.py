"""Modules that are recognised by their structure, modules that are not, and the final check by numbers."""

from __future__ import annotations

import argparse
import copy
import re
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.cases import few_shot, libraries, nets
from signmaml.models import MLP, Conv4
from signmaml_ext import chain, conv, mlp, recognition


def images(channels: int, size: int, count: int = 4) -> Tensor:
    return torch.randn(count, channels, size, size)


# name -> (module, images to try it on, what must be found)
RECOGNISED: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, object]]] = {
    "Conv4": (lambda: Conv4(5, 3, 32, 84), images(3, 84, 2), {"halving": "max", "readout": "flatten", "filters": 32}),
    "Conv4, odd": (lambda: Conv4(5, 1, 8, 21), images(1, 21), {"channels": 1, "ways": 5}),
    "Conv4, strided": (lambda: Conv4(3, 1, 64, 28, pooling="stride"), images(1, 28), {"halving": "stride"}),
    "Conv4, six blocks": (lambda: Conv4(3, 2, 8, 9, "stride", 6), images(2, 9), {"halving": "stride"}),
    "Conv4, one block": (lambda: Conv4(3, 2, 8, 9, layers=1), images(2, 9), {"halving": "max"}),
    "MiniImagenetCNN": (libraries.MiniImagenetCNN, images(3, 16), {"readout": "flatten", "ways": 3}),
    "CNN4": (libraries.CNN4, images(3, 16), {"halving": "max"}),
    "OmniglotCNN": (libraries.OmniglotCNN, images(1, 16), {"halving": "stride", "readout": "mean"}),
    "torchmeta": (libraries.torchmeta, images(3, 16), {"channels": 3}),
    "one sequence": (libraries.one_sequence, images(1, 16), {"halving": "max"}),
    "functional": (libraries.Functional, images(2, 16), {"channels": 2}),
    "pools first": (libraries.PoolsFirst, images(1, 16), {"readout": "mean"}),
    "the tests' own": (lambda: nets.conv4(filters=8), images(1, 16), {}),
    "a subclass of a layer": (
        lambda: put(4, lambda: type("MyConv", (nn.Conv2d,), {})(8, 8, 3, padding=1, bias=False))(),
        images(1, 16),
        {"filters": 8},
    ),
    "torchmeta's own": (few_shot.MetaConvModel, images(1, 16), {"halving": "max", "ways": 3}),
    "torchmeta's own with running statistics": (few_shot.torchmeta_with_statistics, images(1, 16), {}),
    "a second input with a default": (lambda: TwoInputs(), images(1, 16), {"halving": "max"}),
}


@pytest.mark.parametrize("name", RECOGNISED)
@pytest.mark.parametrize("training", [True, False])
def test_recognised(name, training):
    make, x, expected = RECOGNISED[name]
    model = make().train(training)
    found = conv.read(model)
    assert isinstance(found, conv.ConvSpec), found
    for attribute, value in expected.items():
        assert getattr(found, attribute) == value
    assert sorted(found.names) == sorted(name for name, _ in model.named_parameters())
    before, owned = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    assert recognition.computes(found, model, x)
    assert all(model.get_parameter(key) is value for key, value in owned.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_names_and_constants_come_in_order():
    model = libraries.Functional(layers=2)
    model.norms[1].eps = 0.5
    assert conv.read(model) == conv.ConvSpec(
        blocks=(
            conv.ConvBlockSpec("convs.0.weight", "convs.0.bias", "norms.0.weight", "norms.0.bias", 1e-3),
            conv.ConvBlockSpec("convs.1.weight", "convs.1.bias", "norms.1.weight", "norms.1.bias", 0.5),
        ),
        classifier=("out.weight", "out.bias"), channels=2, filters=8, ways=3, halving="max", readout="flatten",
    )  # fmt: skip
    plain = conv.read(libraries.one_sequence(layers=1))
    assert isinstance(plain, conv.ConvSpec)
    assert plain.names == ("0.weight", "1.weight", "1.bias", "7.weight", "7.bias")


def changed(change: Callable[[nn.Sequential], None], **options: int) -> Callable[[], nn.Module]:
    """Makes one sequence of layers with one thing changed."""

    def make() -> nn.Module:
        model = libraries.one_sequence(**options)
        assert isinstance(model, nn.Sequential)
        change(model)
        return model

    return make


def put(index: int, layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return changed(lambda model: model.__setitem__(index, layer()), layers=2, side=4)


def setting(index: int, attribute: str, value: object) -> Callable[[], nn.Module]:
    return changed(lambda model: setattr(model[index], attribute, value), layers=2, side=4)


class Around(nn.Module):
    """A network with a function applied to its input or its output."""

    def __init__(self, before=lambda x: x, after=lambda x: x) -> None:
        super().__init__()
        self.net = libraries.one_sequence()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class OnlyInTraining(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 1.000001 if self.training else self.net(x)


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = libraries.ConvBlock(8, 8), libraries.ConvBlock(1, 8)
        self.out = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return self.out((self.a(x) + F.max_pool2d(x, 2)).flatten(1))


class TwoInputs(Around):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x)


class LooksAtTheData(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


class Other(nn.Conv2d):
    """Calls F.conv2d with something else than its own weight and padding."""

    def __init__(self, weight=lambda w: w, padding=(1, 1)) -> None:
        super().__init__(8, 8, 3, padding=1, bias=False)
        self.change, self.pad = weight, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.change(self.weight), None, self.stride, self.pad)


class ExtraBias(nn.Conv2d):
    """Calls F.conv2d with a bias of another name."""

    def __init__(self, *arguments: int, **options: int) -> None:
        super().__init__(*arguments, **options)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.shift, self.stride, self.padding)


STRAY = nn.Parameter(torch.randn(8, 8, 3, 3))


def others_weight(weight: Tensor) -> Tensor:
    return STRAY


class InEvaluation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def tied() -> nn.Module:
    model = libraries.one_sequence(layers=3, side=2)
    model[8].weight = model[4].weight
    return model


def reused() -> nn.Module:
    model = libraries.one_sequence(layers=3, side=2)
    model[8] = model[4]
    return model


def hooked() -> nn.Module:
    model = libraries.one_sequence()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def parametrised() -> nn.Module:
    model = libraries.one_sequence()
    nn.utils.parametrizations.weight_norm(model[4])
    return model


def monkeypatched() -> nn.Module:
    model = libraries.one_sequence()
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 1.0000001
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an MLP": (lambda: MLP(4, 3), "it has no 2d convolution"),
    "5x5": (put(4, lambda: nn.Conv2d(8, 8, 5, padding=2, bias=False)), "has kernel_size .5, 5., not"),
    "no padding": (put(4, lambda: nn.Conv2d(8, 8, 3, bias=False)), "has padding .0, 0., not"),
    "groups": (put(4, lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)), "has groups 8"),
    "dilation": (put(4, lambda: nn.Conv2d(8, 8, 3, padding=1, dilation=2, bias=False)), "has dilation"),
    "padding mode": (
        put(4, lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)), "has padding_mode reflect"
    ),
    "stride and pooling": (put(4, lambda: nn.Conv2d(8, 8, 3, 2, 1, bias=False)), "with pooling.* has stride"),
    "no halving": (put(7, nn.Identity), "without pooling.* has stride"),
    "transposed": (put(4, lambda: nn.ConvTranspose2d(8, 8, 3)), "it uses ConvTranspose2d"),
    "one bias": (put(4, lambda: nn.Conv2d(8, 8, 3, padding=1)), "some of its convolutions have a bias"),
    "BatchNorm without scale": (put(5, lambda: nn.BatchNorm2d(8, affine=False)), "no scale and shift"),
    "InstanceNorm": (put(5, lambda: nn.InstanceNorm2d(8)), "but conv, instance_norm, relu, pool"),
    "another activation": (put(6, nn.LeakyReLU), "but conv, norm, leaky_relu, pool"),
    "tanh": (put(6, nn.Tanh), "not conv, BatchNorm, ReLU and a halving, in this order, but conv, norm, tanh"),
    "average pooling": (put(7, lambda: nn.AvgPool2d(2)), "but conv, norm, relu, average_pool"),
    "3x3 pooling": (put(7, lambda: nn.MaxPool2d(3, 2, 1)), "but conv, norm, relu, max_pool"),
    "pooling, stride 1": (put(7, lambda: nn.MaxPool2d(2, 1)), "but conv, norm, relu, max_pool"),
    "ceil_mode": (setting(7, "ceil_mode", True), "ceil_mode"),
    "dropout": (put(9, lambda: nn.Dropout(0.5)), "after its blocks come|dropout"),
    "other filters": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
            nn.ReLU(), nn.Flatten(), nn.Linear(256, 3),
        ),
        r"different numbers of filters: \[8, 16\]",
    ),
    "ReLU before BatchNorm": (
        changed(lambda m: (m.__setitem__(5, nn.ReLU()), m.__setitem__(6, nn.BatchNorm2d(8))), layers=2, side=4),
        "but conv, relu, norm, pool",
    ),
    "no classifier": (put(11, nn.Identity), "not flatten or mean, and one linear layer"),
    "two classifiers": (put(10, lambda: nn.Sequential(nn.Linear(128, 128), nn.ReLU())), "not flatten or mean"),
    "classifier without bias": (put(11, lambda: nn.Linear(128, 3, bias=False)), "classifier '11' has no bias"),
    "flattens all": (put(9, lambda: nn.Flatten(0)), "it flattens other axes"),
    "scaled input": (lambda: Around(before=lambda x: x / 255), "it uses truediv"),
    "scaled output": (lambda: Around(after=lambda y: y * 1.0001), "it uses mul"),
    "softmax": (lambda: Around(after=lambda y: y.softmax(-1)), "it uses softmax"),
    "view of a fixed batch": (lambda: Around(before=lambda x: x.view(4, 1, 16, 16)), "its view is not one of"),
    "detached": (lambda: Around(after=lambda y: y.detach()), "it uses detach"),
    "two outputs": (lambda: Around(after=lambda y: (y, y)), "it returns something else"),
    "only in training": (OnlyInTraining, "it uses mul"),
    "skip connection": (Skips, "no plain chain"),
    "control flow": (LooksAtTheData, "torch.fx cannot trace it"),
    "tied": (tied, "layers '4' and '8' share parameters"),
    "reused": (reused, "layer '4' is used twice"),
    "forward hook": (hooked, "module '0' has forward hooks"),
    "parametrised": (parametrised, "module '4' is parametrised|it uses Parametrized"),
    "monkeypatched": (monkeypatched, "the forward of Conv2d was replaced"),
    "standardised weight": (put(4, lambda: Other(lambda w: w - w.mean())), "conv2d with a weight that is no parameter"),
    "detached weight": (put(4, lambda: Other(torch.Tensor.detach)), "conv2d with a weight that is no parameter"),
    "a global weight": (put(4, lambda: Other(others_weight)), "conv2d with a weight that is no parameter"),
    "another bias": (put(4, lambda: ExtraBias(8, 8, 3, padding=1)), "that are not weight and bias of one Conv2d"),
    "another padding": (put(4, lambda: Other(padding=(0, 0))), "conv2d with a padding other than its module's"),
    "running statistics by a call": (
        put(5, lambda: InEvaluation(8)), "batch_norm with statistics that are not the batch's"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    make, reason = REFUSED[name]
    found = conv.read(make())
    assert isinstance(found, str) and re.search(reason, found), found


def test_only_the_mode_at_hand_counts():
    """Networks that deviate only in training, e.g. by dropout, are recognised in evaluation and refused in training."""
    for model in (OnlyInTraining(), nn.Sequential(nn.Dropout2d(0.5), *libraries.one_sequence())):
        for training in (True, False, True):
            found = conv.read(model.train(training))
            assert isinstance(found, str) == training, found


def test_a_changed_module_is_read_again():
    model = libraries.one_sequence(layers=2, side=4)
    x = images(1, 16)

    def state() -> tuple[object, bool]:
        found = conv.read(model)
        return found, isinstance(found, conv.ConvSpec) and recognition.verified(found, model, x)

    first, holds = state()
    assert holds
    model[5].eps = 0.5
    second, holds = state()
    assert holds and first != second
    model[7].ceil_mode = True
    assert isinstance(state()[0], str)
    model[7].ceil_mode = False
    handle = model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert isinstance(state()[0], str)
    handle.remove()
    assert state() == (second, True)
    model[1].weight = model[5].weight
    assert isinstance(state()[0], str)


def test_a_changed_setting_of_a_functional_layer_is_noticed(monkeypatch):
    model = few_shot.MetaConvModel()
    assert conv.read(model).blocks[1].eps == 1e-5
    model.features.layer2.norm.eps = 0.5
    assert conv.read(model).blocks[1].eps == 0.5
    model.features.layer1.conv.padding = (0, 0)
    assert "has padding" in conv.read(model)
    model.features.layer1.conv.padding = (1, 1)
    assert isinstance(conv.read(model), conv.ConvSpec)
    original = few_shot.MetaLinear.forward
    monkeypatch.setattr(few_shot.MetaLinear, "forward", lambda self, x, params=None: original(self, x, params) * 2)
    assert "mul" in conv.read(model)


def test_a_lambda_that_is_exchanged_is_noticed():
    model = libraries.OmniglotCNN()
    assert isinstance(conv.read(model), conv.ConvSpec)
    model.base[1].max_pool = lambda x: x * 1.5
    assert conv.read(model) == "it uses mul"


# --- what the structure cannot tell -----------------------------------------------------------------------------


class WithoutGradient(Around):
    """The values are right but the gradient is not: torch.fx does not see `no_grad`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in list(self.net)[:-1]:
                x = layer(x)
        return self.net[-1](x)


class InBfloat16(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("make", [WithoutGradient, InBfloat16])
def test_numbers_decide(make):
    model = make()
    found = conv.read(model)
    assert isinstance(found, conv.ConvSpec)
    assert not recognition.computes(found, model, images(1, 16))
    assert not recognition.verified(found, model, images(1, 16))


@pytest.mark.parametrize("factor", [1.5, 1 + 1e-6])
def test_a_small_factor_is_found(factor, monkeypatch):
    """A linear layer that torch.fx takes for torch's own, although its output is scaled."""
    model = libraries.one_sequence()
    original = nn.Linear.forward
    found = conv.read(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, x) * factor)
    assert isinstance(found, conv.ConvSpec)
    assert not recognition.computes(found, model, images(1, 16))


def test_a_view_of_another_size_mixes_images():
    """`view(-1, 1, 16, 16)` leaves images of 16 x 16 unchanged and cuts others into pieces."""
    model = libraries.OmniglotCNN(size=16)
    found = conv.read(model)
    assert recognition.verified(found, model, images(1, 16))
    assert not recognition.verified(found, model, images(1, 32))


def test_a_module_that_fails_by_itself_is_not_verified():
    model = libraries.MiniImagenetCNN()
    assert not recognition.computes(conv.read(model), model, images(3, 40))


def test_mlp_is_held_against_its_gradient_too():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.hidden(x).relu()
            return self.out(x)

    model = Frozen()
    found = mlp.read(model)
    assert isinstance(found, mlp.MlpSpec)
    assert not recognition.computes(found, model, torch.randn(4, 3))
    plain = nets.mlp()
    assert recognition.computes(mlp.read(plain), plain, torch.randn(4, 4))


def test_the_memo_keeps_no_model_alive():
    import gc
    import weakref

    model = libraries.OmniglotCNN()
    recognition.verified(conv.read(model), model, images(1, 16))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_reading_a_module_again_is_cheap(monkeypatch):
    """torch.fx traces once; later reads only compare the structure."""
    model, traces = Conv4(5, 1, 8, 28), []
    monkeypatch.setattr(chain, "_trace", lambda m, original=chain._trace: traces.append(1) or original(m))
    for _ in range(3):
        conv.read(model)
    assert len(traces) == 1


class Configured(nn.Module):
    """Its forward reads its own attributes, a configuration, a global and what a closure holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        self.number, self.table, self.listed, self.function = 1, {}, [1, 2], torch.relu
        self.config = argparse.Namespace(inner=argparse.Namespace(act="relu"), widths=[3, 3])
        self.unread = 0
        self.register_buffer("flag", torch.zeros(()))
        slope = [0.5]
        self.closed = lambda x: x if slope else -x
        self.slope = slope

    @property
    def depth(self) -> int:
        return len(self.listed)

    def forward(self, x: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        plain = self.number and not self.table and self.depth and self.config.inner.act == "relu" and GLOBAL
        return self.body(self.closed(x)) if plain and not bool(self.flag) else self.function(x)


GLOBAL = [True]


def another_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.body(x)


CHANGES = {
    "mode": lambda m: m.body.eval(),
    "an attribute": lambda m: setattr(m, "number", 2),
    "an attribute less": lambda m: delattr(m, "number"),
    "nothing in place of an empty dictionary": lambda m: setattr(m, "table", None),
    "an entry of a dictionary": lambda m: m.table.update(a=1),
    "an item of a list": lambda m: m.listed.append(3),
    "a tuple in place of a list": lambda m: setattr(m, "listed", tuple(m.listed)),
    "a word deep in a configuration": lambda m: setattr(m.config.inner, "act", "tanh"),
    "another configuration": lambda m: setattr(m, "config", argparse.Namespace(inner=m.config.inner)),
    "a buffer's value": lambda m: m.flag.fill_(1),
    "what a closure holds": lambda m: m.slope.clear(),
    "another closure": lambda m: setattr(m, "closed", lambda x: x),
    "a setting of a layer": lambda m: setattr(m.body[0], "in_features", 4),
    "a parameter": lambda m: setattr(m.body[0], "weight", nn.Parameter(m.body[0].weight.detach().clone())),
    "a parameter's shape": lambda m: setattr(m.body[0].bias, "data", torch.zeros(1)),
    "a layer": lambda m: m.body.__setitem__(0, nn.Linear(3, 3)),
    "the order of layers": lambda m: m.body._modules.update({"0": m.body[1], "1": m.body[0]}),
    "a hook": lambda m: m.body[1].register_forward_hook(lambda *_: None),
    "a buffer": lambda m: m.register_buffer("offset", torch.zeros(3)),
    "the forward of one module": lambda m: setattr(m, "forward", types.MethodType(another_forward, m)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_forward_can_see_is_noticed(change):
    """An unchanged model is recognised as known; after any change it is not."""
    model = Configured()
    assert isinstance(chain.layers_of(model), tuple)
    known = chain.of_module(model)
    assert chain.of_module(model) is known
    CHANGES[change](model)
    assert chain.of_module(model) is not known


@pytest.mark.parametrize("name", ["forward", "depth"])
def test_a_change_of_the_class_is_noticed(monkeypatch, name):
    """This happens when a notebook reloads a module's source."""
    model = Configured()
    chain.layers_of(model)
    known = chain.of_module(model)
    other = another_forward if name == "forward" else property(lambda self: 1)
    monkeypatch.setattr(Configured, name, other)
    assert chain.of_module(model) is not known


def test_a_global_that_a_forward_reads_is_noticed(monkeypatch):
    model = Configured()
    chain.layers_of(model)
    known = chain.of_module(model)
    monkeypatch.setattr(sys.modules[Configured.__module__], "GLOBAL", [])
    assert chain.of_module(model) is not known


def test_what_no_forward_reads_may_change(monkeypatch):
    """A counter, an epoch, a trainer that keeps its state on the module: no new trace."""
    model, traces = Configured(), []
    monkeypatch.setattr(chain, "_trace", lambda m, original=chain._trace: traces.append(1) or original(m))
    for number in range(4):
        model.unread, model.body.note = number, number
        setattr(model, f"more_{number}", number)
        chain.layers_of(model)
    assert len(traces) == 1
    assert not hasattr(model, "count")  # tracing left nothing behind either
