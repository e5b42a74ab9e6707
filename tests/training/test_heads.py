"""Heads for another number of classes: found, made from prototypes, and run with their rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import signmaml
import signmaml_ext
from signmaml.heads import LENGTH, first_rows, head_of, prototype_head, rates_for_head, with_head
from signmaml.learner import Learner


def conv(ways: int = 3) -> nn.Module:
    return signmaml.Conv4(ways, channels=1, filters=4, image_size=16, layers=2).double()


def learner(model: nn.Module, **options: object) -> Learner:
    return Learner.of(model, inner_lr=0.01, inner_steps=2, **options)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, dtype=torch.float64)


class Reordered(nn.Module):
    """Its head is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(6, 4)
        self.bottom = nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.bottom(x).tanh())


class Scaled(Reordered):
    """Its prediction is no linear layer's output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "x", "name", "outputs"),
    [
        (conv(), images(2), "classifier", 3),
        (signmaml.MLP(5, 4), torch.randn(2, 5), "classifier", 4),
        (Reordered(), torch.randn(2, 5), "top", 4),
        (nn.Linear(5, 2), torch.randn(2, 5), "", 2),
        (Scaled(), torch.randn(2, 5), None, 4),
    ],
)
def test_the_head_is_found_by_its_output(model: nn.Module, x: torch.Tensor, name: str | None, outputs: int) -> None:
    assert head_of(model, x) == (name, outputs)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_predicts_no_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predicts scores \[2, classes\], found \[2, 4, 5\]"):
        head_of(nn.Unflatten(1, (4, 5)), torch.randn(2, 20))


def test_prototype_rows_are_the_documented_ones() -> None:
    model, x = conv(), images(8)
    y = torch.tensor([0, 1, 2, 3, 3, 1, 0, 0])
    layer = prototype_head(model, "classifier", x, y, 4, learner(model).arguments)
    with torch.no_grad():
        features = with_head(model, "classifier", nn.Identity())(x)
        means = [torch.stack([f for f, label in zip(features, y, strict=True) if label == c]).mean(0) for c in range(4)]
        middle = sum(means) / 4
        length = LENGTH * sum(row.norm() for row in model.classifier.weight) / 3
        for row, offset, mean in zip(layer.weight, layer.bias, means, strict=True):
            expected = length * (mean - middle) / (mean - middle).norm()
            torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(offset, -expected @ middle, rtol=1e-10, atol=1e-14)


def test_classes_that_look_alike_get_finite_rows() -> None:
    model = conv()
    same = images(1).expand(4, -1, -1, -1)
    layer = prototype_head(model, "classifier", same, torch.arange(4), 4, learner(model).arguments)
    rows, trained = layer.weight.detach(), model.classifier.weight.detach()
    assert bool(rows.isfinite().all())
    assert float(rows.abs().max()) <= LENGTH * float(trained.norm(dim=1).mean())


def test_another_head_leaves_the_model_as_it_is_and_shares_its_tensors() -> None:
    model = conv()
    twin = with_head(model, "classifier", nn.Linear(4 * 16, 7).double())
    assert model.classifier.out_features == 3
    assert twin.features[0].conv.weight is model.features[0].conv.weight
    assert twin(images(2)).shape == (2, 7)


@pytest.mark.parametrize(("ways", "head", "own"), [(3, "auto", False), (3, "prototypes", True), (5, "auto", True)])
def test_auto_takes_the_trained_head_for_as_many_classes_as_it_has(ways: int, head: str, own: bool) -> None:
    mine = learner(conv())
    x, y = images(ways), torch.arange(ways)
    model, _, name = mine.start(x, y, ways, head)
    assert (model is not mine.model) == own == (name == "classifier") == mine.takes_prototypes(x, ways, head)
    assert model(x).shape == (ways, ways)


def test_the_trained_head_gives_its_first_rows_to_fewer_classes() -> None:
    mine = learner(conv(5))
    x = images(2)
    model, _, _ = mine.start(x, torch.arange(2), 2, "trained")
    torch.testing.assert_close(model(x), mine.model(x)[:, :2])
    with pytest.raises(ValueError, match=r"more than the 5 classes of the trained head, found 'trained' for 6"):
        first_rows(mine.model.classifier, 6)
    with pytest.raises(ValueError, match="head: expected one of 'auto', 'trained', 'prototypes', found 'zero'"):
        mine.start(x, torch.arange(2), 2, "zero")


def test_a_model_without_a_linear_end_serves_its_own_number_of_classes_alone() -> None:
    mine = Learner.of(Scaled(), inner_lr=0.01, inner_steps=1)
    x = torch.randn(4, 5)
    assert mine.start(x, torch.arange(4), 4)[0] is mine.model
    with pytest.raises(
        ValueError, match=r"output of an nn.Linear, for heads of other than its 4 classes, found Scaled"
    ):
        mine.start(x[:3], torch.arange(3), 3)


def test_rates_of_single_rows_become_their_mean() -> None:
    model = conv()
    rates = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    rates["classifier.bias"] = torch.rand(2, 3, dtype=torch.float64)  # a rate for each of two steps
    new = rates_for_head(rates, model, "classifier")
    torch.testing.assert_close(new["classifier.weight"], rates["classifier.weight"].mean(0, keepdim=True))
    torch.testing.assert_close(new["classifier.bias"], rates["classifier.bias"].mean(1, keepdim=True))
    assert new["features.0.conv.weight"] is rates["features.0.conv.weight"]
    assert rates_for_head(0.1, model, "classifier") == 0.1
    twin = with_head(model, "classifier", nn.Linear(64, 5).double())
    x, y = images(5)[None], torch.arange(5)[None]
    adapted = signmaml_ext.adapt(twin, x, y, inner_lr=new, inner_steps=2)
    assert adapted["classifier.weight"].shape == (1, 5, 64)


def test_the_order_of_classes_does_not_matter_to_prototypes() -> None:
    mine = Learner.of(conv(), inner_lr=0.01, inner_steps=3)
    x, new = images(8), images(5)
    names = ["d", "a", "b", "c"]
    renamed = dict(zip(names, "wxyz", strict=True))  # another order once sorted
    labels = names * 2
    first = signmaml.FewShotClassifier(mine).fit(x, labels)
    second = signmaml.FewShotClassifier(mine).fit(x, [renamed[label] for label in labels])
    order = [list(second.classes_).index(renamed[label]) for label in first.classes_]
    assert order != sorted(order)
    torch.testing.assert_close(
        torch.from_numpy(first.predict_proba(new)),
        torch.from_numpy(second.predict_proba(new)[:, order]),
        rtol=1e-9,
        atol=1e-12,
    )


class Floored(Reordered):
    """A head whose outputs a ReLU then passes or not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_what_follows_a_head_is_seen_also_where_it_does_nothing() -> None:
    model, x = Floored(), torch.randn(3, 5)
    with torch.no_grad():
        model.top.bias.fill_(100.0)  # so that the ReLU passes everything
    assert torch.equal(model(x), super(Floored, model).forward(x))
    assert head_of(model, x) == (None, 4)


def test_classes_that_differ_by_rounding_get_no_rows_of_noise() -> None:
    model = conv()
    same = images(4)
    x = torch.cat((same, same.roll(1, 0)))  # two classes of the same four images, in another order
    y = torch.tensor([0] * 4 + [1] * 4)
    layer = prototype_head(model, "classifier", x, y, 2, learner(model).arguments)
    assert float(layer.weight.detach().norm(dim=1).max()) < 0.1 * LENGTH * float(
        model.classifier.weight.detach().norm(dim=1).mean()
    )


def test_the_first_rows_keep_their_own_rates() -> None:
    model = conv()
    rates = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    new = rates_for_head(rates, model, "classifier", rows=2)
    assert torch.equal(new["classifier.weight"], rates["classifier.weight"][:2])
    assert torch.equal(new["classifier.bias"], rates["classifier.bias"][:2])


@pytest.mark.parametrize("last", [nn.ReLU(inplace=True), nn.ReLU(), nn.Hardtanh(-50, 50, inplace=True)])
def test_layers_behind_the_head_that_work_in_place_are_seen(last: nn.Module) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), last)
    assert head_of(model, torch.randn(3, 5)) == (None, 4)
