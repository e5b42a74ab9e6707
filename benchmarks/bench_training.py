"""Whole training: time per iteration and time to accuracy, by method: python benchmarks/bench_training.py

An iteration includes drawing the tasks, the meta-step and Adam. Training time excludes validation. Accuracies are those
of the validation of `signmaml train`, on the same tasks for all methods. Examples:

  python benchmarks/bench_training.py --preset omniglot --data-root DIR --methods sign-maml fo-maml maml --seconds 60
      the trade-off on two CPU cores: each method trains for 60 seconds, in which its learning rate falls to 0
      (`--methods sign-maml sharp-sign-maml fo-maml maml alpha-maml` for the relatives, too)
  python benchmarks/bench_training.py --iterations 60000 --data-root DIR
      the official run of Sign-MAML (mini-ImageNet, T = 8, K = 5), for a GPU

The inner rates of fo-maml and maml are the preset's rate times 0.1 / 0.0035 and 0.14 / 0.0035, the ratios in the
official code. sharp-sign-maml takes both steps of Sharp-MAML with sign steps, alpha-maml is maml whose two rates adapt
online. `--set NAME=VALUE` changes any other field of the configuration, such as data=fc100. `--images random`
trains on noise of mini-ImageNet's size: the time per iteration needs no data set, and nothing can be learned.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import harness
import torch

from signmaml.config import TrainConfig, kinds
from signmaml.data.image_set import ImageSet
from signmaml.evaluation import Evaluation
from signmaml.presets import PRESETS
from signmaml.results import FitResult
from signmaml.trainer import MetaTrainer
from signmaml.values import parse_word

RATES = {"sign-maml": 1.0, "fo-maml": 0.1 / 0.0035, "maml": 0.14 / 0.0035}
# What a method's name on the command line means.
METHODS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in RATES},
    "sharp-sign-maml": {"method": "sign-maml", "sharpness_lower": 0.05, "sharpness_upper": 0.05},
    "alpha-maml": {"method": "maml", "adapt_rates": "alpha-maml"},
}
TARGETS = (0.7, 0.8, 0.9)
# mini-ImageNet's: classes of each split, images of each class.
CLASSES, IMAGES_OF_CLASS = {"train": 64, "val": 16, "test": 20}, 600


class Timed(MetaTrainer):
    """A trainer that measures its training time without validation."""

    def __init__(self, config: TrainConfig, **arguments: Any) -> None:
        self.curve: list[dict[str, float]] = []
        self._validating = 0.0
        self._began = 0.0
        super().__init__(config, callbacks=(self._record,), **arguments)

    def fit(self, **arguments: Any) -> Any:
        self._began = time.perf_counter()
        return super().fit(**arguments)

    def validate(self) -> Evaluation:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # do not count queued training as validation
        began = time.perf_counter()
        found = super().validate()
        self._validating += time.perf_counter() - began
        return found

    def _record(self, record: Mapping[str, Any]) -> None:
        if record["split"] != "val":
            return
        point = {"iteration": record["iteration"], "seconds": time.perf_counter() - self._began - self._validating}
        # Regression has only a loss.
        point |= {key: record[key] for key in ("loss", "accuracy", "ci95") if key in record}
        self.curve.append({key: round(value, 5) for key, value in point.items()})
        print(f"    {point['seconds']:7.1f} s  {point}", flush=True)


def random_images(size: int, images: int = IMAGES_OF_CLASS) -> dict[str, ImageSet]:
    """The three splits as colour images of noise, as many classes and images as mini-ImageNet has."""
    generator, found = torch.Generator().manual_seed(0), {}
    for split, classes in CLASSES.items():
        shape = (classes * images, 3, size, size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        names = tuple(f"class {number}" for number in range(classes))
        found[split] = ImageSet("random images", split, pixels, names, torch.full((classes,), images))
    return found


def train(config: TrainConfig, images: Mapping[str, ImageSet]) -> tuple[Timed, FitResult]:
    """A run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(config, out=Path(folder) / "run", progress=False, **images)
        return trainer, trainer.fit()


def iterations_in(
    config: TrainConfig, seconds: float, enough: float = 3, images: Mapping[str, ImageSet] = MappingProxyType({})
) -> int:
    """The number of iterations in a time budget, extrapolated from a trial of at least `enough` seconds."""
    few = 15
    while (spent := _seconds_of(config.replace(iterations=few, validate_every=0, test_tasks=0), images)) < enough:
        few *= 4
    return max(20, round(seconds / spent * few))


