"""Small models as users write them, each with one habit or one family of layers that a meta-step must get right.

Nothing is simplified for the package: forwards keep tensors, write buffers, branch on numbers and differentiate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

WAYS = 3
PADDING = 0  # the token that pads short rows


# ----------------------------------------------------------------------------------------------------
# Layers of torch.nn, one family at a time


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, inputs: int = 4, outputs: int = WAYS) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, outputs))


def gated_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, WAYS))


def smooth_activations() -> nn.Module:
    kinds = (nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Hardswish, nn.SELU, nn.Mish, nn.CELU, nn.Softsign)
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, WAYS))


def kinked_activations() -> nn.Module:
    kinds = (nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Hardsigmoid, nn.Tanhshrink, nn.LogSigmoid)
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, WAYS))


class Pairs(nn.Module):
    """A bilinear form of the two halves of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(2, 2, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.form(x[:, :2], x[:, 2:])))


def image_net(*layers: nn.Module, filters: int) -> nn.Module:
    """Layers on images, then mean and head."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, WAYS))


def sequence_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1), nn.GELU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3), nn.GELU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, WAYS),
    )  # fmt: skip


def volume_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(32, WAYS))


def odd_convolutions() -> nn.Module:
    """Grouped, dilated, depthwise, strided, without bias."""
    return image_net(
        nn.Conv2d(1, 4, 3, padding="same"), nn.SiLU(),
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False), nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8), nn.SiLU(),
        filters=16,
    )  # fmt: skip


def padded_convolutions() -> nn.Module:
    """Every padding mode other than zeros."""
    return image_net(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.SiLU(),
        nn.ReplicationPad2d(1), nn.Conv2d(4, 4, 3), nn.SiLU(),
        filters=4,
    )  # fmt: skip


def transposed_sequences() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.Tanh(),
        nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(8, WAYS),
    )  # fmt: skip


def transposed_images() -> nn.Module:
    return image_net(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, groups=2), nn.Tanh(),
        filters=4,
    )  # fmt: skip


def normed_vectors(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, WAYS))


def normed_images(norm: nn.Module) -> nn.Module:
    return image_net(nn.Conv2d(1, 6, 3, padding=1), norm, nn.SiLU(), nn.Conv2d(6, 6, 3), nn.SiLU(), filters=6)


def pools() -> nn.Module:
    """Poolings other than plain max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(4, 4, 3, padding=1), nn.Softplus(), nn.LPPool2d(2, 2),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, WAYS),
    )  # fmt: skip


class Unpooled(nn.Module):
    """Puts maxima back where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = self.pool(torch.tanh(self.conv(x)))
        return self.head(torch.tanh(self.last(self.unpool(pooled, places))).mean((2, 3)))


def resized() -> nn.Module:
    return image_net(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(), nn.PixelShuffle(2),
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1), nn.Tanh(),
        filters=4,
    )  # fmt: skip


class Unfolded(nn.Module):
    """A convolution written as a product with all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Unfold(3, stride=2)
        self.mix = nn.Linear(9, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.patches(x).transpose(1, 2))).mean(1))


# ----------------------------------------------------------------------------------------------------
# Tokens


class BagOfWords(nn.Module):
    """The mean of the vectors of all words."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, **options)
        self.head = nn.Linear(6, WAYS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens)).mean(1))


class Bags(nn.Module):
    def __init__(self, *, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(12, 6, **options)
        self.weights = nn.Parameter(torch.rand(12)) if weighted else None
        self.head = nn.Linear(6, WAYS)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights[tokens]
        return self.head(torch.tanh(self.words(tokens, per_sample_weights=weights)))


class RecurrentReader(nn.Module):
    """Any of torch's recurrent layers, read at its last step."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **options)
        width = (options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(1, 2))[0][:, -1])


