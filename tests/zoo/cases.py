"""The models of the zoo with tasks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo import models as m

METHODS = ("sign-maml", "fo-maml", "maml")
FIRST_ORDER = METHODS[:2]
TASKS = 3


@dataclass(frozen=True)
class Case:
    """A model and the kind of tasks it gets.

    Attributes:
        make: Makes the model.
        inputs: The kind of one example: "vectors", "images", "large images", "volumes", "series", "tokens" or "points".
        targets: "labels", "tokens" for 12 numbers per token, or the shape of the numbers that the model predicts:
            "points", "images", "vectors" or "forces".
        together: Part of the reason why tasks cannot be batched under vmap; None if they can.
        options: More arguments of `meta_step`.
        methods: The methods for which torch has the derivatives and computes them correctly.
        training: Whether the model is in training mode.
        twin: Makes a model of the same numbers that the plain loop can copy; None if it can copy the model itself.
    """

    make: Callable[[], nn.Module]
    inputs: str = "vectors"
    targets: str = "labels"
    together: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = METHODS
    training: bool = True
    twin: Callable[[nn.Module], nn.Module] | None = None

    def model(self) -> nn.Module:
        """The model in float64."""
        torch.manual_seed(1)
        model = self.make().double()
        return model if self.training else model.eval()

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support and query sets, of different sizes, for several tasks."""
        torch.manual_seed(2)
        sx, qx = _draw(self.inputs, 6), _draw(self.inputs, 7)
        return sx, self._targets(sx), qx, self._targets(qx)

    def _targets(self, x: Tensor) -> Tensor:
        if self.targets == "labels":
            return torch.randint(m.WAYS, x.shape[:2])
        if self.targets == "tokens":
            return torch.rand(*x.shape, 12, dtype=torch.float64)
        shape = {"points": (1,), "images": (1, 8, 8), "vectors": (4,), "forces": (2,)}
        return torch.randn(*x.shape[:2], *shape[self.targets], dtype=torch.float64)


def _draw(kind: str, count: int) -> Tensor:
    shapes = {
        "vectors": (4,), "images": (1, 8, 8), "large images": (1, 16, 16), "volumes": (1, 4, 4, 4), "series": (3, 9),
        "points": (2,),
    }  # fmt: skip
    if kind == "tokens":
        tokens = torch.randint(1, 12, (TASKS, count, 6))
        lengths = torch.randint(2, 7, (TASKS, count, 1))
        return torch.where(torch.arange(6) < lengths, tokens, m.PADDING)
    return torch.randn(TASKS, count, *shapes[kind], dtype=torch.float64)


class ScaledByName(nn.Module):
    """Computes what `LambdaOverSelf` does; deep copies of that one would still read the original's scale."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.scale = like.body, like.head, like.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) * self.scale))


class ParametersByName(nn.Module):
    """Computes what `PlainParameters` does."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.head = like.weight, like.bias, like.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.nn.functional.linear(x, self.weight, self.bias)))