def _seconds_of(config: TrainConfig, images: Mapping[str, ImageSet]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return MetaTrainer(config, out=Path(folder) / "run", progress=False, **images).fit().seconds


def measure(
    config: TrainConfig,
    seconds: float | None,
    validations: int,
    targets: tuple[float, ...],
    images: Mapping[str, ImageSet] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains one method, on `images` (by split) instead of the configuration's data if there are any."""
    if seconds is not None:
        iterations = iterations_in(config, seconds, images=images)
        config = config.replace(iterations=iterations)
    if validations:
        config = config.replace(validate_every=max(1, config.iterations // validations))
    print(f"  {config.iterations} iterations", flush=True)
    trainer, ended = train(config, images)
    reached = {
        str(target): next((p["seconds"] for p in trainer.curve if p.get("accuracy", 0) >= target), None)
        for target in targets
    }
    trained = trainer.curve[-1]["seconds"] if trainer.curve else ended.seconds
    kept = harness.public(trainer.config.to_dict()) | {"data": trainer.data_name}
    result = {
        "backend": trainer.explanation.backend,
        "iterations": trainer.iteration,
        "train_seconds": round(trained, 2),
        "ms_per_iteration": round(1e3 * trained / trainer.iteration, 4),
        "seconds_to": reached,
        "curve": trainer.curve,
        "test": ended.to_dict()["test"],
        "config": kept,
    }
    print(f"  {result['ms_per_iteration']:.2f} ms an iteration, test {result['test']}", flush=True)
    return result


def settings(words: list[str]) -> dict[str, Any]:
    """Fields of the configuration from NAME=VALUE."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds():
            raise SystemExit(f"--set: expected a field of TrainConfig before '=', found {word!r}")
        found[name] = parse_word(name, value, kinds()[name])
    return found


def configuration(base: TrainConfig, method: str) -> TrainConfig:
    """The base configuration, which is that of sign-maml, with a method's own fields and rate."""
    fields = METHODS[method]
    return base.replace(**fields, inner_lr=base.inner_lr * RATES[fields["method"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="official")
    parser.add_argument("--data-root", help="where the data set lies; default: the cache folder")
    parser.add_argument("--images", choices=["random"], help="noise of mini-ImageNet's size, instead of a data set")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["sign-maml"])
    parser.add_argument("--iterations", type=int, help="of each method; default: the preset's")
    parser.add_argument("--seconds", type=float, help="training time of each method, instead of --iterations")
    parser.add_argument("--validations", type=int, default=12, help="points of a curve; 0: as the preset says")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="validation accuracies")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the configuration")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result file (JSON)")
    arguments = parser.parse_args()
    fields: dict[str, Any] = {**PRESETS[arguments.preset], **settings(arguments.set)}
    if arguments.data_root is not None:
        fields["data_root"] = arguments.data_root
    if arguments.iterations is not None:
        fields["iterations"] = arguments.iterations
    base = TrainConfig(**{"method": "sign-maml", **fields})
    device = torch.device("cuda" if torch.cuda.is_available() and base.device != "cpu" else "cpu")
    result: dict[str, Any] = {"benchmark": "methods", **harness.stamp(device), "preset": arguments.preset}
    if arguments.data_root is not None:
        result["command"] = result["command"].replace(arguments.data_root, "DIR")
    images = {} if arguments.images is None else random_images(base.image_size or 84)
    data = "random images" if images else base.data.replace("_", "-")
    result["summary"] = (
        f"{data}, {base.ways}-way {base.shots}-shot, {base.queries} queries a class, "
        f"Conv4-{base.filters}, T = {base.tasks}, K = {base.inner_steps}"
    )
    result["runs"] = {}
    for method in arguments.methods:
        print(f"{method}:", flush=True)
        config = configuration(base, method)
        result["runs"][method] = measure(
            config, arguments.seconds, arguments.validations, tuple(arguments.targets), images
        )
    if arguments.out:
        harness.write(arguments.out / f"methods_{arguments.preset}_{device.type}.json", result)


if __name__ == "__main__":
    main()