class CellReader(nn.Module):
    """A recurrent cell and a loop over time by hand."""

    def __init__(self, kind: type[nn.LSTMCell] | type[nn.GRUCell] | type[nn.RNNCell]) -> None:
        super().__init__()
        self.cell = kind(3, 5)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for moment in x.unbind(2):
            state = self.cell(moment, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class PackedReader(nn.Module):
    """Packed rows of tokens of different lengths; the lengths are numbers on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4, padding_idx=PADDING)
        self.layer = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, WAYS)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != PADDING).sum(1).cpu()
        packed = pack_padded_sequence(self.words(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.layer(packed)[1][-1])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.raise_width = nn.Linear(3, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.raise_width(x.transpose(1, 2))
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


class AttentionWithMaps(nn.Module):
    """Keys of a different width, an extra key, and the attention maps as features."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(8 + 2 * 10, WAYS)  # the maps include the extra key

    def forward(self, x: Tensor) -> Tensor:
        keys = x.transpose(1, 2)
        out, maps = self.attention(self.queries.expand(len(x), -1, -1), keys, keys)
        return self.head(torch.cat((out.flatten(1), maps.flatten(1)), 1))


class Encoder(nn.Module):
    """Tokens with padding, as a text classifier reads them."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=PADDING)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=not norm_first)
        self.head = nn.Linear(8, WAYS)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PADDING
        h = self.encoder(self.words(tokens), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return self.head((h * kept).sum(1) / kept.sum(1))


class Decoder(nn.Module):
    """Learned queries that attend to a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.raise_width = nn.Linear(3, 6)
        self.queries = nn.Parameter(torch.randn(2, 6))
        self.layer = nn.TransformerDecoderLayer(6, 2, 10, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(12, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.raise_width(x.transpose(1, 2))
        return self.head(self.layer(self.queries.expand(len(x), -1, -1), memory).flatten(1))


class Translator(nn.Module):
    """The whole nn.Transformer: a causal target, padding in both, logits per token."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(6, 8) / 4)
        self.transformer = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.positions
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=h.dtype)
        padding = torch.zeros_like(tokens, dtype=h.dtype).masked_fill(tokens == PADDING, -math.inf)
        out = self.transformer(
            h, h.flip(2), tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.head(out)


class LanguageModel(nn.Module):
    """Embedding and output head are one matrix, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.positions = nn.Embedding(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("places", torch.arange(6), persistent=False)
        self.register_buffer("later", torch.triu(torch.ones(6, 6, dtype=torch.bool), 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.words(tokens) + self.positions(self.places), src_mask=self.later))


class VisionTransformer(nn.Module):
    """Patches, class token, positions, one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) / 4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat((self.class_token.expand(len(x), -1, -1), patches), 1) + self.positions
        return self.head(self.encoder(h)[:, 0])


class RotaryAttention(nn.Module):
    """Causal attention with rotated queries and keys; the angles are buffers."""

    def __init__(self, width: int = 8, heads: int = 2, length: int = 9) -> None:
        super().__init__()
        self.heads = heads
        self.raise_width = nn.Linear(3, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, WAYS)
        half = width // heads // 2
        angles = torch.arange(length)[:, None] / 10.0 ** (torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def rotate(self, value: Tensor) -> Tensor:
        first, second = value.chunk(2, dim=-1)
        return torch.cat((first * self.cosine - second * self.sine, first * self.sine + second * self.cosine), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.raise_width(x.transpose(1, 2))
        count, length, width = h.shape
        qkv = self.qkv(h).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(self.rotate(query), self.rotate(key), value, is_causal=True)
        return self.head(self.out(mixed.transpose(1, 2).flatten(2))[:, -1])


class WindowAttention(nn.Module):
    """Attention by einsum, with a table of biases that an index buffer reads, as in Swin."""

    def __init__(self, side: int = 2, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, WAYS)
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", query * self.scale, key) + self.table[self.index].permute(2, 0, 1)
        return self.head(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).flatten(2).mean(1))


# ----------------------------------------------------------------------------------------------------
# Few-shot backbones as in public libraries


class ConvBlockL2L(nn.Module):
    """Registers its layers in a different order than the forward uses them."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.max_pool = nn.MaxPool2d(2, 2)
        self.normalize = nn.BatchNorm2d(filters, affine=True)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, filters, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


class Conv4L2L(nn.Module):
    """learn2learn's style: one sequence of blocks, registered a second time inside `features`."""

    def __init__(self, filters: int = 6) -> None:
        super().__init__()
        self.base = nn.Sequential(ConvBlockL2L(1, filters), *[ConvBlockL2L(filters, filters) for _ in range(2)])
        self.features = nn.Sequential(self.base, nn.Flatten())
        self.classifier = nn.Linear(4 * filters, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def conv_block(inputs: int, filters: int, *, track: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, filters, 3, padding=1), nn.BatchNorm2d(filters, track_running_stats=track),
        nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip


class Conv4Torchmeta(nn.Module):
    """torchmeta's style: no running statistics, features flattened by view."""

    def __init__(self, filters: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_block(1, filters, track=False),
            conv_block(filters, filters, track=False),
            conv_block(filters, filters, track=False),
        )
        self.classifier = nn.Linear(4 * filters, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.classifier(features.view(features.size(0), -1))


class Conv4Easyfsl(nn.Module):
    """easyfsl's style: named layers, an optional head, blocks of different widths."""

    def __init__(self, widths: Sequence[int] = (6, 6, 6), *, use_fc: bool = True) -> None:
        super().__init__()
        self.layer1 = conv_block(1, widths[0])
        self.layer2 = conv_block(widths[0], widths[1])
        self.layer3 = conv_block(widths[1], widths[2])
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * widths[2], WAYS)
        self.use_fc = use_fc

    def set_use_fc(self, use_fc: bool) -> None:
        self.use_fc = use_fc

    def forward(self, x: Tensor) -> Tensor:
        features = self.flatten(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(features) if self.use_fc else features


def conv4_wide() -> nn.Module:
    """64-96-128-256 filters."""
    widths = (1, 64, 96, 128, 256)
    blocks = [conv_block(inputs, filters) for inputs, filters in pairwise(widths)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, WAYS))


def omniglot_fc() -> nn.Module:
    """Linear layers with BatchNorm, on flattened images."""
    sizes = (64, 16, 12, 8)
    layers = [
        layer
        for inputs, outputs in pairwise(sizes)
        for layer in (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, WAYS))


class ResNet12Block(nn.Module):
    """Three convolutions, LeakyReLU, a projected shortcut, pooling."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        sizes = (inputs, filters, filters, filters)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters) for _ in self.convs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, filters, 1, bias=False), nn.BatchNorm2d(filters))
        self.act = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            if i < 2:
                h = self.act(h)
        return self.pool(self.act(h + self.downsample(x)))


def resnet12() -> nn.Module:
    return image_net(ResNet12Block(1, 4), ResNet12Block(4, 8), filters=8)


class WideBlock(nn.Module):
    """Pre-activation; the shortcut is a convolution only where the width changes. ReLU works in place."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.shortcut = None if inputs == filters else nn.Conv2d(inputs, filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        out += around
        return out


def wide_resnet() -> nn.Module:
    return image_net(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), WideBlock(4, 8), nn.AvgPool2d(2), WideBlock(8, 8),
        nn.BatchNorm2d(8), nn.ReLU(inplace=True), filters=8,
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, filters: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(filters, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, filters, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def squeezed() -> nn.Module:
    return image_net(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), SqueezeExcite(6, 3), filters=6)


class InvertedResidual(nn.Module):
    """MobileNetV2: widen, depthwise, narrow, with an identity shortcut."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def mobilenet() -> nn.Module:
    return image_net(nn.Conv2d(1, 4, 3, stride=2, padding=1), InvertedResidual(4, 2), nn.Hardswish(), filters=4)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels last, one scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.narrow(F.gelu(self.widen(h)))
        return x + h.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return image_net(nn.Conv2d(1, 6, 2, stride=2), ConvNeXtBlock(6), filters=6)


class MixerBlock(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(places, 6), nn.GELU(), nn.Linear(6, places))
        self.channels = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 4, stride=4)
        self.block = MixerBlock(4, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class DenseBlock(nn.Module):
    """Every layer reads all layers before it."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, inputs + i * growth), nn.ReLU(), nn.Conv2d(inputs + i * growth, growth, 3, padding=1)
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    return image_net(nn.Conv2d(1, 4, 3, padding=1), DenseBlock(4, 2, 3), filters=10)


class Shuffled(nn.Module):
    """Half of the channels go through a branch, then both halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        )
        self.shuffle = nn.ChannelShuffle(2)
        self.last = nn.Conv2d(8, 6, 1, groups=2)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.stem(x).chunk(2, dim=1)
        h = self.shuffle(torch.cat((kept, self.branch(worked)), 1))
        return self.head(F.relu(self.last(h)).mean((2, 3)))


class CosineClassifier(nn.Module):
    """Angles between features and class vectors, times a learned scale (a parameter without dimensions)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.classes = nn.Parameter(torch.randn(WAYS, 6))
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.body(x), dim=-1) @ F.normalize(self.classes, dim=-1).T


class RidgeHead(nn.Module):
    """Predicts from features by a regularised least-squares fit to learned anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.anchors = nn.Parameter(torch.randn(6, 4))
        self.answers = nn.Parameter(torch.randn(6, WAYS))
        self.log_ridge = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.tanh(self.body(self.anchors))
        gram = keys.T @ keys + self.log_ridge.exp() * torch.eye(5, dtype=x.dtype)
        return torch.tanh(self.body(x)) @ torch.linalg.solve(gram, keys.T @ self.answers)


# ----------------------------------------------------------------------------------------------------
# Regression, sets, graphs, conditioning


class UNet(nn.Module):
    """Down, up, and a skip connection; images in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.SiLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        return self.leave(torch.cat((fine, self.up(self.down(fine))), 1))


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class FourierFeatures(nn.Module):
    """Fixed random frequencies in a buffer, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 6))
        self.body = mlp(nn.ReLU, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.frequencies
        return self.body(torch.cat((angles.sin(), angles.cos()), -1))


class Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, omega: float = 3.0) -> None:
        super().__init__()
        self.omega = omega
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


def siren() -> nn.Module:
    return nn.Sequential(Sine(2, 8), Sine(8, 8), nn.Linear(8, 1))


class SkipField(nn.Module):
    """Feeds the input in again half way, as radiance fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 8)])
        self.second = nn.ModuleList([nn.Linear(10, 8), nn.Linear(8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.first:
            h = F.softplus(layer(h))
        h = F.softplus(self.second[0](torch.cat((h, x), -1)))
        return self.second[1](h)


class DeepSets(nn.Module):
    """One network per element, the sum over elements, then another network."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.rho = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x.transpose(1, 2)).sum(1))


class GraphConv(nn.Module):
    """A fixed ring of nodes; its normalised adjacency is a buffer."""

    def __init__(self, nodes: int = 9) -> None:
        super().__init__()
        ring = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
        self.register_buffer("adjacency", ring / 3)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        h = F.elu(self.first(self.adjacency @ h))
        h = F.elu(self.second(self.adjacency @ h))
        return self.head(h.amax(1))


class EdgeSums(nn.Module):
    """Messages along a list of edges, summed at the target nodes by index."""

    def __init__(self, nodes: int = 9) -> None:
        super().__init__()
        self.register_buffer("source", torch.arange(nodes))
        self.register_buffer("target", (torch.arange(nodes) * 2 + 1) % nodes)
        self.message = nn.Linear(3, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        messages = torch.tanh(self.message(x.transpose(1, 2)))[:, self.source]
        sums = torch.zeros_like(messages).index_add(1, self.target, messages)
        return self.head(torch.tanh(sums).mean(1))


class FiLM(nn.Module):
    """A side network scales and shifts the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.condition = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.condition(x)[:, :, None, None].chunk(2, dim=1)
        return self.head(F.silu((1 + scale) * self.body(x) + shift).mean((2, 3)))


class SoftExperts(nn.Module):
    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(4, experts)
        self.experts = nn.ModuleList(mlp(nn.ReLU) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(-1).unsqueeze(-1) * answers).sum(1)


class TopExperts(nn.Module):
    """Each example goes through its two best experts only; their weights are gathered."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(4, experts)
        self.weights = nn.Parameter(torch.randn(experts, 4, 6))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).topk(2, dim=-1)
        answers = torch.einsum("si,skio->sko", x, self.weights[chosen])
        return self.head(torch.tanh((scores.softmax(-1).unsqueeze(-1) * answers).sum(1)))


class HyperNetwork(nn.Module):
    """A small network writes the weights of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(2, 3))
        self.writer = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4 * 6))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.writer(self.codes).view(2, 6, 4)
        return self.head(torch.tanh(F.linear(x, first)) * torch.sigmoid(F.linear(x, second)))


class RadialBasis(nn.Module):
    """Distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 4))
        self.log_width = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        squares = (x[:, None] - self.centres).square().sum(-1)
        return self.head(torch.exp(-squares * self.log_width.exp() / 4))


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.carry, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.carry(x))
        return self.head(torch.lerp(x, torch.relu(self.transform(x)), gate))


class RungeKutta(nn.Module):
    """Solves a differential equation in a few steps: one field, called many times."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        step = 0.25
        for _ in range(2):
            k1 = self.field(x)
            k2 = self.field(x + step / 2 * k1)
            k3 = self.field(x + step / 2 * k2)
            k4 = self.field(x + step * k3)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


class StateSpace(nn.Module):
    """A diagonal linear recurrence over time, whose decays are exp(-exp(parameter))."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.randn(6))
        self.enter, self.leave = nn.Linear(3, 6, bias=False), nn.Linear(6, WAYS)
        self.skip = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        decay = torch.exp(-torch.exp(self.log_decay))
        state, drive = x.new_zeros(len(x), 6), self.enter(x.transpose(1, 2))
        for moment in drive.unbind(1):
            state = decay * state + moment
        return self.leave(F.silu(state + self.skip * drive[:, -1]))


class FourierMixing(nn.Module):
    """Mixes time by an FFT with learned complex gains (kept as pairs of reals)."""

    def __init__(self, length: int = 9) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.randn(3, length // 2 + 1, 2))
        self.norm = nn.LayerNorm(length)
        self.head = nn.Linear(3, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, norm="ortho") * torch.view_as_complex(self.gains)
        mixed = torch.fft.irfft(spectrum, n=x.shape[-1], norm="ortho")
        return self.head(F.gelu(self.norm(mixed)).mean(-1) + spectrum.abs().mean(-1))


class MaskedConv(nn.Conv2d):
    """A convolution that sees only what is above and to the left: a mask buffer multiplies its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 2:] = 0
        mask[2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def masked_convolutions() -> nn.Module:
    return image_net(MaskedConv(1, 4), nn.Tanh(), MaskedConv(4, 4), nn.Tanh(), filters=4)


class CausalConv(nn.Module):
    """A temporal block: padding on the left alone, growing dilation, normalised weights."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.left = dilation * 2
        self.conv = parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pad(x, (self.left, 0))))


def temporal_convolutions() -> nn.Module:
    return nn.Sequential(
        CausalConv(3, 6, 1), CausalConv(6, 6, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, WAYS)
    )


# ----------------------------------------------------------------------------------------------------
# Shared, frozen and unused parameters; containers


class OneModuleTwoNames(nn.Module):
    """The same layer, registered as `first` and as `again`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class SharedDepth(nn.Module):
    """One block for all layers, as in ALBERT, and a norm for each."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(6, 6)
        self.enter = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), block, nn.GELU()) for _ in range(3))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h)


class TiedTranspose(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


def frozen_body() -> nn.Module:
    model = nn.Sequential(conv_block(1, 4), conv_block(4, 4), nn.Flatten(), nn.Linear(16, WAYS))
    model[:2].requires_grad_(False)
    return model


def frozen_between() -> nn.Module:
    """The gradient passes through a frozen layer to one that is not."""
    model = mlp()
    model[2].requires_grad_(False)
    return model


class LowRank(nn.Module):
    """A frozen layer with a low-rank update beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs) / 2)
        self.up = nn.Parameter(torch.randn(outputs, rank) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def low_rank() -> nn.Module:
    return nn.Sequential(LowRank(4, 8), nn.Tanh(), LowRank(8, WAYS))


class WithUnused(nn.Module):
    """A layer that no forward uses, and an auxiliary head that only evaluation uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.forgotten = nn.Linear(4, 4)
        self.auxiliary = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.head(h) if self.training else self.head(h) + self.auxiliary(h)


class PartlyUsed(nn.Module):
    """Uses only a slice of a parameter; the rest has gradient 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.table[2:6]))


