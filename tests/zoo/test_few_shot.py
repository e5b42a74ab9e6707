"""The classes of learn2learn, torchmeta, easyfsl and `signmaml.models` against the plain loop, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import signmaml_ext
from helpers.cases import definition, few_shot, libraries
from signmaml.models import Conv4, ResNet12

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
METHODS = ("sign-maml", "fo-maml", "maml")
OPTIONS: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 2}


@dataclass(frozen=True)
class Net:
    """A network.

    Attributes:
        make: Makes it.
        shape: Of one example.
        head: What ANIL adapts.
        general: Whether "layers" must serve it, with native gradients; else "conv" or "mlp" must, as a whole.
        slow: Whether only slow tests take it.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 16, 16)
    head: str = "classifier"
    general: bool = False
    slow: bool = False


NETS: dict[str, Net] = {
    "learn2learn OmniglotFC": Net(few_shot.OmniglotFC, (1, 8, 8), general=True),
    "learn2learn OmniglotCNN": Net(libraries.OmniglotCNN),
    "learn2learn MiniImagenetCNN, early": Net(lambda: libraries.MiniImagenetCNN(channels=1), head="linear"),
    "learn2learn CNN4, early": Net(lambda: libraries.CNN4(channels=1)),
    "learn2learn CNN4": Net(few_shot.CNN4),
    "learn2learn CNN4, two layers that pool by four": Net(lambda: few_shot.CNN4(layers=2), general=True),
    "learn2learn CNN4 without pooling": Net(lambda: few_shot.CNN4(max_pool=False)),
    "learn2learn ResNet12": Net(few_shot.ResNet12, general=True),
    "learn2learn ResNet12 without average": Net(
        lambda: few_shot.ResNet12(avg_pool=False, last=2), (1, 32, 32), general=True, slow=True
    ),
    "learn2learn WRN of depth 10": Net(lambda: few_shot.WRN28(depth=10), (1, 8, 8), general=True),
    "learn2learn WRN28": Net(few_shot.WRN28, (1, 8, 8), general=True, slow=True),
    "torchmeta MetaConvModel": Net(few_shot.MetaConvModel),
    "torchmeta MetaConvModel with torch's BatchNorm": Net(few_shot.torchmeta_with_torchs_norm),
    "torchmeta MetaConvModel with running statistics": Net(few_shot.torchmeta_with_statistics),
    "torchmeta MetaSequential": Net(few_shot.torchmeta_sequence, head="9"),
    "torchmeta MetaMLPModel": Net(few_shot.MetaMLPModel, (4,)),
    "easyfsl resnet10": Net(few_shot.EasyResNet, head="fc", general=True),
    "easyfsl resnet12": Net(lambda: few_shot.EasyResNet((1, 1, 2, 1)), head="fc", general=True),
    "easyfsl feat_resnet12": Net(few_shot.feat_with_head, head="head", general=True),
    "our Conv4": Net(lambda: Conv4(3, 1, 8, 16)),
    "our Conv-N with a width a block": Net(lambda: Conv4(3, 1, (8, 12, 16), 16), general=True),
    "our Conv-N with GroupNorm and SiLU": Net(
        lambda: Conv4(3, 1, 8, 16, layers=2, norm="group", activation="silu"), general=True
    ),
    "our Conv-N with InstanceNorm": Net(lambda: Conv4(3, 1, 8, 16, layers=2, norm="instance"), general=True),
    "our Conv-N without norm": Net(lambda: Conv4(3, 1, 8, 16, layers=2, norm="none"), general=True),
    "our ResNet12": Net(lambda: ResNet12(3, 1, (4, 6, 6, 8), 16), general=True),
    "our ResNet12 with GroupNorm": Net(lambda: ResNet12(3, 1, (4, 6, 6, 8), 16, "group", "relu"), general=True),
    "our ResNet12 without norm": Net(lambda: ResNet12(3, 1, (4, 6, 6, 8), 16, "none"), general=True),
}


def names(*, slow: bool) -> list[Any]:
    """The networks, those that are slow marked so if `slow`, else left out."""
    marks = [pytest.mark.slow]
    return [pytest.param(n, marks=marks if net.slow else []) for n, net in NETS.items() if slow or not net.slow]


