"""The networks of learn2learn, torchmeta and easyfsl, re-created from their definitions with small sizes as arguments.

What a forward does is kept: counters, branches, functional calls, parameters that come as an argument. Channels of the
images, widths, depths and the size of the last images, which the libraries fix for mini-ImageNet, are arguments.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from helpers.cases.libraries import ConvBase, Flatten, Lambda

Parameters = Mapping[str, Tensor] | None

# ---------------------------------------------------------------------------------------------------------------------
# learn2learn


class LinearBlock(nn.Module):
    """Registers its layers in the reverse of the order in which they are used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(outputs, momentum=0.999, eps=1e-3, track_running_stats=False)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = self.normalize(x)
        return self.relu(x)


class OmniglotFC(nn.Module):
    def __init__(self, inputs: int = 64, ways: int = 3, sizes: Sequence[int] = (16, 12, 8, 8)) -> None:
        super().__init__()
        layers = nn.Sequential(*(LinearBlock(i, o) for i, o in pairwise((inputs, *sizes))))
        self.features = nn.Sequential(Flatten(), layers)
        self.classifier = nn.Linear(sizes[-1], ways)
        self.input_size = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x)


class CNN4Backbone(ConvBase):
    """A sequence whose own forward flattens what its base class computes."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.reshape(x.size(0), -1)


class CNN4(nn.Module):
    """The newest CNN4, alias MiniImagenetCNN: with fewer than four layers, each pools more at once."""

    def __init__(
        self,
        ways: int = 3,
        hidden: int = 8,
        layers: int = 4,
        channels: int = 1,
        max_pool: bool = True,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        self.features = CNN4Backbone(hidden, channels, max_pool, layers, 4 // layers)
        self.classifier = nn.Linear(hidden if embedding is None else embedding, ways, bias=True)
        self.hidden_size = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x)


class DropBlock(nn.Module):
    """Drops squares of features at random; it counts and places them by their numbers."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        if not self.training:
            return x
        count, channels, height, width = x.shape
        corners = torch.distributions.Bernoulli(gamma).sample(
            (count, channels, height - self.side + 1, width - self.side + 1)
        )
        kept = self.kept(corners.to(x))
        return kept * x * (kept.numel() / kept.sum())

    def kept(self, corners: Tensor) -> Tensor:
        before, after = int((self.side - 1) / 2), int(self.side / 2)
        dropped = F.pad(corners, (before, after, before, after))
        found = corners.nonzero()
        if len(found) > 0:
            for row in range(self.side):
                for column in range(self.side):
                    image, channel, i, j = found.unbind(1)
                    dropped[image, channel, i + row, j + column] = 1.0
        return 1 - dropped


class ResNetBlock(nn.Module):
    """Counts its calls in an attribute, which the share of dropped features depends on."""

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        drop_rate: float,
        drop_block: bool,
        side: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv3x3(planes, planes)
        self.bn3 = nn.BatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.drop_rate, self.drop_block, self.side = drop_rate, drop_block, side
        self.num_batches_tracked = 0
        self.DropBlock = DropBlock(side)

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        out = self.maxpool(out)
        if self.drop_rate > 0:
            if self.drop_block:
                size = out.size()[2]
                keep = max(1.0 - self.drop_rate / 40000 * self.num_batches_tracked, 1.0 - self.drop_rate)
                gamma = (1 - keep) / self.side**2 * size**2 / (size - self.side + 1) ** 2
                out = self.DropBlock(out, gamma=gamma)
            else:
                out = F.dropout(out, p=self.drop_rate, training=self.training, inplace=True)
        return out


class ResNet12(nn.Module):
    """learn2learn's, after MetaOptNet: every layer is registered by itself and again in `features`."""

    def __init__(
        self,
        ways: int = 3,
        widths: Sequence[int] = (4, 6, 6, 8),
        channels: int = 1,
        last: int = 1,
        avg_pool: bool = True,
        drop_rate: float = 0.0,
        side: int = 1,
        keep_prob: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = list(pairwise((channels, *widths)))
        layers = [self._layer(*size, drop_rate, i >= 2, side) for i, size in enumerate(sizes)]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool: nn.Module = nn.AvgPool2d(last, stride=1) if avg_pool else Lambda(lambda x: x)
        self.keep_prob, self.keep_avg_pool, self.drop_rate = keep_prob, avg_pool, drop_rate
        self.dropout = nn.Dropout(p=1.0 - keep_prob, inplace=False)
        self.features = nn.Sequential(*layers, self.avgpool, Flatten(), self.dropout)
        self.classifier = nn.Linear(widths[-1] * (1 if avg_pool else last * last), ways)

    @staticmethod
    def _layer(inputs: int, planes: int, drop_rate: float, drop_block: bool, side: int) -> nn.Module:
        downsample = nn.Sequential(conv1x1(inputs, planes), nn.BatchNorm2d(planes))
        return nn.Sequential(ResNetBlock(inputs, planes, 2, downsample, drop_rate, drop_block, side))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x)


class WideBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, dropout: float, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, kernel_size=3, padding=1, bias=True)
        self.dropout = nn.Dropout(p=dropout)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, planes, kernel_size=1, stride=stride, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


class WRN28Backbone(nn.Module):
    """A wide residual network of depth 6 n + 4, read by an average over windows of a fixed size."""

    def __init__(self, depth: int, widths: Sequence[int], channels: int, last: int, dropout: float) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, widths[0], kernel_size=3, padding=1, bias=True)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                WideBlock(inputs, planes, dropout, 1 if i == 0 else 2),
                *(WideBlock(planes, planes, dropout, 1) for _ in range(blocks - 1)),
            )
            for i, (inputs, planes) in enumerate(pairwise(widths))
        )
        self.bn1 = nn.BatchNorm2d(widths[-1], momentum=0.9)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = F.relu(self.bn1(out))
        out = F.avg_pool2d(out, self.last)
        return out.view(out.size(0), -1)


class WRN28(nn.Module):
    def __init__(
        self,
        ways: int = 3,
        depth: int = 28,
        widths: Sequence[int] = (4, 4, 6, 8),
        channels: int = 1,
        last: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = WRN28Backbone(depth, widths, channels, last, dropout)
        self.classifier = nn.Linear(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x)


# ---------------------------------------------------------------------------------------------------------------------
# torchmeta


class MetaModule(nn.Module):
    """Its forward takes parameters in place of its own: a dictionary of the names below the module."""

    def __init__(self) -> None:
        super().__init__()
        self._children_modules_parameters_cache: dict[Any, list[str]] = {}

    def meta_named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named_members(
            lambda module: module._parameters.items() if isinstance(module, MetaModule) else [],
            prefix=prefix,
            recurse=recurse,
        )

    def get_subdict(self, params: Parameters, key: str) -> Parameters:
        """The parameters of one child, by their names there; which they are is kept from call to call."""
        if params is None:
            return None
        asked = (key, tuple(params))
        if asked not in self._children_modules_parameters_cache:
            below = re.compile(rf"^{re.escape(key)}\.(.+)")
            matches = (below.match(name) for name in params)
            self._children_modules_parameters_cache[asked] = [match[1] for match in matches if match is not None]
        names = self._children_modules_parameters_cache[asked]
        return OrderedDict((name, params[f"{key}.{name}"]) for name in names)


class MetaSequential(nn.Sequential, MetaModule):
    def forward(self, input: Tensor, params: Parameters = None) -> Tensor:
        for name, module in self._modules.items():
            if isinstance(module, MetaModule):
                input = module(input, params=self.get_subdict(params, name))
            elif isinstance(module, nn.Module):
                input = module(input)
            else:
                raise TypeError(f"expected a module, found {type(module)}")
        return input


class MetaConv2d(nn.Conv2d, MetaModule):
    def forward(self, input: Tensor, params: Parameters = None) -> Tensor:
        if params is None:
            params = OrderedDict(self.named_parameters())
        bias = params.get("bias", None)
        if self.padding_mode == "circular":
            rows, columns = self.padding
            around = ((columns + 1) // 2, columns // 2, (rows + 1) // 2, rows // 2)
            wrapped = F.pad(input, around, mode="circular")
            return F.conv2d(wrapped, params["weight"], bias, self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(input, params["weight"], bias, self.stride, self.padding, self.dilation, self.groups)


class MetaLinear(nn.Linear, MetaModule):
    def forward(self, input: Tensor, params: Parameters = None) -> Tensor:
        if params is None:
            params = OrderedDict(self.named_parameters())
        bias = params.get("bias", None)
        return F.linear(input, params["weight"], bias)


class _MetaBatchNorm(nn.modules.batchnorm._BatchNorm, MetaModule):
    def forward(self, input: Tensor, params: Parameters = None) -> Tensor:
        self._check_input_dim(input)
        if params is None:
            params = OrderedDict(self.named_parameters())
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        by_batch = self.training or not self.track_running_stats
        weight, bias = params.get("weight", None), params.get("bias", None)
        return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, by_batch, factor, self.eps)


class MetaBatchNorm1d(_MetaBatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")


class MetaBatchNorm2d(_MetaBatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


def _norm2d(filters: int, **options: Any) -> nn.Module:
    return MetaBatchNorm2d(filters, momentum=1.0, **{"track_running_stats": False, **options})


def _torchs_norm2d(filters: int) -> nn.Module:
    return nn.BatchNorm2d(filters, momentum=1.0, track_running_stats=False)


class MetaConvModel(MetaModule):
    """The network of torchmeta's MAML example; earlier versions take MetaBatchNorm2d, later ones torch's own."""

    def __init__(
        self,
        channels: int = 1,
        ways: int = 3,
        hidden: int = 8,
        features: int = 8,
        layers: int = 4,
        norm: Callable[[int], nn.Module] = _norm2d,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_features, self.hidden_size, self.feature_size = channels, ways, hidden, features
        blocks = [self._block(hidden if i else channels, hidden, norm) for i in range(layers)]
        self.features = MetaSequential(OrderedDict((f"layer{i + 1}", block) for i, block in enumerate(blocks)))
        self.classifier = MetaLinear(features, ways, bias=True)

    @staticmethod
    def _block(inputs: int, filters: int, norm: Callable[[int], nn.Module]) -> nn.Module:
        return MetaSequential(
            OrderedDict(
                conv=MetaConv2d(inputs, filters, kernel_size=3, stride=1, padding=1, bias=True),
                norm=norm(filters),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(2),
            )
        )

    def forward(self, inputs: Tensor, params: Parameters = None) -> Tensor:
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        features = features.view((features.size(0), -1))
        return self.classifier(features, params=self.get_subdict(params, "classifier"))


class MetaMLPModel(MetaModule):
    """The perceptron of the same example, for vectors."""

    def __init__(self, inputs: int = 4, ways: int = 3, hidden: Sequence[int] = (8, 8)) -> None:
        super().__init__()
        self.features = MetaSequential(
            OrderedDict(
                (f"layer{i + 1}", MetaSequential(OrderedDict(linear=MetaLinear(*sizes, bias=True), relu=nn.ReLU())))
                for i, sizes in enumerate(pairwise((inputs, *hidden)))
            )
        )
        self.classifier = MetaLinear(hidden[-1], ways, bias=True)

    def forward(self, inputs: Tensor, params: Parameters = None) -> Tensor:
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        return self.classifier(features, params=self.get_subdict(params, "classifier"))


def torchmeta_with_torchs_norm() -> nn.Module:
    return MetaConvModel(norm=_torchs_norm2d)


def torchmeta_with_statistics() -> nn.Module:
    """MetaBatchNorm2d as it comes, with running statistics."""
    return MetaConvModel(norm=MetaBatchNorm2d)


def torchmeta_sequence() -> nn.Module:
    """MetaSequential as the whole network."""
    return MetaSequential(
        MetaConv2d(1, 8, 3, padding=1), _norm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        MetaConv2d(8, 8, 3, padding=1), _norm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), MetaLinear(128, 3),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# easyfsl


class EasyResNet(nn.Module):
    """ResNets of torchvision's blocks behind a 3x3 convolution; the head is a matter of two attributes."""

    def __init__(
        self,
        layers: Sequence[int] = (1, 1, 1, 1),
        planes: Sequence[int] = (4, 6, 6, 8),
        stem: int = 4,
        use_fc: bool = True,
        num_classes: int = 3,
        use_pooling: bool = True,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.inplanes = stem
        self.conv1 = nn.Conv2d(channels, stem, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(planes[0], layers[0])
        self.layer2 = self._make_layer(planes[1], layers[1], stride=2)
        self.layer3 = self._make_layer(planes[2], layers[2], stride=2)
        self.layer4 = self._make_layer(planes[3], layers[3], stride=2)
        self.use_pooling = use_pooling
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.use_fc = use_fc
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Module:
        downsample = None
        if stride != 1 or self.inplanes != planes * BasicBlock.expansion:
            downsample = nn.Sequential(conv1x1(self.inplanes, planes, stride), nn.BatchNorm2d(planes))
        found = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * BasicBlock.expansion
        found += [BasicBlock(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*found)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))))
        if self.use_pooling:
            x = torch.flatten(self.avgpool(x), 1)
            if self.use_fc:
                return self.fc(x)
        elif self.use_fc:
            raise ValueError("expected pooled features for the fully connected layer")
        return x


class FeatResNet12(nn.Module):
    """The backbone of FEAT as easyfsl has it: features alone, by a mean over the last two axes."""

    def __init__(self, widths: Sequence[int] = (4, 6, 6, 8), channels: int = 1) -> None:
        super().__init__()
        layers = [ResNet12._layer(*size, 0.0, False, 1) for size in pairwise((channels, *widths))]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((-2, -1))


def feat_with_head() -> nn.Module:
    return nn.Sequential(OrderedDict(backbone=FeatResNet12(), head=nn.Linear(8, 3)))