class Detached(nn.Module):
    """Stops the gradient into the body: only the head learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.body(x))
        return self.head(h)


class Containers(nn.Module):
    """Parameters and modules in torch's lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)])
        self.scales = nn.ParameterDict({"low": nn.Parameter(torch.rand(6)), "high": nn.Parameter(torch.rand(6))})
        self.acts = nn.ModuleDict({"low": nn.PReLU(), "high": nn.Softplus()})
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        for shift, (name, scale) in zip(self.shifts, self.scales.items(), strict=True):
            h = self.acts[name](h * scale + shift)
        return self.head(h)


class RegularisesItself(nn.Module):
    """Iterates over `self.parameters()` in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        size = sum(parameter.square().sum() for parameter in self.parameters())
        return self.head(torch.tanh(self.body(x))) / (1 + size / 10)


# ----------------------------------------------------------------------------------------------------
# Weights computed from other parameters


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def between_linears(middle: nn.Module, width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), middle, nn.Tanh(), nn.Linear(width, WAYS))


def with_weight_norm() -> nn.Module:
    return between_linears(parametrizations.weight_norm(nn.Linear(6, 6)))


def with_spectral_norm() -> nn.Module:
    return between_linears(parametrizations.spectral_norm(nn.Linear(6, 6)))


def with_spectral_norm_on_images() -> nn.Module:
    conv = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1), n_power_iterations=2)
    return image_net(conv, nn.LeakyReLU(0.1), filters=4)


def with_orthogonal() -> nn.Module:
    return between_linears(parametrizations.orthogonal(nn.Linear(6, 6)))


def with_symmetric() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return between_linears(layer)


def with_old_weight_norm() -> nn.Module:
    """A hook writes `weight`, an ordinary attribute, before every forward."""
    return between_linears(nn.utils.weight_norm(nn.Linear(6, 6)))


def with_old_spectral_norm() -> nn.Module:
    return between_linears(nn.utils.spectral_norm(nn.Linear(6, 6)))


class Standardised(nn.Conv2d):
    """Weight standardisation: its own weight, normalised in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (spread + 1e-5), self.bias)


