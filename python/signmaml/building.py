"""Builds what a configuration names: device, images, samplers, model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from signmaml_ext import Adam, InnerRule, Lion, Momentum, Plain, Sharpness, Signum

from .config import TrainConfig
from .episodes import Sampler, draw
from .evaluation import EvaluationArguments, StepArguments
from .examples import ExampleFormat
from .models import MLP, Conv4, ResNet12
from .networks import named
from .rates import InnerRates

if TYPE_CHECKING:
    from .data import ImageSet

SPLITS = ("train", "val", "test")
Source = Any  # an ImageSet, a Sampler, or None


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of a configuration's `device`; "auto" is a CUDA device if there is one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:INDEX".
        local_rank: Which CUDA device "auto" and "cuda" mean.

    Raises:
        ValueError: There is no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= gpus:
            there = f"auto, cpu or one of {gpus} CUDA devices" if gpus else "auto or cpu (torch sees no CUDA device)"
            raise ValueError(f"device: expected {there}, found {name!r}")
        device = torch.device("cuda", index)
    return device


def load_images(config: TrainConfig, split: str, *, progress: bool = True) -> ImageSet:
    """One split of the configuration's data set.

    Raises:
        ValueError: There is no such data set.
        FileNotFoundError: The data are not on disk; the message says how to get them.
    """
    from . import data

    check_data_name(config.data)
    return data.load(
        config.data,
        split,
        root=config.data_root,
        image_size=config.image_size,
        split_by=config.split_by,
        min_images=config.min_images,
        skip_damaged=config.skip_damaged,
        progress=progress,
    )


def check_data_name(name: str) -> None:
    """Raises ValueError, suggesting the nearest name, unless `name` is a data set of images."""
    from . import data

    if name not in data.DATASETS:
        near = difflib.get_close_matches(name, data.DATASETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"data: expected one of {', '.join(data.DATASETS)} or sinusoid, found {name!r}{hint}")


def make_sampler(
    config: TrainConfig,
    source: Source,
    split: str,
    device: torch.device,
    *,
    training: bool = False,
    progress: bool = True,
) -> Sampler:
    """The episodes of one split.

    Args:
        config: The configuration.
        source: An `ImageSet`; a sampler, which is returned as it is; or None for the configuration's data.
        split: "train", "val" or "test".
        device: Where the episodes are drawn.
        training: Whether they are for training: with rotated classes and changed images, and `queries` rather than
            `test_queries`.
        progress: Whether to show the progress of loading.
    """
    if source is not None and hasattr(source, "draw"):
        if training and config.augment:
            raise ValueError(
                f"augment: expected none for a sampler of your own, {type(source).__name__}, which draws its images as "
                f"it likes (EpisodeSampler takes augment=), found {config.augment}"
            )
        return cast(Sampler, source)
    from .episodes import EpisodeSampler, SinusoidSampler

    queries = config.queries if training else config.evaluation_queries()
    if source is None and config.data == "sinusoid":
        # All splits draw from one endless distribution of tasks; widely spaced seeds keep them separate.
        seed = config.seed + 1_000_003 * SPLITS.index(split)
        return SinusoidSampler(shots=config.shots, queries=queries, tasks=config.tasks, seed=seed, device=device)
    images = load_images(config, split, progress=progress) if source is None else source
    return EpisodeSampler(
        images,
        ways=config.ways,
        shots=config.shots,
        queries=queries,
        tasks=config.tasks,
        seed=config.seed,
        device=device,
        rotations=training and rotated(config, source is None),
        normalize=config.normalize,
        augment=(config.augment or ()) if training else (),
    )


def rotated(config: TrainConfig, named_data: bool = True) -> bool:
    """Whether training counts rotated classes as separate classes.

    Args:
        config: The configuration.
        named_data: Whether the configuration names the data; for a caller's own data the default is False.
    """
    if config.rotations is not None or not named_data:
        return bool(config.rotations)
    from . import data

    info = data.DATASETS.get(config.data)
    return bool(info is not None and info.rotations)


def build_model(config: TrainConfig, sampler: Sampler) -> nn.Module:
    """The configuration's network, sized for a sampler's episodes; `config.seed` alone determines its weights.

    Raises:
        ValueError: The network is convolutional, and the episodes are not images of equal height and width, or are
            too small for its blocks.
    """
    episodes = draw(sampler, 0)
    targets = episodes.support_y
    outputs = config.ways if targets.dtype == torch.int64 else targets.shape[-1]
    return build_network(config, tuple(episodes.support_x.shape[2:]), outputs)


def build_network(config: TrainConfig, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The configuration's network for inputs of a shape, with `outputs` numbers in a prediction.

    Raises:
        ValueError: As `build_model`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = named(config.model)
        if network.kind == "mlp":
            return MLP(math.prod(shape), outputs, config.hidden, config.activation or "relu")
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(
                f"model: expected 'mlp' for examples that are no square images, found {config.model!r} for {shape}"
            )
        if network.kind == "resnet12":
            activation = config.activation or "leaky-relu"
            return ResNet12(outputs, shape[0], network.widths, shape[1], config.norm, activation)
        filters = network.widths or (config.filters,) * network.blocks
        return Conv4(
            outputs,
            shape[0],
            filters,
            shape[1],
            config.pooling,
            norm=config.norm,
            activation=config.activation or "relu",
        )


def example_format(sampler: Sampler) -> ExampleFormat | None:
    """How examples become a run's inputs; None if the caller's own sampler makes them."""
    from .episodes import EpisodeSampler, SinusoidSampler

    if not isinstance(sampler, (EpisodeSampler, SinusoidSampler)):
        return None
    shape = tuple(draw(sampler, 0).support_x.shape[2:])
    if isinstance(sampler, SinusoidSampler):
        return ExampleFormat(shape)
    return ExampleFormat(shape, sampler.normalize, sampler.inverted)


def step_arguments(config: TrainConfig, loss: str | Callable[[Tensor, Tensor], Tensor]) -> StepArguments:
    """The arguments that both training and evaluation pass on to `signmaml_ext`."""
    return {
        "method": config.method,
        "loss": loss,
        "adapt": None if config.adapt is None else list(config.adapt),
        "backend": config.backend,
        "precision": config.precision,
        "nonfinite": config.nonfinite,
        "batch_norm": config.batch_norm,
        "sharpness": sharpness(config, config.sharpness_lower),
        "inner_rule": inner_rule(config),
    }


def inner_rule(config: TrainConfig) -> InnerRule | None:
    """The rule of inner steps as configured; None for plain steps."""
    if config.takes_plain_steps():
        return None
    momentum, decay = 0.9 if config.inner_momentum is None else config.inner_momentum, config.inner_weight_decay
    rules: dict[str, InnerRule] = {
        "plain": Plain(decay),
        "signum": Signum(momentum, decay),
        "lion": Lion(momentum, weight_decay=decay),
        "momentum": Momentum(momentum, weight_decay=decay),
        "adam": Adam(momentum, eps=1e-8 if config.inner_eps is None else config.inner_eps, weight_decay=decay),
    }
    return rules[config.inner_rule]


def sharpness(config: TrainConfig, rho: float) -> Sharpness | None:
    """Perturbations of a radius as configured; None for radius 0."""
    return Sharpness(rho, config.sharpness_norm, config.sharpness_adaptive) if rho > 0 else None


def evaluation_arguments(
    config: TrainConfig, rates: InnerRates, loss: str | Callable[[Tensor, Tensor], Tensor]
) -> EvaluationArguments:
    """The arguments of `signmaml_ext.evaluate` in an evaluation; the rates carry no gradient."""
    steps = config.evaluation_steps()
    with torch.no_grad():
        values = rates.values(steps)
    return {**step_arguments(config, loss), "inner_lr": values, "inner_steps": steps}


def data_name(config: TrainConfig, sources: Sequence[Source]) -> str:
    """The name of the data in reports."""
    for source in sources:
        if source is not None:
            return str(getattr(source, "name", type(source).__name__))
    return config.data


def device_name(device: torch.device) -> str:
    """A human-readable name of the device."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