class NormedByHand(nn.Module):
    """Computes what a layer under `torch.nn.utils.weight_norm` does; that one cannot be copied after a forward."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.bias, self.weight_g, self.weight_v = like.bias, like.weight_g, like.weight_v

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return torch.nn.functional.linear(x, weight, self.bias)


def normed_by_hand(like: nn.Module) -> nn.Module:
    layers = list(like.children())
    return nn.Sequential(*layers[:2], NormedByHand(layers[2]), *layers[3:])


def image_norm(norm: Callable[[], nn.Module]) -> Case:
    return Case(lambda: m.normed_images(norm()), "images")


def vector_norm(norm: Callable[[], nn.Module]) -> Case:
    return Case(lambda: m.normed_vectors(norm()))


def series(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, "series", **options)


def images(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, "images", **options)


def tokens(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, "tokens", **options)


REGRESSION = {"options": {"loss": "mse"}}
PADDED = "padding_idx"
RECURRENT = "vmap refused it"
BRANCHES = "data-dependent control flow"

CASES: dict[str, Case] = {
    # Layers of torch.nn
    "MLP": Case(m.mlp),
    "gated MLP": Case(m.gated_mlp),
    "smooth activations": Case(m.smooth_activations),
    "kinked activations": Case(m.kinked_activations, methods=FIRST_ORDER),
    "bilinear": Case(m.Pairs),
    "1d convolutions": series(m.sequence_convolutions),
    "3d convolutions": Case(m.volume_convolutions, "volumes"),
    "grouped, dilated and depthwise convolutions": images(m.odd_convolutions),
    "circular and reflected padding": images(m.padded_convolutions),
    "1d transposed convolutions": series(m.transposed_sequences),
    "2d transposed convolutions": images(m.transposed_images),
    "BatchNorm1d": vector_norm(lambda: nn.BatchNorm1d(8)),
    "BatchNorm1d, not affine": vector_norm(lambda: nn.BatchNorm1d(8, affine=False)),
    "BatchNorm2d": image_norm(lambda: nn.BatchNorm2d(6)),
    "BatchNorm2d without running statistics": image_norm(lambda: nn.BatchNorm2d(6, track_running_stats=False)),
    "BatchNorm2d in evaluation": Case(lambda: m.normed_images(nn.BatchNorm2d(6)), "images", training=False),
    "GroupNorm": image_norm(lambda: nn.GroupNorm(2, 6)),
    "InstanceNorm": image_norm(lambda: nn.InstanceNorm2d(6, affine=True)),
    "LayerNorm": vector_norm(lambda: nn.LayerNorm(8)),
    "RMSNorm": vector_norm(lambda: nn.RMSNorm(8)),
    "LocalResponseNorm": image_norm(lambda: nn.LocalResponseNorm(3)),
    "PReLU": vector_norm(lambda: nn.PReLU(8)),
    "average, power and adaptive pooling": images(m.pools),
    "unpooling": images(m.Unpooled),
    "upsampling and pixel shuffle": images(m.resized),
    "unfold": images(m.Unfolded),
    # Tokens and sequences
    "embedding": tokens(m.BagOfWords),
    "embedding with padding": tokens(lambda: m.BagOfWords(padding_idx=m.PADDING), together=PADDED),
    "embedding with max_norm": tokens(lambda: m.BagOfWords(max_norm=0.7), methods=FIRST_ORDER),
    "sparse embedding": tokens(lambda: m.BagOfWords(sparse=True)),
    "bags of words": tokens(m.Bags, methods=FIRST_ORDER),
    "bags of words with padding": tokens(lambda: m.Bags(padding_idx=m.PADDING), methods=FIRST_ORDER, together=PADDED),
    "weighted bags of words": tokens(lambda: m.Bags(weighted=True, mode="sum"), methods=FIRST_ORDER),
    "RNN": series(lambda: m.RecurrentReader(nn.RNN), together=RECURRENT),
    "LSTM": series(lambda: m.RecurrentReader(nn.LSTM), together=RECURRENT),
    "GRU, two layers, both directions": series(
        lambda: m.RecurrentReader(nn.GRU, num_layers=2, bidirectional=True), together=RECURRENT
    ),
    "LSTM with projection": series(lambda: m.RecurrentReader(nn.LSTM, proj_size=3), together=RECURRENT),
    "LSTM cell": series(lambda: m.CellReader(nn.LSTMCell), together=RECURRENT),
    "GRU cell": series(lambda: m.CellReader(nn.GRUCell)),
    "packed sequences": tokens(m.PackedReader, together=RECURRENT),
    "attention": series(m.SelfAttention),
    "attention with its maps": series(m.AttentionWithMaps),
    "transformer encoder": tokens(m.Encoder, together=PADDED),
    "transformer encoder, norm first": tokens(lambda: m.Encoder(norm_first=True), together=PADDED),
    "transformer decoder": series(m.Decoder),
    "transformer": tokens(m.Translator, targets="tokens", together=PADDED, **REGRESSION),
    "language model with tied head": tokens(m.LanguageModel, targets="tokens", **REGRESSION),
    "vision transformer": images(m.VisionTransformer),
    "rotary attention": series(m.RotaryAttention),
    "window attention": images(m.WindowAttention),
    # Few-shot and image networks
    "Conv4 as in learn2learn": Case(m.Conv4L2L, "large images"),
    "Conv4 as in torchmeta": Case(m.Conv4Torchmeta, "large images"),
    "Conv4 as in easyfsl": Case(m.Conv4Easyfsl, "large images"),
    "Conv4, 64-96-128-256": Case(m.conv4_wide, "large images"),
    "OmniglotFC": images(m.omniglot_fc),
    "ResNet-12": images(m.resnet12),
    "WRN": images(m.wide_resnet),
    "squeeze and excite": images(m.squeezed),
    "inverted residual": images(m.mobilenet),
    "ConvNeXt": images(m.convnext),
    "mixer": images(m.Mixer),
    "DenseNet": images(m.densenet),
    "channel shuffle": images(m.Shuffled),
    "cosine classifier": Case(m.CosineClassifier),
    "ridge regression inside": Case(m.RidgeHead),
    "ANIL": Case(m.mlp, options={"adapt": ["4.*"]}),
    "BOIL": Case(m.mlp, options={"adapt": ["0.*", "2.*"]}),
    # Regression, sets, graphs, conditioning
    "U-Net": images(m.UNet, targets="images", **REGRESSION),
    "autoencoder": images(m.AutoEncoder, targets="images", **REGRESSION),
    "Fourier features": Case(m.FourierFeatures, "points", "points", **REGRESSION),
    "SIREN": Case(m.siren, "points", "points", **REGRESSION),
    "field with a skip": Case(m.SkipField, "points", "points", **REGRESSION),
    "deep sets": series(m.DeepSets),
    "graph convolution": series(m.GraphConv),
    "sums along edges": series(m.EdgeSums),
    "FiLM": images(m.FiLM),
    "soft experts": Case(m.SoftExperts),
    "top experts": Case(m.TopExperts),
    "hypernetwork": Case(m.HyperNetwork),
    "radial basis functions": Case(m.RadialBasis),
    "highway": Case(m.Highway),
    "Runge-Kutta": Case(m.RungeKutta),
    "state space": series(m.StateSpace),
    "Fourier mixing": series(m.FourierMixing),
    "masked convolutions": images(m.masked_convolutions),
    "temporal convolutions": series(m.temporal_convolutions),
    # Shared, frozen and unused parameters
    "one module under two names": Case(m.OneModuleTwoNames),
    "shared depth": Case(m.SharedDepth),
    "tied transpose": Case(m.TiedTranspose, targets="vectors", **REGRESSION),
    "frozen body": images(m.frozen_body),
    "frozen between": Case(m.frozen_between),
    "low-rank updates": Case(m.low_rank),
    "unused parameters": Case(m.WithUnused),
    "unused in training only": Case(m.WithUnused, training=False),
    "partly used": Case(m.PartlyUsed),
    "detached body": Case(m.Detached),
    "lists and dictionaries of parameters": Case(m.Containers),
    "walks over its parameters": Case(m.RegularisesItself),
    # Weights computed from others
    "weight norm": Case(m.with_weight_norm),
    "spectral norm": Case(m.with_spectral_norm, together=RECURRENT),
    "spectral norm in evaluation": Case(m.with_spectral_norm, training=False),
    "spectral norm on images": images(m.with_spectral_norm_on_images, together=RECURRENT),
    "orthogonal": Case(m.with_orthogonal),
    "symmetric": Case(m.with_symmetric),
    # torch's second derivative of `_weight_norm` does not pass torch's own gradgradcheck.
    "old weight norm": Case(m.with_old_weight_norm, methods=FIRST_ORDER, twin=normed_by_hand),
    "old spectral norm": Case(m.with_old_spectral_norm, together=RECURRENT),
    "standardised weights": images(m.standardised_convolutions),
    # Forwards that write
    "counts its calls": Case(m.CountsCalls),
    "running mean by hand": Case(m.RunningMeanByHand),
    "running mean in place": Case(m.RunningMeanInPlace),
    "keeps its features": Case(m.KeepsFeatures),
    "collects by hook": Case(m.CollectsByHook, together="has hooks"),
    "activations in a dictionary": Case(m.ActivationsInDict, together="has hooks"),
    "adds an auxiliary loss": Case(m.AddsAuxiliaryLoss),
    "fills a new tensor": Case(m.FillsNewTensor, together=RECURRENT),
    "works in place": Case(m.WorksInPlace),
    # Forwards that branch, differentiate, recompute
    "branches": Case(m.Branches, together=BRANCHES),
    "hard routing": Case(m.HardRouting, together=RECURRENT),
    "halting": Case(m.Halting, together=RECURRENT),
    "checkpointed": Case(m.Checkpointed, together="checkpointing"),
    "energy and force": Case(m.EnergyForce, "points", "forces", together=RECURRENT, **REGRESSION),
    "energy and force by torch.func": Case(m.EnergyForceByFunc, "points", "forces", **REGRESSION),
    "custom function": Case(lambda: m.CustomFunction(m.SignWithGradient), methods=FIRST_ORDER, together=RECURRENT),
    "custom function that batches": Case(lambda: m.CustomFunction(m.Squash)),
    # Odd attributes
    "blocks in a plain list": Case(m.PlainList),
    "parameters in a plain dictionary": Case(m.PlainParameters, twin=ParametersByName),
    "bound method": Case(m.BoundMethod),
    "lambda over self": Case(m.LambdaOverSelf, twin=ScaledByName),
    "partial of a submodule": Case(m.PartialOfSubmodule),
    "child that knows its parent": Case(m.BackReference),
    "lazily initialised": images(m.lazily_initialised),
    "layer norm by hand": vector_norm(lambda: m.HandwrittenLayerNorm(8)),
    "a stage in evaluation": Case(m.TrainsAndEvaluates),
    # In the style of large libraries
    "timm": images(m.TimmViT),
    "timm, attention by hand": images(lambda: m.TimmViT(fused=False, pool="token")),
    "Hugging Face": tokens(m.Bert, together=PADDED),
    "Hugging Face, checkpointed": tokens(lambda: m.Bert(gradient_checkpointing=True), together=RECURRENT),
}