def standardised_convolutions() -> nn.Module:
    return image_net(Standardised(1, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), filters=6)


# ----------------------------------------------------------------------------------------------------
# Forwards that write


class CountsCalls(nn.Module):
    """A buffer counts forward passes, and the output depends on it: every pass of a call must see the same count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(3))
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(torch.tanh(self.body(x))) / self.calls


class RunningMeanByHand(nn.Module):
    """Replaces the buffer by a new tensor, and normalises by it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head(torch.tanh(h - self.mean))


class RunningMeanInPlace(RunningMeanByHand):
    """Does the same in place, by `lerp_`."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        with torch.no_grad():
            self.mean.lerp_(h.mean(0), 0.1)
        return self.head(torch.tanh(h - self.mean))


class KeepsFeatures(nn.Module):
    """Keeps its features in an attribute, for use outside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.body(x))
        return self.head(self.features)


class CollectsByHook(nn.Module):
    """Hooks collect layers' outputs in a list that every forward replaces; the head reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(10, WAYS)
        self.collected: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, nn.Tanh):
                layer.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.collected.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.collected = []
        self.layers(x)
        return self.head(torch.cat(self.collected, 1))


def remember(kept: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    kept[name] = output


class ActivationsInDict(nn.Module):
    """The usual recipe from forums: hooks fill a dictionary, here an attribute of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.activations: dict[str, Tensor] = {}
        self.body.register_forward_hook(partial(remember, self.activations, "body"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))) + self.activations["body"].mean(1, keepdim=True)