def made(net: Net) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A network in float64, and two tasks for it."""
    torch.manual_seed(1)
    model = net.make().double()
    sx, qx = (torch.randn(2, count, *net.shape, dtype=torch.float64) for count in (6, 7))
    return model, (sx, torch.randint(3, (2, 6)), qx, torch.randint(3, (2, 7)))


def check(net: Net, method: str, adapt: list[str] | None = None) -> None:
    """One call of `meta_step` gives what the loop gives, and leaves the network as it was."""
    model, data = made(net)
    patterns = None if adapt is None else [f"{pattern}.*" for pattern in adapt]
    expected, query, support = definition.meta_gradient(model, data, **OPTIONS, method=method, adapt=patterns)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counters = [getattr(module, "num_batches_tracked", None) for module in model.modules()]
    result = signmaml_ext.meta_step(model, *data, **OPTIONS, method=method, adapt=adapt)
    torch.testing.assert_close(result.query_loss, query, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.support_loss, support, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        gradient = expected[name]
        assert gradient is not None, name
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert counters == [getattr(module, "num_batches_tracked", None) for module in model.modules()]


@pytest.mark.parametrize("name", names(slow=True))
def test_sign_steps(name: str) -> None:
    check(NETS[name], "sign-maml")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", NETS)
def test_the_other_methods(name: str, method: str) -> None:
    check(NETS[name], method)


@pytest.mark.parametrize("name", names(slow=False))
def test_anil(name: str) -> None:
    """Only the head adapts, whatever the body; the methods take turns."""
    check(NETS[name], METHODS[list(NETS).index(name) % 3], [NETS[name].head])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_anil_in_every_method(name: str, method: str) -> None:
    check(NETS[name], method, [NETS[name].head])


@pytest.mark.parametrize("name", NETS)
def test_explained(name: str) -> None:
    """A native family serves it."""
    net = NETS[name]
    model, data = made(net)
    found = signmaml_ext.explain(model, *data, **OPTIONS)
    assert found.backend == "cpu" and found.family in (("layers",) if net.general else ("conv", "mlp")), found


META = [name for name in NETS if name.startswith("torchmeta")]


@pytest.mark.parametrize("name", META)
def test_adapted_parameters_are_torchmetas_params(name: str) -> None:
    """What `adapt` returns goes into torchmeta's own forward, which adapts its own kinds of layers alone."""
    model, data = made(NETS[name])
    options = {**OPTIONS, "adapt": [key for key, _ in model.meta_named_parameters()]}
    adapted = signmaml_ext.adapt(model, *data[:2], **options)
    logits = signmaml_ext.evaluate(model, *data, **options).logits
    for task, x in enumerate(data[2]):
        params = {key: value[task] for key, value in adapted.items()}
        torch.testing.assert_close(model(x, params=params), logits[task], rtol=1e-9, atol=1e-9)


def test_anil_by_torchmetas_params() -> None:
    """`params` of the head alone: the body takes its own parameters."""
    model, data = made(NETS["torchmeta MetaMLPModel"])
    adapted = signmaml_ext.adapt(model, *data[:2], **OPTIONS, adapt="classifier")
    logits = signmaml_ext.evaluate(model, *data, **OPTIONS, adapt="classifier").logits
    assert sorted(adapted) == ["classifier.bias", "classifier.weight"]
    for task, x in enumerate(data[2]):
        features = model.features(x)
        head = {key.removeprefix("classifier."): value[task] for key, value in adapted.items()}
        torch.testing.assert_close(model.classifier(features, params=head), logits[task], rtol=1e-9, atol=1e-9)


def dropping(rate: float = 0.5, side: int = 2) -> few_shot.ResNet12:
    """learn2learn's ResNet12 in the middle of its schedule, so that it drops features."""
    torch.manual_seed(1)
    model = few_shot.ResNet12(last=2, drop_rate=rate, side=side).double()
    for module in model.modules():
        if isinstance(module, few_shot.ResNetBlock):
            module.num_batches_tracked = 40000
    return model


def test_drop_block_in_evaluation_drops_nothing() -> None:
    net = Net(lambda: dropping().eval(), (1, 32, 32))
    check(net, "sign-maml")


def test_drop_block_in_training_is_repeatable() -> None:
    """It draws random numbers and places them by `nonzero`, so tasks run one by one; the seed decides."""
    data = made(Net(dropping, (1, 32, 32)))[1]
    found = []
    for seed in (0, 0, 1):
        model = dropping()
        result = signmaml_ext.meta_step(model, *data, **OPTIONS, seed=seed)
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        assert {m.num_batches_tracked for m in model.modules() if isinstance(m, few_shot.ResNetBlock)} == {40000}
        found.append(result.query_loss)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match=r"batching: .*found 'together'"):
        signmaml_ext.meta_step(dropping(), *data, **OPTIONS, batching="together")


def test_the_head_of_easyfsl_is_an_attribute() -> None:
    """What `set_use_fc` changes is noticed between calls: without the head the prediction is the features."""
    model, data = made(NETS["easyfsl resnet10"])
    assert signmaml_ext.evaluate(model, *data, **OPTIONS).logits.shape[-1] == 3
    model.use_fc = False
    assert signmaml_ext.evaluate(model, *data, **OPTIONS).logits.shape[-1] == 8


def test_functional_calls_agree() -> None:
    """Adapted parameters also go through `torch.func.functional_call`, for every network that has no `params`."""
    for name in ("learn2learn CNN4", "our ResNet12", "easyfsl feat_resnet12"):
        model, data = made(NETS[name])
        adapted = signmaml_ext.adapt(model, *data[:2], **OPTIONS)
        logits = signmaml_ext.evaluate(model, *data, **OPTIONS).logits
        params = {key: value[1] for key, value in adapted.items()}
        torch.testing.assert_close(functional_call(model, params, (data[2][1],)), logits[1], rtol=1e-9, atol=1e-9)