class AddsAuxiliaryLoss(nn.Module):
    """Keeps a penalty on its features in an attribute, and scales the logits by it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.penalty = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        self.penalty = h.square().mean()
        return self.head(h) * (1 + self.penalty)


class FillsNewTensor(nn.Module):
    """Makes an empty output and writes into its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.empty(len(x), 6, dtype=x.dtype)
        h[:, :3] = torch.tanh(self.left(x))
        h[:, 3:] = torch.sigmoid(self.right(x))
        return self.head(h)


class WorksInPlace(nn.Module):
    """Applies in-place operators to tensors that it computed itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h += self.shift
        h.mul_(2).add_(0.1)
        return self.head(F.leaky_relu_(h, 0.2))


# ----------------------------------------------------------------------------------------------------
# Forwards that branch, differentiate, recompute


class Branches(nn.Module):
    """One of two layers, by the sign of the mean: tasks take different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(4, 6), nn.Linear(4, 6)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.positive(x) if x.mean() > 0 else self.negative(x)
        return self.head(torch.tanh(h))


class HardRouting(nn.Module):
    """Picks the examples of each expert by a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, WAYS), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        high = x[:, 0] > 0
        out = x.new_zeros(len(x), WAYS)
        out[high] = self.high(x[high])
        out[~high] = self.low(x[~high])
        return out


class Halting(nn.Module):
    """Repeats a step until the state is small, at most four times."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.step(x))
            if x.detach().abs().mean().item() < 0.4:
                break
        return self.head(x)


class Checkpointed(nn.Module):
    """Blocks whose activations are computed a second time in the backward pass."""

    def __init__(self, *, checkpointing: bool = True) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Softplus()) for _ in range(2))
        self.head = nn.Linear(6, WAYS)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointing else block(h)
        return self.head(h)


class EnergyForce(nn.Module):
    """Predicts forces, the negative gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -gradient


class EnergyForceByFunc(EnergyForce):
    """Does the same by torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(lambda places: self.energy(places).sum())(x)


class SignWithGradient(torch.autograd.Function):
    """A sign whose gradient is that of a clamp, as binarised networks use it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Squash(torch.autograd.Function):
    """A function in the newer form, which torch.func can batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / (1 + x * x).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + x * x) ** 1.5


class CustomFunction(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.body, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.function.apply(self.body(x)))))


# ----------------------------------------------------------------------------------------------------
# Odd attributes


class PlainList(nn.Module):
    """Keeps its blocks in an ordinary list as well, and calls them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, WAYS)
        self.steps = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(step(x))
        return self.head(x)


class PlainParameters(nn.Module):
    """Keeps its parameters in an ordinary dictionary as well, and reads them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4) / 2), nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, WAYS)
        self.first = {"weight": self.weight, "bias": self.bias}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, **self.first)))


class BoundMethod(nn.Module):
    """Its activation is one of its own methods."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.act = self._act

    def _act(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + self.slope * x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class LambdaOverSelf(nn.Module):
    """A lambda that reads one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.scale_by = lambda x: x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale_by(self.body(x))))


def residual(layer: nn.Module, x: Tensor, *, weight: float) -> Tensor:
    return x + weight * torch.tanh(layer(x))


class PartialOfSubmodule(nn.Module):
    """A functools.partial that holds one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, WAYS)
        self.step = partial(residual, self.inner, weight=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(x))


class BackReference(nn.Module):
    """A child that holds its parent (in a tuple, so that torch does not register it) and reads a parameter of it."""

    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)
            self.parent = (parent,)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) * self.parent[0].scale

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.child = self.Child(self)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.child(x))


def lazily_initialised() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(),
                          nn.LazyLinear(WAYS))  # fmt: skip
    model(torch.zeros(2, 1, 8, 8))
    return model


class HandwrittenLayerNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * (x - mean) / torch.sqrt(variance + self.eps) + self.beta


class TrainsAndEvaluates(nn.Module):
    """BatchNorm and dropout in evaluation mode inside a model in training mode, as after freezing a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)).eval()
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(x))


# ----------------------------------------------------------------------------------------------------
# Blocks in the style of large libraries


class LayerScale(nn.Module):
    def __init__(self, width: int, start: float = 0.1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(start * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth; with rate 0 the identity."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(1 - self.rate) / (1 - self.rate)


class TimmAttention(nn.Module):
    """Fused qkv, optional norms of queries and keys, and a switch between two forms of the product."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(count, length, width))


class TimmBlock(nn.Module):
    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = TimmAttention(width, 2, fused=fused)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        self.drop_path1, self.drop_path2 = DropPath(), DropPath()
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TimmViT(nn.Module):
    """A stem, a trunk and a head with the library's pooling switch."""

    def __init__(self, *, fused: bool = True, pool: str = "avg") -> None:
        super().__init__()
        self.pool = pool
        self.patch_embed = nn.Conv2d(1, 8, 4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8) / 4)
        self.blocks = nn.Sequential(TimmBlock(8, fused=fused))
        self.fc_norm = nn.LayerNorm(8) if pool == "avg" else nn.Identity()
        self.head = nn.Linear(8, WAYS)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        h = self.forward_features(x)
        return self.head(self.fc_norm(h.mean(1) if self.pool == "avg" else h[:, 0]))


@dataclass
class BertConfig:
    """What the blocks below are made from."""

    vocab_size: int = 12
    hidden_size: int = 8
    heads: int = 2
    intermediate_size: int = 12
    layers: int = 2
    positions: int = 6
    eps: float = 1e-12


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.config.heads, -1).transpose(1, 2)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (self.split(layer(hidden)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = self.norm(self.dense(mixed) + hidden)
        return self.output_norm(self.output(F.gelu(self.intermediate(hidden))) + hidden)


class Bert(nn.Module):
    """A config object, an additive mask, a flag for gradient checkpointing, optional arguments."""

    def __init__(self, config: BertConfig | None = None, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config or BertConfig()
        self.gradient_checkpointing = gradient_checkpointing
        self.word_embeddings = nn.Embedding(self.config.vocab_size, self.config.hidden_size, padding_idx=PADDING)
        self.position_embeddings = nn.Embedding(self.config.positions, self.config.hidden_size)
        self.register_buffer("position_ids", torch.arange(self.config.positions)[None], persistent=False)
        self.norm = nn.LayerNorm(self.config.hidden_size, eps=self.config.eps)
        self.layer = nn.ModuleList(BertLayer(self.config) for _ in range(self.config.layers))
        self.classifier = nn.Linear(self.config.hidden_size, WAYS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            attention_mask = (input_ids != PADDING).to(self.norm.weight.dtype)
        mask = (1 - attention_mask)[:, None, None, :] * torch.finfo(attention_mask.dtype).min
        positions = self.position_ids[:, : input_ids.shape[1]]
        hidden = self.norm(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        for layer in self.layer:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer.__call__, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
        return self.classifier(hidden[:, 0])
